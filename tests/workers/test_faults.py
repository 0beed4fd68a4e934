"""Processes are killed, paused and told to leave while a job runs; the job must not notice."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator

import psutil
import pytest
import redis as redis_client

from ethogram.errors import StaleAttempt
from ethogram.platform.stack import free_port
from services.jobs.registry import JobState
from services.jobs.signals import Bell
from tests.redis_server import start_redis
from tests.workers.stack import LEASE, Stack, gone, wait_for
from tests.workers.test_jobs import expected

STEPS, SECONDS = 40, 0.1


def test_a_killed_child_goes_on_from_its_last_checkpoint(stack: Stack) -> None:
    worker = stack.worker()
    stack.reconciler()
    job = stack.submit(STEPS, SECONDS, seed=3)
    stack.wait_checkpoint(job)
    os.kill(stack.child(worker), signal.SIGKILL)
    done = stack.wait(job)
    assert done.state is JobState.SUCCEEDED
    assert done.result is not None
    assert done.result["total"] == expected(STEPS, 3)
    assert stack.history(job) == ["QUEUED", "RUNNING", "QUEUED crashed", "RUNNING", "SUCCEEDED"]
    assert stack.begins(job)[0] == 0
    assert stack.begins(job)[1] > 0
    # The metrics are those of a run that was not interrupted: each step once.
    (row,) = (row for row in stack.registry.artifacts(job=job.id)[0] if row.name == "metrics")
    with stack.store.open(row.id, "metrics.jsonl") as file:
        assert len(file.readlines()) == STEPS


def test_cancel_while_running(stack: Stack) -> None:
    worker = stack.worker()
    job = stack.submit(10_000, SECONDS)
    stack.wait_checkpoint(job)
    child = stack.child(worker)
    assert stack.registry.request_cancel(job.id).state is JobState.CANCELLING
    assert stack.wait(job, seconds=5).state is JobState.CANCELLED
    assert gone(child)
    # The slot is free again.
    assert stack.wait(stack.submit(1)).state is JobState.SUCCEEDED


def test_cancel_of_a_job_that_does_not_listen(stack: Stack) -> None:
    worker = stack.worker("hang", grace_seconds="0.5")
    job = stack.submit()
    helper = stack.helper(job)
    child = stack.child(worker)
    stack.registry.request_cancel(job.id)
    assert stack.wait(job, seconds=8).state is JobState.CANCELLED
    assert gone(child)
    assert gone(helper), "what the job had started outlived it"


@pytest.mark.slow
def test_a_worker_told_to_leave_checkpoints_and_another_goes_on(stack: Stack) -> None:
    worker = stack.worker(checkpoint_seconds="600")
    job = stack.submit(STEPS, SECONDS, seed=5)
    wait_for("the job to be under way", lambda: stack.begins(job))
    time.sleep(5 * SECONDS)
    began = time.monotonic()
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(10) == 0
    assert time.monotonic() - began < 4, "it took long to leave"
    queued = stack.registry.get(job.id)
    assert (queued.state, queued.attempts) == (JobState.QUEUED, 0)
    assert queued.checkpoint is not None
    stack.worker()
    done = stack.wait(job)
    assert done.result is not None
    assert done.result["total"] == expected(STEPS, 5)
    assert stack.begins(job) == [0, queued.checkpoint["step"]]
    assert stack.history(job) == ["QUEUED", "RUNNING", "QUEUED stopped", "RUNNING", "SUCCEEDED"]


def test_a_worker_whose_parent_dies_leaves_in_order(stack: Stack) -> None:
    worker = stack.worker()
    job = stack.submit(10_000, SECONDS)
    stack.wait_checkpoint(job)
    child = stack.child(worker)
    assert worker.stdin is not None
    worker.stdin.close()
    assert worker.wait(10) == 0
    assert gone(child)
    assert stack.registry.get(job.id).state is JobState.QUEUED


def test_a_killed_worker_leaves_no_orphan_and_its_job_goes_on(stack: Stack) -> None:
    worker = stack.worker()
    stack.reconciler()
    job = stack.submit(STEPS, SECONDS, seed=4)
    stack.wait_checkpoint(job)
    child = stack.child(worker)
    worker.kill()
    killed = time.monotonic()
    wait_for("the child to end", lambda: gone(child), 5)
    wait_for("the attempt to be lost", lambda: "QUEUED lost" in stack.history(job))
    assert time.monotonic() - killed < 2 * LEASE + 0.5
    stack.worker()
    done = stack.wait(job)
    assert done.result is not None
    assert done.result["total"] == expected(STEPS, 4)
    assert stack.begins(job)[1] > 0
    # The second worker removed the first one's scratch folder.
    assert len(list((stack.state / "work").iterdir())) == 1


def test_a_hung_childs_helpers_die_with_the_worker_or_its_fork_server(stack: Stack) -> None:
    worker = stack.worker("hang")
    for victim in ("its fork server", "the worker"):
        job = stack.submit(max_attempts=1)
        helper = stack.helper(job)
        child = stack.child(worker)
        os.kill(worker.pid if victim == "the worker" else stack.server(worker), signal.SIGKILL)
        wait_for("child and helper to end", lambda: gone(child) and gone(helper), 8)  # noqa: B023


@pytest.mark.slow
def test_a_paused_worker_finds_itself_replaced_and_writes_nothing(stack: Stack) -> None:
    first = stack.worker()
    stack.reconciler()
    job = stack.submit(STEPS, SECONDS, seed=6)
    stack.wait_checkpoint(job)
    child = stack.child(first)
    (attempt,) = stack.registry.running_attempts()
    first.send_signal(signal.SIGSTOP)
    wait_for("the attempt to be lost", lambda: "QUEUED lost" in stack.history(job))
    with pytest.raises(StaleAttempt):
        stack.registry.set_progress(attempt.attempt, {})
    stack.worker()
    stack.wait(job, "RUNNING")
    first.send_signal(signal.SIGCONT)
    wait_for("the stale child to end", lambda: gone(child), 10)
    done = stack.wait(job)
    assert done.result is not None
    assert done.result["total"] == expected(STEPS, 6)
    events = stack.registry.events(job.id)
    taken = next(event.seq for event in events if event.data.get("reason") == "lost")
    assert all(event.attempt != attempt.attempt for event in events if event.seq > taken)
    # The one that was paused works on.
    assert first.poll() is None


@pytest.fixture
def own_redis(stack: Stack) -> Iterator[list[subprocess.Popen[bytes]]]:
    """A Redis server for this test alone, that may be killed."""
    port = free_port()
    servers = [start_redis(port, stack.state)]
    stack.redis_url = f"redis://127.0.0.1:{port}/0"
    stack.bell.close()
    stack.bell = Bell(stack.redis_url)
    yield servers
    for server in servers:
        server.kill()
        server.wait()


def test_redis_restarted_and_emptied_while_a_job_runs(stack: Stack, own_redis: list[subprocess.Popen[bytes]]) -> None:
    worker = stack.worker()
    stack.reconciler()
    running, waiting = stack.submit(STEPS, SECONDS), stack.submit(1)
    stack.wait_checkpoint(running)
    own_redis[0].kill()
    own_redis[0].wait()
    later = stack.submit(1)
    assert stack.wait(running).state is JobState.SUCCEEDED
    assert stack.wait(waiting).state is JobState.SUCCEEDED
    assert stack.wait(later).state is JobState.SUCCEEDED
    # Now the worker is idle, and only a bell wakes it.
    last = stack.submit(1)
    wait_for("a sentence that says what to do", lambda: "start it, or set REDIS_URL" in stack.said())
    port = int(stack.redis_url.rpartition(":")[2].split("/")[0])
    own_redis.append(start_redis(port, stack.state))
    assert stack.wait(last).state is JobState.SUCCEEDED
    redis_client.Redis(port=port).flushall()
    assert stack.wait(stack.submit(1)).state is JobState.SUCCEEDED
    assert worker.poll() is None


def test_a_worker_waits_for_redis_and_leaves_while_it_waits(
    stack: Stack, own_redis: list[subprocess.Popen[bytes]]
) -> None:
    own_redis[0].kill()
    own_redis[0].wait()
    worker, other = stack.worker(), stack.worker()
    job = stack.submit(1)
    wait_for("a sentence that says what to do", lambda: stack.said().count("start it, or set REDIS_URL") == 2)
    other.send_signal(signal.SIGTERM)
    assert other.wait(8) == 0
    port = int(stack.redis_url.rpartition(":")[2].split("/")[0])
    own_redis.append(start_redis(port, stack.state))
    assert stack.wait(job).state is JobState.SUCCEEDED
    assert worker.poll() is None


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"redis": "redis+cluster://127.0.0.1:7000"}, "Redis Cluster cannot carry"),
        ({"redis": "127.0.0.1:6379"}, "must look like redis://host:6379/0"),
        ({"slots": "0"}, "ETHOGRAM_SLOTS: must be greater than or equal to 1"),
    ],
)
def test_wrong_settings_are_refused_at_start(stack: Stack, settings: dict[str, str], sentence: str) -> None:
    stack.redis_url = settings.pop("redis", stack.redis_url)
    assert stack.worker(**settings).wait(15) == 2
    assert sentence in stack.said()


@pytest.mark.slow
def test_many_random_faults(stack: Stack) -> None:
    """Kills and pauses of workers and children at random moments; every job ends as if there had been none."""
    import random

    chance = random.Random(0)
    stack.reconciler()
    workers = [stack.worker(slots="2") for _ in range(2)]
    jobs = [stack.submit(30, SECONDS, seed=seed, max_attempts=50) for seed in range(10)]
    for _ in range(20):
        time.sleep(chance.uniform(0.2, 1.5))
        index = chance.randrange(len(workers))
        victim = workers[index]
        match chance.choice(["child", "worker", "pause"]):
            case "child":
                # The process of a job, or the one that starts them.
                if family := psutil.Process(victim.pid).children(recursive=True):
                    chance.choice(family).kill()
            case "worker":
                victim.kill()
                victim.wait()
                workers[index] = stack.worker(slots="2")
            case "pause":
                victim.send_signal(signal.SIGSTOP)
                time.sleep(LEASE * 1.6)
                victim.send_signal(signal.SIGCONT)
    for seed, job in enumerate(jobs):
        done = stack.wait(job, seconds=90)
        assert done.state is JobState.SUCCEEDED
        assert done.result is not None
        assert done.result["total"] == expected(30, seed)
        assert stack.history(job).count("SUCCEEDED") == 1
