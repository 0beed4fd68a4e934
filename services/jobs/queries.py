"""Queries of the registry: nothing here writes."""

from __future__ import annotations

import base64
import binascii
import builtins
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TypeVar

from sqlalchemy import ColumnElement, and_, case, func, or_, select
from sqlalchemy.orm import Session

from ethogram.errors import InvalidInput, NotFound
from services.jobs import submission, tables, text, transitions
from services.jobs.database import Database
from services.jobs.records import LABEL_KEY, ArtifactRow, BackingOff, Depth, Event, Job, RunningAttempt
from services.jobs.states import ACTIVE, UNFINISHED, JobState

MAX_LIMIT = 1000

Row = TypeVar("Row", tables.Job, tables.Artifact)


class Queries:
    """The reading side of the registry."""

    def __init__(self, database: Database) -> None:
        self._database = database

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
        parent: str | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> tuple[builtins.list[Job], str | None]:
        """Jobs, newest first, and the cursor of the next page; ``None`` at the end. ``labels``: all must match;
        ``parent``: only the children of this job.

        Raises :class:`InvalidInput` for an unknown state, and for a limit or cursor that is not valid.
        """
        if state is not None and state not in builtins.list(JobState):
            raise InvalidInput.field("state", f"must be one of {', '.join(JobState)}")
        where = _filters(tables.Job, tenant, kind=kind, state=state, parent=parent)
        for key, value in (labels or {}).items():
            if not re.fullmatch(LABEL_KEY, key):
                raise InvalidInput.field("labels", f"{key!a} is not a valid label name")
            text.check(value, f"labels.{key}")
            where.append(tables.Job.labels[key].as_string() == value)
        with self._database.read() as session:
            rows, more = _page(session, tables.Job, where, limit, cursor)
            return _records(session, rows), more

    def events(self, job: str, after: int = 0, limit: int = 1000) -> builtins.list[Event]:
        """Events of ``job`` with ``seq > after``, in order. Raises :class:`NotFound`."""
        query = select(tables.Event).where(tables.Event.job == job, tables.Event.seq > after)
        query = query.order_by(tables.Event.seq).limit(_check_limit(limit))
        with self._database.read() as session:
            rows = session.scalars(query).all() if text.storable(job) else []
            if not rows:
                self._job(session, job)
            return [Event.model_validate(row) for row in rows]

    def artifacts(
        self,
        job: str | None = None,
        type: str | None = None,
        tenant: str = "default",
        limit: int = 50,
        cursor: str | None = None,
    ) -> tuple[builtins.list[ArtifactRow], str | None]:
        """Artifacts, newest first, and the cursor of the next page; of a job's outputs of one name, only the last."""
        table = tables.Artifact
        where = [*_filters(table, tenant, job=job, type=type), table.superseded == tables.FALSE]
        with self._database.read() as session:
            rows, more = _page(session, table, where, limit, cursor)
            return [ArtifactRow.model_validate(row) for row in rows], more

    def artifact(self, id: str) -> ArtifactRow:
        """The row of an artifact. Raises :class:`NotFound`."""
        with self._database.read() as session:
            return ArtifactRow.model_validate(self._artifact(session, id))

    def depths(self) -> builtins.list[Depth]:
        """What is in each queue with jobs that have not ended. The cost grows with the number of such jobs."""
        job, now = tables.Job, transitions.now()
        # Jobs whose `not_before` has passed are marked ready only by the next claim.
        is_due = due()
        state = case(
            (or_(ready(), is_due), "ready"), (job.state == JobState.QUEUED, "held"), else_=func.lower(job.state)
        )
        since = func.min(case((is_due, job.not_before), else_=job.ready_at))
        query = select(job.queue, state.label("part"), func.count(), since).where(job.state.in_(UNFINISHED))
        found: dict[str, Depth] = {}
        with self._database.read() as session:
            for queue, name, count, oldest in session.execute(query.group_by(job.queue, "part")):
                depth = found.setdefault(queue, Depth(queue=queue))
                setattr(depth, name, count)
                if name == "ready" and oldest is not None:
                    depth.oldest_ready_seconds = max(0.0, (now - oldest).total_seconds())
        return sorted(found.values(), key=lambda depth: depth.queue)

    def backing_off(self) -> builtins.list[BackingOff]:
        """Jobs that wait after a crash; the reconciler ends the wait by :meth:`Attempts.wake`."""
        job = tables.Job
        query = select(job.id.label("job"), job.queue, job.claims, job.backoff_seconds.label("seconds"))
        query = query.where(_queued(None, job.ready == tables.FALSE), job.backoff_seconds.is_not(None))
        with self._database.read() as session:
            return [BackingOff(**row) for row in session.execute(query).mappings()]

    def running_attempts(self) -> builtins.list[RunningAttempt]:
        """All attempts that have not ended, for the reconciler to watch."""
        job, attempt = tables.Job, tables.Attempt
        columns = (attempt.worker, attempt.heartbeat, attempt.lease_seconds)
        query = select(job.attempt, job.id.label("job"), job.queue, *columns)
        query = query.join(attempt, attempt.id == job.attempt).where(job.state.in_(ACTIVE))
        with self._database.read() as session:
            return [RunningAttempt(**row) for row in session.execute(query.order_by(job.number)).mappings()]

    def has_work(self, queue: str) -> bool:
        """Whether a job of ``queue`` could be claimed now. The cost does not depend on the length of the queue."""
        queries = [select(tables.Job.number).where(where).limit(1) for where in (ready(queue), due(queue))]
        with self._database.read() as session:
            return any(session.scalar(query) is not None for query in queries)

    def queues_with_work(self) -> builtins.list[str]:
        """Queues in which a job could be claimed now."""
        query = select(tables.Job.queue).where(or_(ready(), due())).distinct().order_by(tables.Job.queue)
        with self._database.read() as session:
            return builtins.list(session.scalars(query))

    def _job(self, session: Session, id: str) -> Job:
        query = select(tables.Job).where(tables.Job.id == id).execution_options(populate_existing=True)
        rows = session.scalars(query).all() if text.storable(id) else []
        if not rows:
            raise NotFound(f"there is no job {id!a}")
        return _records(session, rows)[0]

    def _artifact(self, session: Session, id: str) -> tables.Artifact:
        row = session.scalar(select(tables.Artifact).where(tables.Artifact.id == id)) if text.storable(id) else None
        if row is None:
            raise NotFound(f"there is no artifact {id!a}")
        return row


def due(queue: str | None = None) -> ColumnElement[bool]:
    """Queued jobs that only their ``not_before`` held back, now that it has passed."""
    job = tables.Job
    return and_(_queued(queue, job.ready == tables.FALSE), job.waiting == 0, job.not_before <= transitions.now())


def ready(queue: str | None = None) -> ColumnElement[bool]:
    """Queued jobs that nothing holds back; with ``priority`` and ``number`` this is the order of an index."""
    return _queued(queue, tables.Job.ready == tables.TRUE)


def _queued(queue: str | None, ready: ColumnElement[bool]) -> ColumnElement[bool]:
    job = tables.Job
    return and_(job.state == JobState.QUEUED, ready, *([job.queue == queue] if queue is not None else []))


def _filters(table: type[Row], tenant: str, **values: str | None) -> builtins.list[ColumnElement[bool]]:
    """Conditions that each column in ``values`` has its value, if that is not None. Raises :class:`InvalidInput`."""
    submission.check_name(tenant, "tenant")
    for name, value in values.items():
        text.check(value, name)
    values["tenant"] = tenant
    return [getattr(table, name) == value for name, value in values.items() if value is not None]


def encode_cursor(table: str, number: int) -> str:
    """The cursor of the page after row ``number``: opaque text. Numbers never change, so pages are stable."""
    return base64.urlsafe_b64encode(f"{table}:{number}".encode()).decode().rstrip("=")


def decode_cursor(table: str, cursor: str) -> int:
    """The number in a cursor of ``table``. Raises :class:`InvalidInput`."""
    try:
        content = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode()
        found, _, number = content.partition(":")
        # Only what `encode_cursor` makes: int() alone takes signs, spaces and digits of other scripts.
        if found == table and number.isascii() and number.isdecimal() and len(number) <= 18:
            return int(number)
    except (binascii.Error, ValueError):
        pass
    raise InvalidInput.field("cursor", "is not a cursor of this list; leave it out to start from the beginning")


def _check_limit(limit: int) -> int:
    if not 1 <= limit <= MAX_LIMIT:
        raise InvalidInput.field("limit", f"must be from 1 to {MAX_LIMIT}")
    return limit


def _page(
    session: Session, table: type[Row], where: Sequence[ColumnElement[bool]], limit: int, cursor: str | None
) -> tuple[Sequence[Row], str | None]:
    """Rows of ``table`` that ``where`` selects, newest first, and the cursor of the next page."""
    older = [table.number < decode_cursor(table.__tablename__, cursor)] if cursor is not None else []
    query = select(table).where(*where, *older).order_by(table.number.desc()).limit(_check_limit(limit) + 1)
    rows = session.scalars(query).all()
    more = encode_cursor(table.__tablename__, rows[limit - 1].number) if len(rows) > limit else None
    return rows[:limit], more


def _records(session: Session, rows: Sequence[tables.Job]) -> builtins.list[Job]:
    """The records of rows."""
    table, records = tables.Job, []
    # Those that have not ended.
    children: dict[str | None, builtins.list[str]] = defaultdict(builtins.list)
    if parents := [row.id for row in rows if row.waiting]:
        query = select(table.parent, table.id).where(table.parent.in_(parents), table.state.in_(UNFINISHED))
        for parent, child in session.execute(query.order_by(table.number)):
            children[parent].append(child)
    copied = Job.model_fields.keys() - {"inputs", "waits_for", "checkpoint"}
    for row in rows:
        needs = {given.needs for given in row.inputs if given.artifact is None and given.needs is not None}
        checkpoint = {"artifact": row.checkpoint_artifact, "step": row.checkpoint_step}
        record = Job(
            inputs={given.path: given.artifact for given in row.inputs if given.artifact is not None},
            waits_for=[] if JobState(row.state).terminal else [*sorted(needs), *children[row.id]],
            checkpoint=None if row.checkpoint_artifact is None else checkpoint,
            **{name: getattr(row, name) for name in copied},
        )
        records.append(record)
    return records
