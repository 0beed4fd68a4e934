"""Deletion of jobs and artifacts, and what the registry says is needed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from ethogram.errors import Conflict, IllegalState, NotFound
from ethogram.specs.base import ArtifactRef
from ethogram.specs.crossmodal import CrossmodalSpec
from services.jobs import submission
from services.jobs.database import Collision, retry_collisions
from services.jobs.registry import JobRegistry, JobState
from tests.jobs.steps import ERROR, artifact_id, claim, codec, finish, job_in, submit, zoo


def test_an_identity_for_good(database_url: str) -> None:
    first, second = JobRegistry.open(database_url), JobRegistry.open(database_url)
    assert first.identity() == second.identity()
    assert len(first.identity()) == 32
    first.close()
    second.close()


def test_a_deleted_job_leaves_nothing(registry: JobRegistry) -> None:
    job, _ = registry.submit("generation", zoo(), idempotency_key="key")
    claimed = claim(registry)
    registry.append_events(claimed.attempt, [("log", {"message": "hello"})])
    registry.commit_checkpoint(claimed.attempt, artifact_id(1), 1)
    for number in (2, 3):
        registry.commit_artifact(claimed.attempt, "zoo", "zoo", artifact_id(number), 1)
    registry.commit_artifact(claimed.attempt, "model", "codec", artifact_id(4), 1)
    registry.fail(claimed.attempt, ERROR)
    assert registry.live_artifacts() == {artifact_id(number) for number in (1, 3, 4)}
    assert registry.delete_job(job.id, published={artifact_id(4), artifact_id(9)}).state is JobState.FAILED
    for gone in (registry.get, registry.delete_job, registry.events):
        with pytest.raises(NotFound):
            gone(job.id)
    (row,) = registry.artifacts()[0]
    assert (row.id, row.job, row.attempt) == (artifact_id(4), None, None)
    assert registry.live_artifacts() == {artifact_id(4)}
    again, created = registry.submit("generation", zoo(1), idempotency_key="key")
    assert created and again.id != job.id


@pytest.mark.parametrize("state", [state for state in JobState if not state.terminal])
def test_only_what_has_ended_can_be_deleted(registry: JobRegistry, state: JobState) -> None:
    job, _ = job_in(registry, state)
    advice = "wait until it has ended" if state is JobState.CANCELLING else "cancel it first"
    with pytest.raises(IllegalState, match=f"is {state}: {advice}"):
        registry.delete_job(job.id)
    assert registry.get(job.id) == job


def test_what_an_unfinished_job_uses_stays(registry: JobRegistry) -> None:
    source = submit(registry)
    finish(registry, claim(registry), 1)
    user, _ = registry.submit("crossmodal", codec(source.id))
    for refused in (lambda: registry.delete_job(source.id), lambda: registry.delete_artifact(artifact_id(1))):
        with pytest.raises(IllegalState, match=f"job {user.id} .* has not ended: cancel that job, or wait"):
            refused()
    registry.request_cancel(user.id)
    registry.delete_job(source.id)
    # Who used it keeps it, and can be tried again.
    assert registry.live_artifacts() == {artifact_id(1)}
    assert registry.retry(user.id).inputs == {"zoo": artifact_id(1)}
    registry.request_cancel(user.id)
    registry.delete_job(user.id)
    assert registry.live_artifacts() == set()


def test_an_input_that_can_never_come(registry: JobRegistry) -> None:
    source = submit(registry)
    waiting, _ = registry.submit("crossmodal", codec(source.id))
    registry.request_cancel(source.id)
    registry.delete_job(source.id)
    with pytest.raises(IllegalState, match="of a job that was deleted: submit it again"):
        registry.retry(waiting.id)
    assert registry.get(waiting.id).waits_for == []
    registry.delete_job(waiting.id)


def test_children_go_with_their_parent(registry: JobRegistry) -> None:
    parent = submit(registry)
    claimed = claim(registry)
    child = registry.spawn(claimed.attempt, "part", "generation", zoo())
    part = claim(registry)
    registry.commit_artifact(part.attempt, "zoo", "zoo", artifact_id(1), 1)
    with pytest.raises(IllegalState, match="has not ended"):
        registry.delete_artifact(artifact_id(1))
    registry.succeed(part.attempt, {})
    for refused in (lambda: registry.delete_job(child.id), lambda: registry.delete_artifact(artifact_id(1))):
        with pytest.raises(IllegalState, match=f"part of job {parent.id}, which has not ended"):
            refused()
    registry.succeed(claimed.attempt, {})
    registry.delete_job(parent.id)
    with pytest.raises(NotFound):
        registry.get(child.id)
    assert registry.live_artifacts() == set()


def test_a_deleted_artifact(registry: JobRegistry) -> None:
    job = submit(registry)
    finish(registry, claim(registry), 1)
    registry.add_artifact(artifact_id(2), "mine", "zoo", 1)
    for number in (1, 2):
        assert registry.deletable_artifact(artifact_id(number)).id == artifact_id(number)
        assert registry.delete_artifact(artifact_id(number)).id == artifact_id(number)
        with pytest.raises(NotFound):
            registry.delete_artifact(artifact_id(number))
    with pytest.raises(NotFound, match="made no artifact named 'zoo'"):
        registry.submit("crossmodal", codec(job.id))
    with pytest.raises(NotFound):
        registry.submit("crossmodal", codec(None, artifact_id(2)))
    assert registry.live_artifacts() == set()


def test_what_a_running_attempt_has_replaced_is_spent(registry: JobRegistry) -> None:
    submit(registry)
    claimed = claim(registry)
    for number in (1, 2, 3):
        registry.commit_checkpoint(claimed.attempt, artifact_id(number), number)
        registry.commit_artifact(claimed.attempt, "zoo", "zoo", artifact_id(10 + number), 1)
    assert registry.spent_artifacts() == {artifact_id(number) for number in (1, 2, 11, 12)}
    assert registry.live_artifacts() == {artifact_id(3), artifact_id(13)}
    registry.release(claimed.attempt, "stopped")
    assert registry.spent_artifacts() == set()
    # The next attempt goes on from there.
    assert artifact_id(3) in registry.live_artifacts()
    registry.succeed(claim(registry).attempt, {})
    assert registry.live_artifacts() == {artifact_id(13)}


def test_only_what_nothing_names_is_forgotten(registry: JobRegistry) -> None:
    submit(registry)
    claimed = claim(registry)
    for number in (1, 2, 3):
        registry.commit_artifact(claimed.attempt, "zoo", "zoo", artifact_id(number), 1)
    registry.commit_checkpoint(claimed.attempt, artifact_id(4), 1)
    user, _ = registry.submit("crossmodal", codec(None, artifact_id(1)))
    asked = {artifact_id(number) for number in range(1, 6)}
    assert registry.forget(asked) == {artifact_id(2), artifact_id(5)}
    assert registry.artifact(artifact_id(1)).id in registry.get(user.id).inputs.values()
    with pytest.raises(NotFound):
        registry.artifact(artifact_id(2))
    assert registry.forget(set()) == set()


def test_jobs_by_their_end(registry: JobRegistry, clock: Callable[[float], None]) -> None:
    old, _ = job_in(registry, JobState.FAILED)
    clock(3600)
    new, _ = job_in(registry, JobState.SUCCEEDED)
    submit(registry)
    now = datetime.now(UTC)
    assert registry.jobs_ended_before(now + timedelta(minutes=30)) == [old.id]
    assert registry.jobs_ended_before(now + timedelta(minutes=90)) == [old.id, new.id]


def test_who_names_an_artifact_while_it_is_forgotten(registry: JobRegistry) -> None:
    """Either the job has its input, or there is none: never a job whose input is deleted."""
    ids = [artifact_id(number) for number in range(1, 41)]
    submit(registry, queue="old")
    attempt = claim(registry, "old").attempt
    for id in [*ids, artifact_id(99)]:
        registry.commit_artifact(attempt, "zoo", "zoo", id, 1)
    registry.succeed(attempt, {})
    named, dead, barrier = set[str](), set[str](), threading.Barrier(2)

    def name() -> None:
        for id in ids:
            barrier.wait()
            try:
                registry.submit("crossmodal", codec(None, id))
            except NotFound:
                continue
            named.add(id)

    namer = threading.Thread(target=name)
    namer.start()
    for id in ids:
        barrier.wait()
        dead |= registry.forget({id})
    namer.join()
    assert named | dead == set(ids) and not named & dead


def test_the_key_of_a_pipeline_that_was_partly_deleted(registry: JobRegistry) -> None:
    plan: dict[str, Any] = {name: ("generation", zoo(seed), {}) for seed, name in enumerate("xy")}
    made, _ = registry.submit_pipeline(plan, idempotency_key="k")
    for job in made.values():
        registry.request_cancel(job.id)
    registry.delete_job(made["x"].id)
    with pytest.raises(Conflict, match="was deleted: send a new key"):
        registry.submit_pipeline(plan, idempotency_key="k")
    registry.delete_job(made["y"].id)
    assert registry.submit_pipeline(plan, idempotency_key="k")[1]


def test_who_names_an_output_while_its_job_is_deleted(registry: JobRegistry) -> None:
    """Its submission is not committed yet when the deletion begins."""
    submit(registry)
    maker = finish(registry, claim(registry))
    raised: list[BaseException] = []

    def delete() -> None:
        try:
            registry.delete_job(maker.id)
        except IllegalState as error:
            raised.append(error)

    deleting = threading.Thread(target=delete)
    request = submission.Request.make("crossmodal", CrossmodalSpec(zoo=ArtifactRef(artifact=artifact_id(1))), {})
    with registry._database.write() as session:
        user = submission.insert_job(session, request, tenant="default", trace=None)
        deleting.start()
        time.sleep(0.3)
    deleting.join()
    assert raised and user in str(raised[0])
    assert registry.artifact(artifact_id(1)).job == maker.id


def test_a_deadlock_is_nobodys_trouble(registry: JobRegistry) -> None:
    tried: list[int] = []

    @retry_collisions
    def unlucky() -> str:
        tried.append(1)
        if len(tried) < 3:
            raise Collision("deadlock detected")
        return "done"

    assert unlucky() == "done"
    assert len(tried) == 3
