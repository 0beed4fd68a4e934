"""Databases that can be used, and those that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from ethogram.errors import InvalidInput, Unavailable
from services.jobs.registry import JobRegistry
from tests.jobs.steps import submit


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


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("registry.db", "not a database URL"),
        ("postgresql://user:swordfish@host:port/name", "not a database URL"),
        ("mysql://user:swordfish@host/name", "mysql:// is not supported"),
        (
            "postgresql+psycopg2://user:swordfish@host/name",
            "not supported; use sqlite:/// or postgresql://",
        ),
        ("postgresql://user:swordfish@127.0.0.1:1/name?color=blue", "color"),
    ],
)
def test_urls_that_are_refused(url: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        JobRegistry.open(url)
    assert caught.value.violations[0].field == "database_url"
    assert "swordfish" not in str(caught.value)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_full_disk(registry: JobRegistry) -> None:
    with registry._database.write() as session:
        session.connection().exec_driver_sql("PRAGMA max_page_count = 44")
    with pytest.raises(Unavailable, match="free some space, then try again"):
        for _ in range(500):
            submit(registry, labels={"filler": "x" * 200})
    jobs, _ = registry.list(limit=1000)
    assert all(len(registry.events(job.id)) == 1 for job in jobs)
