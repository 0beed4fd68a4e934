"""What becomes of jobs when all goes well, and when it is the job that goes wrong."""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis as redis_client

from ethogram.specs.clt import ActivationsSpec
from services.jobs.registry import JobState
from services.jobs.signals import CHANNEL
from tests.clt.conftest import small_policy
from tests.workers.stack import Stack, wait_for


def expected(steps: int, seed: int = 0) -> float:
    stream, total = random.Random(seed), 0.0
    for _ in range(steps):
        total += stream.random()
    return total


def test_a_job_runs_and_all_it_said_is_there(stack: Stack) -> None:
    # Untyped.
    client: Any = redis_client.Redis.from_url(stack.redis_url)
    listener = client.pubsub()
    listener.subscribe(CHANNEL)
    worker = stack.worker(threads="3")
    job = stack.wait(stack.submit(steps=30, seconds=0.02, seed=7))

    assert job.state is JobState.SUCCEEDED, stack.said()
    assert job.result == {"total": expected(30, 7), "steps": 30, "threads": "3"}
    assert job.progress is not None
    assert job.progress["stage"] == "count"
    assert job.progress["done"] == job.progress["total"] == 30
    assert job.progress["metrics"] == {"total": expected(30, 7)}
    events = stack.registry.events(job.id)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert {event.type for event in events} == {"state", "log", "checkpoint", "artifact"}

    rows = {row.name: row for row in stack.registry.artifacts(job=job.id)[0]}
    assert rows.keys() == {"answer", "metrics"}
    with stack.store.open(rows["answer"].id, "total.txt") as file:
        assert float(file.read()) == expected(30, 7)
    manifest = stack.store.manifest(rows["answer"].id)
    assert (manifest.job, manifest.attempt, manifest.spec) == (job.id, rows["answer"].attempt, job.spec)
    with stack.store.open(rows["metrics"].id, "metrics.jsonl") as file:
        lines = [json.loads(line) for line in file]
    assert [line["step"] for line in lines] == list(range(30))
    assert lines[-1] == {"stage": "count", "step": 29, "total": expected(30, 7)}

    told = set()
    while (message := listener.get_message(timeout=0.5)) is not None:
        if message["type"] == "message":
            told.add((json.loads(message["data"])["job"], json.loads(message["data"])["seq"]))
    assert (job.id, job.seq) in told
    assert worker.poll() is None
    assert not list((stack.state / "work").glob("*/att_*"))


def test_jobs_wait_for_a_slot_and_two_slots_run_two(stack: Stack) -> None:
    stack.worker(slots="2")
    jobs = [stack.submit(steps=20, seconds=0.05) for _ in range(3)]
    done = [stack.wait(job) for job in jobs]
    assert all(job.state is JobState.SUCCEEDED for job in done)
    first, second, third = (job for job in done)
    assert first.finished_at and second.started_at and second.finished_at and third.started_at
    assert second.started_at < first.finished_at
    # Whichever of the two is done first makes room.
    assert min(first.finished_at, second.finished_at) < third.started_at


def test_a_wrong_spec_fails_at_once_with_its_violations(stack: Stack) -> None:
    stack.worker("refuse")
    job = stack.wait(stack.submit())
    assert job.state is JobState.FAILED
    assert job.attempts == 1
    assert job.error == {
        "reason": "INVALID_INPUT",
        "message": "spec.training.steps: is not to my taste",
        "violations": [{"field": "spec.training.steps", "description": "is not to my taste"}],
    }


def test_a_defect_ends_the_attempt_and_is_told_in_the_log(stack: Stack) -> None:
    stack.worker("fail")
    job = stack.wait(stack.submit(max_attempts=1))
    assert job.state is JobState.FAILED
    assert job.error is not None
    assert job.error["reason"] == "CRASHED"
    assert "RuntimeError" in job.error["message"]
    assert "a defect" not in job.error["message"]
    assert [line for line in stack.log(job) if "Traceback" in line and "RuntimeError: a defect" in line]


def test_a_killed_process_is_a_crashed_attempt_with_its_last_words(stack: Stack) -> None:
    stack.worker("die")
    stack.reconciler()
    job = stack.wait(stack.submit(max_attempts=2))
    assert job.state is JobState.FAILED
    assert job.error is not None
    assert "SIGKILL" in job.error["message"]
    assert stack.history(job) == ["QUEUED", "RUNNING", "QUEUED crashed", "RUNNING", "FAILED crashed"]
    assert [line for line in stack.log(job) if "famous last words" in line]


def test_a_system_that_does_not_load_says_why(stack: Stack) -> None:
    worker = stack.worker("tests.workers.broken:run")
    job = stack.wait(stack.submit(max_attempts=1))
    assert job.state is JobState.FAILED
    assert any("no module named tensorflow" in line for line in stack.log(job))
    # Parts of the import may be left in the fork server.
    wait_for("the fork server to end", lambda: not psutil.Process(worker.pid).children())


def test_a_module_that_cannot_be_forked_is_imported_in_a_process_of_its_own(stack: Stack) -> None:
    stack.worker("tests.workers.threaded:run")
    imports = []
    for _ in range(2):
        done = stack.wait(stack.submit(max_attempts=1))
        assert done.result is not None and "of the import" in done.result["threads"]
        (took,) = [re.findall(r"imports ([\d.]+) s", line) for line in stack.log(done) if "apart from" in line]
        imports.append(float(took[0]))
    # The first job has waited for the server's import too.
    assert imports[0] >= 0.4 and imports[1] >= 0.2
    assert stack.said().count("importing tests.workers.threaded:run started the threads of the import") == 1


def test_a_process_that_ends_before_it_serves_says_why(stack: Stack) -> None:
    stack.worker("unknown")
    job = stack.wait(stack.submit(max_attempts=1))
    assert job.state is JobState.FAILED
    assert job.error is not None and "ended before it could be given work" in job.error["message"]
    assert any("this version knows no kind 'unknown'" in line for line in stack.log(job))


def test_the_child_sees_only_what_it_may(stack: Stack, tmp_path: Path) -> None:
    stack.worker("look_around", database_url=f"sqlite:///{stack.state / 'registry.db'}")
    job, second = (stack.wait(stack.submit()) for _ in range(2))
    assert job.result is not None and second.result is not None, stack.said()
    # Nothing is left of another job's process.
    assert {**second.result, "folder": job.result["folder"]} == job.result
    assert job.result["folder"] != second.result["folder"]
    assert job.result["interrupt"] and job.result["hangup"]
    assert not [name for name in job.result["environment"] if name.startswith("ETHOGRAM") or "REDIS" in name]
    assert job.result["session"]
    assert job.result["device"] == "cpu"
    assert not job.result["torch"]
    assert job.result["folder"].startswith(str(stack.state / "work"))


def test_a_job_keeps_no_store_in_its_current_folder(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACTIVATIONS_ROOT", "stores")
    stack.start("workers", "--parent-pipe")
    small_policy().save(tmp_path / "policy")
    policy, manifest = stack.store.put(tmp_path / "policy", name="policy", type="policy")
    stack.registry.add_artifact(policy, "policy", "policy", manifest.size)
    given = {"policy": {"artifact": policy}, "instances": 20, "validation": 0.2}
    roots: list[tuple[str, dict[str, Any]]] = [("ACTIVATIONS_ROOT", {}), ("spec.root", {"root": "stores"})]
    for field, root in roots:
        job, _ = stack.registry.submit(
            "activations", ActivationsSpec.model_validate({**given, **root}), queue=stack.queue
        )
        stack.bell.ring(stack.queue)
        job = stack.wait(job)
        assert job.state is JobState.FAILED and job.error is not None
        assert f"{field}: stores must be an absolute path" in job.error["message"]


def test_a_job_starts_soon(stack: Stack) -> None:
    stack.worker()
    stack.wait(stack.submit(steps=1))
    began = time.monotonic()
    job = stack.submit(steps=200)
    while not stack.log(job):
        time.sleep(0.02)
    assert time.monotonic() - began < 4.0
