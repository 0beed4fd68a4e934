"""Jobs that have parts of their work done by other jobs."""

from __future__ import annotations

from typing import Any

import pytest

from ethogram.specs.generation import GenerationSpec, SubjectTrainingSpec
from services.jobs.registry import Job, JobState
from tests.workers.stack import Stack, wait_for
from tests.workers.test_jobs import expected


def submit(stack: Stack, parts: int, seed: int = 0, seconds: float = 0.02, **options: Any) -> Job:
    training = SubjectTrainingSpec(steps=10, learning_rate=seconds)
    spec = GenerationSpec(seed=seed, subjects=parts, training=training)
    job, _ = stack.registry.submit("generation", spec, queue=stack.queue, **options)
    stack.bell.ring(stack.queue)
    return job


def children(stack: Stack, job: Job) -> list[Job]:
    return sorted(stack.registry.list(parent=job.id)[0], key=lambda child: child.name or "")


def test_a_parent_gathers_what_its_children_made(stack: Stack) -> None:
    # One slot: the parent does not hold it while it waits.
    stack.worker("gather")
    stack.reconciler()
    job = submit(stack, 3, labels={"owner": "me"}, priority=5)
    done = stack.wait(job)
    assert done.state is JobState.SUCCEEDED, done.error
    assert done.result is not None
    assert done.result["total"] == done.result["results"] == sum(expected(10, seed) for seed in range(3))
    assert done.attempts == 1
    assert stack.history(job) == ["QUEUED", "RUNNING", "QUEUED waiting", "RUNNING", "SUCCEEDED"]
    made = children(stack, job)
    assert [child.name for child in made] == ["part-0", "part-1", "part-2"]
    assert all(child.parent == job.id and child.labels == {"owner": "me"} and child.priority == 5 for child in made)


@pytest.mark.slow
def test_a_part_that_fails_is_the_parents_to_judge(stack: Stack) -> None:
    stack.worker("gather")
    stack.reconciler()
    done = stack.wait(submit(stack, 3, seed=12))
    assert done.state is JobState.SUCCEEDED
    assert done.result is not None
    assert done.result["failed"] == {"part-1": "spec.seed: brings bad luck"}
    assert done.result["total"] == expected(10, 12) + expected(10, 14)


def test_cancelling_a_parent_cancels_its_children(stack: Stack) -> None:
    stack.worker("gather")
    stack.reconciler()
    job = submit(stack, 3, seconds=1.0)
    wait_for("a child to run", lambda: any(child.state is JobState.RUNNING for child in children(stack, job)))
    waiting = stack.registry.get(job.id)
    assert waiting.state is JobState.QUEUED
    assert sorted(waiting.waits_for) == sorted(child.id for child in children(stack, job))
    stack.registry.request_cancel(job.id)
    wait_for("all to end", lambda: all(child.state is JobState.CANCELLED for child in children(stack, job)))
    assert stack.registry.get(job.id).state is JobState.CANCELLED


@pytest.mark.slow
def test_a_parent_that_is_killed_finds_its_children_again(stack: Stack) -> None:
    worker = stack.worker("gather")
    stack.reconciler()
    job = submit(stack, 2, seconds=0.3)
    wait_for("a child to run", lambda: any(child.state is JobState.RUNNING for child in children(stack, job)))
    worker.kill()
    stack.worker("gather")
    done = stack.wait(job, seconds=60)
    assert done.state is JobState.SUCCEEDED
    assert done.result is not None
    assert done.result["total"] == expected(10, 0) + expected(10, 1)
    assert len(children(stack, job)) == 2
