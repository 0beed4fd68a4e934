"""Which job is next, and that it is given to one worker only, however many ask."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import create_engine, event, text

from services.jobs import transitions
from services.jobs.registry import JobRegistry, JobState
from tests.jobs.steps import claim, codec, finish, submit


def test_the_order(registry: JobRegistry, clock: Callable[[float], None]) -> None:
    low = submit(registry, priority=-1)
    first, second = submit(registry), submit(registry)
    high = submit(registry, priority=5)
    submit(registry, queue="gpu", priority=9)
    later = submit(registry, priority=9, not_before=datetime.now(UTC) + timedelta(minutes=1))
    assert [claim(registry).job.id for _ in range(3)] == [high.id, first.id, second.id]
    clock(61)
    assert [claim(registry).job.id for _ in range(2)] == [later.id, low.id]
    assert registry.claim_next("cpu", "w", 10) is None
    assert registry.queues_with_work() == ["gpu"]


def test_a_step_back_of_the_clock_keeps_the_order(registry: JobRegistry, clock: Callable[[float], None]) -> None:
    first = submit(registry)
    clock(-3600)
    second = submit(registry)
    assert [claim(registry).job.id for _ in range(2)] == [first.id, second.id]
    assert [job.id for job in registry.list()[0]] == [second.id, first.id]


def test_each_job_is_claimed_once(registry: JobRegistry, database_url: str) -> None:
    """Two processes and this one, three threads each."""
    jobs = [submit(registry).id for _ in range(60)]
    command = [sys.executable, "-m", "tests.jobs.claimer", database_url, "3"]
    others = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    mine: list[str] = []

    def work() -> None:
        while (claimed := registry.claim_next("cpu", "w", 10)) is not None:
            mine.append(claimed.job.id)
            registry.append_events(claimed.attempt, [("log", {"message": "hello"})])
            registry.succeed(claimed.attempt, {})

    for other in others:
        assert other.stdin is not None
        other.stdin.write("go\n")
        other.stdin.flush()
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results = [other.communicate(timeout=60) for other in others]
    assert [error for _, error in results] == [""] * 2
    everyone = Counter([*mine, *(id for output, _ in results for id in output.split())])
    assert everyone == Counter(jobs)
    for id in jobs:
        job = registry.get(id)
        assert (job.state, job.attempts, job.seq) == (JobState.SUCCEEDED, 1, 4)
        assert [event.seq for event in registry.events(id)] == [1, 2, 3, 4]


def test_of_many_cancellations_and_endings_one_wins(registry: JobRegistry) -> None:
    for _ in range(10):
        job = submit(registry)
        attempt = claim(registry).attempt
        outcomes: list[str] = []
        barrier = threading.Barrier(4)

        def end(result: int, attempt: str = attempt, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            try:
                registry.succeed(attempt, {"by": result})
                outcomes.append(f"{result}")  # noqa: B023
            except Exception as error:
                assert type(error).__name__ == "StaleAttempt"

        threads = [threading.Thread(target=end, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(outcomes) == 1
        assert registry.get(job.id).result == {"by": int(outcomes[0])}


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_claim_costs_the_same_in_a_long_queue(registry: JobRegistry, database_url: str) -> None:
    """Each look is a search in an index, without a sort: no step reads the queue."""
    for _ in range(3):
        submit(registry)
    statements: list[tuple[str, object]] = []

    def record(_c: object, _cursor: object, statement: str, parameters: object, *_: object) -> None:
        statements.append((statement, parameters))

    engine = registry._database._engine
    event.listen(engine, "before_cursor_execute", record)
    claim(registry)
    event.remove(engine, "before_cursor_execute", record)
    plans = []
    reader = create_engine(database_url)
    with reader.connect() as connection:
        for statement, parameters in statements:
            if statement.startswith(("SELECT", "UPDATE")):
                rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()  # type: ignore[arg-type]
                plans += [row[3] for row in rows]
    reader.dispose()
    assert any("ix_jobs_claim (state=? AND queue=? AND ready=?)" in plan for plan in plans)
    assert any("ix_jobs_due (state=? AND queue=? AND ready=? AND waiting=? AND not_before<?)" in plan for plan in plans)
    assert not [plan for plan in plans if plan.startswith("SCAN") or "TEMP B-TREE" in plan], plans


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_jobs_that_cannot_start_do_not_slow_down_those_that_can(registry: JobRegistry) -> None:
    """What the query plan promises, counted: steps of SQLite's machine per claim, beside 20 and beside 4,000 jobs."""

    def steps() -> int:
        count = 0

        def tick() -> int:
            nonlocal count
            count += 1
            return 0

        def install(connection: object, *_: object) -> None:
            connection.set_progress_handler(tick, 1)  # type: ignore[attr-defined]

        engine = registry._database._engine
        engine.dispose()
        event.listen(engine, "connect", install)
        claim(registry)
        event.remove(engine, "connect", install)
        engine.dispose()
        return count

    def fill(rows: int) -> None:
        """Jobs that wait for a time, that wait for inputs, that are ready, and that are done; by copying."""
        columns = "tenant, kind, queue, spec, labels, priority, claims, attempts, max_attempts, cancel_requested, seq"
        with registry._database.write() as session:
            session.execute(
                text(
                    f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {rows}) "
                    f"INSERT INTO jobs (id, created_at, state, ready, waiting, not_before, {columns}) "
                    "SELECT hex(randomblob(8)), created_at, iif(i % 4 = 0, 'SUCCEEDED', 'QUEUED'), i % 4 = 1, "
                    f"i % 4 = 2, iif(i % 4 = 3, '2999-01-01 00:00:00.000000', NULL), {columns} "
                    "FROM n, (SELECT * FROM jobs ORDER BY number LIMIT 1)"
                )
            )

    submit(registry, max_attempts=50)
    fill(20)
    few = steps()
    fill(4000)
    many = steps()
    assert many <= 1.2 * few, (few, many)


def test_the_age_of_a_queue_counts_from_when_its_jobs_were_ready(
    registry: JobRegistry, clock: Callable[[float], None]
) -> None:
    def depth() -> tuple[int, int, float]:
        (found,) = registry.depths()
        return found.ready, found.held, round(found.oldest_ready_seconds)

    zoo_job = submit(registry)
    registry.submit("crossmodal", codec(zoo_job.id))
    clock(100)
    assert depth() == (1, 1, 100)
    finish(registry, claim(registry))
    # Its input has just come, however long it waited.
    assert depth() == (1, 0, 0)
    again = registry.request_cancel(submit(registry).id)
    clock(150)
    registry.retry(again.id)
    assert depth() == (2, 0, 50)
    registry.claim_next("cpu", "w", 10)
    assert depth() == (1, 0, 0)


def test_a_job_whose_time_has_come_is_ready_though_nobody_looks(
    registry: JobRegistry, clock: Callable[[float], None]
) -> None:
    submit(registry, not_before=transitions.now() + timedelta(seconds=60))
    clock(50)
    assert [(found.ready, found.held) for found in registry.depths()] == [(0, 1)]
    clock(90)
    (found,) = registry.depths()
    assert (found.ready, found.held, round(found.oldest_ready_seconds)) == (1, 0, 30)
    assert registry.has_work("cpu") and not registry.has_work("gpu")
