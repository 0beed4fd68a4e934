"""The parts of the embedded platform: guard, lock, Redis, a child that is started again."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from ethogram.errors import Conflict, InvalidInput, Unavailable
from ethogram.platform import guard, process, redis
from ethogram.platform.process import Child
from ethogram.platform.stack import Platform, free_port
from ethogram.platform.state import StateDir

SLEEP = [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(600)"]


def until(true: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def guarded() -> tuple[subprocess.Popen[bytes], int]:
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", guard.__file__, *SLEEP], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"here\n"
    (child,) = psutil.Process(process.pid).children()
    return process, child.pid


@pytest.mark.parametrize("how", ["end of pipe", "SIGTERM", "SIGKILL"])
def test_a_guarded_program_never_outlives_its_parent(how: str) -> None:
    process, child = guarded()
    assert process.stdin is not None
    if how == "end of pipe":
        process.stdin.close()
    else:
        process.send_signal(signal.Signals[how])
    process.wait(10)
    until(lambda: gone(child))


def test_a_state_directory_has_one_platform(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    says = f"process {os.getpid()} already runs a platform in .*another folder"
    with state.lock(), pytest.raises(Conflict, match=says):
        state.lock()
    state.lock().close()


def test_the_lock_lasts_until_the_last_child_has_left(tmp_path: Path) -> None:
    # A parent that takes the lock, leaves a child with it and is killed.
    script = f"""
import os, subprocess, sys
from pathlib import Path
from ethogram.platform.state import StateDir
lock = StateDir(Path({str(tmp_path)!r})).lock()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1.5)"], pass_fds=[lock.fileno()])
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", script])
    began = time.monotonic()
    StateDir(tmp_path).lock().close()
    assert time.monotonic() - began > 0.5


def test_the_record_of_a_dead_platform_counts_for_nothing(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    assert state.read_record() is None
    state.write_record("http://127.0.0.1:1", "127.0.0.1:2")
    assert state.read_record() is None
    with state.lock():
        record = state.read_record()
        assert record is not None
        assert record["url"] == "http://127.0.0.1:1"
        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        state.record.write_text(state.record.read_text().replace(str(os.getpid()), str(dead.pid)))
        assert state.read_record() is None
        state.record.write_text("{")
        assert state.read_record() is None
    # Its process's number may be another's by now.
    state.write_record("http://127.0.0.1:1", "127.0.0.1:2")
    assert state.read_record() is None


def test_a_state_directory_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInput, match="--state"):
        StateDir(tmp_path / "file" / "state").make()


def test_redis_runs_with_our_settings_and_a_password(tmp_path: Path) -> None:
    folder = tmp_path / 'with "quotes" and spaces'
    folder.mkdir()
    server = redis.write_settings(folder, free_port())
    assert stat.S_IMODE(server.settings.stat().st_mode) == 0o600
    child = Child("redis", [str(redis.find_server()), str(server.settings)], dict(os.environ), tmp_path / "redis.log")
    child.start()
    try:

        def answers() -> bool:
            try:
                return redis.ping(server.port, server.password)
            except Unavailable:
                return False

        until(answers)
        # Servers before Redis 7 keep one file, later ones a folder of them.
        assert any(folder.rglob("appendonly.aof*"))
        with pytest.raises(Unavailable, match=r"WRONGPASS|invalid"):
            redis.ping(server.port, "another")
        redis.check(server.url)
        with pytest.raises(Unavailable, match="start it, or correct REDIS_URL"):
            redis.check(f"redis://127.0.0.1:{server.port}/0")
    finally:
        child.terminate()
        assert child.finish(time.monotonic() + 10)


def test_a_redis_that_is_not_there_is_said() -> None:
    with pytest.raises(Unavailable, match="REDIS_URL") as caught:
        redis.check(f"redis://:secret@127.0.0.1:{free_port()}/0?client_name=secret")
    assert "secret" not in caught.value.message
    for url in ("http://127.0.0.1", "redis://127.0.0.1:99999", "redis://[::1"):
        with pytest.raises(InvalidInput, match="redis://host:6379/0"):
            redis.check(url)


def test_a_child_that_dies_is_started_again_after_ever_longer_pauses(tmp_path: Path) -> None:
    child = Child("worker", SLEEP, dict(os.environ), tmp_path / "worker.log")
    child.start()
    try:
        first = child.pid
        assert first is not None
        assert child.revive() is None
        os.kill(first, signal.SIGKILL)
        until(lambda: child.exit_code is not None)
        assert "worker ended (SIGKILL); restarting it in 0.5 s" in (child.revive() or "")
        assert child.pid is None
        until(lambda: child.revive() == "worker restarted")
        second = child.pid
        assert second not in (None, first)
        os.kill(second or 0, signal.SIGKILL)
        until(lambda: child.exit_code is not None)
        assert "in 1 s" in (child.revive() or "")
    finally:
        child.terminate()
        child.finish(time.monotonic() + 10)


def test_a_long_log_is_set_aside_while_its_process_writes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "MAX_LOG_BYTES", 1000)
    code = "import sys, time\nprint('x' * 1000, flush=True)\ntime.sleep(0.5)\nprint('later')"
    log = tmp_path / "worker.log"
    child = Child("worker", [sys.executable, "-c", code], dict(os.environ), log)
    child.start()
    until(lambda: log.stat().st_size > 1000)
    child.trim()
    assert child.finish(time.monotonic() + 10)
    assert log.read_text() == "later\n"
    assert child.logged("later")
    assert log.with_suffix(".log.1").stat().st_size == 1001


def test_ports_of_metrics_that_cannot_be_are_refused_before_anything_serves(
    tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("ETHOGRAM_METRICS_PORT", "65534")
    with (
        pytest.raises(InvalidInput, match=r"ETHOGRAM_METRICS_PORT: is 65534, .* give at most 65533"),
        Platform(StateDir(tmp_path), port=0),
    ):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the range is not in a file")
def test_no_connection_takes_a_free_port() -> None:
    first, _ = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    if int(first) < 30_000:
        pytest.skip("this machine gives connections more ports than systems do by default")
    ports = {free_port() for _ in range(50)}
    assert max(ports) < int(first)
    assert len(ports) > 40
