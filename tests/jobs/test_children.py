"""Jobs that other jobs make."""

from __future__ import annotations

import pytest

from ethogram.errors import IllegalState, InvalidInput, StaleAttempt
from ethogram.specs.generation import GenerationSpec
from services.jobs.registry import Claim, Job, JobRegistry, JobState
from tests.jobs.steps import ERROR, artifact_id, claim, codec, finish, submit, zoo


@pytest.fixture
def parent(registry: JobRegistry) -> Claim:
    submit(registry, labels={"owner": "me"}, priority=3, max_attempts=5, time_limit_seconds=60.0)
    return claim(registry)


def spawn(registry: JobRegistry, parent: Claim, *names: str) -> list[Job]:
    return [registry.spawn(parent.attempt, name, "generation", zoo()) for name in names]


def test_a_child_is_like_its_parent(registry: JobRegistry, parent: Claim) -> None:
    (child,) = spawn(registry, parent, "a")
    assert (child.parent, child.name) == (parent.job.id, "a")
    for field in ("tenant", "queue", "priority", "labels", "max_attempts", "time_limit_seconds", "stall_limit_seconds"):
        assert getattr(child, field) == getattr(parent.job, field), field
    assert child.state is JobState.QUEUED


def test_a_child_may_have_fields_without_effect_and_a_job_may_not(registry: JobRegistry, parent: Claim) -> None:
    """A sweep varies options that have no effect at some of its points."""
    spec = GenerationSpec.model_validate({"signature": {"bins": 4}})
    child = registry.spawn(parent.attempt, "a", "generation", spec)
    # Jobs of earlier versions are claimed as they are.
    assert claim(registry).job.spec["signature"]["bins"] == 4 and child.spec["signature"]["bins"] == 4
    for refused, prefix in (
        (lambda: registry.submit("generation", spec), ""),
        (lambda: registry.check("generation", spec), ""),
        (lambda: registry.submit_pipeline({"b": ("generation", spec, {})}), "jobs.b."),
    ):
        with pytest.raises(InvalidInput) as error:
            refused()
        assert [violation.field for violation in error.value.violations] == [f"{prefix}spec.signature.bins"]


def test_the_same_name_is_the_same_child(registry: JobRegistry, parent: Claim) -> None:
    assert spawn(registry, parent, "a", "a")[1].id == spawn(registry, parent, "a")[0].id
    assert len(registry.list(parent=parent.job.id)[0]) == 1


def test_a_parent_waits_for_all_its_children_and_sees_what_became_of_them(registry: JobRegistry, parent: Claim) -> None:
    good, bad = spawn(registry, parent, "good", "bad")
    released = registry.release(parent.attempt, "waiting")
    assert (released.state, released.attempts) == (JobState.QUEUED, 0)
    assert released.waits_for == [good.id, bad.id]
    first, second = claim(registry), claim(registry)
    assert {first.job.id, second.job.id} == {good.id, bad.id}
    assert registry.claim_next("cpu", "w", 10) is None
    finish(registry, first, name="part")
    assert registry.get(parent.job.id).waits_for == [second.job.id]
    assert registry.claim_next("cpu", "w", 10) is None
    registry.fail(second.attempt, ERROR)
    again = claim(registry)
    assert again.job.id == parent.job.id
    assert again.job.waits_for == []
    found = {child.job: child for child in again.children}
    assert found[first.job.id].state is JobState.SUCCEEDED
    assert found[first.job.id].outputs == {"part": artifact_id(1)}
    assert found[second.job.id].state is JobState.FAILED
    assert (found[second.job.id].error or {})["message"] == ERROR["message"]


def test_a_parent_whose_children_have_ended_does_not_wait(registry: JobRegistry, parent: Claim) -> None:
    spawn(registry, parent, "a")
    registry.succeed(claim(registry).attempt, {})
    registry.release(parent.attempt, "waiting")
    assert claim(registry).job.id == parent.job.id


@pytest.mark.parametrize("end", ["fail", "succeed", "cancel", "exhausted"])
def test_children_that_nobody_gathers_are_cancelled(registry: JobRegistry, parent: Claim, end: str) -> None:
    running, queued = spawn(registry, parent, "running", "queued")
    taken = claim(registry)
    assert taken.job.id == running.id
    if end == "fail":
        registry.fail(parent.attempt, ERROR)
    elif end == "succeed":
        registry.succeed(parent.attempt, {})
    elif end == "cancel":
        registry.request_cancel(parent.job.id)
    else:
        attempt = parent.attempt
        for _ in range(4):
            registry.release(attempt, "crashed")
            (back_off,) = registry.backing_off()
            assert registry.wake(back_off.job, back_off.claims) is not None
            attempt = next(
                found.attempt for found in iter(lambda: claim(registry), None) if found.job.id == parent.job.id
            )
        registry.release(attempt, "crashed")
    if end != "exhausted":
        assert registry.get(queued.id).state is JobState.CANCELLED
    assert registry.get(running.id).state is JobState.CANCELLING
    assert registry.heartbeat(taken.attempt), "the worker is told"


def test_retrying_a_parent_retries_what_failed(registry: JobRegistry, parent: Claim) -> None:
    good, bad = spawn(registry, parent, "good", "bad")
    registry.release(parent.attempt, "waiting")
    claims = {found.job.id: found for found in (claim(registry), claim(registry))}
    finish(registry, claims[good.id])
    registry.fail(claims[bad.id].attempt, ERROR)
    registry.fail(claim(registry).attempt, ERROR)
    registry.retry(parent.job.id)
    assert registry.get(good.id).state is JobState.SUCCEEDED
    assert registry.get(bad.id).state is JobState.QUEUED
    assert registry.get(parent.job.id).state is JobState.QUEUED


def test_a_child_may_have_children(registry: JobRegistry, parent: Claim) -> None:
    (child,) = spawn(registry, parent, "child")
    registry.release(parent.attempt, "waiting")
    middle = claim(registry)
    (grandchild,) = spawn(registry, middle, "grandchild")
    registry.release(middle.attempt, "waiting")
    assert claim(registry).job.id == grandchild.id
    registry.request_cancel(parent.job.id)
    assert registry.get(child.id).state is JobState.CANCELLED
    assert registry.get(grandchild.id).state is JobState.CANCELLING


def test_a_child_of_a_job_that_is_being_cancelled_is_cancelled(registry: JobRegistry, parent: Claim) -> None:
    registry.request_cancel(parent.job.id)
    assert spawn(registry, parent, "late")[0].state is JobState.CANCELLED


def test_wrong_children(registry: JobRegistry, parent: Claim) -> None:
    with pytest.raises(InvalidInput, match=r"children\.a\.kind"):
        registry.spawn(parent.attempt, "a", "alchemy", zoo())
    with pytest.raises(InvalidInput, match=r"children\.a\.spec"):
        registry.spawn(parent.attempt, "a", "crossmodal", zoo())
    with pytest.raises(InvalidInput, match="children"):
        registry.spawn(parent.attempt, "no name", "generation", zoo())
    registry.succeed(parent.attempt, {})
    with pytest.raises(StaleAttempt):
        registry.spawn(parent.attempt, "late", "crossmodal", codec(None, artifact_id(1)))
    assert registry.list(parent=parent.job.id)[0] == []


def test_a_parent_is_not_retried_while_a_child_is_being_cancelled(registry: JobRegistry, parent: Claim) -> None:
    spawn(registry, parent, "a", "b")
    registry.release(parent.attempt, "waiting")
    running = claim(registry)
    registry.request_cancel(parent.job.id)
    with pytest.raises(IllegalState, match="still being cancelled"):
        registry.retry(parent.job.id)
    registry.cancelled(running.attempt)
    registry.retry(parent.job.id)
    assert {child.state for child in registry.list(parent=parent.job.id)[0]} == {JobState.QUEUED}
