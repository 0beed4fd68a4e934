"""The chaos benchmark: each of its checks sees the defect that it is for, and a small draw of faults shows none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest

from benchmarks._chaos import checks, points
from benchmarks._chaos.arena import ORPHAN_SECONDS, Arena, Orphans, spawn
from benchmarks._chaos.checks import Evidence, Submission
from benchmarks._chaos.faults import write
from benchmarks._chaos.workload import Workload
from benchmarks.chaos import suffer
from ethogram.specs.generation import GenerationSpec, SubjectTrainingSpec
from services.jobs.records import ArtifactRow, Event, Job
from services.jobs.registry import JobRegistry
from services.jobs.states import JobState
from tests.workers.stack import Stack, gone, wait_for

JOB, TOTAL = "job_a", 1.5
TIME = datetime(2030, 1, 1, tzinfo=UTC)
HISTORY: list[tuple[str | None, str, dict[str, Any]]] = [
    (None, "state", {"state": "QUEUED"}),
    ("a", "state", {"state": "RUNNING", "worker": "w"}),
    ("a", "log", {"message": "step 0"}),
    ("a", "checkpoint", {"artifact": "c1", "step": 1}),
    ("a", "state", {"state": "QUEUED", "reason": "lost"}),
    ("b", "state", {"state": "RUNNING", "worker": "w"}),
    # Again, by another attempt, and a line that is no step's.
    ("b", "log", {"message": "step 0"}),
    ("b", "log", {"message": "hello"}),
    ("b", "log", {"message": "hello"}),
    ("b", "checkpoint", {"artifact": "c2", "step": 2}),
    ("b", "artifact", {"artifact": "o", "name": "answer"}),
    ("b", "state", {"state": "SUCCEEDED"}),
]


def events(history: Sequence[tuple[str | None, str, dict[str, Any]]]) -> list[Event]:
    return [
        Event.model_validate({"job": JOB, "seq": seq, "attempt": attempt, "type": type_, "data": data, "time": TIME})
        for seq, (attempt, type_, data) in enumerate(history, 1)
    ]


def artifact(name: str) -> ArtifactRow:
    return ArtifactRow(
        id=f"id of {name}", name=name, type="number", tenant="t", job=JOB, attempt="b", size=1, created_at=TIME
    )


def job(**values: Any) -> Job:
    fields: dict[str, Any] = dict.fromkeys(Job.model_fields)
    fields |= {"id": JOB, "tenant": "t", "kind": "generation", "spec": {}, "queue": "cpu", "priority": 0, "labels": {}}
    fields |= {"attempts": 2, "max_attempts": 9, "ran_seconds": 1.0, "inputs": {}, "waits_for": [], "created_at": TIME}
    fields |= {"state": JobState.SUCCEEDED, "result": {"total": TOTAL}, "cancel_requested": False, "seq": len(HISTORY)}
    return Job.model_validate({**fields, **values})


def clean(**values: Any) -> Evidence:
    """Of a parent that also counted: everything that a check looks at is there."""
    numbers = range(1, len(HISTORY) + 1)
    made = Evidence(
        job=job(),
        events=events(HISTORY),
        artifacts=[artifact("answer"), artifact("metrics")],
        expected=TOTAL,
        output=TOTAL,
        steps=[0, 1],
        count=2,
        parts=dict.fromkeys(["part-0", "part-1"], GenerationSpec()),
        children=["part-1", "part-0"],
        watched=[list(numbers), list(numbers)],
    )
    return replace(made, **values)


def told(*history: tuple[str | None, str, dict[str, Any]], before_end: bool = True) -> Evidence:
    """Clean, but that ``history`` came too: before the end of the job, or after it."""
    whole = [*HISTORY[:-1], *history, HISTORY[-1]] if before_end else [*HISTORY, *history]
    return clean(events=events(whole), job=job(seq=len(whole)), watched=[])


def all_checks(
    found: Sequence[Evidence], keys: dict[str, list[str]] | None = None, roots: Sequence[str] = (JOB,)
) -> dict[str, list[str]]:
    """What each check says, without those that say nothing."""
    said = {
        "lost": checks.lost(found),
        "duplicated": checks.duplicated(found, {"key": [JOB, JOB]} if keys is None else keys, roots),
        "unequal": checks.unequal(found),
        "stale": checks.stale(found),
    }
    return {name: sentences for name, sentences in said.items() if sentences}


CANCELLED = [*HISTORY[:-1], (None, "state", {"state": "CANCELLING"}), ("b", "state", {"state": "CANCELLED"})]


@pytest.mark.parametrize(
    "evidence",
    [
        clean(),
        told(("b", "log", {"message": "step 4"}), ("b", "checkpoint", {"artifact": "c3", "step": 5})),
        clean(parts={}, children=(), count=0, steps=(), watched=()),
        # A user ended it, and asks for no output.
        clean(
            job=job(state=JobState.CANCELLED, result=None, seq=len(CANCELLED)),
            events=events(CANCELLED),
            watched=[],
            output="there is none",
            steps=(),
            children=(),
            cancelled=True,
        ),
        # It had ended before it heard of it.
        clean(cancelled=True),
    ],
)
def test_nothing_is_wrong(evidence: Evidence) -> None:
    assert all_checks([evidence]) == {}


def without_step_3() -> Evidence:
    kept = [event for event in events(HISTORY) if event.seq != 3]
    return clean(events=kept, watched=[[event.seq for event in kept]])


RUNNING_AGAIN = ("c", "state", {"state": "RUNNING", "worker": "w"})
DEFECTS = [
    # In the list, the defect, what is said of it.
    ("lost", lambda: clean(job=job(state="FAILED", error={"message": "no luck"})), ["job_a is FAILED: {'message': "]),
    ("lost", lambda: clean(job=job(state="RUNNING")), ["job_a is RUNNING"]),
    ("lost", lambda: clean(job=job(state="CANCELLED")), ["job_a is CANCELLED"]),
    ("lost", lambda: clean(job=job(state="FAILED"), cancelled=True), ["job_a is FAILED"]),
    ("lost", lambda: clean(output="it is damaged"), ["job_a: its output cannot be had: it is damaged"]),
    ("lost", lambda: clean(steps=[1]), ["job_a: metrics without steps [0]"]),
    ("lost", lambda: clean(children=["part-1"]), ["job_a has no children ['part-0']"]),
    ("lost", without_step_3, ["job_a: no events [3] of 12"]),
    ("lost", lambda: clean(job=job(seq=14)), ["job_a: no events [13, 14] of 14"]),
    (
        "lost",
        lambda: clean(watched=[range(1, 13), [*range(1, 6), *range(7, 13)]]),
        ["job_a: a watcher did not see [6]"],
    ),
    ("duplicated", lambda: told(RUNNING_AGAIN), ["job_a went from RUNNING to RUNNING"]),
    # There is no legal way to it.
    (
        "duplicated",
        lambda: told(("c", "state", {"state": "SUCCEEDED"}), before_end=False),
        ["job_a succeeded 2 times", "job_a went from SUCCEEDED to SUCCEEDED"],
    ),
    ("duplicated", lambda: clean(children=["part-0", "part-1", "part-0"]), ["job_a has 2 children 'part-0'"]),
    ("duplicated", lambda: clean(children=["part-0", "part-1", "other"]), ["job_a has 1 children 'other'"]),
    ("duplicated", lambda: clean(artifacts=[artifact("answer")] * 2), ["job_a has 2 outputs 'answer'"]),
    ("duplicated", lambda: clean(steps=[0, 1, 1]), ["job_a: step 1 is 2 times in its metrics"]),
    ("duplicated", lambda: told(HISTORY[6]), ["job_a: attempt b said 'step 0' 2 times"]),
    ("duplicated", lambda: told(HISTORY[9]), ["job_a: checkpoint c2 is 2 times in its events"]),
    ("duplicated", lambda: clean(watched=[[1, *range(1, 13)]]), ["job_a: a watcher saw events twice or out of order"]),
    (
        "duplicated",
        lambda: clean(watched=[[2, 1, *range(3, 13)]]),
        ["job_a: a watcher saw events twice or out of order"],
    ),
    ("unequal", lambda: clean(job=job(result={"total": 1.25})), ["job_a: its result is 1.25, not 1.5"]),
    ("unequal", lambda: clean(job=job(result=None)), ["job_a: its result is None, not 1.5"]),
    ("unequal", lambda: clean(output=1.25), ["job_a: its output is 1.25, not 1.5"]),
    # The attempt that was lost speaks again, before the end and after it.
    ("stale", lambda: told(("a", "log", {"message": "late"})), ["job_a: event 12 of a after its end at 5"]),
    (
        "stale",
        lambda: told(("b", "log", {"message": "late"}), before_end=False),
        ["job_a: event 13 of b after its end at 12"],
    ),
]


@pytest.mark.parametrize(("where", "defect", "sentences"), DEFECTS, ids=[said[0] for *_, said in DEFECTS])
def test_a_defect_is_seen_where_it_belongs(where: str, defect: Callable[[], Evidence], sentences: list[str]) -> None:
    # Among others, of which nothing is said.
    said = all_checks([clean(), defect(), clean()])
    assert list(said) == [where]
    assert len(said[where]) == len(sentences)
    for found, expected in zip(said[where], sentences, strict=True):
        assert found.startswith(expected)


def test_a_key_that_made_two_jobs() -> None:
    said = all_checks([clean()], keys={"key": [JOB, "job_b"]}, roots=[JOB, "job_b"])
    assert said == {"duplicated": ["key key made ['job_a', 'job_b']"]}


def test_a_job_that_nobody_was_told_of() -> None:
    said = all_checks([clean()], roots=[JOB, "job_b"])
    assert said == {"duplicated": ["job_b is in the registry, and no submission was answered with it"]}


def test_uploads_that_are_gone_or_changed() -> None:
    taken = {"x": 0.5, "y": 0.25, "z": 0.125, "v": 1.0}
    found: dict[str, float | str] = {"x": 0.5, "y": 0.75, "z": "it is damaged"}
    assert checks.uploads(taken, found) == [
        "upload y holds 0.75, not 0.25",
        "upload z holds 'it is damaged', not 0.125",
        "upload v holds None, not 1.0",
    ]
    assert checks.uploads(taken, taken) == []


def test_a_history_has_a_line_for_each_event() -> None:
    lines = checks.history(clean())
    assert len(lines) == len(HISTORY)
    assert "checkpoint {'artifact': 'c2', 'step': 2}" in lines[9]


def test_a_write_that_is_accepted_is_told_of(tmp_path: Path) -> None:
    registry = JobRegistry.open(f"sqlite:///{tmp_path / 'registry.db'}")
    try:
        registry.submit("generation", GenerationSpec())
        claim = registry.claim_next("cpu", "w", 10.0)
        assert claim is not None
        refused, accepted = write(registry, claim.attempt)
        # The job succeeds by the seventh of ten, and the attempt has ended then.
        assert refused == 3
        assert len(accepted) == 7
        assert write(registry, claim.attempt) == (10, [])
        assert write(registry, "att_of_nobody") == (10, [])
    finally:
        registry.close()


def test_a_parent_is_retried_once_its_children_are_cancelled(tmp_path: Path) -> None:
    registry, spec = JobRegistry.open(f"sqlite:///{tmp_path / 'registry.db'}"), GenerationSpec()
    try:
        parent, _ = registry.submit("generation", spec)
        first = registry.claim_next("cpu", "w", 10.0)
        assert first is not None
        registry.spawn(first.attempt, "part-0", "generation", spec)
        registry.release(first.attempt, "waiting")
        child = registry.claim_next("cpu", "w", 10.0)
        assert child is not None and child.job.parent == parent.id
        client = SimpleNamespace(job=registry.get, cancel=registry.request_cancel, retry=registry.retry)
        workload = Workload(cast("Arena", SimpleNamespace(clients=[client], registry=registry)), seed=0)
        submission = Submission(ids=[parent.id], expected=0.0)
        canceller = spawn(workload.errors, workload._cancel, submission, 0.0, True)
        wait_for("the parent to be cancelled", lambda: registry.get(parent.id).state is JobState.CANCELLED)
        # It may try now; the child is still being cancelled.
        time.sleep(0.3)
        assert registry.get(parent.id).state is JobState.CANCELLED
        registry.cancelled(child.attempt)
        canceller.join(10)
        assert not canceller.is_alive() and workload.errors == []
        assert not submission.cancelled and not registry.get(parent.id).state.terminal
        assert registry.get(child.job.id).state is JobState.QUEUED
    finally:
        registry.close()


# Starts a process that works in the given folder, says its process id, and waits.
_PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[2]], cwd=sys.argv[1], stdout=subprocess.PIPE, text=True)
print(child.pid, child.stdout.readline(), flush=True)
time.sleep(60)
"""
_SLEEPER = "import time; print('', flush=True); time.sleep(60)"
# One that itself starts such a process.
_STARTER = (
    f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', {_SLEEPER!r}]); "
    "print(p.pid, flush=True); time.sleep(60)"
)


@pytest.fixture
def family(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int, int]]:
    """A parent elsewhere, its child that works in ``tmp_path``, and a child of that one."""
    command = [sys.executable, "-c", _PARENT, str(tmp_path), _STARTER]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child, grandchild = (int(word) for word in parent.stdout.readline().split())
    try:
        yield parent, child, grandchild
    finally:
        for pid in (parent.pid, child, grandchild):
            with suppress(psutil.NoSuchProcess):
                psutil.Process(pid).kill()
        parent.wait()
        parent.stdout.close()


def test_an_orphan_is_found_when_its_time_is_over(
    tmp_path: Path, family: tuple[subprocess.Popen[str], int, int]
) -> None:
    parent, child, grandchild = family
    orphans, patience = Orphans(tmp_path, 0.5), 0.5
    assert {process.pid for process in orphans.living()} == {child, grandchild}
    until = time.monotonic() + 2 * patience
    while time.monotonic() < until:
        orphans.look({parent.pid})
        time.sleep(0.05)
    assert orphans.found == {}, "its parent lives"
    parent.kill()
    parent.wait()
    orphans.look({parent.pid})
    assert orphans.found == {}, "it may clean up"
    time.sleep(1.2 * patience)
    orphans.look(set())
    # What it has started is its own.
    assert list(orphans.found) == [child]
    assert "-c" in orphans.found[child]
    psutil.Process(child).kill()
    deadline = time.monotonic() + 10
    while [process.pid for process in orphans.living()] != [grandchild]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    orphans.look(set())
    time.sleep(1.2 * patience)
    orphans.look(set())
    assert list(orphans.found) == [child, grandchild]


def test_an_orphan_that_leaves_in_time_is_none(tmp_path: Path, family: tuple[subprocess.Popen[str], int, int]) -> None:
    parent, child, grandchild = family
    orphans = Orphans(tmp_path, 0.3)
    parent.kill()
    parent.wait()
    orphans.look(set())
    for pid in (grandchild, child):
        psutil.Process(pid).kill()
    time.sleep(0.5)
    orphans.look(set())
    assert orphans.found == {}
    assert orphans.living() == []


def test_the_processes_of_a_worker_are_orphans_when_it_is_dead_and_not_while_it_is_paused(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stack.state / "faults").mkdir()
    monkeypatch.setenv(points.VARIABLE, str(stack.state / "faults"))
    worker = stack.start("benchmarks._chaos.points", "worker-0", "--parent-pipe")
    spec = GenerationSpec(subjects=1, training=SubjectTrainingSpec(steps=10_000, learning_rate=0.1))
    stack.wait_checkpoint(stack.registry.submit("generation", spec, queue=stack.queue)[0])
    server, job = stack.server(worker), stack.child(worker)
    orphans, parents = Orphans(stack.state, 0.3), {psutil.Process(worker.pid).ppid()}

    def look() -> list[int]:
        orphans.look(parents)
        time.sleep(0.5)
        orphans.look(parents)
        return list(orphans.found)

    worker.send_signal(signal.SIGSTOP)
    assert look() == []
    assert {process.pid for process in orphans.living()} == {worker.pid, server, job}
    os.kill(server, signal.SIGSTOP)
    worker.kill()
    worker.wait()
    # The job's process has a parent, which would end it if it could.
    assert look() == [server]
    os.kill(server, signal.SIGCONT)
    wait_for("the end of what the worker had started", lambda: gone(server) and gone(job), ORPHAN_SECONDS)


@pytest.mark.slow
def test_a_small_draw_of_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The platform must not see the developer's own.
    for name in [name for name in os.environ if name.startswith("ETHOGRAM_")]:
        monkeypatch.delenv(name)
    found = suffer(tmp_path / "arena", "sqlite", faults=12, jobs=6, seed=1)
    assert found.faults >= 12
    assert found.jobs >= 6
    assert found.wrong == {check: [] for check in ("lost", "duplicated", "unequal", "stale_accepted", "orphans")}
    assert found.stale_refused > 0
