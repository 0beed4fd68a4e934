"""What a worker does with the job it owns."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import timedelta

import pytest

from ethogram.errors import Conflict, IllegalState, InvalidInput, NotFound, TooLarge
from services.jobs.registry import JobRegistry, JobState
from tests.jobs.steps import ERROR, artifact_id, claim, job_in, submit


def test_a_claim(registry: JobRegistry) -> None:
    job = submit(registry)
    claimed = registry.claim_next("cpu", "worker-7", 12.5)
    assert claimed is not None
    assert claimed.job.id == job.id
    assert (claimed.number, claimed.lease_seconds, claimed.job.attempts) == (1, 12.5, 1)
    assert claimed.job.state is JobState.RUNNING
    assert claimed.job.started_at is not None
    (running,) = registry.running_attempts()
    assert (running.attempt, running.job, running.queue, running.worker, running.heartbeat, running.lease_seconds) == (
        claimed.attempt,
        job.id,
        "cpu",
        "worker-7",
        0,
        12.5,
    )
    event = registry.events(job.id)[-1]
    assert (event.attempt, event.data) == (claimed.attempt, {"state": "RUNNING", "worker": "worker-7"})


def test_heartbeats_count_and_tell_of_a_cancellation(registry: JobRegistry) -> None:
    job, attempt = job_in(registry, JobState.RUNNING)
    assert attempt is not None
    assert [registry.heartbeat(attempt) for _ in range(3)] == [False] * 3
    assert registry.running_attempts()[0].heartbeat == 3
    assert registry.request_cancel(job.id).cancel_requested
    assert registry.heartbeat(attempt) is True
    assert registry.cancelled(attempt).state is JobState.CANCELLED
    assert registry.running_attempts() == []


def test_events_progress_and_checkpoints(registry: JobRegistry) -> None:
    job, attempt = job_in(registry, JobState.RUNNING)
    assert attempt is not None
    events = registry.append_events(attempt, [("log", {"message": f"line {n}"}) for n in range(5)])
    assert [event.seq for event in events] == [3, 4, 5, 6, 7]
    assert registry.append_events(attempt, []) == []
    progress = {"stage": "train", "done": 3, "total": 9, "unit": "steps", "metrics": {"loss": 0.5}}
    registry.set_progress(attempt, progress)
    checkpoint = registry.commit_checkpoint(attempt, artifact_id(1), 3)
    assert (checkpoint.seq, checkpoint.data) == (8, {"artifact": artifact_id(1), "step": 3})
    row = registry.commit_artifact(attempt, "zoo", "zoo", artifact_id(2), 77)
    assert (row.job, row.attempt, row.size, row.tenant) == (job.id, attempt, 77, "default")
    found = registry.get(job.id)
    assert (found.progress, found.checkpoint, found.seq) == (progress, {"artifact": artifact_id(1), "step": 3}, 9)
    assert registry.events(job.id, after=2) == [*events, checkpoint, registry.events(job.id)[-1]]
    assert [event.seq for event in registry.events(job.id, after=4, limit=2)] == [5, 6]
    assert registry.events(job.id, after=9) == []
    with pytest.raises(NotFound):
        registry.events("job_none")
    with pytest.raises(InvalidInput):
        registry.append_events(attempt, [("state", {"state": "SUCCEEDED"})])


def test_stray_characters_do_not_fail_a_job(registry: JobRegistry) -> None:
    job, attempt = job_in(registry, JobState.RUNNING)
    assert attempt is not None
    (event,) = registry.append_events(attempt, [("log", {"message": "a\0b\ud800", "text": "x" * 100_000})])
    assert event.data["message"] == "a\ufffdb?"
    assert len(event.data["text"]) < 17_000
    registry.set_progress(attempt, {"metrics": {"loss": math.nan, "gain": math.inf}})
    assert registry.get(job.id).progress == {"metrics": {"loss": None, "gain": None}}
    assert registry.succeed(attempt, {"text": "\0", "loss": math.nan}).result == {"text": "\ufffd", "loss": None}
    assert registry.events(job.id, after=event.seq - 1)[0] == event


def test_the_same_artifact_twice(registry: JobRegistry) -> None:
    _, attempt = job_in(registry, JobState.RUNNING)
    assert attempt is not None
    first = registry.commit_artifact(attempt, "zoo", "zoo", artifact_id(2), 77)
    seq = registry.running_attempts() and registry.get(first.job or "").seq
    assert registry.commit_artifact(attempt, "zoo", "zoo", artifact_id(2), 77) == first
    assert registry.get(first.job or "").seq == seq
    with pytest.raises(Conflict):
        registry.commit_artifact(attempt, "another", "zoo", artifact_id(2), 77)
    with pytest.raises(InvalidInput):
        registry.commit_artifact(attempt, "a/b", "zoo", artifact_id(3), 77)
    with pytest.raises(InvalidInput):
        registry.commit_artifact(attempt, "zoo", "zoo", "../../etc", 77)
    upload = registry.add_artifact(artifact_id(5), "mine", "codec", 3)
    assert registry.add_artifact(artifact_id(5), "mine", "codec", 3) == upload
    assert registry.artifact(artifact_id(5)) == upload
    with pytest.raises(NotFound):
        registry.artifact(artifact_id(6))


def test_results(registry: JobRegistry) -> None:
    _, attempt = job_in(registry, JobState.RUNNING)
    assert attempt is not None
    with pytest.raises(TooLarge):
        registry.succeed(attempt, {"text": "x" * 2_000_000})
    job = registry.succeed(attempt, {"accuracy": 0.25, "subjects": 3, "none": None})
    assert job.result == {"accuracy": 0.25, "subjects": 3, "none": None}
    assert job.finished_at is not None
    _, attempt = job_in(registry, JobState.RUNNING)
    assert registry.fail(attempt or "", {"message": "no"}).error == {
        "reason": "INTERNAL",
        "message": "no",
        "violations": [],
    }


def test_crashes_wait_longer_each_time_and_then_fail(registry: JobRegistry, clock: Callable[[float], None]) -> None:
    job = submit(registry, max_attempts=12)
    waits, now = [], 0.0
    for number in range(1, 12):
        claimed = claim(registry)
        assert (claimed.number, claimed.job.attempts) == (number, number)
        registry.commit_checkpoint(claimed.attempt, artifact_id(number), number)
        released = registry.release(claimed.attempt, "crashed", "exit code 137")
        assert released.state is JobState.QUEUED
        waits.append(registry.events(job.id)[-1].data["retry_in_seconds"])
        assert registry.claim_next("cpu", "w", 10) is None
        assert registry.queues_with_work() == []
        now += waits[-1] + 0.001
        clock(now)
        assert registry.queues_with_work() == ["cpu"]
    assert waits == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]
    last = claim(registry)
    assert last.job.checkpoint == {"artifact": artifact_id(11), "step": 11}
    failed = registry.release(last.attempt, "lost", "no heartbeat")
    assert failed.state is JobState.FAILED
    assert failed.error is not None
    assert failed.error["reason"] == "LOST"
    assert "all its 12 attempts" in failed.error["message"]
    assert "no heartbeat" in failed.error["message"]


def test_a_worker_that_leaves_in_order_costs_nothing(registry: JobRegistry) -> None:
    submit(registry, max_attempts=1)
    for number in range(1, 4):
        claimed = claim(registry)
        assert (claimed.number, claimed.job.attempts) == (number, 1)
        assert registry.release(claimed.attempt, "stopped").attempts == 0
    assert registry.release(claim(registry).attempt, "crashed").state is JobState.FAILED


def test_retry_goes_on_from_the_checkpoint(registry: JobRegistry) -> None:
    job = submit(registry, max_attempts=1)
    first = claim(registry)
    registry.set_progress(first.attempt, {"stage": "train"})
    registry.commit_checkpoint(first.attempt, artifact_id(1), 40)
    assert registry.fail(first.attempt, ERROR).error == ERROR
    again = registry.retry(job.id)
    assert (again.attempts, again.error, again.finished_at, again.progress) == (0, None, None, None)
    second = claim(registry)
    assert (second.number, second.job.attempts) == (2, 1)
    assert second.job.checkpoint == {"artifact": artifact_id(1), "step": 40}
    with pytest.raises(IllegalState):
        registry.retry(job.id)


def test_retry_after_cancel_forgets_the_cancellation(registry: JobRegistry) -> None:
    job, _ = job_in(registry, JobState.CANCELLED)
    assert not registry.retry(job.id).cancel_requested
    assert registry.heartbeat(claim(registry).attempt) is False


def test_release_of_an_unknown_sort(registry: JobRegistry) -> None:
    _, attempt = job_in(registry, JobState.RUNNING)
    with pytest.raises(InvalidInput):
        registry.release(attempt or "", "bored")  # type: ignore[arg-type]


def test_a_retry_starts_without_the_old_delay(registry: JobRegistry) -> None:
    job = submit(registry)
    delayed = registry.release(claim(registry).attempt, "crashed")
    assert delayed.not_before is not None
    assert delayed.not_before - delayed.created_at < timedelta(minutes=1)
    registry.request_cancel(job.id)
    registry.retry(job.id)
    assert claim(registry).job.id == job.id
