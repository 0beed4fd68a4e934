"""Changes of a job's state: each is one UPDATE that names the states, and the attempt, that it may start from.

Functions here work inside a write transaction of the caller.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import and_, case, func, insert, or_, select
from sqlalchemy.orm import Session

from services.jobs import tables
from services.jobs.database import set_values
from services.jobs.records import Child, Event
from services.jobs.states import LEGAL, UNFINISHED, JobState


def now() -> datetime:
    """The current time, UTC."""
    return datetime.now(UTC)


def move(
    session: Session,
    job: str,
    to: JobState,
    *,
    source: Collection[JobState],
    owner: str | None = None,
    note: dict[str, Any] | None = None,
    **values: Any,
) -> bool:
    """Move ``job`` from a state of ``source`` to ``to`` and record the event; False if it is in none of them.

    With ``owner``, only if that attempt owns the job. ``values`` are set in the same UPDATE, ``note`` is added to the
    event.
    """
    assert all(to in LEGAL[state] for state in source), f"no step from {source} to {to}"
    values = {"ready": False, "backoff_seconds": None, **values}
    values["ready_at"] = now() if values["ready"] else None
    if to.terminal:
        values |= {"finished_at": now(), "attempt": None}
    table = tables.Job
    where = [table.id == job, table.state.in_(source), *([table.attempt == owner] if owner is not None else [])]
    changed = set_values(session, table, *where, returning=[table.seq], state=to, seq=table.seq + 1, **values)
    seq = changed.scalar_one_or_none()
    if seq is None:
        return False
    add_events(session, job, owner or values.get("attempt"), seq, [("state", {"state": to, **(note or {})})])
    return True


def add_events(
    session: Session, job: str, attempt: str | None, last: int, events: Sequence[tuple[str, dict[str, Any]]]
) -> list[Event]:
    """Insert ``events``; ``last`` is the job's ``seq`` after they were counted on its row."""
    time = now()
    first = last - len(events) + 1
    rows = [
        {"job": job, "seq": first + index, "attempt": attempt, "type": type_, "data": data, "time": time}
        for index, (type_, data) in enumerate(events)
    ]
    if rows:
        session.execute(insert(tables.Event), rows)
    return [Event.model_validate(row) for row in rows]


def end_attempt(session: Session, attempt: str, outcome: str, message: str | None, seconds: float | None) -> None:
    """Close the attempt's row, and count its running time (``None``: as of its last heartbeat) to the job's."""
    table, job = tables.Attempt, tables.Job
    values = {"ended_at": now(), "outcome": outcome, "message": message}
    if seconds is not None:
        values["seconds"] = seconds
    open_row = (table.id == attempt, table.ended_at.is_(None))
    ended = set_values(session, table, *open_row, returning=[table.job, table.seconds], **values).one_or_none()
    if ended is not None:
        set_values(session, job, job.id == ended.job, ran_seconds=job.ran_seconds + ended.seconds)


def lock(session: Session, job: str) -> None:
    """Lock the row of ``job`` until the transaction ends."""
    session.scalar(select(tables.Job.number).where(tables.Job.id == job).with_for_update())


def lock_parent(session: Session, job: str) -> None:
    """Lock the parent of ``job``, if it has one, before the job itself is locked. So transactions that end a child and
    those that count or cancel a parent's children take turns, and never wait for each other in a circle."""
    parent = _parent(session, job)
    if parent is not None:
        lock(session, parent)


def _parent(session: Session, job: str) -> str | None:
    return session.scalar(select(tables.Job.parent).where(tables.Job.id == job))


def children(session: Session, parent: str) -> list[Child]:
    """The child jobs of ``parent``, by name."""
    table = tables.Job
    columns = (table.name, table.id.label("job"), table.state, table.result, table.error)
    query = select(*columns).where(table.parent == parent)
    return [
        Child(**row, outputs=outputs(session, row["job"]) if row["state"] == JobState.SUCCEEDED else {})
        for row in session.execute(query.order_by(table.name)).mappings().all()
    ]


def unfinished_children(session: Session, parent: str) -> int:
    """How many children of ``parent`` have not ended."""
    query = select(func.count()).where(tables.Job.parent == parent, tables.Job.state.in_(UNFINISHED))
    return session.scalars(query).one()


def count_children(session: Session, parent: str | None) -> None:
    """Make ``parent``, if there is one, ready if it waits for its children and all have ended.

    A parent has run, so its inputs are there, and all that it waits for are children.
    """
    if parent is None:
        return
    # Of two children that end at the same time, the second must see that the first has ended.
    lock(session, parent)
    left = unfinished_children(session, parent)
    table = tables.Job
    waits = (table.id == parent, table.state == JobState.QUEUED, table.waiting > 0)
    set_values(session, table, *waits, waiting=left, ready=left == 0, ready_at=now())


def cancel(session: Session, job: str) -> bool:
    """Cancel ``job`` and its children; False if it has ended."""
    # Without the lock it might be released between the two moves, and neither would apply.
    lock(session, job)
    if move(session, job, JobState.CANCELLED, source=[JobState.QUEUED], cancel_requested=True, waiting=0):
        settle(session, job, JobState.CANCELLED)
        return True
    if move(session, job, JobState.CANCELLING, source=[JobState.RUNNING], cancel_requested=True):
        for child in children(session, job):
            cancel(session, child.job)
        return True
    return session.scalar(select(tables.Job.state).where(tables.Job.id == job)) == JobState.CANCELLING


def settle(session: Session, job: str, state: JobState, error: dict[str, Any] | None = None) -> None:
    """After ``job`` has reached the terminal ``state``: cancel its children, which nobody gathers any more, and update
    its parent and the jobs that wait for it."""
    for child in children(session, job):
        if not child.state.terminal:
            cancel(session, child.job)
    count_children(session, _parent(session, job))
    settle_dependents(session, job, state, error)


def outputs(session: Session, job: str) -> dict[str, str]:
    """Name -> id of the artifacts that ``job`` made."""
    query = select(tables.Artifact.name, tables.Artifact.id)
    kept = query.where(tables.Artifact.job == job, tables.Artifact.superseded == tables.FALSE)
    return dict(session.execute(kept).all())


def settle_dependents(session: Session, job: str, state: JobState, error: dict[str, Any] | None = None) -> None:
    """After ``job`` has reached the terminal ``state``: give the jobs that wait for it their inputs, or end them like
    it, and in turn those that wait for them."""
    ended = [(job, state, error)]
    while ended:
        job, state, error = ended.pop()
        made = outputs(session, job) if state is JobState.SUCCEEDED else {}
        for dependent, inputs in _waiting_for(session, job).items():
            missing = [(path, name) for path, name in inputs if name not in made]
            if not missing:
                _give(session, dependent, {path: made[name] for path, name in inputs})
                continue
            path, name = missing[0]
            if state is JobState.SUCCEEDED:
                end, cause = JobState.FAILED, f"input job {job} finished without an artifact named {name!r}"
                cause += f"; it made: {', '.join(sorted(made)) or 'none'}"
            elif state is JobState.CANCELLED:
                end, cause = JobState.CANCELLED, f"input job {job} was cancelled; retry it, then this one"
            else:
                reason = (error or {}).get("message", "no message")
                end, cause = JobState.FAILED, f"input job {job} failed: {reason} (retry it, then this one)"
            lock_parent(session, dependent)
            violation = {"field": f"spec.{path}", "description": cause}
            input_error = {"reason": "INPUT_FAILED", "message": cause, "violations": [violation]}
            note = {"message": cause}
            if move(session, dependent, end, source=[JobState.QUEUED], error=input_error, waiting=0, note=note):
                count_children(session, _parent(session, dependent))
                # Pass on the first cause, not a sentence that grows with the length of the chain.
                ended.append((dependent, end, error if state is JobState.FAILED else input_error))


def _waiting_for(session: Session, job: str) -> dict[str, list[tuple[str, str]]]:
    table = tables.Input
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    query = select(table.job, table.path, table.name).join(tables.Job, tables.Job.id == table.job)
    query = query.where(table.needs == job, table.artifact.is_(None), tables.Job.state == JobState.QUEUED)
    for dependent, path, name in session.execute(query.order_by(table.job, table.path)):
        found[dependent].append((path, name or ""))
    return found


def _give(session: Session, job: str, artifacts: dict[str, str]) -> None:
    for path, artifact in artifacts.items():
        set_values(session, tables.Input, tables.Input.job == job, tables.Input.path == path, artifact=artifact)
    table = tables.Job
    # Count down rather than recount, since two inputs may finish at the same time.
    left = table.waiting - len(artifacts)
    due = or_(table.not_before.is_(None), table.not_before <= now())
    ready = case((and_(left == 0, due), tables.TRUE), else_=tables.FALSE)
    queued = (table.id == job, table.state == JobState.QUEUED)
    set_values(session, table, *queued, waiting=left, ready=ready, ready_at=now())
