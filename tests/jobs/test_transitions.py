"""Every operation in every state: the steps that exist, and no others."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ethogram.errors import EthogramError, IllegalState, NotFound, StaleAttempt
from services.jobs.registry import JobRegistry, JobState
from services.jobs.states import LEGAL
from tests.jobs.steps import ERROR, artifact_id, job_in, submit

S = JobState
Step = Callable[[JobRegistry, str, str], Any]

BY_JOB: dict[str, Step] = {
    "cancel": lambda registry, job, attempt: registry.request_cancel(job),
    "retry": lambda registry, job, attempt: registry.retry(job),
}
BY_ATTEMPT: dict[str, Step] = {
    "succeed": lambda registry, job, attempt: registry.succeed(attempt, {}),
    "fail": lambda registry, job, attempt: registry.fail(attempt, ERROR),
    "cancelled": lambda registry, job, attempt: registry.cancelled(attempt),
    "crashed": lambda registry, job, attempt: registry.release(attempt, "crashed"),
    "lost": lambda registry, job, attempt: registry.release(attempt, "lost"),
    "stopped": lambda registry, job, attempt: registry.release(attempt, "stopped"),
}
WRITES: dict[str, Step] = {
    "heartbeat": lambda registry, job, attempt: registry.heartbeat(attempt),
    "events": lambda registry, job, attempt: registry.append_events(attempt, [("log", {"message": "hello"})]),
    "progress": lambda registry, job, attempt: registry.set_progress(attempt, {"stage": "train"}),
    "checkpoint": lambda registry, job, attempt: registry.commit_checkpoint(attempt, artifact_id(1), 5),
    "artifact": lambda registry, job, attempt: registry.commit_artifact(attempt, "zoo", "zoo", artifact_id(1), 1),
}
# (operation, state) to the state after it; what is not here is refused.
ALLOWED = {
    ("cancel", S.QUEUED): S.CANCELLED,
    ("cancel", S.RUNNING): S.CANCELLING,
    ("cancel", S.CANCELLING): S.CANCELLING,
    ("retry", S.FAILED): S.QUEUED,
    ("retry", S.CANCELLED): S.QUEUED,
    ("succeed", S.RUNNING): S.SUCCEEDED,
    ("succeed", S.CANCELLING): S.SUCCEEDED,
    ("fail", S.RUNNING): S.FAILED,
    ("fail", S.CANCELLING): S.FAILED,
    ("cancelled", S.CANCELLING): S.CANCELLED,
    ("crashed", S.RUNNING): S.QUEUED,
    ("crashed", S.CANCELLING): S.CANCELLED,
    ("lost", S.RUNNING): S.QUEUED,
    ("lost", S.CANCELLING): S.CANCELLED,
    ("stopped", S.RUNNING): S.QUEUED,
    ("stopped", S.CANCELLING): S.CANCELLED,
}


@pytest.mark.parametrize("state", list(JobState))
@pytest.mark.parametrize("operation", [*BY_JOB, *BY_ATTEMPT])
def test_every_pair(registry: JobRegistry, operation: str, state: JobState) -> None:
    job, attempt = job_in(registry, state)
    step = {**BY_JOB, **BY_ATTEMPT}[operation]
    after = ALLOWED.get((operation, state))
    if after is not None:
        step(registry, job.id, attempt or "att_none")
        assert registry.get(job.id).state is after
        assert after is state or after in LEGAL[state]
        return
    expected = StaleAttempt if operation in BY_ATTEMPT and state not in (S.RUNNING, S.CANCELLING) else IllegalState
    with pytest.raises(expected):
        step(registry, job.id, attempt or "att_none")
    # Refused means that nothing at all has changed.
    assert registry.get(job.id) == job
    assert len(registry.events(job.id)) == job.seq


@pytest.mark.parametrize("state", [S.QUEUED, S.SUCCEEDED, S.FAILED, S.CANCELLED])
@pytest.mark.parametrize("write", list(WRITES))
def test_a_stale_attempt_writes_nothing(registry: JobRegistry, write: str, state: JobState) -> None:
    job, attempt = job_in(registry, S.RUNNING if state is S.QUEUED else state)
    assert attempt is not None
    if state is S.QUEUED:
        job = registry.release(attempt, "lost")
    with pytest.raises(StaleAttempt):
        WRITES[write](registry, job.id, attempt)
    assert registry.get(job.id) == job
    assert registry.artifacts()[0] == []


@pytest.mark.parametrize("write", [*WRITES, *BY_ATTEMPT])
def test_a_lost_worker_that_wakes_up_does_not_disturb_the_next(registry: JobRegistry, write: str) -> None:
    job, old = job_in(registry, S.RUNNING)
    assert old is not None
    registry.release(old, "stopped")
    claimed = registry.claim_next("cpu", "worker-2", 10)
    assert claimed is not None
    with pytest.raises(StaleAttempt):
        {**WRITES, **BY_ATTEMPT}[write](registry, job.id, old)
    assert registry.get(job.id) == claimed.job
    assert registry.heartbeat(claimed.attempt) is False


@pytest.mark.parametrize("operation", list(BY_JOB))
@pytest.mark.parametrize("id", ["job_none", "", "job\0", "\ud800"])
def test_an_unknown_job(registry: JobRegistry, operation: str, id: str) -> None:
    with pytest.raises(NotFound):
        BY_JOB[operation](registry, id, "")


class Life(RuleBasedStateMachine):
    """Random lives of a few jobs, beside a model that knows the states, the owners and nothing else."""

    template: Path

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        shutil.copy(self.template, self.folder / "registry.db")
        self.registry = JobRegistry.open(f"sqlite:///{self.folder / 'registry.db'}")
        self.states: dict[str, JobState] = {}
        self.owner: dict[str, str] = {}
        self.attempts: list[tuple[str, str]] = []
        self.seqs: dict[str, int] = {}

    def teardown(self) -> None:
        self.registry.close()
        shutil.rmtree(self.folder)

    @initialize()
    def first(self) -> None:
        self.submit()

    @precondition(lambda self: len(self.states) < 4)
    @rule()
    def submit(self) -> None:
        self.states[submit(self.registry, max_attempts=100).id] = S.QUEUED

    @rule()
    def claim(self) -> None:
        claimed = self.registry.claim_next("cpu", "w", 10)
        if claimed is None:
            return
        assert self.states[claimed.job.id] is S.QUEUED
        self.states[claimed.job.id] = S.RUNNING
        self.owner[claimed.job.id] = claimed.attempt
        self.attempts.append((claimed.job.id, claimed.attempt))

    @rule(data=st.data(), operation=st.sampled_from(sorted(BY_JOB)))
    def steer(self, data: st.DataObject, operation: str) -> None:
        job = data.draw(st.sampled_from(sorted(self.states)))
        after = ALLOWED.get((operation, self.states[job]))
        self._expect(after is not None, lambda: BY_JOB[operation](self.registry, job, ""))
        self._becomes(job, after)

    @precondition(lambda self: self.attempts)
    @rule(data=st.data(), operation=st.sampled_from(sorted(BY_ATTEMPT)))
    def end(self, data: st.DataObject, operation: str) -> None:
        job, attempt = data.draw(st.sampled_from(self.attempts))
        after = ALLOWED.get((operation, self.states[job])) if self.owner.get(job) == attempt else None
        self._expect(after is not None, lambda: BY_ATTEMPT[operation](self.registry, job, attempt))
        self._becomes(job, after)

    @precondition(lambda self: self.attempts)
    @rule(data=st.data(), write=st.sampled_from(sorted(WRITES)))
    def write(self, data: st.DataObject, write: str) -> None:
        job, attempt = data.draw(st.sampled_from(self.attempts))
        if write == "artifact":
            number = self.attempts.index((job, attempt))
            call = lambda: self.registry.commit_artifact(attempt, "zoo", "zoo", artifact_id(number), 1)  # noqa: E731
        else:
            call = lambda: WRITES[write](self.registry, job, attempt)  # noqa: E731
        self._expect(self.owner.get(job) == attempt, call)

    @invariant()
    def the_registry_agrees(self) -> None:
        running = {found.job: found.attempt for found in self.registry.running_attempts()}
        assert running == self.owner
        for job in self.registry.list()[0]:
            assert job.state is self.states[job.id]
            assert (job.finished_at is not None) == job.state.terminal
            events = self.registry.events(job.id)
            assert [event.seq for event in events] == list(range(1, job.seq + 1))
            assert job.seq >= self.seqs.get(job.id, 0)
            self.seqs[job.id] = job.seq
            path = [JobState(event.data["state"]) for event in events if event.type == "state"]
            assert path[-1] is job.state
            assert all(after in LEGAL[before] for before, after in itertools.pairwise(path))

    def _expect(self, allowed: bool, call: Callable[[], Any]) -> None:
        try:
            call()
        except (IllegalState, StaleAttempt) as error:
            assert not allowed, error
        except EthogramError as error:
            raise AssertionError(repr(error)) from error
        else:
            assert allowed

    def _becomes(self, job: str, after: JobState | None) -> None:
        if after is not None:
            self.states[job] = after
            if after not in (S.RUNNING, S.CANCELLING):
                self.owner.pop(job, None)


def test_random_lives(empty_database: Path) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    Life.template = empty_database
    run_state_machine_as_test(
        Life, settings=settings(max_examples=10, stateful_step_count=15, deadline=None, derandomize=True)
    )
