"""Rows of artifacts, those of jobs and those of uploads. Works inside a write transaction of the caller."""

from __future__ import annotations

import re

from sqlalchemy import insert, select, update
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
    row = session.scalar(select(table).where(table.id == id))
    if row is not None:
        if (row.tenant, row.job, row.name) != (tenant, job, name):
            raise Conflict(f"artifact {id} is already there as {row.name!r} of {row.job or 'an upload'}")
        return artifact_of(row), False
    if job is not None:
        session.execute(
            update(table).where(table.job == job, table.name == name).values(superseded=True),
            execution_options={"synchronize_session": False},
        )
    values = {"id": id, "name": name, "type": type, "tenant": tenant, "job": job, "attempt": attempt, "size": size}
    session.execute(insert(table).values(**values, superseded=False, created_at=transitions.now()))
    return artifact_of(session.scalars(select(table).where(table.id == id)).one()), True
