"""The registry of jobs: what is to be done, who does it, and what came of it.

Safe to use from several threads and several processes at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from ethogram.errors import IllegalState
from ethogram.specs.base import ArtifactRef, Spec
from services.jobs import submission, tables, transitions
from services.jobs.database import Database, retry_collisions, set_values
from services.jobs.records import ArtifactRow, Claim, Depth, Event, Job, Options, RunningAttempt
from services.jobs.retention import Retention
from services.jobs.states import UNSUCCESSFUL, JobState

__all__ = ["ArtifactRow", "Claim", "Depth", "Event", "Job", "JobRegistry", "JobState", "Options", "RunningAttempt"]


class JobRegistry(Retention):
    """All operations on jobs, attempts, events and artifact rows; this module has those of users.

    Each operation is one transaction.
    """

    @classmethod
    def open(cls, database_url: str) -> JobRegistry:
        """Open the registry in the database at ``database_url``, and migrate it to this version's tables.

        Raises :class:`Unavailable` when the database cannot be used, :class:`IllegalState` when a newer version of
        Ethogram wrote it.
        """
        return cls(Database(database_url))

    def close(self) -> None:
        """Close the connections."""
        self._database.close()

    def submit(
        self,
        kind: str,
        spec: Spec,
        *,
        tenant: str = "default",
        idempotency_key: str | None = None,
        trace: str | None = None,
        **options: Any,
    ) -> tuple[Job, bool]:
        """Queue a job; return it and True, or the job that ``idempotency_key`` made before with the same request, and
        False. ``options``: fields of :class:`Options`.

        Raises :class:`InvalidInput`, :class:`NotFound` for an input job or artifact that does not exist,
        :class:`IllegalState` for an input job that has failed, :class:`Conflict` for a key that was used with another
        request.
        """
        request = submission.Request.make(kind, spec, options)
        jobs, created = self._submit({"": request}, request.body, tenant, idempotency_key, trace)
        return jobs[""], created

    def check(self, kind: str, spec: Spec, *, tenant: str = "default", **options: Any) -> None:
        """Raise what :meth:`submit` would now raise for this job; queue nothing."""
        submission.check_name(tenant, "tenant")
        request = submission.Request.make(kind, spec, options)
        # In a write transaction, since a submission takes locks.
        with self._database.write() as session:
            submission.resolve_inputs(session, request, tenant=tenant)

    def submit_pipeline(
        self,
        jobs: Mapping[str, tuple[str, Spec, Mapping[str, Any]]],
        *,
        tenant: str = "default",
        idempotency_key: str | None = None,
        trace: str | None = None,
    ) -> tuple[dict[str, Job], bool]:
        """Queue several jobs, all or none: name -> ``(kind, spec, options)``, with options as in :meth:`submit`. Return
        the jobs by name, and whether they are new.

        An :class:`ArtifactRef` may name a job of the same pipeline. Raises :class:`InvalidInput` for an unknown name
        or a circle, and what :meth:`submit` raises; fields are named ``jobs.<name>.…``.
        """
        requests = submission.make_pipeline(jobs)
        body = {"pipeline": {name: request.body for name, request in requests.items()}}
        return self._submit(requests, body, tenant, idempotency_key, trace)

    @retry_collisions
    def _submit(
        self, requests: Mapping[str, submission.Request], body: Any, tenant: str, key: str | None, trace: str | None
    ) -> tuple[dict[str, Job], bool]:
        submission.check_name(tenant, "tenant")
        submission.check_key(key)
        digest = submission.body_hash(body)
        with self._database.write() as session:
            ids = submission.seen(session, tenant, key, digest) if key is not None else None
            created = ids is None
            if ids is None:
                ids = submission.insert_pipeline(session, requests, tenant=tenant, trace=trace)
                if key is not None:
                    submission.remember(session, tenant, key, digest, ids)
            return {name: self._job(session, job) for name, job in ids.items()}, created

    @retry_collisions
    def request_cancel(self, id: str) -> Job:
        """Cancel the job and its children: queued ones at once, running ones at their worker's next heartbeat.

        Raises :class:`NotFound`, and :class:`IllegalState` for a job that has ended.
        """
        self.get(id)
        with self._database.write() as session:
            transitions.lock_parent(session, id)
            if not transitions.cancel(session, id):
                raise IllegalState(f"job {id} has already ended ({self._job(session, id).state}): nothing to cancel")
            return self._job(session, id)

    @retry_collisions
    def retry(self, id: str, *, from_start: bool = False) -> Job:
        """Queue a failed or cancelled job again, with all its attempts; it resumes from its last checkpoint, or starts
        over with ``from_start``. Its children that did not succeed are queued again as well.

        Raises :class:`NotFound`, and :class:`IllegalState` for a job in another state or whose input job failed.
        """
        with self._database.write() as session:
            job = self._job(session, id)
            if job.state not in UNSUCCESSFUL:
                raise IllegalState(f"job {id} is {job.state}: only a failed or cancelled job can be retried")
            transitions.lock_parent(session, id)
            self._retry(session, job, from_start)
            return self._job(session, id)

    def _retry(self, session: Session, job: Job, from_start: bool) -> None:
        waiting = 0
        table = tables.Input
        for path, needs, name in session.execute(
            select(table.path, table.needs, table.name).where(table.job == job.id, table.artifact.is_(None))
        ).all():
            if needs is None:
                raise IllegalState(f"job {job.id} waits for {name!r} of a job that was deleted: submit it again")
            found = submission.resolve(session, path, ArtifactRef(job=needs, artifact=name or ""), job.tenant)
            waiting += found.artifact is None
            set_values(session, table, table.job == job.id, table.path == path, artifact=found.artifact)
        cleared = ["not_before", "progress", "result", "error", "finished_at"]
        cleared += ["checkpoint_artifact", "checkpoint_step"] if from_start else []
        values: dict[str, Any] = dict.fromkeys(cleared)
        values |= {"attempts": 0, "ran_seconds": 0.0, "cancel_requested": False}
        values |= {"ready": waiting == 0, "waiting": waiting, "note": {"reason": "retried"}}
        if not transitions.move(session, job.id, JobState.QUEUED, source=UNSUCCESSFUL, **values):
            raise IllegalState(f"job {job.id} was just retried by somebody else")
        transitions.count_children(session, job.parent)
        for child in transitions.children(session, job.id):
            if child.state is JobState.CANCELLING:
                raise IllegalState(f"its child {child.job} is still being cancelled: try again when that has ended")
            if child.state in UNSUCCESSFUL:
                self._retry(session, self._job(session, child.job), from_start)

    def add_artifact(
        self, artifact_id: str, name: str, type: str, size: int, *, tenant: str = "default"
    ) -> ArtifactRow:
        """Record an upload, which is in the store already. The same artifact again changes nothing."""
        submission.check_name(tenant, "tenant")
        with self._database.write() as session:
            return self._add_artifact(session, artifact_id, tenant, name=name, type=type, size=size)[0]
