"""The database file: made, migrated, shared, and refused."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine

from ethogram.errors import IllegalState, InvalidInput, Unavailable
from services.jobs import tables
from services.jobs.database import MIGRATIONS
from services.jobs.registry import JobRegistry
from tests.jobs.steps import submit


def schema(path: Path) -> set[frozenset[str]]:
    """The parts of each statement; the order of constraints means nothing."""
    with sqlite3.connect(path) as connection:
        rows = connection.execute("SELECT sql FROM sqlite_master WHERE name NOT LIKE 'alembic%' AND sql IS NOT NULL")
        return {
            frozenset(part.rstrip(")") for part in "".join(sql.split()).replace('"', "").split(",")) for (sql,) in rows
        }


def test_the_migrations_make_the_tables(empty_database: Path, tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'model.db'}")
    tables.Base.metadata.create_all(engine)
    assert schema(empty_database) == schema(tmp_path / "model.db")


def test_the_revision_is_the_last_migration() -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    assert ScriptDirectory.from_config(config).get_current_head() == tables.REVISION


def test_down_and_up_again(registry: JobRegistry, database_url: str) -> None:
    from alembic import command

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with registry._database._writer.begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
    reopened = JobRegistry.open(database_url)
    submit(reopened)
    reopened.close()


def test_a_failed_migration_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from alembic import op

    path = tmp_path / "registry.db"

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(op, "create_index", fail)
        with pytest.raises(RuntimeError):
            JobRegistry.open(f"sqlite:///{path}")
    assert schema(path) == set()
    JobRegistry.open(f"sqlite:///{path}").close()


def test_folders_are_made_and_jobs_outlive_the_process(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'a % b' / 'registry.db'}"
    first = JobRegistry.open(url)
    job = submit(first)
    first.close()
    second = JobRegistry.open(url)
    assert second.get(job.id) == job
    second.close()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_settings_of_sqlite(registry: JobRegistry) -> None:
    with registry._database.read() as session:
        settings = {
            name: session.connection().exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert settings == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30_000}


def test_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    JobRegistry.open(f"sqlite:///{path}").close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0999'")
    connection.close()
    with pytest.raises(
        IllegalState, match=rf"newer version of Ethogram \(its schema is 0999, this version knows {tables.REVISION}\)"
    ):
        JobRegistry.open(f"sqlite:///{path}")


def test_processes_and_threads_that_open_at_the_same_time(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'registry.db'}"
    command = [sys.executable, "-m", "tests.jobs.claimer", url, "1"]
    others = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    errors: list[Exception] = []

    def open_one() -> None:
        try:
            JobRegistry.open(url).close()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=open_one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [other.communicate("go\n", timeout=60) for other in others] == [("", "")] * 2


def test_what_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("not a database, but long enough to be read as a header of one" * 20)
    with pytest.raises(Unavailable, match="cannot be used"):
        JobRegistry.open(f"sqlite:///{tmp_path / 'text.db'}")
    with pytest.raises(Unavailable, match="cannot be used"):
        JobRegistry.open(f"sqlite:///{tmp_path}")
    with pytest.raises(Unavailable, match="cannot be used"):
        JobRegistry.open(f"sqlite:///{tmp_path / 'text.db' / 'below.db'}")
    with pytest.raises(InvalidInput, match="must name a file"):
        JobRegistry.open("sqlite://")
    with pytest.raises(InvalidInput, match="not a database URL"):
        JobRegistry.open("registry.db")


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_full_disk(registry: JobRegistry) -> None:
    with registry._database.write() as session:
        session.connection().exec_driver_sql("PRAGMA max_page_count = 44")
    with pytest.raises(Unavailable, match="free some space, then try again"):
        for _ in range(500):
            submit(registry, labels={"filler": "x" * 200})
    jobs, _ = registry.list(limit=1000)
    assert all(len(registry.events(job.id)) == 1 for job in jobs)
