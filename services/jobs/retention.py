"""Deletion of jobs that have ended and of artifacts that nothing needs.

A new job can only name an artifact that has a row, and only a running attempt commits what it made. So once nothing
names an artifact and its row is gone, nothing will need it, and the collector
(:mod:`services.artifacts.collect`) may delete it.
"""

from __future__ import annotations

import builtins
from collections.abc import Collection
from collections.abc import Set as AbstractSet
from datetime import datetime

from sqlalchemy import ColumnElement, Select, delete, or_, select, update
from sqlalchemy.orm import Session

from ethogram.errors import IllegalState, NotFound
from services.jobs import tables, transitions
from services.jobs.attempts import Attempts
from services.jobs.database import change, retry_collisions
from services.jobs.records import ArtifactRow, Job
from services.jobs.states import ACTIVE, TERMINAL, JobState


class Retention(Attempts):
    """The registry's side of deletion."""

    def identity(self) -> str:
        """Id of this registry, which never changes."""
        with self._database.read() as session:
            return session.scalars(select(tables.Identity.id)).one()

    def live_artifacts(self) -> set[str]:
        """Ids of artifacts that must stay: outputs and uploads (except those that a later attempt replaced), inputs of
        jobs that exist, and the last checkpoint of each job that has not succeeded."""
        job, artifact = tables.Job, tables.Artifact
        with self._database.read() as session:
            return {
                *session.scalars(select(artifact.id).where(artifact.superseded == tables.FALSE)),
                *session.scalars(select(tables.Input.artifact).where(tables.Input.artifact.is_not(None)).distinct()),
                *session.scalars(_checkpoints(job.checkpoint_artifact.is_not(None))),
            }

    def spent_artifacts(self) -> set[str]:
        """Ids of artifacts that running attempts committed and have since replaced. They may still commit anything else
        that they made."""
        job, artifact, event = tables.Job, tables.Artifact, tables.Event
        id = event.data["artifact"].as_string()
        outputs = select(artifact.id).join(job, job.attempt == artifact.attempt)
        outputs = outputs.where(job.state.in_(ACTIVE), artifact.superseded == tables.TRUE)
        checkpoints = select(id).join(job, job.attempt == event.attempt).where(event.job == job.id)
        older = checkpoints.where(job.state.in_(ACTIVE), event.type == "checkpoint", id != job.checkpoint_artifact)
        with self._database.read() as session:
            return {*session.scalars(outputs), *session.scalars(older)}

    @retry_collisions
    def forget(self, ids: AbstractSet[str]) -> set[str]:
        """Delete the rows of those of ``ids`` that nothing needs; return their ids, and those without a row. No running
        attempt may still commit one of ``ids``."""
        artifact, given, job = tables.Artifact, tables.Input, tables.Job
        with self._database.write() as session:
            query = select(artifact.id, artifact.superseded).where(artifact.id.in_(ids)).order_by(artifact.id)
            rows = session.execute(query.with_for_update()).all()
            # After the rows are locked: a job that wants to name one either has, or waits for us.
            dead = set(ids) - {id for id, superseded in rows if not superseded}
            dead -= {*session.scalars(select(given.artifact).where(given.artifact.in_(dead)))}
            dead -= {*session.scalars(_checkpoints(job.checkpoint_artifact.in_(dead)))}
            change(session, delete(artifact).where(artifact.id.in_(dead)))
            return dead

    def deletable_artifact(self, id: str) -> ArtifactRow:
        """The row of an artifact, if it could be deleted now. Raises :class:`NotFound`, :class:`IllegalState`."""
        with self._database.write() as session:
            return self._deletable(session, id)

    @retry_collisions
    def delete_artifact(self, id: str) -> ArtifactRow:
        """Delete the row of an artifact, so that no new job can name it. Jobs that have ended keep what they used.

        Raises :class:`NotFound`, and :class:`IllegalState` while a job that has not ended needs it.
        """
        with self._database.write() as session:
            row = self._deletable(session, id)
            change(session, delete(tables.Artifact).where(tables.Artifact.id == id))
            return row

    @retry_collisions
    def delete_job(self, id: str, published: Collection[str] = ()) -> Job:
        """Delete a job that has ended, with its events, outputs and children; return the job as it was.

        Outputs among ``published`` (ids of artifacts that are models) stay, as if they were uploaded. Raises
        :class:`NotFound`, and :class:`IllegalState` while it, its parent, or a job that uses its outputs has not ended.
        """
        with self._database.write() as session:
            found = self._job(session, id)
            transitions.lock_parent(session, id)
            parent = self._unfinished(session, tables.Job.id == found.parent)
            if parent is not None:
                raise IllegalState(f"job {id} is a part of job {parent}, which has not ended: cancel that job, or wait")
            self._delete(session, id, set(published))
            return found

    def jobs_ended_before(self, time: datetime) -> builtins.list[str]:
        """Ids of jobs, except children, that ended before ``time``, oldest first."""
        job = tables.Job
        query = select(job.id).where(job.state.in_(TERMINAL), job.parent.is_(None), job.finished_at < time)
        with self._database.read() as session:
            return builtins.list(session.scalars(query.order_by(job.number)))

    def _deletable(self, session: Session, id: str) -> ArtifactRow:
        artifact, job = tables.Artifact, tables.Job
        row = self._artifact(session, id)
        if row.job is not None:
            # A job that is being submitted or retried, and names it as this job's output, holds this lock.
            session.scalar(select(job.number).where(job.id == row.job).with_for_update())
            parent = select(job.parent).where(job.id == row.job).scalar_subquery()
            maker = self._unfinished(session, or_(job.id == row.job, job.id == parent))
            if maker is not None:
                raise IllegalState(
                    f"artifact {id} is a part of job {maker}, which has not ended: cancel that job, or wait"
                )
        session.scalar(select(artifact.number).where(artifact.id == id).with_for_update())
        users = select(tables.Input.job).where(tables.Input.artifact == id)
        user = self._unfinished(session, job.id.in_(users))
        if user is not None:
            raise IllegalState(f"job {user} needs artifact {id} and has not ended: cancel that job, or wait")
        return ArtifactRow.model_validate(row)

    def _delete(self, session: Session, id: str, published: set[str]) -> None:
        job, given, artifact, event = tables.Job, tables.Input, tables.Artifact, tables.Event
        state = session.scalar(select(job.state).where(job.id == id).with_for_update())
        if state is None:
            raise NotFound(f"there is no job {id!a}")
        if not JobState(state).terminal:
            advice = "wait" if state == JobState.CANCELLING else "cancel it first, or wait"
            raise IllegalState(f"job {id} is {state}: {advice} until it has ended")
        # A submission that names one of them holds the lock on its row until it commits.
        session.execute(select(artifact.number).where(artifact.job == id).order_by(artifact.id).with_for_update()).all()
        made = select(artifact.id).where(artifact.job == id)
        users = select(given.job).where(or_(given.needs == id, given.artifact.in_(made)))
        user = self._unfinished(session, job.id.in_(users))
        if user is not None:
            raise IllegalState(f"job {user} uses what job {id} made and has not ended: cancel that job, or wait")
        for child in session.scalars(select(job.id).where(job.parent == id).order_by(job.name)).all():
            self._delete(session, child, published)
        for statement in (
            update(artifact)
            .where(artifact.job == id, artifact.id.in_(published))
            .values(job=None, attempt=None, superseded=False),
            delete(artifact).where(artifact.job == id),
            # Jobs that have ended keep the artifact: they name it by its id too.
            update(given).where(given.needs == id).values(needs=None),
            delete(given).where(given.job == id),
            delete(event).where(event.job == id),
            delete(tables.Attempt).where(tables.Attempt.job == id),
            delete(job).where(job.id == id),
        ):
            change(session, statement)
        # The idempotency key that made the job goes once all its jobs are deleted.
        key, by_key = tables.Submission, tables.SubmissionJob
        deleted = delete(by_key).where(by_key.job == id).returning(by_key.tenant, by_key.key)
        if (found := change(session, deleted).one_or_none()) is not None:
            others = select(by_key.job).where(by_key.tenant == found.tenant, by_key.key == found.key).limit(1)
            if session.scalar(others) is None:
                change(session, delete(key).where(key.tenant == found.tenant, key.key == found.key))

    def _unfinished(self, session: Session, where: ColumnElement[bool]) -> str | None:
        """Id of a job among these that has not ended."""
        return session.scalar(select(tables.Job.id).where(where, tables.Job.state.not_in(TERMINAL)).limit(1))


def _checkpoints(where: ColumnElement[bool]) -> Select[str | None]:
    """The last checkpoints, of those that ``where`` selects, that a retry could resume from."""
    return select(tables.Job.checkpoint_artifact).where(where, tables.Job.state != JobState.SUCCEEDED)
