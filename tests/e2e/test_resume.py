"""A crossmodal job whose process is killed in mid-training ends with the very same codec."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from ethogram.client import Client
from ethogram.platform.stack import Platform
from ethogram.platform.state import StateDir
from ethogram.resources import Job

ZOO = {
    "subjects": 64,
    "vocab_size": 5,
    "sequence_length": 4,
    "patterns": [{"name": "starts_with", "token": "A"}, {"name": "ends_with", "token": "B"}],
    "max_patterns_per_batch": 2,
    "training": {"steps": 150},
    "signature": {"probes": 32},
    "min_accuracy": 0.5,
}
CODEC = {
    "codec": {"latent_dim": 16, "hidden_dim": 32, "depth": 1},
    "training": {"steps": 300, "batch_size": 16, "queries": 32},
}


def codec_of(client: Client, job: Job) -> dict[str, str]:
    manifest = client.artifact(client.output(job.id, "codec").id).manifest
    assert manifest is not None
    return {name: file.sha256 for name, file in manifest.files.items()}


def kill_child(platform: Platform) -> None:
    """Kill the process that runs the job: the worker's only child."""
    worker = platform.children["worker"].pid
    assert worker is not None
    (child,) = psutil.Process(worker).children()
    child.kill()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_killed_in_mid_training_ends_with_the_same_codec(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    state: Path = tmp_path_factory.mktemp("resume")
    monkeypatch.delenv("REDIS_URL", raising=False)
    monkeypatch.setenv("ETHOGRAM_CHECKPOINT_SECONDS", "0.5")
    monkeypatch.setenv("ETHOGRAM_THREADS", "1")
    with Platform(StateDir(state)) as platform, Client(platform.url) as client:
        zoo = client.wait(client.submit("generation", ZOO).id).check()
        spec: dict[str, Any] = {**CODEC, "zoo": {"job": zoo.id, "artifact": "zoo"}}
        whole = client.wait(client.submit("crossmodal", spec).id).check()
        job = client.submit("crossmodal", spec)
        killed_at = None
        for event in client.events(job.id):
            if killed_at is None and event.type == "checkpoint" and 0 < event.data["step"] < 280:
                kill_child(platform)
                killed_at = event.data["step"]
        resumed = client.job(job.id).check()
        assert killed_at is not None
        assert (whole.attempts, resumed.attempts) == (1, 2)
        assert codec_of(client, resumed) == codec_of(client, whole)
        assert resumed.result == whole.result


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_platform_that_stops_takes_its_job_up_again(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    state: Path = tmp_path_factory.mktemp("restart")
    monkeypatch.delenv("REDIS_URL", raising=False)
    monkeypatch.setenv("ETHOGRAM_CHECKPOINT_SECONDS", "0.5")
    monkeypatch.setenv("ETHOGRAM_THREADS", "1")
    long = {**ZOO, "subjects": 100_000, "min_accuracy": 0.0}
    with Platform(StateDir(state)) as platform, Client(platform.url) as client:
        job = client.submit("generation", long)
        next(event for event in client.events(job.id) if event.type == "checkpoint")
    with Platform(StateDir(state)) as platform, Client(platform.url) as client:
        deadline = time.monotonic() + 60
        while (now := client.job(job.id)).state != "RUNNING" or not now.progress or not now.progress["done"]:
            assert time.monotonic() < deadline, now
            time.sleep(0.1)
        # A platform that is stopped costs a job none of its attempts.
        assert now.attempts <= 2
        assert now.checkpoint is not None
        client.cancel(job.id)
        assert client.wait(job.id).state == "CANCELLED"
