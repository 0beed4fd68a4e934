"""What the reconciler does beside attempts: back-offs, old jobs, and what nothing needs in the store."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest
import redis as redis_client

from ethogram.errors import IllegalState
from ethogram.specs.generation import GenerationSpec
from services.artifacts.store import ArtifactStore
from services.jobs import transitions
from services.jobs.registry import Job, JobRegistry, JobState
from services.jobs.signals import Bell, Notifier, celery_queue
from tests.workers.stack import Stack, wait_for
from workers.collector import Housekeeper
from workers.metrics import ReconcilerMetrics
from workers.reconciler import Reconciler
from workers.settings import WorkerSettings

DAY = 24 * 3600.0


class Clock:
    """A clock that is set by hand."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[JobRegistry]:
    """An empty registry."""
    opened = JobRegistry.open(f"sqlite:///{tmp_path / 'registry.db'}")
    yield opened
    opened.close()


def test_a_wall_clock_that_is_set_back_holds_no_job(
    registry: JobRegistry, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bell, notifier, clock = Bell(redis_url), Notifier(redis_url), Clock(50.0)
    queue = f"test-{uuid4().hex[:8]}"
    job, _ = registry.submit("generation", GenerationSpec(), queue=queue)
    claim = registry.claim_next(queue, "w", 10)
    assert claim is not None
    with monkeypatch.context() as patch:
        # The crash was told at a time that comes only in hours.
        patch.setattr(transitions, "now", lambda: datetime.now(UTC) + timedelta(hours=5))
        registry.release(claim.attempt, "crashed")
    (back,) = registry.backing_off()
    assert back.seconds == 1.0
    reconciler = Reconciler(registry, bell, notifier, ReconcilerMetrics(), clock)
    # What happened before the first look, or while this process slept, was seen by nobody.
    clock.now += 1000
    reconciler.look()
    clock.now += 0.9
    reconciler.look()
    assert registry.claim_next(queue, "w", 10) is None
    clock.now += 0.2
    reconciler.look()
    assert bell.flush(5)
    assert redis_client.Redis.from_url(redis_url).delete(celery_queue(queue)) == 1
    again = registry.claim_next(queue, "w", 10)
    assert again is not None and again.job.id == job.id
    # The next wait is another one, though it is of the same job.
    registry.release(again.attempt, "crashed")
    reconciler.look()
    assert [(back.claims, back.seconds) for back in registry.backing_off()] == [(2, 2.0)]
    bell.close()
    notifier.close()


def finished(registry: JobRegistry, store: ArtifactStore, folder: Path) -> tuple[Job, str]:
    """A job that has just succeeded, and its one output."""
    job, _ = registry.submit("generation", GenerationSpec())
    claim = registry.claim_next("cpu", "w", 10)
    assert claim is not None
    folder.mkdir(exist_ok=True)
    (folder / "zoo.txt").write_text(job.id)
    id, manifest = store.put(folder, name="zoo", type="codec", job=job.id, attempt=claim.attempt)
    registry.commit_artifact(claim.attempt, "zoo", "codec", id, manifest.size)
    return registry.succeed(claim.attempt, {}), id


def test_old_jobs_go_but_not_by_a_clock_that_was_set(
    registry: JobRegistry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = ArtifactStore(str(tmp_path / "store"))
    plain, gone = finished(registry, store, tmp_path / "made")
    kept, model = finished(registry, store, tmp_path / "made")
    waiting, _ = registry.submit("generation", GenerationSpec())
    store.publish("default", "m", model)
    clock, wall = Clock(10.0), Clock(datetime.now(UTC).timestamp())
    config = WorkerSettings(retention_days=2.0, gc_grace_seconds=0.0)
    keeper = Housekeeper(registry, store, config, ReconcilerMetrics(), clock=clock, wall=wall)

    wall.now += 400 * DAY
    for _ in range(3):
        keeper.look()
    assert registry.get(plain.id).state is JobState.SUCCEEDED
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "clock" in warnings[0].message
    wall.now -= 400 * DAY

    for clock_too in (clock, wall):
        clock_too.now += 1.5 * DAY
    keeper.look()
    assert registry.get(plain.id).state is JobState.SUCCEEDED
    for clock_too in (clock, wall):
        clock_too.now += DAY
    keeper.look()
    assert [job.id for job in registry.list()[0]] == [waiting.id]
    # What is published stays, as if it was uploaded.
    assert [(row.id, row.job) for row in registry.artifacts()[0]] == [(model, None)]
    assert store.manifest(model).job == kept.id
    assert not (tmp_path / "store/manifests" / gone[:2] / f"{gone}.json").exists()


def test_a_store_is_collected_by_its_own_registry_only(registry: JobRegistry, tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "store"))
    other = JobRegistry.open(f"sqlite:///{tmp_path / 'other.db'}")
    _, id = finished(other, store, tmp_path / "made")
    Housekeeper(other, store, WorkerSettings(gc_period_seconds=0.0), ReconcilerMetrics()).look()
    with pytest.raises(IllegalState, match="belongs to another registry"):
        Housekeeper(registry, store, WorkerSettings(gc_grace_seconds=0.0), ReconcilerMetrics()).look()
    store.fetch(id, tmp_path / "fetched")
    other.close()


def test_checkpoints_of_a_job_that_succeeded_are_collected(stack: Stack) -> None:
    stack.worker("pile")
    job = stack.submit(steps=30)
    stack.wait(job, "SUCCEEDED")
    checkpoints = [event.data["artifact"] for event in stack.registry.events(job.id) if event.type == "checkpoint"]
    assert len(checkpoints) == 30
    manifests = stack.state / "store" / "manifests"
    outputs = {row.id for row in stack.registry.artifacts(job=job.id)[0]}

    def kept() -> set[str]:
        return {path.stem for path in manifests.rglob("*.json")}

    assert kept() == {*checkpoints, *outputs}
    stack.start("workers.reconciler", "--parent-pipe", gc_grace_seconds="0.3", gc_period_seconds="0.2")
    wait_for(f"the collection; {stack.said()}", lambda: kept() == outputs)
    named = {file.sha256 for id in outputs for file in stack.store.manifest(id).files.values()}
    blobs = stack.state / "store" / "blobs"
    wait_for("the files to go", lambda: {path.name for path in blobs.rglob("*") if path.is_file()} == named)
    for id in outputs:
        stack.store.fetch(id, stack.state / "fetched" / id)


@pytest.mark.slow
def test_a_job_goes_on_from_its_checkpoint_while_all_else_is_collected(stack: Stack) -> None:
    stack.start("workers.reconciler", "--parent-pipe", gc_grace_seconds="0", gc_period_seconds="0.02")
    worker = stack.worker(checkpoint_seconds="0.05")
    job = stack.submit(steps=40, seconds=0.05)
    stack.wait_checkpoint(job)
    worker.kill()
    stack.worker(checkpoint_seconds="0.05")
    done = stack.wait(job, "SUCCEEDED")
    assert stack.begins(job)[-1] > 0
    assert done.result is not None and done.result["steps"] == 40
    outputs = {row.id for row in stack.registry.artifacts(job=job.id)[0]}
    manifests = stack.state / "store" / "manifests"
    wait_for("the collection", lambda: {path.stem for path in manifests.rglob("*.json")} == outputs)
    for id in outputs:
        stack.store.fetch(id, stack.state / "fetched" / id)
