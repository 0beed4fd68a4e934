"""Records that the registry returns, and the options of a submission. All times are UTC."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints

from services.jobs.states import JobState


def _to_utc(value: datetime) -> datetime:
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise ValueError("must lie between the years 1 and 9999 in UTC") from None


LABEL_KEY = r"^[A-Za-z0-9_./-]{1,63}$"
LabelKey = Annotated[str, StringConstraints(pattern=LABEL_KEY)]
LabelValue = Annotated[str, StringConstraints(max_length=255)]
# JSON has no dates, so text in ISO 8601 is accepted too.
UtcTime = Annotated[AwareDatetime, Field(strict=False), AfterValidator(_to_utc)]
QueueName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,63}$")]


class Options(BaseModel):
    """How a job is queued; the same for one job and for each job of a pipeline."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    queue: QueueName | None = None
    """Machine class that runs it; ``None``: that of its kind."""
    priority: int = Field(0, ge=-1000, le=1000)
    """Higher goes first."""
    not_before: UtcTime | None = None
    """Earliest time to start, with its time zone, e.g. ``2030-01-01T00:00:00Z``."""
    max_attempts: int = Field(3, ge=1, le=100)
    """Attempts that may crash or be lost before the job fails."""
    time_limit_seconds: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Running time, over all attempts since the submission or the last retry, after which the job fails."""
    stall_limit_seconds: float | None = Field(1800.0, gt=0, allow_inf_nan=False)
    """An attempt that reports nothing for so long (no progress, log line or checkpoint) is ended, and counts as a
    crash; ``None``: never."""
    labels: dict[LabelKey, LabelValue] = Field({}, max_length=32)
    """Free-form labels to find the job by."""


class Job(BaseModel):
    """One job as it is now."""

    id: str
    tenant: str
    kind: str
    spec: dict[str, Any]
    state: JobState
    queue: str
    priority: int
    labels: dict[str, str]
    attempts: int
    """Attempts that count against ``max_attempts``, since the submission or the last retry."""
    max_attempts: int
    parent: str | None
    """Id of the job that made this one to do part of its work."""
    name: str | None
    """Name of a child job at its parent."""
    time_limit_seconds: float | None
    stall_limit_seconds: float | None
    ran_seconds: float
    """Running time of the attempts that have ended, since the submission or the last retry."""
    not_before: datetime | None
    inputs: dict[str, str]
    """Spec path -> artifact id, of the inputs that are there."""
    waits_for: list[str]
    """Ids of the jobs whose outputs are still to come; of a parent: its children that have not ended."""
    progress: dict[str, Any] | None
    """``stage``, ``done``, ``total``, ``unit`` and ``metrics`` as last reported."""
    checkpoint: dict[str, Any] | None
    """``artifact`` and ``step`` of the last committed checkpoint."""
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    """``reason``, ``message`` and ``violations``."""
    trace: str | None
    """Trace context of the request that made it."""
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    cancel_requested: bool
    seq: int
    """Number of the last event."""


class Event(BaseModel):
    """An event of a job. ``seq`` counts from 1 without gaps."""

    model_config = ConfigDict(from_attributes=True)

    job: str
    seq: int
    attempt: str | None
    type: Literal["state", "log", "checkpoint", "artifact"]
    data: dict[str, Any]
    time: datetime


class ArtifactRow(BaseModel):
    """An artifact as the registry lists it; its manifest in the store lists its files."""

    model_config = ConfigDict(from_attributes=True)

    id: str
    name: str
    type: str
    tenant: str
    job: str | None
    attempt: str | None
    size: int
    """Total bytes."""
    created_at: datetime


class Claim(BaseModel):
    """A job that a worker has claimed: ``attempt`` fences each of its writes."""

    job: Job
    attempt: str
    number: int
    """Attempts of this job so far, including this one."""
    lease_seconds: float
    children: list[Child] = []
    """Child jobs that earlier attempts made."""


class Depth(BaseModel):
    """What is in one queue."""

    queue: str
    ready: int = 0
    """Jobs that could be claimed now."""
    held: int = 0
    """Jobs that wait for inputs, children, the end of a back-off or their time to start."""
    running: int = 0
    cancelling: int = 0
    oldest_ready_seconds: float = 0.0
    """Age of the oldest job that could be claimed."""


class BackingOff(BaseModel):
    """A queued job that waits after a crash. ``claims`` distinguishes one such wait from the next."""

    job: str
    queue: str
    claims: int
    seconds: float


class Child(BaseModel):
    """The outcome of a child job, for its parent to gather."""

    name: str
    job: str
    state: JobState
    outputs: dict[str, str]
    """Name -> artifact id."""
    result: dict[str, Any] | None
    error: dict[str, Any] | None


class RunningAttempt(BaseModel):
    """An attempt that has not ended. It is alive while ``heartbeat`` changes within ``lease_seconds``."""

    attempt: str
    job: str
    queue: str
    worker: str
    heartbeat: int
    lease_seconds: float
