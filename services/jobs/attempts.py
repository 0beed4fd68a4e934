"""The worker's side of the registry: claim a job, report on it, end the attempt.

Each write names the attempt. A write of an attempt that no longer owns its job raises :class:`StaleAttempt` and changes
nothing.
"""

from __future__ import annotations

import builtins
import json
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Literal, get_args

from sqlalchemy import func, insert, select, update
from sqlalchemy.orm import Session

from ethogram.errors import IllegalState, InvalidInput, StaleAttempt, TimeLimit, TooLarge
from ethogram.specs.base import Spec
from services.jobs import artifacts, shares, submission, tables, text, transitions
from services.jobs.database import change
from services.jobs.queries import Queries, due
from services.jobs.records import ArtifactRow, Claim, Event, Job, Options
from services.jobs.states import ACTIVE, JobState

MAX_BACKOFF_SECONDS = 300.0
MAX_RESULT_BYTES = 2**20

Reason = Literal["crashed", "stalled", "lost", "stopped", "waiting"]
"""How an attempt may end without ending its job."""


class Attempts(Queries):
    """What a worker does with the registry."""

    def claim_next(self, queue: str, worker: str, lease_seconds: float) -> Claim | None:
        """Claim the next job of ``queue``, in the order of :mod:`services.jobs.shares`; ``None`` when there is none.

        The caller owns the job until it ends the attempt, or until the reconciler sees no heartbeat for
        ``lease_seconds``.
        """
        # An idle worker must not take the write lock.
        if not self.has_work(queue):
            return None
        with self._database.write() as session:
            self._wake(session, queue)
            attempt = submission.new_id("att")
            for id, tenant in shares.candidates(session, queue):
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
                shares.served(session, queue, tenant)
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
                return Claim(
                    job=self._job(session, id),
                    attempt=attempt,
                    number=number,
                    lease_seconds=lease_seconds,
                    children=transitions.children(session, id),
                )
            return None

    def heartbeat(self, attempt: str, seconds: float = 0.0) -> bool:
        """Renew the lease; return whether the job is to be cancelled. ``seconds``: running time of the attempt, by the
        worker's monotonic clock. Raises :class:`StaleAttempt`."""
        with self._database.write() as session:
            job = change(
                session,
                update(tables.Attempt)
                .where(tables.Attempt.id == attempt, tables.Attempt.ended_at.is_(None))
                .values(heartbeat=tables.Attempt.heartbeat + 1, seconds=seconds)
                .returning(tables.Attempt.job),
            ).scalar_one_or_none()
            query = select(tables.Job.cancel_requested).where(tables.Job.id == job, tables.Job.attempt == attempt)
            cancel = session.scalar(query)
            if cancel is None:
                raise _stale(attempt)
            return cancel

    def append_events(
        self, attempt: str, events: Sequence[tuple[str, dict[str, Any]]], batch: int | None = None
    ) -> builtins.list[Event]:
        """Record events of the job: ``(type, data)`` with type ``log``. Raises :class:`StaleAttempt`.

        ``batch`` counts up. A batch is recorded once, so a writer that got no answer may send it again.
        """
        for type_, _ in events:
            if type_ != "log":
                raise InvalidInput.field(
                    "type", f"{type_!r} events cannot be appended; they are recorded with the change that they report"
                )
        with self._database.write() as session:
            cleaned = [(type_, text.clean(data, text.MAX_TEXT)) for type_, data in events]
            if batch is not None:
                # Lock the job before the attempt, in the order in which an attempt ends.
                self._touch(session, attempt, count=0)
                if not self._is_new(session, attempt, batch):
                    return []
            job, last = self._touch(session, attempt, count=len(events))
            return transitions.add_events(session, job, attempt, last, cleaned)

    def set_progress(self, attempt: str, progress: dict[str, Any]) -> None:
        """Set the job's progress; this is no event. Raises :class:`StaleAttempt`."""
        with self._database.write() as session:
            self._touch(session, attempt, count=0, progress=text.clean(progress, text.MAX_TEXT))

    def commit_checkpoint(self, attempt: str, artifact_id: str, step: int) -> Event:
        """Let the next attempt resume from this artifact, which is in the store. Repeating it changes nothing.

        Raises :class:`StaleAttempt`.
        """
        with self._database.write() as session:
            job, last = self._touch(session, attempt, count=0)
            table = tables.Event
            if session.scalars(select(tables.Job.checkpoint_artifact).where(tables.Job.id == job)).one() == artifact_id:
                query = select(table).where(table.job == job, table.type == "checkpoint").order_by(table.seq.desc())
                return Event.model_validate(session.scalars(query.limit(1)).one(), from_attributes=True)
            _, last = self._touch(session, attempt, 1, checkpoint_artifact=artifact_id, checkpoint_step=step)
            data = {"artifact": artifact_id, "step": step}
            return transitions.add_events(session, job, attempt, last, [("checkpoint", data)])[0]

    def commit_artifact(self, attempt: str, name: str, type: str, artifact_id: str, size: int) -> ArtifactRow:
        """Record an output of the job, which is in the store. Raises :class:`StaleAttempt`."""
        with self._database.write() as session:
            job, _ = self._touch(session, attempt, count=0)
            tenant = session.scalars(select(tables.Job.tenant).where(tables.Job.id == job)).one()
            row, new = artifacts.add(
                session, id=artifact_id, name=name, type=type, size=size, tenant=tenant, job=job, attempt=attempt
            )
            if new:
                _, last = self._touch(session, attempt, count=1)
                data = {"name": name, "type": type, "id": artifact_id, "size": size}
                transitions.add_events(session, job, attempt, last, [("artifact", data)])
            return row

    def spawn(self, attempt: str, name: str, kind: str, spec: Spec) -> Job:
        """Queue a child job that does a part of the work, with its parent's queue, labels and limits. The same name
        again is the same child. Raises :class:`StaleAttempt`, and what :meth:`JobRegistry.submit` raises."""
        submission.check_name(name, "children")
        with self._database.write() as session:
            id, _ = self._touch(session, attempt, count=0)
            known = session.scalar(select(tables.Job.id).where(tables.Job.parent == id, tables.Job.name == name))
            if known is not None:
                return self._job(session, known)
            parent = self._job(session, id)
            options = {key: getattr(parent, key) for key in Options.model_fields if key != "not_before"}
            request = submission.Request.make(kind, spec, options, prefix=f"children.{name}.")
            request.parent, request.name = id, name
            child = submission.insert_job(session, request, tenant=parent.tenant, trace=parent.trace)
            if parent.state is JobState.CANCELLING:
                transitions.cancel(session, child)
            return self._job(session, child)

    def succeed(self, attempt: str, result: dict[str, Any], *, seconds: float | None = None) -> Job:
        """End the job as succeeded. ``seconds``: running time of the attempt, as in :meth:`heartbeat`.

        Raises :class:`StaleAttempt`, and :class:`TooLarge` for a result over 1 MiB.
        """
        result = text.clean(result)
        if len(json.dumps(result)) > MAX_RESULT_BYTES:
            raise TooLarge("the result is larger than 1 MiB: put it into an artifact and name that")
        return self._end(attempt, JobState.SUCCEEDED, ACTIVE, "succeeded", seconds, result=result)

    def fail(self, attempt: str, error: dict[str, Any], *, seconds: float | None = None) -> Job:
        """End the job as failed, for a reason that another attempt would meet again. Raises :class:`StaleAttempt`.

        ``error``: ``reason``, ``message``, ``violations``.
        """
        error = {"reason": "INTERNAL", "message": "", "violations": [], **text.clean(error, text.MAX_TEXT)}
        outcome = "timed out" if error["reason"] == TimeLimit.reason else "failed"
        return self._end(attempt, JobState.FAILED, ACTIVE, outcome, seconds, error=error)

    def cancelled(self, attempt: str, *, seconds: float | None = None) -> Job:
        """End the job as cancelled. Raises :class:`StaleAttempt`; :class:`IllegalState` when nobody cancelled it."""
        return self._end(attempt, JobState.CANCELLED, [JobState.CANCELLING], "cancelled", seconds)

    def release(self, attempt: str, reason: Reason, message: str = "", *, seconds: float | None = None) -> Job:
        """End the attempt, not the job. Raises :class:`StaleAttempt`.

        ``stopped`` (the worker shuts down): queued again at once, and not counted. ``waiting``: the same, once all
        children have ended. ``crashed``, ``stalled``, ``lost``: queued again after 1, 2, 4, ... seconds (at most 300),
        or failed if that was its last attempt. A job that is being cancelled is cancelled.
        """
        if reason not in get_args(Reason):
            raise InvalidInput.field("reason", f"must be one of {', '.join(get_args(Reason))}")
        message = text.clean(message, text.MAX_TEXT)
        with self._database.write() as session:
            job = _lock_parent(session, attempt)
            row = session.execute(
                select(tables.Job.state, tables.Job.attempts, tables.Job.max_attempts)
                .where(tables.Job.attempt == attempt)
                .with_for_update()
            ).one_or_none()
            if row is None:
                raise _stale(attempt)
            state, attempts, max_attempts = row
            note: dict[str, Any] = {"reason": reason, "message": message}
            end = partial(self._end_in, session, job, attempt, outcome=reason, message=message, seconds=seconds)
            if state == JobState.CANCELLING:
                return end(JobState.CANCELLED, source=[JobState.CANCELLING], note=note)
            counts = reason not in ("stopped", "waiting")
            if counts and attempts >= max_attempts:
                tries = "its only attempt" if attempts == 1 else f"all its {attempts} attempts"
                error = {
                    "reason": reason.upper(),
                    "message": f"{tries} ended before the job was done; the last one {reason}"
                    f"{': ' + message if message else ''}. Retry the job to resume it from its last checkpoint",
                    "violations": [],
                }
                return end(JobState.FAILED, source=[JobState.RUNNING], note=note, error=error)
            values: dict[str, Any] = {"attempt": None, "ready": True, "not_before": None}
            if counts:
                delay = min(2.0 ** (attempts - 1), MAX_BACKOFF_SECONDS)
                note["retry_in_seconds"] = delay
                later = transitions.now() + timedelta(seconds=delay)
                values |= {"ready": False, "not_before": later, "backoff_seconds": delay}
            else:
                values["attempts"] = attempts - 1
            if reason == "waiting":
                # The row is locked, so a child that ends now is counted afterwards.
                left = transitions.unfinished_children(session, job)
                values |= {"waiting": left, "ready": left == 0}
            moved = transitions.move(
                session, job, JobState.QUEUED, source=[JobState.RUNNING], owner=attempt, note=note, **values
            )
            if not moved:
                raise _stale(attempt)
            transitions.end_attempt(session, attempt, reason, message, seconds)
            return self._job(session, job)

    def wake(self, job: str, claims: int) -> Job | None:
        """End the back-off of a job now; ``None`` when it is in none, or no longer in the one after its claim number
        ``claims``. For a caller that timed the back-off by its own monotonic clock."""
        table = tables.Job
        with self._database.write() as session:
            woken = change(
                session,
                update(table)
                .where(table.id == job, table.state == JobState.QUEUED, table.claims == claims)
                .where(table.backoff_seconds.is_not(None), table.waiting == 0)
                .values(ready=True, ready_at=transitions.now(), backoff_seconds=None, not_before=None)
                .returning(table.id),
            ).one_or_none()
            return None if woken is None else self._job(session, job)

    def _wake(self, session: Session, queue: str) -> None:
        """Mark jobs ready whose ``not_before`` has passed, so that a claim is one lookup in one index."""
        # Skip rows that another claim has locked: they are woken next time, and claims never wait for each other.
        free = select(tables.Job.number).where(due(queue)).with_for_update(skip_locked=True)
        change(
            session,
            update(tables.Job).where(tables.Job.number.in_(free)).values(ready=True, ready_at=tables.Job.not_before),
        )

    def _is_new(self, session: Session, attempt: str, batch: int) -> bool:
        table = tables.Attempt
        marked = change(
            session,
            update(table).where(table.id == attempt, table.batch < batch).values(batch=batch).returning(table.id),
        )
        return marked.one_or_none() is not None

    def _touch(self, session: Session, attempt: str, count: int, **values: Any) -> tuple[str, int]:
        """Write to the job that ``attempt`` owns and count ``count`` events; return its id and the last ``seq``."""
        row = change(
            session,
            update(tables.Job)
            .where(tables.Job.attempt == attempt, tables.Job.state.in_(ACTIVE))
            .values(seq=tables.Job.seq + count, **values)
            .returning(tables.Job.id, tables.Job.seq),
        ).one_or_none()
        if row is None:
            raise _stale(attempt)
        return row.id, row.seq

    def _end(
        self,
        attempt: str,
        to: JobState,
        source: Sequence[JobState],
        outcome: str,
        seconds: float | None,
        **values: Any,
    ) -> Job:
        with self._database.write() as session:
            job = _lock_parent(session, attempt)
            return self._end_in(session, job, attempt, to, source=source, outcome=outcome, seconds=seconds, **values)

    def _end_in(
        self,
        session: Session,
        job: str,
        attempt: str,
        to: JobState,
        *,
        source: Sequence[JobState],
        outcome: str,
        seconds: float | None,
        message: str | None = None,
        note: dict[str, Any] | None = None,
        **values: Any,
    ) -> Job:
        error = values.get("error")
        if error is not None:
            note = {**(note or {}), "message": error["message"]}
        if not transitions.move(session, job, to, source=source, owner=attempt, note=note, **values):
            if session.scalar(select(tables.Job.number).where(tables.Job.attempt == attempt)) is None:
                # Somebody else has ended it meanwhile.
                raise _stale(attempt)
            found = self._job(session, job)
            raise IllegalState(f"job {job} is {found.state}: it cannot become {to} now")
        transitions.end_attempt(session, attempt, outcome, message, seconds)
        transitions.settle(session, job, to, error)
        return self._job(session, job)


def _lock_parent(session: Session, attempt: str) -> str:
    """The job that ``attempt`` owns, after its parent is locked. Raises :class:`StaleAttempt`."""
    job = session.scalar(select(tables.Job.id).where(tables.Job.attempt == attempt))
    if job is None:
        raise _stale(attempt)
    transitions.lock_parent(session, job)
    return job


def _stale(attempt: str) -> StaleAttempt:
    return StaleAttempt(f"attempt {attempt} no longer owns its job; nothing it sends is kept")
