"""What is PostgreSQL's own: its settings, and how it goes away and comes back."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from ethogram.errors import Unavailable
from services.jobs import transitions
from services.jobs.registry import JobRegistry, JobState
from tests.jobs.steps import claim, submit
from tests.postgres_server import PostgresServer, start_postgres

postgresql = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """A server to stop and to kill; it loses nothing."""
    started = start_postgres(tmp_path_factory.mktemp("server"))
    yield started
    started.close()


@pytest.fixture
def served(server: PostgresServer) -> Iterator[JobRegistry]:
    """A registry on it."""
    opened = JobRegistry.open(server.create_database())
    yield opened
    opened.close()


def ask(registry: JobRegistry, *names: str) -> list[str]:
    with registry._database.write() as session:
        return [session.scalars(text(f"SHOW {name}")).one() for name in names]


@postgresql
def test_settings(registry: JobRegistry, database_url: str) -> None:
    names = ("timezone", "application_name", "lock_timeout", "idle_in_transaction_session_timeout")
    assert ask(registry, *names) == ["UTC", "ethogram", "15s", "15s"]
    assert ask(registry, "transaction_isolation", "synchronous_commit") == ["read committed", "on"]
    other = JobRegistry.open(f"{database_url}?application_name=mine&options=-c%20lock_timeout=2s")
    assert ask(other, *names) == ["UTC", "mine", "2s", "15s"]
    other.close()


@postgresql
@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_forms_of_the_url(database_url: str, scheme: str) -> None:
    registry = JobRegistry.open(f"{scheme}://{database_url.split('://')[1]}")
    submit(registry)
    registry.close()


def test_a_server_that_is_down_and_comes_back(server: PostgresServer, served: JobRegistry) -> None:
    job = submit(served)
    server.stop()
    begun = time.monotonic()
    for _ in range(2):
        with pytest.raises(Unavailable, match=r"refused.*is writable, then try again") as caught:
            submit(served)
    with pytest.raises(Unavailable) as at_start:
        JobRegistry.open(server.url)
    assert time.monotonic() - begun < 5
    assert "only-for-tests" not in str(caught.value) + str(at_start.value)
    server.start()
    assert served.get(job.id) == job


@pytest.mark.parametrize("end", ["fast", "immediate", "kill"])
def test_a_connection_lost_in_the_middle(server: PostgresServer, served: JobRegistry, end: str) -> None:
    """What was answered is there after it; what was not is not."""
    job = submit(served)
    claimed = claim(served)
    with pytest.raises(Unavailable), served._database.write() as session:
        assert transitions.move(session, claimed.job.id, JobState.CANCELLING, source=[JobState.RUNNING])
        if end == "kill":
            server.kill()
            server.start()
        else:
            server.restart("fast" if end == "fast" else "immediate")
        session.execute(text("SELECT 1"))
    assert served.get(claimed.job.id) == claimed.job
    served.succeed(claimed.attempt, {})
    assert served.get(job.id).state is JobState.SUCCEEDED


@pytest.mark.slow
def test_a_server_that_starts_up(server: PostgresServer, served: JobRegistry) -> None:
    """Asked all the time while it restarts, it answers or is told to be unavailable; nothing else."""
    answers: list[str] = []
    server.stop("immediate")
    begun = time.monotonic()

    def ask_on() -> None:
        while time.monotonic() - begun < 1.0:
            try:
                served.list()
                answers.append("there")
            except Unavailable:
                answers.append("gone")

    asking = threading.Thread(target=ask_on)
    asking.start()
    server.start()
    asking.join()
    assert answers[0] == "gone"
    assert answers[-1] == "there"


@postgresql
@pytest.mark.parametrize(
    ("code", "cause", "hint"),
    [
        ("53100", "could not extend file: No space left on device", "free some space"),
        ("53300", "sorry, too many clients already", "max_connections"),
        ("57P01", "terminating connection due to administrator command", "check that it runs"),
        ("57P03", "the database system is starting up", "check that it runs"),
        ("40001", "could not serialize access", "try again"),
        ("40P01", "deadlock detected", "other transactions were in the way"),
        ("25006", "cannot execute INSERT in a read-only transaction", "is writable"),
        ("42501", "permission denied for schema public", "GRANT CREATE"),
        ("58030", "could not read block 1: Input/output error", "check that it runs"),
    ],
)
def test_what_the_server_says_of_itself(registry: JobRegistry, code: str, cause: str, hint: str) -> None:
    with pytest.raises(Unavailable, match=hint) as caught, registry._database.write() as session:
        session.connection().exec_driver_sql(f"DO $$ BEGIN RAISE EXCEPTION '{cause}' USING ERRCODE = '{code}'; END $$")
    assert cause in str(caught.value)
    submit(registry)


@postgresql
def test_a_stopped_process_does_not_keep_its_locks(registry: JobRegistry, database_url: str) -> None:
    submit(registry)
    claimed = claim(registry)
    stopped = JobRegistry.open(f"{database_url}?options=-c%20idle_in_transaction_session_timeout=200")
    with pytest.raises(Unavailable), stopped._database.write() as session:
        transitions.lock(session, claimed.job.id)
        registry.release(claimed.attempt, "lost")
        session.execute(text("SELECT 1"))
    assert registry.get(claimed.job.id).state is JobState.QUEUED
    stopped.close()


def test_a_claim_reads_no_more_in_a_long_queue(server: PostgresServer, served: JobRegistry) -> None:
    """Blocks that a claim looks at, beside 5,000 jobs that are done, that wait, and that are ready."""
    columns = "tenant, kind, queue, spec, labels, priority, claims, attempts, max_attempts, cancel_requested, seq"
    job = submit(served, queue="long", max_attempts=50)
    with served._database.write() as session:
        session.execute(
            text(
                f"INSERT INTO jobs (id, created_at, state, ready, waiting, not_before, {columns}) "
                "SELECT 'copy' || i, created_at, CASE i % 4 WHEN 0 THEN 'SUCCEEDED' ELSE 'QUEUED' END, i % 4 = 1, "
                f"CASE i % 4 WHEN 2 THEN 1 ELSE 0 END, CASE i % 4 WHEN 3 THEN timestamptz '2999-01-01' END, {columns} "
                f"FROM jobs, generate_series(1, 5000) i WHERE id = '{job.id}'"
            )
        )
        session.execute(text("ANALYZE jobs"))

    def blocks() -> int:
        # Counters of a session are told when it ends.
        served._database._engine.dispose()
        time.sleep(0.1)
        with served._database.write() as session:
            session.execute(text("SELECT pg_stat_clear_snapshot()"))
            query = "SELECT heap_blks_read + heap_blks_hit FROM pg_statio_user_tables WHERE relname = 'jobs'"
            return int(session.scalars(text(query)).one())

    before = blocks()
    assert claim(served, "long").job.id == job.id
    assert blocks() - before < 60, "the table is read from end to end"


def test_the_log_says_why_it_did_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.postgres_server._SETTINGS", {"listen_addresses": "127.0.0.1", "shared_buffers": "much"})
    with pytest.raises(RuntimeError, match="shared_buffers"):
        start_postgres(tmp_path)
