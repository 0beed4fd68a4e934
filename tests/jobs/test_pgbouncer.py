"""The registry behind PgBouncer, which hands each transaction to whatever session is free."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url

from ethogram.errors import InvalidInput
from ethogram.platform.stack import free_port
from services.jobs.registry import JobRegistry, JobState
from tests.jobs.steps import claim, submit
from tests.jobs.test_postgres import ask
from tests.postgres_server import PostgresServer

PROGRAM = shutil.which("pgbouncer", path="/usr/sbin:/usr/bin:/usr/local/bin") or shutil.which("pgbouncer")
NAMES = ("timezone", "application_name", "lock_timeout", "idle_in_transaction_session_timeout")


@pytest.fixture(params=["session", "transaction", "transaction, options dropped"])
def pooled_url(request: pytest.FixtureRequest, postgres: PostgresServer) -> Iterator[str]:
    """URL of an empty database behind a PgBouncer with one session per database."""
    if PROGRAM is None:
        pytest.skip("PgBouncer is not installed here")
    mode, _, dropped = str(request.param).partition(", ")
    database, port = make_url(postgres.create_database()), free_port()
    folder = postgres.private_folder()
    login = f"user={database.username} password={database.password}"
    lines = [
        "[databases]",
        f"* = host=127.0.0.1 port={database.port} {login}",
        "[pgbouncer]",
        f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any",
        f"pool_mode = {mode}\ndefault_pool_size = {1 if mode == 'transaction' else 20}",
        f"ignore_startup_parameters = {'options' if dropped else 'extra_float_digits'}",
    ]
    (folder / "pgbouncer.ini").write_text("\n".join(lines))
    with (folder / "pgbouncer.log").open("wb") as log:
        process = subprocess.Popen(
            [PROGRAM, str(folder / "pgbouncer.ini")], stdout=log, stderr=log, **postgres.as_user()
        )
    try:
        deadline = time.monotonic() + 10
        while True:
            try:
                psycopg.connect(host="127.0.0.1", port=port, user="anyone", dbname="postgres").close()
                break
            except psycopg.OperationalError:
                assert process.poll() is None and time.monotonic() < deadline, (folder / "pgbouncer.log").read_text()
                time.sleep(0.02)
        yield f"postgresql://anyone@127.0.0.1:{port}/{database.database}"
    finally:
        process.terminate()
        process.wait()


def test_a_registry_behind_pgbouncer(pooled_url: str) -> None:
    with closing(JobRegistry.open(pooled_url)) as first, closing(JobRegistry.open(pooled_url)) as second:
        # More often than the driver needs to prepare a statement.
        jobs = [submit(registry, queue="pooled") for registry in (first, second) for _ in range(8)]
        for registry in (second, first):
            for _ in range(8):
                claimed = claim(registry, "pooled")
                registry.heartbeat(claimed.attempt)
                registry.succeed(claimed.attempt, {})
        for job in jobs:
            assert first.get(job.id).state is JobState.SUCCEEDED
            assert [event.type for event in second.events(job.id)][-1] == "state"
        assert ask(first, *NAMES) == ["UTC", "ethogram", "15s", "15s"]
        with first._database.read() as session:
            assert session.scalars(text("SHOW transaction_isolation")).one() == "repeatable read"
            assert session.scalars(text("SHOW timezone")).one() == "UTC"


def test_settings_of_the_url_behind_pgbouncer(pooled_url: str) -> None:
    options = "application_name=mine&prepare_threshold=0&options=-c%20lock_timeout=2s%20--statement-timeout=9s"
    with closing(JobRegistry.open(f"{pooled_url}?{options}")) as registry:
        for _ in range(3):
            submit(registry)
        assert ask(registry, *NAMES) == ["UTC", "mine", "2s", "15s"]
        assert ask(registry, "statement_timeout") == ["9s"]


@pytest.mark.parametrize("threshold", ["0", "3", "none", "None"])
def test_the_drivers_threshold_may_be_in_the_url(postgres: PostgresServer, threshold: str) -> None:
    with closing(JobRegistry.open(f"{postgres.create_database()}?prepare_threshold={threshold}")) as registry:
        for _ in range(7):
            submit(registry)
        assert ask(registry, *NAMES) == ["UTC", "ethogram", "15s", "15s"]


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("prepare_threshold=soon", "prepare_threshold=soon: must be a whole number, or none"),
        ("prepare_threshold=-1", "must be a whole number"),
        ("autocommit=true", "autocommit cannot be set"),
        ("row_factory=x", "row_factory cannot be set"),
        ("colour=red", "the driver refuses it"),
    ],
)
def test_wrong_options_of_the_url_are_named(postgres: PostgresServer, option: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=f"database_url: .*{said}"):
        JobRegistry.open(f"{postgres.create_database()}?{option}")
