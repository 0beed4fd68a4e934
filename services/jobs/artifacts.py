"""Rows of artifacts: outputs of jobs, and uploads. Functions here work inside a write transaction of the caller."""

from __future__ import annotations

import re

from sqlalchemy import select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from ethogram.errors import Conflict, InvalidInput
from services.jobs import tables, transitions
from services.jobs.database import change
from services.jobs.queries import artifact_of
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
    """Insert the row of an artifact; the row, and whether it is new. It replaces the job's earlier output of that name.

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
    # Locked, so that nobody deletes it meanwhile; another upload of it may insert it at the same time.
    while (row := session.scalar(select(table).where(table.id == id).with_for_update(read=True))) is None:
        inserted = session.execute(insert.on_conflict_do_nothing().returning(table.number)).one_or_none()
        new = inserted is not None
    if not new:
        if (row.tenant, row.job, row.name) != (tenant, job, name):
            raise Conflict(f"artifact {id} is already there as {row.name!r} of {row.job or 'an upload'}")
    elif job is not None:
        change(
            session, update(table).where(table.job == job, table.name == name, table.id != id).values(superseded=True)
        )
    return artifact_of(row), new
