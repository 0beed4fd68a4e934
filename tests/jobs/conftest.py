"""A registry in a real SQLite file and in a real PostgreSQL database, and short ways to the states of a job."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, text

from services.jobs import tables
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
def shared_postgres(postgres: PostgresServer) -> Iterator[Engine]:
    """A migrated database that is emptied after each test: quicker than a new one."""
    url = postgres.create_database()
    JobRegistry.open(url).close()
    engine = create_engine(url)
    yield engine
    engine.dispose()


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
def database_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """URL of an empty registry of this test's own: each test that asks for it runs on both databases.

    One about a single database says ``@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)``.
    """
    if request.param == "sqlite":
        template: Path = request.getfixturevalue("empty_database")
        used = template.with_name("used.db")
        for path in template.parent.glob("used.db*"):
            path.unlink()
        shutil.copy(template, used)
        yield f"sqlite:///{used}"
        return
    engine: Engine = request.getfixturevalue("shared_postgres")
    yield engine.url.render_as_string(hide_password=False)
    with engine.begin() as connection:
        others = "datname = current_database() AND pid <> pg_backend_pid()"
        connection.execute(text(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}"))
        for table in reversed(tables.Base.metadata.sorted_tables):
            if table.name != tables.Identity.__tablename__:
                connection.execute(table.delete())


@pytest.fixture(scope="session")
def opened() -> dict[str, JobRegistry]:
    """Registries by URL: one that was closed connects again, and knows the SQL that it has compiled."""
    return {}


@pytest.fixture
def registry(database_url: str, opened: dict[str, JobRegistry]) -> Iterator[JobRegistry]:
    """An empty registry."""
    if database_url not in opened:
        opened[database_url] = JobRegistry.open(database_url)
    yield opened[database_url]
    opened[database_url].close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Stops the registry's clock so many seconds after the test's begin."""
    from datetime import timedelta

    from services.jobs import transitions

    begin = transitions.now()

    def forward(seconds: float) -> None:
        monkeypatch.setattr(transitions, "now", lambda: begin + timedelta(seconds=seconds))

    forward(0)

    return forward
