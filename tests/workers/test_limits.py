"""Jobs that run or are silent for too long."""

from __future__ import annotations

import pytest

from services.jobs.registry import JobState
from tests.workers.stack import Stack, gone, wait_for
from tests.workers.test_jobs import expected


def test_the_time_limit_ends_a_job_at_a_checkpoint_and_a_retry_goes_on(stack: Stack) -> None:
    stack.worker(checkpoint_seconds="600")
    job = stack.submit(40, 0.1, seed=2, time_limit_seconds=1.5)
    failed = stack.wait(job)
    assert failed.state is JobState.FAILED
    assert failed.error is not None
    assert failed.error["reason"] == "TIME_LIMIT"
    assert "1.5 s" in failed.error["message"]
    assert 1.5 < failed.ran_seconds < 6
    assert failed.attempts == 1, "another attempt would meet the same limit"
    assert failed.checkpoint is not None
    assert 0 < failed.checkpoint["step"] < 40
    for _ in range(6):
        stack.registry.retry(job.id)
        stack.bell.ring(stack.queue)
        if (done := stack.wait(job)).state is JobState.SUCCEEDED:
            break
    assert done.result is not None
    assert done.result["total"] == expected(40, 2)


@pytest.mark.slow
def test_the_time_limit_counts_over_attempts(stack: Stack) -> None:
    worker = stack.worker()
    job = stack.submit(200, 0.1, time_limit_seconds=3.0)
    stack.wait_checkpoint(job)
    worker.terminate()
    worker.wait(10)
    before = stack.registry.get(job.id).ran_seconds
    assert before > 0
    stack.worker()
    failed = stack.wait(job)
    assert failed.error is not None
    assert failed.error["reason"] == "TIME_LIMIT"
    assert 3.0 < failed.ran_seconds < 7


def test_a_job_that_says_nothing_is_ended_and_tried_again(stack: Stack) -> None:
    worker = stack.worker("silent")
    stack.reconciler()
    job = stack.submit(600, 1.0, stall_limit_seconds=0.5, max_attempts=2)
    stack.wait(job, "RUNNING")
    child = stack.child(worker)
    failed = stack.wait(job)
    assert failed.state is JobState.FAILED
    assert failed.error is not None
    assert failed.error["reason"] == "STALLED"
    assert "0.5 s" in failed.error["message"]
    assert stack.history(job) == ["QUEUED", "RUNNING", "QUEUED stalled", "RUNNING", "FAILED stalled"]
    # Where it hung.
    assert any("in silent" in line for line in stack.log(job))
    assert gone(child)


def test_an_import_that_hangs_is_ended_like_a_job_that_hangs(stack: Stack) -> None:
    worker = stack.worker("tests.workers.hanging:run")
    limited = stack.submit(time_limit_seconds=0.5)
    failed = stack.wait(limited)
    assert failed.error is not None and failed.error["reason"] == "TIME_LIMIT"
    cancelled, left = stack.submit(), stack.submit()
    stack.wait(cancelled, "RUNNING")
    server = stack.server(worker)
    stack.registry.request_cancel(cancelled.id)
    assert stack.wait(cancelled, seconds=5).state is JobState.CANCELLED
    assert gone(server)
    stack.wait(left, "RUNNING")
    server = stack.server(worker)
    worker.kill()
    wait_for("the import to end", lambda: gone(server), 5)


@pytest.mark.slow
def test_a_job_that_speaks_is_not_ended(stack: Stack) -> None:
    stack.worker()
    # It speaks for longer than the limit, which in turn is longer than any import at its end.
    done = stack.wait(stack.submit(80, 0.1, stall_limit_seconds=6.0))
    assert done.state is JobState.SUCCEEDED
    assert done.attempts == 1
