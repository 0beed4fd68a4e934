"""What happens to the jobs that wait when the job they wait for ends."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ethogram.errors import IllegalState
from services.jobs.registry import Job, JobRegistry, JobState
from tests.jobs.steps import ERROR, artifact_id, claim, codec, finish, zoo


def chain(registry: JobRegistry) -> dict[str, Job]:
    """b needs a, c needs b, and d needs a."""
    return registry.submit_pipeline(
        {
            "a": ("generation", zoo(), {}),
            "b": ("crossmodal", codec("a"), {}),
            "c": ("crossmodal", codec("b"), {}),
            "d": ("crossmodal", codec("a"), {}),
        }
    )[0]


def states(registry: JobRegistry, jobs: dict[str, Job]) -> list[str]:
    return [registry.get(job.id).state for job in jobs.values()]


def test_success_releases_those_that_wait(registry: JobRegistry) -> None:
    jobs = chain(registry)
    assert registry.queues_with_work() == ["cpu"]
    claimed = claim(registry)
    assert registry.queues_with_work() == []
    finish(registry, claimed, 1)
    first, second = claim(registry), claim(registry)
    assert [first.job.id, second.job.id] == [jobs["b"].id, jobs["d"].id]
    assert first.job.inputs == {"zoo": artifact_id(1)}
    assert registry.claim_next("cpu", "w", 10) is None
    finish(registry, first, 2)
    assert claim(registry).job.inputs == {"zoo": artifact_id(2)}


def test_failure_takes_them_along(registry: JobRegistry) -> None:
    jobs = chain(registry)
    registry.fail(claim(registry).attempt, ERROR)
    assert states(registry, jobs) == ["FAILED"] * 4
    for name, cause in (("b", "a"), ("c", "b"), ("d", "a")):
        job = registry.get(jobs[name].id)
        assert job.error is not None
        assert job.error["reason"] == "INPUT_FAILED"
        assert job.error["message"].startswith(f"input job {jobs[cause].id} failed: the zoo is empty")
        assert job.error["violations"][0]["field"] == "spec.zoo"
        assert job.finished_at is not None
        assert job.waits_for == []
        assert registry.events(job.id)[-1].data["state"] == "FAILED"


def test_cancelling_takes_them_along(registry: JobRegistry) -> None:
    jobs = chain(registry)
    registry.request_cancel(jobs["a"].id)
    assert states(registry, jobs) == ["CANCELLED"] * 4
    error = registry.get(jobs["c"].id).error
    assert error is not None
    assert "was cancelled" in error["message"]


def test_cancelling_one_that_waits_leaves_its_inputs_alone(registry: JobRegistry) -> None:
    jobs = chain(registry)
    registry.request_cancel(jobs["b"].id)
    assert states(registry, jobs) == ["QUEUED", "CANCELLED", "CANCELLED", "QUEUED"]
    finish(registry, claim(registry))
    assert states(registry, jobs) == ["SUCCEEDED", "CANCELLED", "CANCELLED", "QUEUED"]


def test_an_output_that_was_not_made(registry: JobRegistry) -> None:
    jobs = chain(registry)
    finish(registry, claim(registry), name="something")
    assert states(registry, jobs) == ["SUCCEEDED", "FAILED", "FAILED", "FAILED"]
    error = registry.get(jobs["b"].id).error
    assert error is not None
    assert "finished without an artifact named 'zoo'; it made: something" in error["message"]


def test_attempts_used_up_take_them_along(registry: JobRegistry, clock: Callable[[float], None]) -> None:
    jobs = chain(registry)
    for number in range(3):
        clock(1000.0 * number)
        registry.release(claim(registry).attempt, "crashed", "exit code 9")
    assert states(registry, jobs) == ["FAILED"] * 4


def test_retry_in_order(registry: JobRegistry) -> None:
    jobs = chain(registry)
    registry.fail(claim(registry).attempt, ERROR)
    with pytest.raises(IllegalState, match="has failed: retry it first"):
        registry.retry(jobs["b"].id)
    registry.retry(jobs["a"].id)
    again = registry.retry(jobs["b"].id)
    assert (again.state, again.waits_for, again.error) == (JobState.QUEUED, [jobs["a"].id], None)
    finish(registry, claim(registry), 4)
    assert claim(registry).job.id == jobs["b"].id
    # Its input is there already when it is retried.
    ready = registry.retry(jobs["d"].id)
    assert (ready.inputs, ready.waits_for) == ({"zoo": artifact_id(4)}, [])
    assert claim(registry).job.id == jobs["d"].id


def test_a_late_start_still_holds_after_the_input_came(registry: JobRegistry, clock: Callable[[float], None]) -> None:
    from datetime import UTC, datetime, timedelta

    later = datetime.now(UTC) + timedelta(hours=1)
    registry.submit_pipeline(
        {"a": ("generation", zoo(), {}), "b": ("crossmodal", codec("a"), {"not_before": later.isoformat()})}
    )
    finish(registry, claim(registry))
    assert registry.claim_next("cpu", "w", 10) is None
    clock(3601)
    assert registry.queues_with_work() == ["cpu"]
    assert claim(registry).job.inputs == {"zoo": artifact_id(1)}


def test_the_last_attempts_output_is_the_one(registry: JobRegistry, clock: Callable[[float], None]) -> None:
    jobs = chain(registry)
    first = claim(registry)
    registry.commit_artifact(first.attempt, "zoo", "zoo", artifact_id(1), 10)
    registry.release(first.attempt, "crashed")
    clock(60)
    finish(registry, claim(registry), 2)
    assert registry.get(jobs["b"].id).inputs == {"zoo": artifact_id(2)}
    assert [row.id for row in registry.artifacts(job=jobs["a"].id)[0]] == [artifact_id(2)]
    assert registry.artifact(artifact_id(1)).attempt == first.attempt
