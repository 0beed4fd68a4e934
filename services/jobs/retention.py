"""What may be deleted: jobs that have ended, artifacts that nothing needs.

An artifact needs a row to be named by a new job, and an attempt that runs to be committed. So once nothing names it and
its row is gone, it stays unneeded, and the collector (:mod:`services.artifacts.collect`) may delete it.
"""

from __future__ import annotations

import builtins
from collections.abc import Collection
from collections.abc import Set as AbstractSet
from datetime import datetime

from sqlalchemy import ColumnElement, delete, or_, select, update
from sqlalchemy.orm import Session

from ethogram.errors import IllegalState, NotFound
from services.jobs import tables, text, transitions
from services.jobs.attempts import Attempts
from services.jobs.database import again
from services.jobs.reading import ACTIVE, artifact_of
from services.jobs.records import ArtifactRow, Job
from services.jobs.states import JobState

TERMINAL = [state for state in JobState if state.terminal]
_LATE = {"synchronize_session": False}


class Retention(Attempts):
    """The registry's side of deletion."""

    def identity(self) -> str:
        """An id that this registry has had since its tables were made."""
        with self._database.read() as session:
            return session.scalars(select(tables.Identity.id)).one()

    def live_artifacts(self) -> set[str]:
        """Ids of artifacts that must stay: outputs and uploads (but those that a later attempt replaced), inputs of
        jobs that exist, and the last checkpoint of each job that has not succeeded."""
        job, artifact = tables.Job, tables.Artifact
        with self._database.read() as session:
            return {
                *session.scalars(select(artifact.id).where(artifact.superseded == tables.FALSE)),
                *session.scalars(select(tables.Input.artifact).where(tables.Input.artifact.is_not(None)).distinct()),
                *session.scalars(
                    select(job.checkpoint_artifact).where(
                        job.checkpoint_artifact.is_not(None), job.state != JobState.SUCCEEDED
                    )
                ),
            }

    def spent_artifacts(self) -> set[str]:
        """Ids of what running attempts have committed and have replaced since; all else that they made they may commit
        yet."""
        job, artifact, event = tables.Job, tables.Artifact, tables.Event
        id = event.data["artifact"].as_string()
        with self._database.read() as session:
            return {
                *session.scalars(
                    select(artifact.id)
                    .join(job, job.attempt == artifact.attempt)
                    .where(job.state.in_(ACTIVE), artifact.superseded == tables.TRUE)
                ),
                *session.scalars(
                    select(id)
                    .join(job, job.attempt == event.attempt)
                    .where(job.state.in_(ACTIVE), event.job == job.id, event.type == "checkpoint")
                    .where(id != job.checkpoint_artifact)
                ),
            }

    @again
    def forget(self, ids: AbstractSet[str]) -> set[str]:
        """Delete the rows of those of ``ids`` that nothing needs; their ids, and those that have no row. ``ids`` are
        not of attempts that may commit them yet."""
        artifact, given, job = tables.Artifact, tables.Input, tables.Job
        with self._database.write() as session:
            rows = session.execute(
                select(artifact.id, artifact.superseded)
                .where(artifact.id.in_(ids))
                .order_by(artifact.id)
                .with_for_update()
            ).all()
            # Asked after the rows are locked: who wants to name one waits now, or has named it.
            dead = set(ids) - {id for id, superseded in rows if not superseded}
            dead -= {*session.scalars(select(given.artifact).where(given.artifact.in_(dead)))}
            dead -= {
                *session.scalars(
                    select(job.checkpoint_artifact).where(
                        job.checkpoint_artifact.in_(dead), job.state != JobState.SUCCEEDED
                    )
                )
            }
            session.execute(delete(artifact).where(artifact.id.in_(dead)), execution_options=_LATE)
            return dead

    def deletable_artifact(self, id: str) -> ArtifactRow:
        """The row of an artifact that could be deleted now. Raises :class:`NotFound` and :class:`IllegalState`."""
        with self._database.write() as session:
            return self._deletable(session, id)

    @again
    def delete_artifact(self, id: str) -> ArtifactRow:
        """Delete the row of an artifact: no new job can name it. Jobs that have ended keep what they used.

        Raises :class:`NotFound`, and :class:`IllegalState` while a job that has not ended needs it.
        """
        with self._database.write() as session:
            row = self._deletable(session, id)
            session.execute(delete(tables.Artifact).where(tables.Artifact.id == id), execution_options=_LATE)
            return row

    @again
    def delete_job(self, id: str, published: Collection[str] = ()) -> Job:
        """Delete a job that has ended, with its events, its outputs and its children; the job as it was.

        Outputs among ``published``, artifacts that models are made of, stay as if they were uploaded. Raises
        :class:`NotFound`, and :class:`IllegalState` while it, its parent, or a job that uses its outputs has not ended.
        """
        with self._database.write() as session:
            found = self._job(session, id)
            transitions.lock_parent(session, id)
            parent = self._unfinished(session, tables.Job.id == found.parent)
            if parent is not None:
                raise IllegalState(f"job {id} is a part of job {parent}, which has not ended: cancel that, or wait")
            self._delete(session, id, set(published))
            return found

    def jobs_ended_before(self, time: datetime) -> builtins.list[str]:
        """Ids of jobs, but for children, that ended before ``time``, oldest first."""
        job = tables.Job
        query = select(job.id).where(job.state.in_(TERMINAL), job.parent.is_(None), job.finished_at < time)
        with self._database.read() as session:
            return builtins.list(session.scalars(query.order_by(job.number)))

    def _deletable(self, session: Session, id: str) -> ArtifactRow:
        artifact, job = tables.Artifact, tables.Job
        row = session.scalar(select(artifact).where(artifact.id == id)) if text.storable(id) else None
        if row is None:
            raise NotFound(f"there is no artifact {id!a}")
        if row.job is not None:
            # A job that is just submitted or retried, and names it as this job's output, holds this lock.
            session.scalar(select(job.number).where(job.id == row.job).with_for_update())
            parent = select(job.parent).where(job.id == row.job).scalar_subquery()
            maker = self._unfinished(session, or_(job.id == row.job, job.id == parent))
            if maker is not None:
                raise IllegalState(f"artifact {id} is a part of job {maker}, which has not ended: cancel that, or wait")
        session.scalar(select(artifact.number).where(artifact.id == id).with_for_update())
        users = select(tables.Input.job).where(tables.Input.artifact == id)
        user = self._unfinished(session, job.id.in_(users))
        if user is not None:
            raise IllegalState(f"job {user} needs artifact {id} and has not ended: cancel that, or wait")
        return artifact_of(row)

    def _delete(self, session: Session, id: str, published: set[str]) -> None:
        job, given, artifact, event = tables.Job, tables.Input, tables.Artifact, tables.Event
        state = session.scalar(select(job.state).where(job.id == id).with_for_update())
        if state is None:
            raise NotFound(f"there is no job {id!a}")
        if not JobState(state).terminal:
            raise IllegalState(f"job {id} is {state}: cancel it first, or wait until it has ended")
        # A submission that names one of them holds its row until it is committed.
        session.execute(select(artifact.number).where(artifact.job == id).order_by(artifact.id).with_for_update()).all()
        made = select(artifact.id).where(artifact.job == id)
        users = select(given.job).where(or_(given.needs == id, given.artifact.in_(made)))
        user = self._unfinished(session, job.id.in_(users))
        if user is not None:
            raise IllegalState(f"job {user} uses what job {id} made and has not ended: cancel that, or wait")
        for child in session.scalars(select(job.id).where(job.parent == id).order_by(job.name)).all():
            self._delete(session, child, published)
        for statement in (
            update(artifact)
            .where(artifact.job == id, artifact.id.in_(published))
            .values(job=None, attempt=None, superseded=False),
            delete(artifact).where(artifact.job == id),
            # Jobs that have ended keep the artifact, which they name by its id too.
            update(given).where(given.needs == id).values(needs=None),
            delete(given).where(given.job == id),
            delete(event).where(event.job == id),
            delete(tables.Attempt).where(tables.Attempt.job == id),
            delete(job).where(job.id == id),
        ):
            session.execute(statement, execution_options=_LATE)
        self._forget_keys(session, id)

    def _forget_keys(self, session: Session, id: str) -> None:
        """Forget the idempotency key of a job when its jobs are all gone."""
        key, made = tables.Submission, tables.SubmissionJob
        found = session.execute(
            delete(made).where(made.job == id).returning(made.tenant, made.key), execution_options=_LATE
        ).one_or_none()
        if found is None:
            return
        others = select(made.job).where(made.tenant == found.tenant, made.key == found.key).limit(1)
        if session.scalar(others) is None:
            session.execute(
                delete(key).where(key.tenant == found.tenant, key.key == found.key), execution_options=_LATE
            )

    def _unfinished(self, session: Session, where: ColumnElement[bool]) -> str | None:
        """A job of those that has not ended."""
        return session.scalar(select(tables.Job.id).where(where, tables.Job.state.not_in(TERMINAL)).limit(1))
