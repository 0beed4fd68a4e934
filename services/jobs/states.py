"""The states of a job, and which may follow which."""

from __future__ import annotations

from enum import StrEnum


class JobState(StrEnum):
    """State of a job."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    CANCELLING = "CANCELLING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def terminal(self) -> bool:
        """Whether the job has ended; only a retry takes it out of this state."""
        return self in TERMINAL


UNSUCCESSFUL = (JobState.FAILED, JobState.CANCELLED)
TERMINAL = (JobState.SUCCEEDED, *UNSUCCESSFUL)
ACTIVE = (JobState.RUNNING, JobState.CANCELLING)
UNFINISHED = (JobState.QUEUED, *ACTIVE)

LEGAL: dict[JobState, frozenset[JobState]] = {
    # A job whose input job failed or was cancelled ends the same way.
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.FAILED, JobState.CANCELLED}),
    JobState.RUNNING: frozenset({JobState.QUEUED, JobState.CANCELLING, JobState.SUCCEEDED, JobState.FAILED}),
    # A job may finish, or fail by itself, before it hears of the cancellation.
    JobState.CANCELLING: frozenset({JobState.CANCELLED, JobState.SUCCEEDED, JobState.FAILED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset({JobState.QUEUED}),
    JobState.CANCELLED: frozenset({JobState.QUEUED}),
}
"""State to the states that can follow it."""
