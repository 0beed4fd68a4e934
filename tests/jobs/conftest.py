"""A registry in a real SQLite file and in a real PostgreSQL database, and short ways to the states of a job."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from services.jobs.registry import JobRegistry
from tests.postgres_server import PostgresServer, start_postgres


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated file to copy: quicker than to migrate for each test."""
    path = tmp_path_factory.mktemp("empty") / "registry.db"
    JobRegistry.open(f"sqlite:///{path}").close()
    return path


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """A server that lives as long as the test session; not one to stop."""
    server = start_postgres(tmp_path_factory.mktemp("postgres"), durable=False)
    yield server
    server.close()


@pytest.fixture(scope="session")
def empty_postgres(postgres: PostgresServer) -> str:
    """URL of a migrated database to copy."""
    url = postgres.create_database()
    JobRegistry.open(url).close()
    return url


@pytest.fixture(params=["sqlite", "postgresql"])
def blank_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of a database without tables, of this test's own."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'registry.db'}"
        return
    server: PostgresServer = request.getfixturevalue("postgres")
    url = server.create_database()
    yield url
    server.drop_database(url)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of an empty registry of this test's own: each test that asks for it runs on both databases.

    One about a single database says ``@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)``.
    """
    if request.param == "sqlite":
        shutil.copy(request.getfixturevalue("empty_database"), tmp_path / "registry.db")
        yield f"sqlite:///{tmp_path / 'registry.db'}"
        return
    server: PostgresServer = request.getfixturevalue("postgres")
    url = server.create_database(request.getfixturevalue("empty_postgres"))
    yield url
    server.drop_database(url)


@pytest.fixture
def registry(database_url: str) -> Iterator[JobRegistry]:
    """An empty registry."""
    opened = JobRegistry.open(database_url)
    yield opened
    opened.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the registry's clock forward by so many seconds."""
    from datetime import timedelta

    from services.jobs import transitions

    real = transitions.now

    def forward(seconds: float) -> None:
        monkeypatch.setattr(transitions, "now", lambda: real() + timedelta(seconds=seconds))

    return forward
