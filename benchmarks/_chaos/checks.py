"""What must hold when the faults are over. Each function returns one sentence for each thing that is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar

from ethogram.specs.generation import GenerationSpec
from services.jobs.records import ArtifactRow, Event, Job
from services.jobs.states import LEGAL, JobState

T = TypeVar("T")


@dataclass(kw_only=True)
class Submission:
    """A submitted job, or a child of one."""

    key: str = ""
    """Its idempotency key."""
    ids: list[str] = field(default_factory=list)
    """The job id that each submission with the key was answered with."""
    expected: float
    """Result of an uninterrupted run."""
    count: int = 0
    """Steps that it is to do; 0 when it writes no metrics."""
    parts: Mapping[str, GenerationSpec] = field(default_factory=dict)
    """Specs of the children that it is to have, by name."""
    cancelled: bool = False
    """Whether a user cancelled it and did not retry it."""
    watched: list[list[int]] = field(default_factory=list)
    """Numbers of the events that each watcher saw."""


@dataclass(kw_only=True)
class Evidence(Submission):
    """All that is known of one job at the end."""

    job: Job
    events: Sequence[Event]
    artifacts: Sequence[ArtifactRow]
    """Its outputs that are not superseded."""
    output: float | str
    """Content of its output; a sentence when it cannot be fetched and verified."""
    steps: Sequence[int] = ()
    """Steps of the lines of its metrics."""
    children: Sequence[str | None] = ()
    """Names of the children that it has."""


def lost(jobs: Iterable[Evidence]) -> list[str]:
    """Jobs without an end, outputs that cannot be had, events that are missing."""
    wrong = []
    for evidence in jobs:
        job, ends = evidence.job, {JobState.SUCCEEDED}
        if evidence.cancelled:
            ends.add(JobState.CANCELLED)
        if job.state not in ends:
            wrong.append(f"{job.id} is {job.state}: {job.error}")
        if job.state is JobState.SUCCEEDED:
            if isinstance(evidence.output, str):
                wrong.append(f"{job.id}: its output cannot be had: {evidence.output}")
            if missing := set(range(evidence.count)) - set(evidence.steps):
                wrong.append(f"{job.id}: metrics without steps {sorted(missing)[:5]}")
            if missing_parts := evidence.parts.keys() - set(evidence.children):
                wrong.append(f"{job.id} has no children {sorted(missing_parts)}")
        numbers = {event.seq for event in evidence.events}
        if gaps := set(range(1, job.seq + 1)) - numbers:
            wrong.append(f"{job.id}: no events {sorted(gaps)[:5]} of {job.seq}")
        for seen in evidence.watched:
            if gaps := numbers - set(seen):
                wrong.append(f"{job.id}: a watcher did not see {sorted(gaps)[:5]}")
    return wrong


def uploads(accepted: Mapping[str, float], fetched: Mapping[str, float | str]) -> list[str]:
    """Uploads that were accepted and of which something else is there, or nothing."""
    return [
        f"upload {id} holds {fetched.get(id)!r}, not {number!r}"
        for id, number in accepted.items()
        if fetched.get(id) != number
    ]


def duplicated(jobs: Sequence[Evidence], keys: Mapping[str, Iterable[str]], roots: Iterable[str]) -> list[str]:
    """Effects that happened twice. ``keys``: idempotency key to the job ids that it was answered with; ``roots``: all
    jobs in the registry that are no children."""
    wrong = [f"key {key} made {sorted(set(ids))}" for key, ids in keys.items() if len(set(ids)) != 1]
    known = {job for ids in keys.values() for job in ids}
    wrong += [f"{job} is in the registry, and no submission was answered with it" for job in set(roots) - known]
    for evidence in jobs:
        id, events = evidence.job.id, evidence.events
        path = [JobState(event.data["state"]) for event in events if event.type == "state"]
        if (times := path.count(JobState.SUCCEEDED)) > 1:
            wrong.append(f"{id} succeeded {times} times")
        wrong += [f"{id} went from {a} to {b}" for a, b in pairwise(path) if b not in LEGAL[a]]
        children = Counter(evidence.children)
        wrong += [
            f"{id} has {n} children {name!r}" for name, n in children.items() if n > 1 or name not in evidence.parts
        ]
        logs = ((e.attempt, e.data["message"]) for e in events if e.type == "log" and _numbered(e))
        checkpoints = ((e.attempt, e.data["artifact"]) for e in events if e.type == "checkpoint")
        wrong += [f"{id} has {n} outputs {name!r}" for name, n in _repeated(row.name for row in evidence.artifacts)]
        wrong += [f"{id}: step {step} is {n} times in its metrics" for step, n in _repeated(evidence.steps)]
        wrong += [f"{id}: attempt {attempt} said {line!r} {n} times" for (attempt, line), n in _repeated(logs)]
        wrong += [f"{id}: checkpoint {point} is {n} times in its events" for (_, point), n in _repeated(checkpoints)]
        for seen in evidence.watched:
            if list(seen) != sorted(set(seen)):
                wrong.append(f"{id}: a watcher saw events twice or out of order")
    return wrong


def unequal(jobs: Iterable[Evidence]) -> list[str]:
    """Results and outputs that are not those of an uninterrupted run, to the last bit."""
    wrong = []
    for evidence in jobs:
        id, expected = evidence.job.id, evidence.expected
        if evidence.job.state is not JobState.SUCCEEDED:
            continue
        result = (evidence.job.result or {}).get("total")
        if result != expected:
            wrong.append(f"{id}: its result is {result!r}, not {expected!r}")
        if not isinstance(evidence.output, str) and evidence.output != expected:
            wrong.append(f"{id}: its output is {evidence.output!r}, not {expected!r}")
    return wrong


def stale(jobs: Iterable[Evidence]) -> list[str]:
    """Events of an attempt that came after it was taken from its worker."""
    wrong = []
    for evidence in jobs:
        ended: dict[str, int] = {}
        for event in evidence.events:
            if (attempt := event.attempt) is None:
                continue
            if attempt in ended:
                wrong.append(f"{evidence.job.id}: event {event.seq} of {attempt} after its end at {ended[attempt]}")
            if event.type == "state" and event.data.get("state") not in (JobState.RUNNING, JobState.CANCELLING):
                ended[attempt] = event.seq
    return wrong


def history(evidence: Evidence) -> list[str]:
    """Its events as lines, to find the cause of what is wrong."""
    return [
        f"        {event.seq:3} {event.time:%H:%M:%S.%f} {event.attempt or '-':24} {event.type} {event.data}"
        for event in evidence.events
    ]


def _numbered(event: Event) -> bool:
    return str(event.data.get("message", "")).startswith("step ")


def _repeated(items: Iterable[T]) -> list[tuple[T, int]]:
    return [(item, times) for item, times in Counter(items).items() if times > 1]
