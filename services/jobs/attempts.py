"""The worker's side of the registry: claim a job, report on it, end the attempt.

Each write names the attempt. A write of an attempt that no longer owns its job raises :class:`StaleAttempt` and changes
nothing.
"""

from __future__ import annotations

import builtins
import json
import re
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Literal, get_args

from sqlalchemy import func, insert, select
from sqlalchemy.orm import Session

from ethogram.errors import Conflict, IllegalState, InvalidInput, StaleAttempt, TimeLimit, TooLarge
from ethogram.specs.base import Spec
from services.jobs import shares, submission, tables, text, transitions
from services.jobs.database import insert_for, set_values
from services.jobs.queries import Queries, due
from services.jobs.records import ArtifactRow, Claim, Event, Job, Options
from services.jobs.states import ACTIVE, LEGAL, JobState

MAX_BACKOFF_SECONDS = 300.0
MAX_RESULT_BYTES = 2**20

_ARTIFACT_ID = re.compile(r"[0-9a-f]{64}")
# What an ArtifactRef can name.
_ARTIFACT_NAME = re.compile(r"[A-Za-z0-9_.-]{1,80}")

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
            found = shares.lock_next(session, queue)
            if found is None:
                return None
            id, tenant = found
            attempt, time, table = submission.new_id("att"), transitions.now(), tables.Job
            started: dict[str, Any] = {"attempt": attempt, "started_at": func.coalesce(table.started_at, time)}
            started |= {"attempts": table.attempts + 1, "claims": table.claims + 1, "note": {"worker": worker}}
            moved = transitions.move(session, id, JobState.RUNNING, source=[JobState.QUEUED], **started)
            assert moved, "the job is locked, and was queued then"
            shares.served(session, queue, tenant)
            number = session.scalars(select(table.claims).where(table.id == id)).one()
            values = {"number": number, "lease_seconds": lease_seconds}
            session.execute(insert(tables.Attempt).values(id=attempt, job=id, worker=worker, started_at=time, **values))
            children = transitions.children(session, id)
            return Claim(job=self._job(session, id), attempt=attempt, children=children, **values)

    def heartbeat(self, attempt: str, seconds: float = 0.0) -> bool:
        """Renew the lease; return whether the job is to be cancelled. ``seconds``: running time of the attempt, by the
        worker's monotonic clock. Raises :class:`StaleAttempt`."""
        with self._database.write() as session:
            row = tables.Attempt
            open_row, values = (row.id == attempt, row.ended_at.is_(None)), {"heartbeat": row.heartbeat + 1}
            renewed = set_values(session, row, *open_row, returning=[row.job], **values, seconds=seconds)
            owned = (tables.Job.id == renewed.scalar_one_or_none(), tables.Job.attempt == attempt)
            cancel = session.scalar(select(tables.Job.cancel_requested).where(*owned))
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
                row = tables.Attempt
                new = set_values(session, row, row.id == attempt, row.batch < batch, returning=[row.id], batch=batch)
                if new.one_or_none() is None:
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
        table = tables.Event
        with self._database.write() as session:
            job, last = self._touch(session, attempt, count=0)
            if session.scalars(select(tables.Job.checkpoint_artifact).where(tables.Job.id == job)).one() == artifact_id:
                query = select(table).where(table.job == job, table.type == "checkpoint").order_by(table.seq.desc())
                return Event.model_validate(session.scalars(query.limit(1)).one())
            _, last = self._touch(session, attempt, 1, checkpoint_artifact=artifact_id, checkpoint_step=step)
            data = {"artifact": artifact_id, "step": step}
            return transitions.add_events(session, job, attempt, last, [("checkpoint", data)])[0]

    def commit_artifact(self, attempt: str, name: str, type: str, artifact_id: str, size: int) -> ArtifactRow:
        """Record an output of the job, which is in the store. Raises :class:`StaleAttempt`."""
        with self._database.write() as session:
            job, _ = self._touch(session, attempt, count=0)
            tenant = session.scalars(select(tables.Job.tenant).where(tables.Job.id == job)).one()
            row, new = self._add_artifact(
                session, artifact_id, tenant, name=name, type=type, size=size, job=job, attempt=attempt
            )
            if new:
                _, last = self._touch(session, attempt, count=1)
                data = {"name": name, "type": type, "id": artifact_id, "size": size}
                transitions.add_events(session, job, attempt, last, [("artifact", data)])
            return row

    def _add_artifact(
        self, session: Session, id: str, tenant: str, *, name: str, type: str, job: str | None = None, **values: Any
    ) -> tuple[ArtifactRow, bool]:
        """Insert the row of an artifact; return it, and whether it is new. It replaces the job's earlier output of that
        name.

        Raises :class:`InvalidInput`, and :class:`Conflict` when the id is there with another name or job.
        """
        if not _ARTIFACT_ID.fullmatch(id):
            raise InvalidInput.field("artifact", "is not an artifact id (64 hexadecimal digits)")
        for value, field in ((name, "name"), (type, "type")):
            if not _ARTIFACT_NAME.fullmatch(value):
                raise InvalidInput.field(field, "must be 1 to 80 letters, digits, '_', '-' or '.'")
        table = tables.Artifact
        insert = insert_for(session, table).values(
            id=id, name=name, type=type, tenant=tenant, job=job, created_at=transitions.now(), **values
        )
        new = False
        # Locked, so that nobody deletes it meanwhile; another upload of it may insert it at the same time.
        while (row := session.scalar(select(table).where(table.id == id).with_for_update(read=True))) is None:
            new = session.execute(insert.on_conflict_do_nothing().returning(table.number)).one_or_none() is not None
        if not new:
            if (row.tenant, row.job, row.name) != (tenant, job, name):
                raise Conflict(f"artifact {id} is already there as {row.name!r} of {row.job or 'an upload'}")
        elif job is not None:
            set_values(session, table, table.job == job, table.name == name, table.id != id, superseded=True)
        return ArtifactRow.model_validate(row), new

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
            request = submission.Request.make(kind, spec, options, f"children.{name}.", parent=id, name=name)
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
        return self._end(attempt, JobState.SUCCEEDED, outcome="succeeded", seconds=seconds, result=result)

    def fail(self, attempt: str, error: dict[str, Any], *, seconds: float | None = None) -> Job:
        """End the job as failed, for a reason that another attempt would meet again. Raises :class:`StaleAttempt`.

        ``error``: ``reason``, ``message``, ``violations``.
        """
        error = {"reason": "INTERNAL", "message": "", "violations": [], **text.clean(error, text.MAX_TEXT)}
        outcome = "timed out" if error["reason"] == TimeLimit.reason else "failed"
        return self._end(attempt, JobState.FAILED, outcome=outcome, seconds=seconds, error=error)

    def cancelled(self, attempt: str, *, seconds: float | None = None) -> Job:
        """End the job as cancelled. Raises :class:`StaleAttempt`; :class:`IllegalState` when nobody cancelled it."""
        return self._end(attempt, JobState.CANCELLED, outcome="cancelled", seconds=seconds)

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
            query = select(tables.Job.state, tables.Job.attempts, tables.Job.max_attempts)
            row = session.execute(query.where(tables.Job.attempt == attempt).with_for_update()).one_or_none()
            if row is None:
                raise _stale(attempt)
            state, attempts, max_attempts = row
            note: dict[str, Any] = {"reason": reason, "message": message}
            end = partial(self._end_in, session, job, attempt, outcome=reason, message=message, seconds=seconds)
            if state == JobState.CANCELLING:
                return end(JobState.CANCELLED, note=note)
            counts = reason not in ("stopped", "waiting")
            if counts and attempts >= max_attempts:
                tries = "its only attempt" if attempts == 1 else f"all its {attempts} attempts"
                error = {
                    "reason": reason.upper(),
                    "message": f"{tries} ended before the job was done; the last one {reason}"
                    f"{': ' + message if message else ''}. Retry the job to resume it from its last checkpoint",
                    "violations": [],
                }
                return end(JobState.FAILED, note=note, error=error)
            if counts:
                delay = note["retry_in_seconds"] = min(2.0 ** (attempts - 1), MAX_BACKOFF_SECONDS)
                later = transitions.now() + timedelta(seconds=delay)
                values: dict[str, Any] = {"not_before": later, "backoff_seconds": delay}
            else:
                # The row is locked, so a child that ends now is counted afterwards.
                left = transitions.unfinished_children(session, job) if reason == "waiting" else 0
                values = {"attempts": attempts - 1, "waiting": left, "ready": left == 0, "not_before": None}
            values |= {"source": [JobState.RUNNING], "owner": attempt, "note": note, "attempt": None}
            if not transitions.move(session, job, JobState.QUEUED, **values):
                raise _stale(attempt)
            transitions.end_attempt(session, attempt, reason, message, seconds)
            return self._job(session, job)

    def wake(self, job: str, claims: int) -> Job | None:
        """End the back-off of a job now; ``None`` when it is in none, or no longer in the one after its claim number
        ``claims``. For a caller that timed the back-off by its own monotonic clock."""
        table = tables.Job
        with self._database.write() as session:
            where = [table.id == job, table.state == JobState.QUEUED, table.claims == claims, table.waiting == 0]
            where.append(table.backoff_seconds.is_not(None))
            values = {"ready": True, "ready_at": transitions.now(), "backoff_seconds": None, "not_before": None}
            woken = set_values(session, table, *where, returning=[table.id], **values).one_or_none()
            return None if woken is None else self._job(session, job)

    def _wake(self, session: Session, queue: str) -> None:
        """Mark jobs ready whose ``not_before`` has passed, so that a claim is one lookup in one index."""
        # Skip rows that another claim has locked: they are woken next time, and claims never wait for each other.
        table = tables.Job
        free = select(table.number).where(due(queue)).with_for_update(skip_locked=True)
        set_values(session, table, table.number.in_(free), ready=True, ready_at=table.not_before)

    def _touch(self, session: Session, attempt: str, count: int, **values: Any) -> tuple[str, int]:
        """Write to the job that ``attempt`` owns and count ``count`` events; return its id and the last ``seq``."""
        table = tables.Job
        owned, returning = (table.attempt == attempt, table.state.in_(ACTIVE)), [table.id, table.seq]
        row = set_values(session, table, *owned, returning=returning, seq=table.seq + count, **values).one_or_none()
        if row is None:
            raise _stale(attempt)
        return row.id, row.seq

    def _end(self, attempt: str, to: JobState, **values: Any) -> Job:
        with self._database.write() as session:
            return self._end_in(session, _lock_parent(session, attempt), attempt, to, **values)

    def _end_in(
        self,
        session: Session,
        job: str,
        attempt: str,
        to: JobState,
        *,
        outcome: str,
        seconds: float | None,
        message: str | None = None,
        note: dict[str, Any] | None = None,
        **values: Any,
    ) -> Job:
        if (error := values.get("error")) is not None:
            note = {**(note or {}), "message": error["message"]}
        source = [state for state in ACTIVE if to in LEGAL[state]]
        if not transitions.move(session, job, to, source=source, owner=attempt, note=note, **values):
            if session.scalar(select(tables.Job.number).where(tables.Job.attempt == attempt)) is None:
                # Somebody else has ended it meanwhile.
                raise _stale(attempt)
            raise IllegalState(f"job {job} is {self._job(session, job).state}: it cannot become {to} now")
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
