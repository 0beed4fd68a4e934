"""How long a claim takes in a long queue and in a short one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import delete, func, insert, select

from benchmarks._kit import say
from ethogram.specs.generation import GenerationSpec
from services.jobs import tables
from services.jobs.registry import JobRegistry

SHORT, LONG = 100, 10_000
_ROUNDS, _CLAIMS = 4, 40


def claim_flat_ratio(urls: Sequence[str]) -> float:
    """The worst ratio of median claim times, 10,000 waiting jobs to 100, over the empty databases at ``urls``, with one
    tenant and with twenty."""
    worst = 0.0
    for url in urls:
        registry = JobRegistry.open(url)
        try:
            for tenants in (1, 20):
                seconds: dict[int, list[float]] = {SHORT: [], LONG: []}
                # Alternate, so that whatever else the machine does affects both.
                for turn in range(_ROUNDS):
                    for waiting in (SHORT, LONG) if turn % 2 else (LONG, SHORT):
                        _fill(registry, waiting, tenants)
                        seconds[waiting] += [_claim(registry) for _ in range(_CLAIMS)]
                short, long = (statistics.median(seconds[waiting]) * 1e3 for waiting in (SHORT, LONG))
                say(
                    f"claims, {url.split(':')[0]}, {tenants} tenant(s): {short:.2f} ms of {SHORT}, "
                    f"{long:.2f} ms of {LONG}: {long / short:.2f}"
                )
                worst = max(worst, long / short)
        finally:
            registry.close()
    return worst


def _claim(registry: JobRegistry) -> float:
    began = time.perf_counter()
    claim = registry.claim_next("cpu", "bench", 10.0)
    seconds = time.perf_counter() - began
    assert claim is not None
    registry.succeed(claim.attempt, {})
    return seconds


def _fill(registry: JobRegistry, waiting: int, tenants: int) -> None:
    """Empty the registry and queue ``waiting`` jobs."""
    database = registry._database
    with database.write() as session:
        for table in (tables.Event, tables.Attempt, tables.Turn, tables.Job):
            session.execute(delete(table))
    registry.submit("generation", GenerationSpec())
    job: Any = tables.Job.__table__
    with database.write() as session:
        row = dict(session.execute(select(job)).mappings().one())
        first = row["number"]
        session.execute(
            insert(job),
            [
                {**row, "number": first + i, "id": f"job_{first + i:020}", "tenant": f"tenant-{i % tenants}"}
                for i in range(1, waiting)
            ],
        )
        if not database.sqlite:
            # Move the counter past the rows that were inserted with a number.
            sequence = func.pg_get_serial_sequence("jobs", "number")
            session.execute(select(func.setval(sequence, select(func.max(job.c.number)).scalar_subquery())))
    if not database.sqlite:
        # PostgreSQL's autovacuum would do so a moment later.
        with database._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("ANALYZE jobs")
