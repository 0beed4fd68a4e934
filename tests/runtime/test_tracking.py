"""Weights & Biases: what is kept or sent is what was logged, and nothing that fails there ends a run."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal
from unittest.mock import Mock

import pytest

from ethogram.specs.base import WandbSpec
from services.artifacts.store import ArtifactStore
from services.runtime import tracking
from services.runtime.console import ConsoleRun
from services.runtime.run import Cancelled, Stopped, Waiting
from services.runtime.tracking import tracked
from tests.recorder import Recorder
from tests.runtime import killed
from tests.runtime.test_training import ToyTrainer
from tests.wandb_server import KEY, serve

SPEC = WandbSpec(project="zoos", name="mine")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    # On a busy machine a service on loopback is slow too.
    monkeypatch.setattr(tracking, "START_SECONDS", 60.0)
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 3.0)


def payload(log: bytes) -> bytes:
    """The bytes of a LevelDB log's records, which are cut into fragments where a block of 32 KiB ends. A fragment is a
    checksum of four bytes, a length of two, a type, and its bytes; W&B's file has seven bytes before the first."""
    kept, position = b"", 7
    while position + 7 <= len(log):
        size = int.from_bytes(log[position + 4 : position + 6], "little")
        kept += log[position + 7 : position + 7 + size]
        position += 7 + size
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
    return kept


def logged(folder: Path) -> list[str]:
    """The losses in the one run that ``folder``, kept for ``wandb sync``, has."""
    (file,) = folder.glob("*run-*/*.wandb")
    assert not [path for path in folder.rglob("*") if path.is_symlink()]
    found = re.findall(rb"loss.{0,9}?(0\.\d+)", payload(file.read_bytes()), re.DOTALL)
    # The summary repeats the last.
    return [value.decode() for value in dict.fromkeys(found)]


def test_without_credentials_it_is_kept_to_be_sent_later(tmp_path: Path) -> None:
    run = Recorder(tmp_path)
    with tracked(SPEC, {"seed": 3}, run) as log:
        log(1, {"loss": 0.515625})
        log(2, {"loss": 0.2578125, "density": ([1, 2], [0.0, 0.5, 1.0])})
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    kept = payload(file.read_bytes())
    assert all(text in kept for text in (b"zoos", b"mine", b"loss", b"0.515625", b"0.2578125", b"histogram"))
    assert logged(tmp_path / "wandb")[:2] == ["0.515625", "0.2578125"]
    assert run.logs == []
    # The store takes plain files alone.
    ArtifactStore(str(tmp_path / "store")).put(tmp_path / "wandb", name="wandb", type="wandb")


@pytest.mark.parametrize(("mode", "kept"), [("offline", True), ("disabled", False)])
def test_the_spec_says_where_metrics_go(
    mode: Literal["offline", "disabled"], kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the environment says."""
    monkeypatch.setenv("WANDB_MODE", "offline" if mode == "disabled" else "online")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with tracked(WandbSpec(project="zoos", mode=mode), {}, Recorder(tmp_path)) as log:
        log(1, {"loss": 0.5})
    assert any((tmp_path / "wandb").glob("offline-run-*/*.wandb")) == kept


@pytest.mark.parametrize("end", [Cancelled, Stopped, Waiting])
def test_the_end_of_a_run_is_no_fault_of_the_service(
    end: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_start", Mock(side_effect=end))
    with pytest.raises(end), tracked(SPEC, {}, Recorder(tmp_path)):
        pass


def test_without_a_spec_nothing_happens(tmp_path: Path) -> None:
    with tracked(None, {}, Recorder(tmp_path)) as log:
        log(1, {"loss": 0.5})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("variables", "warning"),
    [
        ({"WANDB_MODE": "Offline"}, None),
        ({"WANDB_MODE": " DRYRUN "}, None),
        ({"WANDB_MODE": "off-line"}, "WANDB_MODE=off-line is none of online, run, offline"),
        ({"WANDB_MODE": "Online"}, "No API key configured"),
        ({"WANDB_API_KEY": "short"}, "WANDB_API_KEY invalid"),
        ({"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}, "connection refused"),
        ({"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "nowhere"}, "cannot be used"),
        ({"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "SILENT"}, "cannot be used"),
    ],
)
def test_where_the_service_cannot_be_used_metrics_are_kept_within_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], warning: str | None
) -> None:
    monkeypatch.setattr(tracking, "START_SECONDS", 2.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        for name, value in variables.items():
            address = f"http://127.0.0.1:{silent.getsockname()[1]}"
            monkeypatch.setenv(name, value.replace("SILENT", address))
        run, began = Recorder(tmp_path), time.monotonic()
        with tracked(SPEC, {}, run, "abc") as log:
            log(1, {"loss": 0.515625})
        assert time.monotonic() - began < 60
    assert run.levels == ["warning"] * (warning is not None), run.logs
    assert warning is None or warning.lower() in run.logs[0].lower()
    assert logged(tmp_path / "wandb")[:1] == ["0.515625"]


def test_a_mode_that_is_disabled_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "Disabled")
    run = Recorder(tmp_path)
    with tracked(SPEC, {}, run) as log:
        log(1, {"loss": 0.5})
    assert (run.artifacts, run.logs, log.id) == ([], [], None)


def test_the_service_gets_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve() as service:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", service.url)
        run = Recorder(tmp_path)
        for steps in (range(1, 4), range(1, 6)):
            # The second attempt repeats what the first may not have sent.
            with tracked(SPEC, {}, run, "abc") as log:
                for step in steps:
                    log(step, {"loss": 1 / 2**step})
        assert run.logs == []
        assert service.rows("abc") == [(step, 1 / 2**step) for step in range(1, 6)]
        assert list(service.history) == ["abc"] and run.artifacts == []

        service.status = 401
        with tracked(SPEC, {}, run, "denied") as log:
            log(1, {"loss": 0.25})
        assert run.artifacts == [("wandb", "wandb")] and len(run.logs) == 1 and "cannot be used" in run.logs[0]


def test_a_service_that_goes_away_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Recorder(tmp_path)
    with serve() as service:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", service.url)
        with tracked(SPEC, {}, run, "abc") as log:
            log(1, {"loss": 0.515625})
            service.status = 503
            log(2, {"loss": 0.2578125})
    assert run.levels == ["warning"] and "did not take all metrics" in run.logs[0]
    assert logged(tmp_path / "wandb")[:2] == ["0.515625", "0.2578125"]


def test_a_client_that_dies_ends_no_run(tmp_path: Path) -> None:
    run = Recorder(tmp_path)
    with tracked(SPEC, {}, run, "abc") as log:
        log(1, {"loss": 0.5})
        found = subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "wandb-core"], capture_output=True, text=True)
        for process in found.stdout.split():
            os.kill(int(process), signal.SIGKILL)
        time.sleep(0.5)
        for step in range(2, 5):
            log(step, {"loss": 0.5})
    assert set(run.levels) == {"warning"} and "takes no more metrics" in run.logs[0]
    # The next run in this process has a client of its own.
    after = Recorder(tmp_path / "next")
    with tracked(SPEC, {}, after, "next") as log:
        log(1, {"loss": 0.515625})
    assert logged(tmp_path / "next" / "wandb")[:1] == ["0.515625"] and after.logs == []


def test_files_of_a_killed_attempt_are_replaced_by_the_whole_run(tmp_path: Path) -> None:
    mine = tmp_path / "wandb" / "offline-run-20200101_000000-other"
    mine.mkdir(parents=True)
    (tmp_path / "wandb" / "offline-run-20200101_000000-abc").mkdir()
    with ConsoleRun(tmp_path) as run, tracked(SPEC, {}, run, "abc") as log:
        log(1, {"loss": 0.515625})
    assert mine.exists() and len(list((tmp_path / "wandb").glob("*-abc"))) == 1
    mine.rmdir()
    assert logged(tmp_path / "wandb")[:1] == ["0.515625"]
    assert json.dumps(sorted(run.artifacts)) == '[["wandb", "wandb"]]'


@pytest.mark.parametrize("checkpoints", ["often", pytest.param("never", marks=pytest.mark.slow)])
def test_after_a_kill_all_steps_are_in_one_run(tmp_path: Path, checkpoints: str) -> None:
    command = [sys.executable, "-m", "tests.runtime.killed", str(tmp_path / "run"), checkpoints]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    # What was logged until then is in the run's own folder, not in one that went with the process.
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 1
    assert (tmp_path / "run" / "checkpoint").exists() is (checkpoints == "often")
    id = killed.train(tmp_path / "run", ToyTrainer)
    assert [path.name.rpartition("-")[2] for path in (tmp_path / "run" / "wandb").glob("offline-run-*")] == [id]
    killed.train(tmp_path / "whole", ToyTrainer)
    assert logged(tmp_path / "run" / "wandb") == logged(tmp_path / "whole" / "wandb")
