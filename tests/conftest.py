"""Fixtures shared by all tests. Servers are real ones, on loopback and on ports of their own."""

from __future__ import annotations

import fcntl
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from ethogram.client import Client
from ethogram.platform.stack import Platform, free_port
from ethogram.platform.state import StateDir
from tests.redis_server import start_redis

# Before torch is loaded: tests share the machine with each other and the servers they start; see
# workers.process.SPIN_COUNT.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ON_THE_PLATFORM = {
    *(f"tests/client/test_{name}.py" for name in ("cli", "client", "deletion", "retries")),
    "tests/e2e/test_clt.py",
    "tests/gateway/test_generated_clients.py",
    "tests/platform/test_modules.py",
}

Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file of tests goes to one process, and the files that need ``platform`` to the same one: it starts once."""
    from xdist.scheduler import LoadFileScheduling

    if config.getvalue("dist") != "loadfile":
        return None
    scheduler = LoadFileScheduling(config, log)
    file_of = scheduler._split_scope
    scheduler._split_scope = lambda test: "platform" if file_of(test) in ON_THE_PLATFORM else file_of(test)
    return scheduler


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """All that is imported and collected stays: the garbage collector need not look at it again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of other things than pictures make those of a report but do not draw them, which takes half a second."""
    if "matplotlib.figure" in sys.modules and "pictures" not in request.keywords:
        figure = sys.modules["matplotlib.figure"].Figure
        monkeypatch.setattr(figure, "savefig", lambda _, file, **__: file.write(b"not drawn"))


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """``once(name, make)``: a folder that ``make`` filled, for tests that only read it. All processes of a session
    share it; the first to ask makes it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def folder(name: str, make: Callable[[Path], object]) -> Path:
        made = root / f"once-{name}"
        with made.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                with TemporaryDirectory(dir=root) as scratch:
                    make(Path(scratch, "made"))
                    Path(scratch, "made").rename(made)
        return made

    return folder


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a real Redis server that lives as long as the test session."""
    port = free_port()
    server = start_redis(port, tmp_path_factory.mktemp("redis"))
    try:
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="session")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """The whole platform as processes, as the demo starts it, in a folder of :func:`write_modules`; it lives as long as
    the test session."""
    project = tmp_path_factory.mktemp("project")
    write_modules(project)
    with pytest.MonkeyPatch.context() as patch:
        # Children must not see the developer's own platform.
        for name in [name for name in os.environ if name.startswith("ETHOGRAM_")] + ["REDIS_URL", "ACTIVATIONS_ROOT"]:
            patch.delenv(name, raising=False)
        # With more, two jobs on a busy machine wait for each other.
        patch.setenv("ETHOGRAM_THREADS", "1")
        running = Platform(StateDir(tmp_path_factory.mktemp("platform")))
        with chdir(project):
            running.start()
        try:
            yield running
        finally:
            running.stop()


def write_modules(project: Path) -> None:
    """Modules of a user that have the names of ours and of libraries."""
    (project / "services").mkdir()
    names = ("services/__init__", "workers", "gateway", "types", "ethogram", "redis", "grpc", "numpy", "sitecustomize")
    for name in names:
        (project / f"{name}.py").write_text("raise RuntimeError('not this one')")


@pytest.fixture(scope="session")
def client(platform: Platform) -> Iterator[Client]:
    """The SDK, connected to ``platform``."""
    with Client(platform.url) as connected:
        yield connected
