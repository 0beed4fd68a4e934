"""``python -m gateway`` as a process: how it starts, says what is wrong, and leaves."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from tests.gateway.running import GENERATION


@contextmanager
def process(state: Path, redis_url: str, *arguments: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {
        "ETHOGRAM_STATE": str(state),
        "ETHOGRAM_PORT": "0",
        "REDIS_URL": redis_url,
        **env,
    }
    for name in ("ETHOGRAM_DATABASE_URL", "ETHOGRAM_STORE"):
        environment.pop(name, None)
    child = subprocess.Popen(
        [sys.executable, "-m", "gateway", *arguments],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def url_of(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    line = child.stdout.readline()
    assert line.startswith("gateway ready at http://127.0.0.1:"), line
    return line.split()[-1]


@pytest.mark.parametrize("way", ["term", "interrupt", "parent"])
def test_leaves_in_order(tmp_path: Path, redis_url: str, way: str) -> None:
    arguments = ["--parent-pipe"] if way == "parent" else []
    with process(tmp_path, redis_url, *arguments) as child:
        url = url_of(child)
        with httpx.Client(base_url=url, trust_env=False) as http:
            assert http.get("/readyz").json()["status"] == "ready"
            job = http.post("/v1/jobs", json=GENERATION).json()["id"]
            with http.stream("GET", f"/v1/jobs/{job}/events") as response:
                chunks = response.iter_raw()
                next(chunks)
                began = time.monotonic()
                if way == "parent":
                    assert child.stdin is not None
                    child.stdin.close()
                    child.stdin = None
                else:
                    child.send_signal(signal.SIGTERM if way == "term" else signal.SIGINT)
                # The open stream ends whole, not cut.
                assert b"event: end" not in b"".join(chunks)
        assert child.wait(5) == 0
        assert time.monotonic() - began < 3


def test_a_database_of_an_earlier_run_and_time_to_start(tmp_path: Path, redis_url: str) -> None:
    times = []
    for run in range(2):
        began = time.monotonic()
        with process(tmp_path, redis_url) as child:
            url = url_of(child)
            times.append(time.monotonic() - began)
            jobs = httpx.get(f"{url}/v1/jobs", trust_env=False).json()["items"]
            assert len(jobs) == run
            httpx.post(f"{url}/v1/jobs", json=GENERATION, trust_env=False)
    # Two seconds when the machine is free; tests share it.
    assert min(times) < 5, times


@pytest.mark.slow
def test_what_a_killed_gateway_held_of_an_upload_is_removed(tmp_path: Path, redis_url: str) -> None:
    with process(tmp_path, redis_url) as child:
        url_of(child)
        (held,) = (tmp_path / "work").iterdir()
        (held / "upload-1").mkdir()
        with process(tmp_path, redis_url) as other:
            url_of(other)
            assert (held / "upload-1").exists(), "its owner lives"
            child.kill()
            child.wait()
    with process(tmp_path, redis_url) as child:
        url_of(child)
        assert not held.exists()


def test_port_taken(tmp_path: Path, redis_url: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with process(tmp_path, redis_url, ETHOGRAM_PORT=str(port)) as child:
            _, error = child.communicate(timeout=20)
    assert child.returncode == 1
    assert error.strip().splitlines()[-1] == (
        f"gateway: port {port} on 127.0.0.1 is taken; set ETHOGRAM_PORT to another, or to 0 for any free one"
    )


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"ETHOGRAM_PORT": "x"}, "ETHOGRAM_PORT"),
        ({"ETHOGRAM_LOG_LEVEL": "loud"}, "ETHOGRAM_LOG_LEVEL"),
        ({"REDIS_URL": "redis://h:99999"}, "REDIS_URL"),
        ({"REDIS_URL": "redis+cluster://h:1"}, "REDIS_URL"),
        ({"ETHOGRAM_HOST": "203.0.113.9"}, "ETHOGRAM_HOST"),
    ],
)
def test_wrong_settings(tmp_path: Path, redis_url: str, env: dict[str, str], said: str) -> None:
    with process(tmp_path, env.pop("REDIS_URL", redis_url), **env) as child:
        _, error = child.communicate(timeout=20)
    assert child.returncode == 1
    last = error.strip().splitlines()[-1]
    assert last.startswith("gateway: ") and said in last, error


def test_what_kubernetes_sets_for_services_is_ignored(tmp_path: Path, redis_url: str) -> None:
    """For Services named ``ethogram``, ``ethogram-inference`` and ``ethogram-state``."""
    links = {
        f"ETHOGRAM_{service}{name}": value
        for service in ("", "INFERENCE_", "STATE_")
        for name, value in {
            "SERVICE_HOST": "10.0.0.1",
            "SERVICE_PORT": "80",
            "SERVICE_PORT_HTTP": "80",
            "PORT": "tcp://10.0.0.1:80",
            "PORT_80_TCP": "tcp://10.0.0.1:80",
            "PORT_80_TCP_PROTO": "tcp",
            "PORT_80_TCP_PORT": "80",
            "PORT_80_TCP_ADDR": "10.0.0.1",
        }.items()
    }
    with socket.socket() as taken:
        # Nothing is started twice on the default port, whoever has it.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with suppress(OSError):
            taken.bind(("127.0.0.1", 8321))
            taken.listen()
        with process(tmp_path, redis_url, **links) as child:
            _, error = child.communicate(timeout=20)
    assert "ETHOGRAM_PORT is ignored: tcp://10.0.0.1:80 is the address of a Kubernetes Service" in error
    assert error.strip().splitlines()[-1].startswith("gateway: port 8321 on 127.0.0.1 is taken")


def test_imports_nothing_heavy() -> None:
    code = (
        "import sys, gateway.app, gateway.__main__; "
        "print([m for m in ('torch', 'datasets', 'celery', 'alembic', 'grpc', 'numpy', 'fsspec') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"


def test_not_ready_names_what_is_missing(tmp_path: Path, redis_url: str) -> None:
    with process(tmp_path, redis_url) as child:
        url = url_of(child)
        (tmp_path / "store" / "tmp").rmdir()
        (tmp_path / "store" / "tmp").write_text("in the way")
        answer = httpx.get(f"{url}/readyz", trust_env=False)
        assert answer.status_code == 503
        assert [check["name"] for check in answer.json()["checks"] if not check["ok"]] == ["store"]
        assert httpx.get(f"{url}/healthz", trust_env=False).status_code == 200
