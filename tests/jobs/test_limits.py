"""Running time, back-off, and writes that are repeated because their answer was lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ethogram.errors import InvalidInput
from services.jobs.registry import JobRegistry, JobState
from tests.jobs.steps import artifact_id, claim, submit

LINE = ("log", {"level": "info", "message": "hello"})


def test_running_time_adds_up_over_attempts_and_starts_anew_with_a_retry(registry: JobRegistry) -> None:
    job = submit(registry, max_attempts=2)
    first = claim(registry)
    registry.heartbeat(first.attempt, 4.0)
    # Lost: what its last heartbeat said.
    registry.release(first.attempt, "lost")
    assert registry.get(job.id).ran_seconds == 4.0
    registry.wake(job.id, 1)
    second = claim(registry)
    assert second.job.ran_seconds == 4.0
    registry.heartbeat(second.attempt, 1.0)
    registry.fail(second.attempt, {"reason": "TIME_LIMIT", "message": "too long"}, seconds=2.5)
    assert registry.get(job.id).ran_seconds == 6.5
    registry.retry(job.id)
    assert registry.get(job.id).ran_seconds == 0.0


@pytest.mark.parametrize("field", ["time_limit_seconds", "stall_limit_seconds"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), "1h"])
def test_wrong_limits(registry: JobRegistry, field: str, value: object) -> None:
    with pytest.raises(InvalidInput, match=field):
        submit(registry, **{field: value})


def test_a_back_off_ends_when_somebody_saw_it_stand_for_its_time(
    registry: JobRegistry, clock: Callable[[float], None]
) -> None:
    job = submit(registry)
    registry.release(claim(registry).attempt, "crashed")
    # The wall clock is set back: by it the job would wait for an hour.
    clock(-3600)
    assert registry.claim_next("cpu", "w", 10) is None
    (found,) = registry.backing_off()
    assert (found.job, found.queue, found.claims, found.seconds) == (job.id, "cpu", 1, 1.0)
    assert registry.wake(job.id, 0) is None, "that is another wait"
    woken = registry.wake(job.id, 1)
    assert woken is not None
    assert registry.queues_with_work() == ["cpu"]
    assert registry.backing_off() == []
    assert claim(registry).job.id == job.id
    assert registry.wake(job.id, 2) is None, "it runs"


def test_a_time_to_start_is_no_back_off(registry: JobRegistry, clock: Callable[[float], None]) -> None:
    from datetime import UTC, datetime, timedelta

    job = submit(registry, not_before=datetime.now(UTC) + timedelta(hours=1))
    assert registry.backing_off() == []
    assert registry.wake(job.id, 0) is None
    assert registry.claim_next("cpu", "w", 10) is None


def test_a_batch_that_is_repeated_is_recorded_once(registry: JobRegistry) -> None:
    job = submit(registry)
    attempt = claim(registry).attempt
    assert len(registry.append_events(attempt, [LINE, LINE], batch=1)) == 2
    assert registry.append_events(attempt, [LINE, LINE], batch=1) == []
    assert len(registry.append_events(attempt, [LINE], batch=2)) == 1
    events = registry.events(job.id)
    assert [event.seq for event in events] == list(range(1, registry.get(job.id).seq + 1))
    assert sum(event.type == "log" for event in events) == 3


def test_a_checkpoint_that_is_repeated_is_recorded_once(registry: JobRegistry) -> None:
    job = submit(registry)
    attempt = claim(registry).attempt
    first = registry.commit_checkpoint(attempt, artifact_id(1), 10)
    assert registry.commit_checkpoint(attempt, artifact_id(1), 10) == first
    registry.commit_checkpoint(attempt, artifact_id(2), 20)
    assert sum(event.type == "checkpoint" for event in registry.events(job.id)) == 2
    assert registry.get(job.id).checkpoint == {"artifact": artifact_id(2), "step": 20}


def test_an_attempt_that_stalls_is_tried_again_until_the_last(registry: JobRegistry) -> None:
    job = submit(registry, max_attempts=2)
    assert registry.release(claim(registry).attempt, "stalled", "it hung").state is JobState.QUEUED
    registry.wake(job.id, 1)
    ended = registry.release(claim(registry).attempt, "stalled", "it hung")
    assert ended.state is JobState.FAILED
    assert ended.error is not None
    assert ended.error["reason"] == "STALLED"


def test_a_retry_goes_on_or_begins_anew(registry: JobRegistry) -> None:
    job = submit(registry)
    attempt = claim(registry).attempt
    registry.commit_checkpoint(attempt, artifact_id(1), 10)
    registry.fail(attempt, {"reason": "INTERNAL", "message": "a defect"})
    assert registry.retry(job.id).checkpoint == {"artifact": artifact_id(1), "step": 10}
    registry.request_cancel(job.id)
    assert registry.retry(job.id, from_start=True).checkpoint is None
