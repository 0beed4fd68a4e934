"""Short ways to specs, and to a job in a given state."""

from __future__ import annotations

from typing import Any

from ethogram.specs.base import ArtifactRef
from ethogram.specs.crossmodal import CrossmodalSpec
from ethogram.specs.generation import GenerationSpec
from services.jobs.registry import Claim, Job, JobRegistry, JobState

ERROR = {"reason": "INVALID_INPUT", "message": "the zoo is empty", "violations": []}


def zoo(seed: int = 0) -> GenerationSpec:
    """Spec of a job that needs nothing."""
    return GenerationSpec(seed=seed)


def codec(job: str | None, artifact: str = "zoo") -> CrossmodalSpec:
    """Spec of a job that needs the output of ``job``."""
    return CrossmodalSpec(zoo=ArtifactRef(job=job, artifact=artifact))


def artifact_id(number: int) -> str:
    """An artifact id."""
    return f"{number:064x}"


def submit(registry: JobRegistry, **options: Any) -> Job:
    """A new job that needs nothing."""
    return registry.submit("generation", zoo(), **options)[0]


def claim(registry: JobRegistry, queue: str = "cpu") -> Claim:
    """The next job; there must be one."""
    claimed = registry.claim_next(queue, "worker-1", 10.0)
    assert claimed is not None
    return claimed


def finish(registry: JobRegistry, claimed: Claim, number: int = 1, name: str = "zoo") -> Job:
    """Let the claimed job succeed with one output."""
    registry.commit_artifact(claimed.attempt, name, "zoo", artifact_id(number), 10)
    return registry.succeed(claimed.attempt, {})


def job_in(registry: JobRegistry, state: JobState) -> tuple[Job, str | None]:
    """A job in ``state``, and the attempt that owns or last owned it."""
    job = submit(registry)
    if state is JobState.QUEUED:
        return job, None
    attempt = claim(registry).attempt
    if state in (JobState.CANCELLING, JobState.CANCELLED):
        registry.request_cancel(job.id)
    if state is JobState.CANCELLED:
        registry.cancelled(attempt)
    elif state is JobState.SUCCEEDED:
        registry.succeed(attempt, {"subjects": 1})
    elif state is JobState.FAILED:
        registry.fail(attempt, ERROR)
    job = registry.get(job.id)
    assert job.state is state
    return job, attempt
