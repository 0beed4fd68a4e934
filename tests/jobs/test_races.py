"""Everybody at once: what one operation decides by must not change under it."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest

from ethogram.errors import IllegalState, NotFound, StaleAttempt
from services.jobs import transitions
from services.jobs.records import Job
from services.jobs.registry import Claim, JobRegistry, JobState
from services.jobs.states import LEGAL
from tests.jobs.steps import ERROR, artifact_id, claim, codec, finish, submit, zoo

SECONDS = 3.0
REFUSED = (IllegalState, StaleAttempt, NotFound)
numbers = itertools.count(1)


def together(*calls: Callable[[], object]) -> list[BaseException | None]:
    """Run ``calls`` at the same time; what each raised."""
    raised: list[BaseException | None] = [None] * len(calls)
    barrier = threading.Barrier(len(calls))

    def run(index: int) -> None:
        barrier.wait()
        try:
            calls[index]()
        except Exception as error:
            raised[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def behind(registry: JobRegistry, job: str, *calls: Callable[[], object]) -> list[BaseException | None]:
    """Run ``calls``, which all come to wait for the row of ``job``, in this order; what each raised."""
    raised: list[BaseException | None] = [None] * len(calls)

    def run(index: int) -> None:
        try:
            calls[index]()
        except Exception as error:
            raised[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    with registry._database.write() as session:
        transitions.lock(session, job)
        for thread in threads:
            thread.start()
            time.sleep(0.15)
    for thread in threads:
        thread.join()
    return raised


def all_jobs(registry: JobRegistry) -> list[Job]:
    jobs, cursor = registry.list(limit=200)
    while cursor is not None:
        more, cursor = registry.list(limit=200, cursor=cursor)
        jobs += more
    return jobs


class People:
    """What users and workers do, at random."""

    def __init__(self, registry: JobRegistry, seed: int, until: float) -> None:
        self.registry, self.random, self.until = registry, random.Random(seed), until

    def user(self) -> None:
        """Submits pipelines, cancels, retries."""
        while time.monotonic() < self.until:
            zoos = self.random.choice([["zoo"], ["zoo", "other"]])
            jobs: dict[str, Any] = {name: ("generation", zoo(), {}) for name in zoos}
            for name in ("codec", "other_codec"):
                jobs[name] = ("crossmodal", codec(self.random.choice(zoos)), {})
            made, _ = self.registry.submit_pipeline(jobs, idempotency_key=f"k{self.random.randrange(10**9)}")
            known = [*made.values(), *self.registry.list(limit=20)[0]]
            for _ in range(3):
                id = self.random.choice(known).id
                act = self.random.choice([self.registry.request_cancel, self.registry.retry, self._depend])
                self._try(partial(act, id))

    def worker(self) -> None:
        """Claims, says something, ends in one of the ways there are."""
        while time.monotonic() < self.until:
            claimed = self.registry.claim_next("cpu", "w", 10)
            if claimed is None:
                time.sleep(0.002)
                continue
            for act in (
                self._talk,
                self.random.choice([self._succeed, self._succeed, self._fail, self._leave, self._gather]),
            ):
                self._try(partial(act, claimed))

    def reconciler(self) -> None:
        """Takes attempts away."""
        while time.monotonic() < self.until:
            for running in self.registry.running_attempts():
                if self.random.random() < 0.1:
                    self._try(partial(self.registry.release, running.attempt, "stopped"))
            for waiting in self.registry.backing_off():
                self.registry.wake(waiting.job, waiting.claims)
            time.sleep(0.01)

    def _try(self, act: Callable[[], object]) -> None:
        with suppress(*REFUSED):
            act()

    def _depend(self, job: str) -> None:
        self.registry.submit("crossmodal", codec(job))

    def _talk(self, claimed: Claim) -> None:
        self.registry.heartbeat(claimed.attempt, 0.1)
        for batch in (1, 1, 2):
            self.registry.append_events(claimed.attempt, [("log", {"message": "hello"})], batch=batch)
        self.registry.commit_checkpoint(claimed.attempt, artifact_id(next(numbers)), 1)

    def _succeed(self, claimed: Claim) -> None:
        finish(self.registry, claimed, next(numbers))

    def _fail(self, claimed: Claim) -> None:
        self.registry.fail(claimed.attempt, ERROR)

    def _leave(self, claimed: Claim) -> None:
        self.registry.release(claimed.attempt, self.random.choice(["stopped", "crashed"]))

    def _gather(self, claimed: Claim) -> None:
        if claimed.children or claimed.job.parent is not None:
            self._succeed(claimed)
            return
        first = self.registry.spawn(claimed.attempt, "a", "generation", zoo())
        self.registry.spawn(claimed.attempt, "b", "crossmodal", codec(first.id))
        self.registry.release(claimed.attempt, "waiting")


@pytest.mark.slow
def test_everything_at_once(registry: JobRegistry) -> None:
    until = time.monotonic() + SECONDS
    people = [People(registry, seed, until) for seed in range(7)]
    raised = together(*(p.user for p in people[:2]), *(p.worker for p in people[2:6]), people[6].reconciler)
    assert raised == [None] * 7
    for running in registry.running_attempts():
        registry.release(running.attempt, "stopped")
    for waiting in registry.backing_off():
        registry.wake(waiting.job, waiting.claims)
    while (claimed := registry.claim_next("cpu", "w", 10)) is not None:
        finish(registry, claimed, next(numbers))
    jobs = all_jobs(registry)
    assert len(jobs) > 20
    assert [job for job in jobs if not job.state.terminal] == [], "jobs that nothing will ever move"
    for job in jobs:
        events = registry.events(job.id)
        assert [event.seq for event in events] == list(range(1, job.seq + 1))
        path = [JobState(event.data["state"]) for event in events if event.type == "state"]
        assert path[-1] is job.state
        assert all(after in LEGAL[before] for before, after in itertools.pairwise(path))


def test_the_last_two_children_end_together(registry: JobRegistry) -> None:
    """One by itself, the other because its input job fails: the parent goes on."""
    source = submit(registry, queue="gpu")
    submit(registry)
    parent = claim(registry)
    registry.spawn(parent.attempt, "a", "generation", zoo())
    registry.spawn(parent.attempt, "b", "crossmodal", codec(source.id))
    registry.release(parent.attempt, "waiting")
    child, feeding = claim(registry), claim(registry, "gpu")
    ends = (partial(finish, registry, child), partial(registry.fail, feeding.attempt, ERROR))
    assert behind(registry, parent.job.id, *ends) == [None, None]
    assert claim(registry).job.id == parent.job.id


def test_cancelling_a_job_that_is_released(registry: JobRegistry) -> None:
    submit(registry)
    claimed = claim(registry)
    release = partial(registry.release, claimed.attempt, "stopped")
    cancel = partial(registry.request_cancel, claimed.job.id)
    assert behind(registry, claimed.job.id, release, cancel) == [None, None]
    assert registry.get(claimed.job.id).state is JobState.CANCELLED


def test_the_same_upload_twice(registry: JobRegistry) -> None:
    raised: list[Exception] = []

    def upload() -> None:
        try:
            registry.add_artifact(artifact_id(1), "zoo", "zoo", 1)
        except Exception as error:
            raised.append(error)

    second = threading.Thread(target=upload)
    with registry._database.write() as session:
        registry._add_artifact(session, artifact_id(1), "default", name="zoo", type="zoo", size=1)
        second.start()
        time.sleep(0.15)
    second.join()
    assert raised == []
    assert len(registry.artifacts()[0]) == 1


def test_retries_of_one_job(registry: JobRegistry) -> None:
    job = submit(registry)
    registry.request_cancel(job.id)
    raised = together(*[lambda: registry.retry(job.id)] * 4)
    assert sorted(type(error).__name__ for error in raised) == ["IllegalState"] * 3 + ["NoneType"]
    assert [event.data["state"] for event in registry.events(job.id)] == ["QUEUED", "CANCELLED", "QUEUED"]


@pytest.mark.parametrize("first", [0, 1])
def test_a_submission_beside_the_end_of_its_input(registry: JobRegistry, first: int) -> None:
    submit(registry)
    claimed = claim(registry)
    made: list[Job] = []

    def depend() -> None:
        made.append(registry.submit("crossmodal", codec(claimed.job.id))[0])

    calls: list[Callable[[], object]] = [depend, partial(finish, registry, claimed)]
    assert behind(registry, claimed.job.id, *(calls if first == 0 else calls[::-1])) == [None, None]
    assert claim(registry).job.id == made[0].id


def test_an_ending_that_comes_second(registry: JobRegistry) -> None:
    for _ in range(5):
        submit(registry)
        claimed = claim(registry)
        raised = together(*[partial(registry.succeed, claimed.attempt, {})] * 4)
        losers = [error for error in raised if error is not None]
        assert len(losers) == 3
        assert all(isinstance(error, StaleAttempt) for error in losers), losers
