"""``ethogram up`` as a process: what it starts, says, restarts, and that it leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from ethogram.client import Client
from ethogram.platform.stack import free_port
from ethogram.platform.state import StateDir
from tests.conftest import write_modules
from tests.platform.test_parts import gone, until

UP_SECONDS = 8.0


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ETHOGRAM_")}
    kept.pop("REDIS_URL", None)
    return kept | more


def command(*arguments: str) -> list[str]:
    # As the installed command: without the current folder on the path.
    return [sys.executable, "-P", "-c", "from ethogram.cli.main import run; run()", *arguments]


@contextmanager
def up(state: Path, *more: str, **env: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A platform as its own process, and what it said of itself."""
    process = subprocess.Popen(
        command("up", "--state", str(state), "--port", "0", "--json", *more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**env),
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.stderr.read() if process.stderr else ""
        yield process, json.loads(line)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(40)


def tree(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def leftovers(state: Path) -> list[int]:
    """Processes that were told of this state directory."""
    found = []
    for process in psutil.process_iter():
        try:
            told = process.environ().get("ETHOGRAM_STATE") == str(state) or str(state) in " ".join(process.cmdline())
        except psutil.Error:
            continue
        if told and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_a_signal_takes_everything_down_in_order(tmp_path: Path, number: signal.Signals) -> None:
    with up(tmp_path) as (process, said):
        assert httpx.get(f"{said['url']}/readyz", trust_env=False).status_code == 200
        assert said["docs"] == f"{said['url']}/docs"
        assert all(Path(log).is_file() for log in said["logs"].values())
        record = json.loads((tmp_path / "platform.json").read_text())
        assert (record["pid"], record["url"], record["inference"]) == (process.pid, said["url"], said["inference"])
        running = tree(process.pid)
        # Redis and its guard, gateway, worker, reconciler, inference.
        assert len(running) >= 6
        process.send_signal(number)
        assert process.wait(40) == 0
        assert [pid for pid in running if not gone(pid)] == []
        assert process.stderr is not None
        assert "killed" not in process.stderr.read()
    assert not (tmp_path / "platform.json").exists()


@pytest.mark.slow
def test_nothing_is_left_when_the_parent_is_killed_and_the_next_one_starts(tmp_path: Path) -> None:
    with up(tmp_path) as (process, said):
        client = Client(said["url"])
        job = client.submit("generation", {}, queue="nobody")
        running = tree(process.pid)
        process.kill()
        process.wait()
        until(lambda: all(gone(pid) for pid in running), 30)
        assert leftovers(tmp_path) == []
    # Its record is still there and counts for nothing; what was submitted is kept.
    assert (tmp_path / "platform.json").exists()
    with up(tmp_path) as (_, said), Client(said["url"]) as client:
        assert client.job(job.id).state == "QUEUED"
    assert leftovers(tmp_path) == []


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """One whose current folder is a project with modules of the names of ours."""
    project = tmp_path_factory.mktemp("project")
    write_modules(project)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        with up(tmp_path_factory.mktemp("state")) as (process, said):
            patch.undo()
            yield process, said


def test_processes_that_die_are_started_again(running: tuple[subprocess.Popen[str], dict[str, Any]]) -> None:
    process, said = running
    before = tree(process.pid)
    for child in map(psutil.Process, before):
        if "guard" not in " ".join(child.cmdline()):
            child.kill()
    spoken = ""

    def all_said() -> bool:
        nonlocal spoken
        spoken += said_on(process)
        return all(f"{name} ended" in spoken for name in ("redis", "gateway", "worker", "reconciler", "inference"))

    until(all_said, 10)
    assert "restarting it in 0.5 s; its log: " in spoken

    def whole() -> bool:
        try:
            ready = httpx.get(f"{said['url']}/readyz", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False
        return ready and len(tree(process.pid)) >= len(before)

    until(whole, 30)
    assert not set(tree(process.pid)) & set(before)
    with Client(said["url"]) as client:
        assert client.info()["inference"] == said["inference"]


def said_on(process: subprocess.Popen[str]) -> str:
    """What is on the standard error of ``process`` by now, without waiting for more."""
    assert process.stderr is not None
    os.set_blocking(process.stderr.fileno(), False)
    try:
        return os.read(process.stderr.fileno(), 65536).decode()
    except BlockingIOError:
        return ""


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=60, env=environment(**env), check=False
    )


def test_modules_of_the_users_own_are_not_mistaken_for_ours(
    running: tuple[subprocess.Popen[str], dict[str, Any]],
) -> None:
    """Every process is started in the user's current folder, and again after it died."""
    process, said = running
    assert Path(psutil.Process(process.pid).cwd(), "services", "__init__.py").exists()
    run_a_job(said["url"])


def run_a_job(url: str) -> None:
    with Client(url) as client:
        job = client.submit("generation", {"subjects": 4, "min_accuracy": 0.0, "training": {"steps": 5}})
        assert client.wait(job.id).check().state == "SUCCEEDED"


def test_a_second_platform_says_who_has_the_directory(
    running: tuple[subprocess.Popen[str], dict[str, Any]],
) -> None:
    process, said = running
    second = run("up", "--state", said["state"], "--port", "0")
    assert second.returncode == 1
    assert f"process {process.pid} already runs a platform" in second.stderr
    assert said["url"] in second.stderr
    assert "Traceback" not in second.stderr
    found = json.loads(run("doctor", "--state", said["state"], "--json").stdout)
    assert said["url"] in next(item["found"] for item in found if item["name"] == "state")


def test_a_taken_port_is_said_and_nothing_is_left(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        answer = run("up", "--state", str(tmp_path), "--port", str(port))
    assert answer.returncode == 1
    assert f"port {port} cannot be used" in answer.stderr
    assert "--port 0" in answer.stderr
    assert leftovers(tmp_path) == []


def test_a_redis_that_is_gone_is_said(tmp_path: Path) -> None:
    answer = run("up", "--state", str(tmp_path), "--port", "0", REDIS_URL=f"redis://127.0.0.1:{free_port()}/0")
    assert answer.returncode == 1
    assert "correct REDIS_URL" in answer.stderr
    assert leftovers(tmp_path) == []


@pytest.mark.slow
def test_the_users_own_redis_is_used(tmp_path: Path, redis_url: str) -> None:
    with up(tmp_path, REDIS_URL=redis_url) as (process, said):
        assert not any("redis-server" in " ".join(psutil.Process(pid).cmdline()) for pid in tree(process.pid))
        assert "redis" not in said["logs"]


def test_a_broken_registry_is_said_with_the_log(tmp_path: Path) -> None:
    StateDir(tmp_path).make()
    (tmp_path / "registry.db").write_bytes(b"this is no database, " * 100)
    answer = run("up", "--state", str(tmp_path), "--port", "0")
    assert answer.returncode == 1
    assert "ended while the platform started" in answer.stderr
    assert "the end of its log" in answer.stderr
    assert leftovers(tmp_path) == []


def test_interrupted_while_it_starts_it_leaves_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command("up", "--state", str(tmp_path), "--port", "0"), env=environment(), stderr=subprocess.PIPE, text=True
    )
    until((tmp_path / "logs" / "gateway.log").exists, 10)
    process.send_signal(signal.SIGINT)
    process.wait(40)
    assert leftovers(tmp_path) == []


def test_the_doctor_names_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    answer = run("doctor", "--state", str(tmp_path / "file" / "state"), REDIS_URL="redis://127.0.0.1:1/0")
    assert answer.returncode == 1
    assert "cannot be written" in answer.stdout
    assert "correct REDIS_URL" in answer.stdout


@pytest.mark.slow
def test_it_is_up_within_the_bar(tmp_path: Path) -> None:
    began = time.monotonic()
    with up(tmp_path) as (_, said):
        assert said["seconds"] <= UP_SECONDS
        assert time.monotonic() - began <= UP_SECONDS + 1
