"""Rows of artifacts, those of jobs and those of uploads. Works inside a write transaction of the caller."""

from __future__ import annotations

import re

from sqlalchemy import select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from ethogram.errors import Conflict, InvalidInput
from services.jobs import tables, transitions
from services.jobs.reading import artifact_of
from services.jobs.records import ArtifactRow

_ARTIFACT_ID = re.compile(r"[0-9a-f]{64}")
# What an ArtifactRef can name.
_ARTIFACT_NAME = re.compile(r"[A-Za-z0-9_.-]{1,80}")


def add(
    session: Session,
    *,
    id: str,
    name: str,
    type: str,
    size: int,
    tenant: str,
    job: str | None = None,
    attempt: str | None = None,
) -> tuple[ArtifactRow, bool]:
    """The row of an artifact, and whether it is new. It takes the place of the job's earlier one of the same name.

    Raises :class:`InvalidInput`, and :class:`Conflict` when the id is there with another name or job.
    """
    if not _ARTIFACT_ID.fullmatch(id):
        raise InvalidInput.field("artifact", "is not an artifact id (64 hexadecimal digits)")
    for value, field in ((name, "name"), (type, "type")):
        if not _ARTIFACT_NAME.fullmatch(value):
            raise InvalidInput.field(field, "must be 1 to 80 letters, digits, '_', '-' or '.'")
    table = tables.Artifact
    values = {"id": id, "name": name, "type": type, "tenant": tenant, "job": job, "attempt": attempt, "size": size}
    dialect = sqlite if session.get_bind().dialect.name == "sqlite" else postgresql
    insert = dialect.insert(table).values(**values, superseded=False, created_at=transitions.now())
    new = False
    # Locked, or it might be deleted now; and the same may be uploaded twice at the same time.
    while (row := session.scalar(select(table).where(table.id == id).with_for_update(read=True))) is None:
        inserted = session.execute(insert.on_conflict_do_nothing().returning(table.number)).one_or_none()
        new = inserted is not None
    if not new:
        if (row.tenant, row.job, row.name) != (tenant, job, name):
            raise Conflict(f"artifact {id} is already there as {row.name!r} of {row.job or 'an upload'}")
    elif job is not None:
        session.execute(
            update(table).where(table.job == job, table.name == name, table.id != id).values(superseded=True),
            execution_options={"synchronize_session": False},
        )
    return artifact_of(row), new
