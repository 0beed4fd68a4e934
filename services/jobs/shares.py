"""The order of claims: the highest priority first; then the tenant with the fewest running jobs in the queue, then the
one that was served longest ago; of one tenant's jobs the oldest.

Each step is one lookup in the index ``ix_jobs_claim``, so the cost of a claim does not depend on how many jobs wait; it
grows with the number of tenants that have work at the highest priority. Functions here work inside a write
transaction of the caller.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from services.jobs import tables
from services.jobs.database import insert_for
from services.jobs.queries import ready
from services.jobs.states import ACTIVE

job, turn = tables.Job, tables.Turn


def lock_next(session: Session, queue: str) -> tuple[str, str] | None:
    """Lock the first job of ``queue`` that may be claimed now and that no other claim holds; return it and its tenant,
    or ``None`` when there is none."""
    lower: list[ColumnElement[bool]] = []
    top = select(job.priority).where(ready(queue)).order_by(job.priority.desc()).limit(1)
    while (priority := session.scalar(top.where(*lower))) is not None:
        equal = (ready(queue), job.priority == priority)
        for tenant in _in_turn(session, queue, _tenants(session, equal)):
            oldest = select(job.id).where(*equal, job.tenant == tenant).order_by(job.number).limit(1)
            found = session.scalar(oldest.with_for_update(skip_locked=True))
            if found is not None:
                return found, tenant
        lower = [job.priority < priority]
    return None


def served(session: Session, queue: str, tenant: str) -> None:
    """Record that ``tenant`` was served last in ``queue``."""
    last = select(func.coalesce(func.max(turn.turn), 0) + 1).where(turn.queue == queue).scalar_subquery()
    row = insert_for(session, turn).values(queue=queue, tenant=tenant, turn=last)
    session.execute(row.on_conflict_do_update(index_elements=["queue", "tenant"], set_={"turn": row.excluded.turn}))


def _tenants(session: Session, equal: Sequence[ColumnElement[bool]]) -> list[str]:
    """The distinct tenants among the jobs ``equal``: one index lookup for each tenant, not one for each job."""
    first = select(func.min(job.tenant)).where(*equal).scalar_subquery()
    found = select(first.label("tenant")).cte("tenants", recursive=True)
    after = select(func.min(job.tenant)).where(*equal, job.tenant > found.c.tenant).correlate(found).scalar_subquery()
    found = found.union_all(select(after).where(found.c.tenant.is_not(None)))
    return list(session.scalars(select(found.c.tenant).where(found.c.tenant.is_not(None))))


def _in_turn(session: Session, queue: str, tenants: list[str]) -> list[str]:
    if len(tenants) < 2:
        return tenants
    count = select(job.tenant, func.count()).where(job.state.in_(ACTIVE), job.queue == queue).group_by(job.tenant)
    running = dict(session.execute(count).all())
    turns = dict(session.execute(select(turn.tenant, turn.turn).where(turn.queue == queue)).all())
    return sorted(tenants, key=lambda tenant: (running.get(tenant, 0), turns.get(tenant, 0), tenant))
