"""Up and down through all revisions, with rows, on both databases."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from alembic import command, op
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import MetaData, inspect, text

from ethogram.errors import IllegalState, InvalidInput
from services.jobs import __main__ as cli
from services.jobs import migrate, tables
from services.jobs.database import Database
from services.jobs.registry import JobRegistry, JobState
from tests.jobs.steps import claim, codec, finish, submit, zoo

REVISIONS = [migrate.BASE, *migrate.revisions()]


@pytest.fixture
def database(blank_url: str) -> Iterator[Database]:
    """A database without tables."""
    opened = Database(blank_url, upgrade=False)
    yield opened
    opened.close()


def go(database: Database, to: str) -> None:
    """One or more steps up or down."""
    with database._migration() as connection:
        now = migrate.revision(connection) or migrate.BASE
        step = command.upgrade if REVISIONS.index(to) > REVISIONS.index(now) else command.downgrade
        step(migrate._config(connection), to)


def schema(database: Database) -> dict[str, Any]:
    """All that is declared, in a form that does not depend on the order of declarations."""
    with database.read() as session:
        found = inspect(session.connection())
        return {
            table: {
                "columns": {c["name"]: (str(c["type"]), c["nullable"], c["default"]) for c in found.get_columns(table)},
                "key": found.get_pk_constraint(table),
                "foreign": sorted(str(key) for key in found.get_foreign_keys(table)),
                "unique": sorted(str(key) for key in found.get_unique_constraints(table)),
                "indexes": sorted(str(index) for index in found.get_indexes(table)),
            }
            for table in found.get_table_names()
            if table not in ("alembic_version", "sqlite_sequence")
        }


def contents(database: Database) -> dict[str, dict[str, list[Any]]]:
    """Table to column to values, in the order of the keys."""
    metadata = MetaData()
    with database.read() as session:
        metadata.reflect(session.connection(), only=lambda name, _: name not in ("alembic_version", "sqlite_sequence"))
        found = {}
        for table in metadata.tables.values():
            rows = session.execute(table.select().order_by(*table.primary_key)).mappings().all()
            found[table.name] = {column.name: [row[column.name] for row in rows] for column in table.columns}
        return found


def only(values: dict[str, dict[str, list[Any]]], shape: dict[str, Any]) -> dict[str, dict[str, list[Any]]]:
    """What of ``values`` is in the tables and columns of ``shape``."""
    return {
        table: {name: found for name, found in columns.items() if name in shape[table]["columns"]}
        for table, columns in values.items()
        if table in shape
    }


def fill(url: str) -> None:
    """Rows in every table: jobs that succeeded, that failed, that are part of another, that wait for one."""
    registry = JobRegistry.open(url)
    made = submit(registry, labels={"a": "b"}, idempotency_key="key", max_attempts=1)
    registry.submit("crossmodal", codec(made.id), time_limit_seconds=5.0)
    first = claim(registry)
    registry.append_events(first.attempt, [("log", {"message": "hello"})], batch=1)
    registry.heartbeat(first.attempt, 1.5)
    finish(registry, first)
    failed = submit(registry, max_attempts=1, queue="gpu")
    second = claim(registry, "gpu")
    registry.spawn(second.attempt, "part", "generation", zoo(7))
    registry.release(second.attempt, "crashed")
    assert registry.get(failed.id).state is JobState.FAILED
    registry.close()


def test_every_step_down_and_up_with_rows(database: Database, blank_url: str) -> None:
    fresh = {migrate.BASE: schema(database)}
    for revision in REVISIONS[1:]:
        go(database, revision)
        fresh[revision] = schema(database)
    fill(blank_url)
    full = contents(database)
    assert all(rows and all(rows.values()) for rows in full.values()), "a table without rows"
    for revision in REVISIONS[-2:0:-1]:
        go(database, revision)
        assert schema(database) == fresh[revision]
        assert contents(database) == only(full, fresh[revision])
    for revision in REVISIONS[2:]:
        go(database, revision)
        assert schema(database) == fresh[revision]
        assert only(contents(database), fresh[REVISIONS[1]]) == only(full, fresh[REVISIONS[1]])
    registry = JobRegistry.open(blank_url)
    assert claim(registry).job.kind == "crossmodal"
    registry.close()
    go(database, migrate.BASE)
    assert schema(database) == fresh[migrate.BASE] == {}
    JobRegistry.open(blank_url).close()
    assert schema(database) == fresh[tables.REVISION]


def test_the_migrations_make_the_tables(database: Database) -> None:
    database.upgrade()
    migrated = schema(database)
    with database.read() as session:
        context = MigrationContext.configure(
            session.connection(), opts={"compare_type": True, "compare_server_default": True}
        )
        assert compare_metadata(context, tables.Base.metadata) == []
    go(database, migrate.BASE)
    with database.write() as session:
        tables.Base.metadata.create_all(session.connection())
    assert schema(database) == migrated


def test_the_revision_is_the_last_migration() -> None:
    assert REVISIONS[-1] == tables.REVISION
    assert len(set(REVISIONS)) == len(REVISIONS)


def test_a_failed_migration_leaves_nothing(blank_url: str, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(op, "create_index", fail)
        with pytest.raises(RuntimeError):
            JobRegistry.open(blank_url)
    assert schema(database) == {}
    assert database.revision() is None
    JobRegistry.open(blank_url).close()


def test_a_newer_version_is_refused(blank_url: str, database: Database) -> None:
    database.upgrade()
    with database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '0999'"))
    known = rf"newer version of Ethogram \(its schema is 0999, this version knows {tables.REVISION}\)"
    with pytest.raises(IllegalState, match=known):
        JobRegistry.open(blank_url)
    with pytest.raises(IllegalState, match=known):
        database.downgrade(migrate.BASE)


def test_processes_and_threads_that_migrate_at_the_same_time(blank_url: str) -> None:
    words = [sys.executable, "-m", "tests.jobs.claimer", blank_url, "1"]
    others = [
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    errors: list[Exception] = []

    def open_one() -> None:
        try:
            JobRegistry.open(blank_url).close()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=open_one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [other.communicate("go\n", timeout=60) for other in others] == [("", "")] * 2


def test_the_command(blank_url: str, database: Database, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: str) -> tuple[int, str, str]:
        status = cli.main([*words, "--database-url", blank_url])
        return status, *capsys.readouterr()

    assert run("current") == (0, f"base (this version of Ethogram: {tables.REVISION})\n", "")
    assert run("upgrade")[0] == 0
    assert run("current") == (0, f"{tables.REVISION}\n", "")
    fill(blank_url)
    full = contents(database)
    status, out, error = run("downgrade", "0001")
    assert status == 1
    assert "would drop column jobs.time_limit_seconds (1 row)\n" in out
    assert "would drop table turns (2 rows)\n" in out
    assert "add --yes" in error
    assert contents(database) == full
    status, out, error = run("downgrade", "0001", "--yes")
    assert (status, error) == (0, "")
    assert "dropped column jobs.time_limit_seconds (1 row)\n" in out
    assert run("current")[1] == f"0001 (this version of Ethogram: {tables.REVISION})\n"
    status, _, error = run("downgrade", tables.REVISION)
    assert status == 1
    assert "not a revision at or before 0001; use one of: base, 0001" in error
    with pytest.raises(InvalidInput):
        database.downgrade("nonsense")


def test_the_command_reads_the_environment(
    blank_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ETHOGRAM_DATABASE_URL", blank_url)
    assert cli.main(["upgrade"]) == 0
    assert "only-for-tests" not in capsys.readouterr().out
    registry = JobRegistry.open(blank_url)
    submit(registry)
    registry.close()
