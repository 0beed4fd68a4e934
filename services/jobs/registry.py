"""The registry of jobs: the one place that knows what is to be done, who does it, and what came of it.

Safe to use from several threads and several processes at once. An attempt is a fence: a worker names it in each write,
and a write of an attempt that no longer owns its job raises :class:`StaleAttempt` and changes nothing.
"""

from __future__ import annotations

import builtins
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import ColumnElement, and_, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, selectinload

from ethogram.errors import (
    Conflict,
    IllegalState,
    InvalidInput,
    NotFound,
    StaleAttempt,
    TooLarge,
)
from ethogram.specs.base import ArtifactRef, Spec
from services.jobs import cursors, submission, tables, text, transitions
from services.jobs.database import Database
from services.jobs.records import LABEL_KEY, ArtifactRow, Claim, Event, Job, Options, RunningAttempt
from services.jobs.states import JobState

__all__ = ["ArtifactRow", "Claim", "Event", "Job", "JobRegistry", "JobState", "Options", "RunningAttempt"]

MAX_BACKOFF_SECONDS = 300.0
MAX_RESULT_BYTES = 2**20
_ARTIFACT_ID = re.compile(r"[0-9a-f]{64}")
# What an ArtifactRef can name.
_ARTIFACT_NAME = re.compile(r"[A-Za-z0-9_.-]{1,80}")
ACTIVE = (JobState.RUNNING, JobState.CANCELLING)


class JobRegistry:
    """All operations on jobs, attempts, events and artifact rows. Each is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @classmethod
    def open(cls, database_url: str) -> JobRegistry:
        """The registry in the database at ``database_url``, migrated to this version's tables.

        Raises :class:`Unavailable` when the database cannot be used, :class:`IllegalState` when a newer version of
        Ethogram wrote it.
        """
        return cls(Database(database_url))

    def close(self) -> None:
        """Close the connections."""
        self._database.close()

    # Submitting

    def submit(
        self,
        kind: str,
        spec: Spec,
        *,
        tenant: str = "default",
        queue: str | None = None,
        priority: int = 0,
        not_before: datetime | None = None,
        max_attempts: int = 3,
        labels: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
        trace: str | None = None,
    ) -> tuple[Job, bool]:
        """A new job, and True; or the one that ``idempotency_key`` made before with the same request, and False.

        Raises :class:`InvalidInput`, :class:`NotFound` for an input job or artifact that does not exist,
        :class:`IllegalState` for an input job that has failed, :class:`Conflict` for a key that came with another
        request.
        """
        options = {
            "queue": queue,
            "priority": priority,
            "not_before": not_before,
            "max_attempts": max_attempts,
            "labels": dict(labels or {}),
        }
        request = submission.Request.make(kind, spec, options)
        jobs, created = self._submit({"": request}, request.body, tenant, idempotency_key, trace)
        return jobs[""], created

    def submit_pipeline(
        self,
        jobs: Mapping[str, tuple[str, Spec, Mapping[str, Any]]],
        *,
        tenant: str = "default",
        idempotency_key: str | None = None,
        trace: str | None = None,
    ) -> dict[str, Job]:
        """Several jobs at once, all or none: name to ``(kind, spec, options)``, options as in :meth:`submit`.

        An :class:`ArtifactRef` may name a job of the same pipeline. Raises :class:`InvalidInput` for an unknown name
        or a circle, and what :meth:`submit` raises; fields are named ``jobs.<name>.…``.
        """
        requests = submission.make_pipeline(jobs)
        body = {"pipeline": {name: request.body for name, request in requests.items()}}
        return self._submit(requests, body, tenant, idempotency_key, trace)[0]

    def _submit(
        self, requests: Mapping[str, submission.Request], body: Any, tenant: str, key: str | None, trace: str | None
    ) -> tuple[dict[str, Job], bool]:
        submission.check_tenant(tenant)
        submission.check_key(key)
        digest = submission.body_hash(body)
        for last in (False, True):
            try:
                with self._database.write() as session:
                    ids = submission.seen(session, tenant, key, digest) if key is not None else None
                    created = ids is None
                    if ids is None:
                        ids = submission.insert_pipeline(session, requests, tenant=tenant, trace=trace)
                        if key is not None:
                            submission.remember(session, tenant, key, digest, ids)
                    return {name: self._job(session, job) for name, job in ids.items()}, created
            except IntegrityError:
                # The same key at the same time; the other one is committed, so now we see it.
                if last:
                    raise
        raise AssertionError

    # Reading

    def get(self, id: str) -> Job:
        """The job. Raises :class:`NotFound`."""
        with self._database.read() as session:
            return self._job(session, id)

    def list(
        self,
        tenant: str = "default",
        *,
        kind: str | None = None,
        state: JobState | str | None = None,
        labels: Mapping[str, str] | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> tuple[builtins.list[Job], str | None]:
        """Jobs, newest first, and the cursor of the next page; ``None`` at the end. ``labels``: all must match.

        Raises :class:`InvalidInput` for a state, limit or cursor that is none.
        """
        submission.check_tenant(tenant)
        text.check(kind, "kind")
        where: builtins.list[ColumnElement[bool]] = [tables.Job.tenant == tenant]
        if kind is not None:
            where.append(tables.Job.kind == kind)
        if state is not None:
            if state not in builtins.list(JobState):
                raise InvalidInput.field("state", f"is none of {', '.join(JobState)}")
            where.append(tables.Job.state == str(state))
        for key, value in (labels or {}).items():
            if not re.fullmatch(LABEL_KEY, key):
                raise InvalidInput.field("labels", f"{key!a} cannot be a label's name")
            text.check(value, f"labels.{key}")
            where.append(tables.Job.labels[key].as_string() == value)
        if cursor is not None:
            where.append(tables.Job.number < cursors.decode("jobs", cursor))
        query = select(tables.Job).where(*where).order_by(tables.Job.number.desc())
        query = query.limit(cursors.check_limit(limit) + 1).options(selectinload(tables.Job.inputs))
        with self._database.read() as session:
            rows = session.scalars(query).all()
            more = cursors.encode("jobs", rows[limit - 1].number) if len(rows) > limit else None
            return [_job(row) for row in rows[:limit]], more

    def events(self, job: str, after: int = 0, limit: int = 1000) -> builtins.list[Event]:
        """Events of ``job`` with ``seq > after``, in order. Raises :class:`NotFound`."""
        if not text.storable(job):
            raise NotFound(f"there is no job {job!a}")
        query = select(tables.Event).where(tables.Event.job == job, tables.Event.seq > after)
        with self._database.read() as session:
            rows = session.scalars(query.order_by(tables.Event.seq).limit(cursors.check_limit(limit))).all()
            if not rows and session.scalar(select(tables.Job.number).where(tables.Job.id == job)) is None:
                raise NotFound(f"there is no job {job!r}")
            return [Event.model_validate(row, from_attributes=True) for row in rows]

    def artifacts(
        self,
        job: str | None = None,
        type: str | None = None,
        tenant: str = "default",
        limit: int = 50,
        cursor: str | None = None,
    ) -> tuple[builtins.list[ArtifactRow], str | None]:
        """Artifacts, newest first, and the cursor of the next page. Of outputs of one name in one job, the last."""
        submission.check_tenant(tenant)
        text.check(job, "job")
        text.check(type, "type")
        table = tables.Artifact
        where: builtins.list[ColumnElement[bool]] = [table.tenant == tenant, table.superseded == tables.FALSE]
        if job is not None:
            where.append(table.job == job)
        if type is not None:
            where.append(table.type == type)
        if cursor is not None:
            where.append(table.number < cursors.decode("artifacts", cursor))
        query = select(table).where(*where).order_by(table.number.desc()).limit(cursors.check_limit(limit) + 1)
        with self._database.read() as session:
            rows = session.scalars(query).all()
            more = cursors.encode("artifacts", rows[limit - 1].number) if len(rows) > limit else None
            return [_artifact(row) for row in rows[:limit]], more

    def artifact(self, id: str) -> ArtifactRow:
        """The row of an artifact. Raises :class:`NotFound`."""
        with self._database.read() as session:
            row = session.scalar(select(tables.Artifact).where(tables.Artifact.id == id)) if text.storable(id) else None
            if row is None:
                raise NotFound(f"there is no artifact {id!a}")
            return _artifact(row)

    def running_attempts(self) -> builtins.list[RunningAttempt]:
        """All attempts that have not ended, for the reconciler to watch."""
        job, attempt = tables.Job, tables.Attempt
        query = select(attempt.id, job.id, job.queue, attempt.worker, attempt.heartbeat, attempt.lease_seconds)
        query = query.join(attempt, attempt.id == job.attempt).where(job.state.in_(ACTIVE)).order_by(job.number)
        with self._database.read() as session:
            return [
                RunningAttempt(attempt=a, job=j, queue=q, worker=w, heartbeat=beat, lease_seconds=lease)
                for a, j, q, w, beat, lease in session.execute(query)
            ]

    def queues_with_work(self) -> builtins.list[str]:
        """Queues in which a job could be claimed now."""
        query = select(tables.Job.queue).where(or_(_ready(), _due())).distinct().order_by(tables.Job.queue)
        with self._database.read() as session:
            return builtins.list(session.scalars(query))

    # Steering

    def request_cancel(self, id: str) -> Job:
        """Cancel: a queued job at once, a running one as soon as its worker hears of it.

        Raises :class:`NotFound`, and :class:`IllegalState` for a job that has ended.
        """
        self.get(id)
        with self._database.write() as session:
            if transitions.move(
                session, id, JobState.CANCELLED, source=[JobState.QUEUED], cancel_requested=True, waiting=0
            ):
                transitions.settle_dependents(session, id, JobState.CANCELLED)
            elif not transitions.move(
                session, id, JobState.CANCELLING, source=[JobState.RUNNING], cancel_requested=True
            ):
                job = self._job(session, id)
                if job.state is not JobState.CANCELLING:
                    raise IllegalState(f"job {id} has already ended ({job.state}): there is nothing to cancel")
            return self._job(session, id)

    def retry(self, id: str) -> Job:
        """Queue a failed or cancelled job again, with all its attempts; it goes on from its last checkpoint.

        Raises :class:`NotFound`, and :class:`IllegalState` for a job in another state or whose input job failed.
        """
        with self._database.write() as session:
            job = self._job(session, id)
            if job.state not in (JobState.FAILED, JobState.CANCELLED):
                raise IllegalState(f"job {id} is {job.state}: only a failed or cancelled job can be retried")
            waiting = 0
            table = tables.Input
            for path, needs, name in session.execute(
                select(table.path, table.needs, table.name).where(table.job == id, table.artifact.is_(None))
            ).all():
                found = submission.resolve(session, path, ArtifactRef(job=needs, artifact=name or ""), job.tenant)
                waiting += found.artifact is None
                session.execute(
                    update(table).where(table.job == id, table.path == path).values(artifact=found.artifact),
                    execution_options={"synchronize_session": False},
                )
            moved = transitions.move(
                session,
                id,
                JobState.QUEUED,
                source=[JobState.FAILED, JobState.CANCELLED],
                ready=waiting == 0,
                waiting=waiting,
                attempts=0,
                cancel_requested=False,
                not_before=None,
                progress=None,
                result=None,
                error=None,
                finished_at=None,
                note={"reason": "retried"},
            )
            if not moved:
                raise IllegalState(f"job {id} was just retried by somebody else")
            return self._job(session, id)

    def add_artifact(
        self, artifact_id: str, name: str, type: str, size: int, *, tenant: str = "default"
    ) -> ArtifactRow:
        """The row of an upload that is in the store already. The same artifact again changes nothing."""
        submission.check_tenant(tenant)
        with self._database.write() as session:
            return self._add_artifact(session, id=artifact_id, name=name, type=type, size=size, tenant=tenant)[0]

    # Working

    def claim_next(self, queue: str, worker: str, lease_seconds: float) -> Claim | None:
        """Take the next job of ``queue``: highest priority first, then oldest. ``None`` when there is none.

        The caller owns the job until it ends the attempt, or until the reconciler finds that its heartbeat has
        stood still for ``lease_seconds``.
        """
        with self._database.read() as session:
            # An idle worker's look costs no writer's turn.
            looks = [select(tables.Job.number).where(where).limit(1) for where in (_ready(queue), _due(queue))]
            if all(session.scalar(look) is None for look in looks):
                return None
        with self._database.write() as session:
            self._wake(session, queue)
            order = (tables.Job.priority.desc(), tables.Job.number)
            pick = select(tables.Job.id).where(_ready(queue)).order_by(*order).limit(1)
            pick = pick.with_for_update(skip_locked=True)
            attempt = submission.new_id("att")
            while (id := session.scalar(pick)) is not None:
                time = transitions.now()
                if not transitions.move(
                    session,
                    id,
                    JobState.RUNNING,
                    source=[JobState.QUEUED],
                    note={"worker": worker},
                    attempt=attempt,
                    attempts=tables.Job.attempts + 1,
                    claims=tables.Job.claims + 1,
                    started_at=func.coalesce(tables.Job.started_at, time),
                ):
                    continue
                number = session.scalars(select(tables.Job.claims).where(tables.Job.id == id)).one()
                session.execute(
                    insert(tables.Attempt).values(
                        id=attempt,
                        job=id,
                        number=number,
                        worker=worker,
                        lease_seconds=lease_seconds,
                        heartbeat=0,
                        started_at=time,
                    )
                )
                job = self._job(session, id)
                return Claim(job=job, attempt=attempt, number=number, lease_seconds=lease_seconds)
            return None

    def heartbeat(self, attempt: str) -> bool:
        """Renew the lease; whether the job is to be cancelled. Raises :class:`StaleAttempt`."""
        with self._database.write() as session:
            job = session.execute(
                update(tables.Attempt)
                .where(tables.Attempt.id == attempt, tables.Attempt.ended_at.is_(None))
                .values(heartbeat=tables.Attempt.heartbeat + 1)
                .returning(tables.Attempt.job),
                execution_options={"synchronize_session": False},
            ).scalar_one_or_none()
            query = select(tables.Job.cancel_requested).where(tables.Job.id == job, tables.Job.attempt == attempt)
            cancel = session.scalar(query)
            if cancel is None:
                raise _stale(attempt)
            return cancel

    def append_events(self, attempt: str, events: Sequence[tuple[str, dict[str, Any]]]) -> builtins.list[Event]:
        """Record what a job said: ``(type, data)`` with type ``log``. Raises :class:`StaleAttempt`."""
        for type_, _ in events:
            if type_ != "log":
                raise InvalidInput.field("type", f"{type_!r} events are recorded with what they tell of, not by hand")
        with self._database.write() as session:
            cleaned = [(type_, text.clean(data, text.MAX_TEXT)) for type_, data in events]
            job, last = self._touch(session, attempt, count=len(events))
            return transitions.add_events(session, job, attempt, last, cleaned)

    def set_progress(self, attempt: str, progress: dict[str, Any]) -> None:
        """Overwrite how far the job is; no event. Raises :class:`StaleAttempt`."""
        with self._database.write() as session:
            self._touch(session, attempt, count=0, progress=text.clean(progress, text.MAX_TEXT))

    def commit_checkpoint(self, attempt: str, artifact_id: str, step: int) -> Event:
        """The next attempt goes on from this artifact, which is in the store. Raises :class:`StaleAttempt`."""
        with self._database.write() as session:
            values = {"checkpoint_artifact": artifact_id, "checkpoint_step": step}
            job, last = self._touch(session, attempt, count=1, **values)
            data = {"artifact": artifact_id, "step": step}
            return transitions.add_events(session, job, attempt, last, [("checkpoint", data)])[0]

    def commit_artifact(self, attempt: str, name: str, type: str, artifact_id: str, size: int) -> ArtifactRow:
        """An output of the job, already in the store. Raises :class:`StaleAttempt`."""
        with self._database.write() as session:
            job, _ = self._touch(session, attempt, count=0)
            tenant = session.scalars(select(tables.Job.tenant).where(tables.Job.id == job)).one()
            row, new = self._add_artifact(
                session, id=artifact_id, name=name, type=type, size=size, tenant=tenant, job=job, attempt=attempt
            )
            if new:
                _, last = self._touch(session, attempt, count=1)
                data = {"name": name, "type": type, "id": artifact_id, "size": size}
                transitions.add_events(session, job, attempt, last, [("artifact", data)])
            return row

    def succeed(self, attempt: str, result: dict[str, Any]) -> Job:
        """The job is done. Raises :class:`StaleAttempt`, and :class:`TooLarge` for a result over 1 MiB."""
        result = text.clean(result)
        if len(json.dumps(result)) > MAX_RESULT_BYTES:
            raise TooLarge("the result is larger than 1 MiB: put it into an artifact and name that")
        return self._end(attempt, JobState.SUCCEEDED, ACTIVE, "succeeded", result=result)

    def fail(self, attempt: str, error: dict[str, Any]) -> Job:
        """The job has failed for a reason that another attempt would meet again. Raises :class:`StaleAttempt`.

        ``error``: ``reason``, ``message``, ``violations``.
        """
        told = {"reason": "INTERNAL", "message": "", "violations": [], **text.clean(error, text.MAX_TEXT)}
        return self._end(attempt, JobState.FAILED, ACTIVE, "failed", error=told)

    def cancelled(self, attempt: str) -> Job:
        """The job has stopped because it was cancelled. Raises :class:`StaleAttempt`; :class:`IllegalState` when
        nobody asked for it."""
        return self._end(attempt, JobState.CANCELLED, [JobState.CANCELLING], "cancelled")

    def release(self, attempt: str, reason: Literal["crashed", "lost", "stopped"], message: str = "") -> Job:
        """End the attempt, not the job. Raises :class:`StaleAttempt`.

        ``stopped`` (the worker leaves in order): queued again at once, and not counted. ``crashed``, ``lost``: queued
        again after 1, 2, 4, ... seconds (300 at most), or failed when that was its last attempt. A job that was to be
        cancelled is cancelled.
        """
        if reason not in ("crashed", "lost", "stopped"):
            raise InvalidInput.field("reason", "is none of crashed, lost, stopped")
        message = text.clean(message, text.MAX_TEXT)
        with self._database.write() as session:
            row = session.execute(
                select(tables.Job.id, tables.Job.state, tables.Job.attempts, tables.Job.max_attempts)
                .where(tables.Job.attempt == attempt)
                .with_for_update()
            ).one_or_none()
            if row is None:
                raise _stale(attempt)
            job, state, attempts, most = row
            note: dict[str, Any] = {"reason": reason, "message": message}
            if state == JobState.CANCELLING:
                return self._end_in(
                    session,
                    job,
                    attempt,
                    JobState.CANCELLED,
                    source=[JobState.CANCELLING],
                    outcome=reason,
                    message=message,
                    note=note,
                )
            if reason != "stopped" and attempts >= most:
                tries = "its only attempt" if attempts == 1 else f"all its {attempts} attempts"
                error = {
                    "reason": reason.upper(),
                    "message": f"{tries} ended before the job was done; the last one {reason}"
                    f"{': ' + message if message else ''}. Retry the job to go on from its last checkpoint",
                    "violations": [],
                }
                return self._end_in(
                    session,
                    job,
                    attempt,
                    JobState.FAILED,
                    source=[JobState.RUNNING],
                    outcome=reason,
                    message=message,
                    note=note,
                    error=error,
                )
            values: dict[str, Any] = {"attempt": None, "ready": True, "not_before": None}
            if reason == "stopped":
                values["attempts"] = attempts - 1
            else:
                delay = min(2.0 ** (attempts - 1), MAX_BACKOFF_SECONDS)
                note["retry_in_seconds"] = delay
                values |= {"ready": False, "not_before": transitions.now() + timedelta(seconds=delay)}
            moved = transitions.move(
                session, job, JobState.QUEUED, source=[JobState.RUNNING], owner=attempt, note=note, **values
            )
            if not moved:
                raise _stale(attempt)
            transitions.end_attempt(session, attempt, reason, message)
            return self._job(session, job)

    # Inside a transaction

    def _job(self, session: Session, id: str) -> Job:
        query = select(tables.Job).where(tables.Job.id == id).options(selectinload(tables.Job.inputs))
        row = session.scalar(query.execution_options(populate_existing=True)) if text.storable(id) else None
        if row is None:
            raise NotFound(f"there is no job {id!a}")
        return _job(row)

    def _wake(self, session: Session, queue: str) -> None:
        """Jobs whose time has come are ready. Kept apart from the claim, which stays one look into one index."""
        session.execute(
            update(tables.Job).where(_due(queue)).values(ready=True),
            execution_options={"synchronize_session": False},
        )

    def _touch(self, session: Session, attempt: str, count: int, **values: Any) -> tuple[str, int]:
        """Write to the job that ``attempt`` owns and count ``count`` events; its id and the last ``seq``."""
        row = session.execute(
            update(tables.Job)
            .where(tables.Job.attempt == attempt, tables.Job.state.in_(ACTIVE))
            .values(seq=tables.Job.seq + count, **values)
            .returning(tables.Job.id, tables.Job.seq),
            execution_options={"synchronize_session": False},
        ).one_or_none()
        if row is None:
            raise _stale(attempt)
        return row[0], row[1]

    def _add_artifact(
        self,
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
            return _artifact(row), False
        if job is not None:
            session.execute(
                update(table).where(table.job == job, table.name == name).values(superseded=True),
                execution_options={"synchronize_session": False},
            )
        values = {"id": id, "name": name, "type": type, "tenant": tenant, "job": job, "attempt": attempt, "size": size}
        session.execute(insert(table).values(**values, superseded=False, created_at=transitions.now()))
        return _artifact(session.scalars(select(table).where(table.id == id)).one()), True

    def _end(self, attempt: str, to: JobState, source: Sequence[JobState], outcome: str, **values: Any) -> Job:
        with self._database.write() as session:
            query = select(tables.Job.id).where(tables.Job.attempt == attempt)
            job = session.scalar(query)
            if job is None:
                raise _stale(attempt)
            return self._end_in(session, job, attempt, to, source=source, outcome=outcome, **values)

    def _end_in(
        self,
        session: Session,
        job: str,
        attempt: str,
        to: JobState,
        *,
        source: Sequence[JobState],
        outcome: str,
        message: str | None = None,
        note: dict[str, Any] | None = None,
        **values: Any,
    ) -> Job:
        error = values.get("error")
        if error is not None:
            note = {**(note or {}), "message": error["message"]}
        if not transitions.move(session, job, to, source=source, owner=attempt, note=note, **values):
            found = self._job(session, job)
            raise IllegalState(f"job {job} is {found.state}: it cannot become {to} now")
        transitions.end_attempt(session, attempt, outcome, message)
        transitions.settle_dependents(session, job, to, error)
        return self._job(session, job)


def _due(queue: str | None = None) -> ColumnElement[bool]:
    """Queued jobs that only their ``not_before`` held back, and which has passed."""
    job = tables.Job
    where = [job.state == JobState.QUEUED, job.ready == tables.FALSE, job.waiting == 0]
    if queue is not None:
        where.append(job.queue == queue)
    return and_(*where, job.not_before <= transitions.now())


def _ready(queue: str | None = None) -> ColumnElement[bool]:
    """Queued jobs that nothing holds back; with ``priority`` and ``number`` this is the order of an index."""
    job = tables.Job
    where = [job.state == JobState.QUEUED, job.ready == tables.TRUE]
    if queue is not None:
        where.append(job.queue == queue)
    return and_(*where)


def _stale(attempt: str) -> StaleAttempt:
    return StaleAttempt(f"attempt {attempt} does not own its job any more; nothing it sends is kept")


def _artifact(row: tables.Artifact) -> ArtifactRow:
    return ArtifactRow.model_validate(row, from_attributes=True)


def _job(row: tables.Job) -> Job:
    state = JobState(row.state)
    checkpoint = None
    if row.checkpoint_artifact is not None:
        checkpoint = {"artifact": row.checkpoint_artifact, "step": row.checkpoint_step}
    waits_for = {found.needs for found in row.inputs if found.artifact is None and found.needs is not None}
    return Job(
        id=row.id,
        tenant=row.tenant,
        kind=row.kind,
        spec=row.spec,
        state=state,
        queue=row.queue,
        priority=row.priority,
        labels=row.labels,
        attempts=row.attempts,
        max_attempts=row.max_attempts,
        not_before=row.not_before,
        inputs={found.path: found.artifact for found in row.inputs if found.artifact is not None},
        waits_for=[] if state.terminal else sorted(waits_for),
        progress=row.progress,
        checkpoint=checkpoint,
        result=row.result,
        error=row.error,
        trace=row.trace,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        cancel_requested=row.cancel_requested,
        seq=row.seq,
    )
