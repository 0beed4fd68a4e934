"""A registry in a real SQLite file, and short ways to the states of a job."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from services.jobs.registry import JobRegistry


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated file to copy: quicker than to migrate for each test."""
    path = tmp_path_factory.mktemp("empty") / "registry.db"
    JobRegistry.open(f"sqlite:///{path}").close()
    return path


@pytest.fixture
def database_url(tmp_path: Path, empty_database: Path) -> str:
    """URL of an empty registry of this test's own."""
    shutil.copy(empty_database, tmp_path / "registry.db")
    return f"sqlite:///{tmp_path / 'registry.db'}"


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
