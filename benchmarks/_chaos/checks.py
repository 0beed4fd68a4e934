"""What must hold when the faults are over. Each function returns sentences, one for each thing that is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from services.jobs.records import ArtifactRow, Event, Job
from services.jobs.states import LEGAL, JobState


@dataclass
class Evidence:
    """All that is known of one job at the end."""

    job: Job
    events: Sequence[Event]
    artifacts: Sequence[ArtifactRow]
    """Its outputs that are not superseded."""
    expected: float
    """What an uninterrupted run finds."""
    output: float | str
    """What its output holds; a sentence when it cannot be fetched and verified."""
    steps: Sequence[int] = ()
    """Steps of the lines of its metrics."""
    count: int = 0
    """Steps that it was to do; 0 when it writes no metrics."""
    parts: Sequence[str] = ()
    """Names of the children that it was to have."""
    children: Sequence[str | None] = ()
    """Names of those that it has."""
    cancelled: bool = False
    """It was asked to end, and nobody asked to try again."""
    watched: Sequence[Sequence[int]] = field(default_factory=tuple)
    """Numbers of the events that each watcher saw."""


def lost(found: Iterable[Evidence]) -> list[str]:
    """Jobs without an end, outputs that cannot be had, events that are missing."""
    wrong = []
    for one in found:
        job, ends = one.job, {JobState.SUCCEEDED}
        if one.cancelled:
            ends.add(JobState.CANCELLED)
        if job.state not in ends:
            wrong.append(f"{job.id} is {job.state}: {job.error}")
        if job.state is JobState.SUCCEEDED:
            if isinstance(one.output, str):
                wrong.append(f"{job.id}: its output cannot be had: {one.output}")
            if missing := set(range(one.count)) - set(one.steps):
                wrong.append(f"{job.id}: metrics without steps {sorted(missing)[:5]}")
            if missing_parts := set(one.parts) - set(one.children):
                wrong.append(f"{job.id} has no children {sorted(missing_parts)}")
        numbers = {event.seq for event in one.events}
        if gaps := set(range(1, job.seq + 1)) - numbers:
            wrong.append(f"{job.id}: no events {sorted(gaps)[:5]} of {job.seq}")
        for seen in one.watched:
            if gaps := numbers - set(seen):
                wrong.append(f"{job.id}: a watcher did not see {sorted(gaps)[:5]}")
    return wrong


def uploads(taken: Mapping[str, float], found: Mapping[str, float | str]) -> list[str]:
    """Uploads that were acknowledged, and of which something else is there, or nothing."""
    return [
        f"upload {id} holds {found.get(id)!r}, not {number!r}"
        for id, number in taken.items()
        if found.get(id) != number
    ]


def duplicated(found: Sequence[Evidence], keys: Mapping[str, Iterable[str]], roots: Iterable[str]) -> list[str]:
    """Effects that happened twice. ``keys``: idempotency key to the job ids that it was answered with; ``roots``: all
    jobs in the registry that are no children."""
    wrong = [f"key {key} made {sorted(set(ids))}" for key, ids in keys.items() if len(set(ids)) != 1]
    known = {job for ids in keys.values() for job in ids}
    wrong += [f"{job} is in the registry, and no submission was answered with it" for job in set(roots) - known]
    for one in found:
        id = one.job.id
        states = Counter(event.data.get("state") for event in one.events if event.type == "state")
        if states[JobState.SUCCEEDED] > 1:
            wrong.append(f"{id} succeeded {states[JobState.SUCCEEDED]} times")
        path = [JobState(event.data["state"]) for event in one.events if event.type == "state"]
        wrong += [f"{id} went from {a} to {b}" for a, b in pairwise(path) if b not in LEGAL[a]]
        children = Counter(one.children)
        wrong += [f"{id} has {n} children {name!r}" for name, n in children.items() if n > 1 or name not in one.parts]
        names = Counter(row.name for row in one.artifacts)
        wrong += [f"{id} has {n} outputs {name!r}" for name, n in names.items() if n > 1]
        steps = Counter(one.steps)
        wrong += [f"{id}: step {step} is {n} times in its metrics" for step, n in steps.items() if n > 1]
        lines = Counter((e.attempt, e.data["message"]) for e in one.events if e.type == "log" and _numbered(e))
        wrong += [f"{id}: attempt {attempt} said {said!r} {n} times" for (attempt, said), n in lines.items() if n > 1]
        points = Counter((e.attempt, e.data["artifact"]) for e in one.events if e.type == "checkpoint")
        wrong += [f"{id}: checkpoint {point} is {n} times in its events" for (_, point), n in points.items() if n > 1]
        for seen in one.watched:
            if list(seen) != sorted(set(seen)):
                wrong.append(f"{id}: a watcher saw events twice or out of order")
    return wrong


def unequal(found: Iterable[Evidence]) -> list[str]:
    """Results and outputs that are not those of an uninterrupted run, to the last bit."""
    wrong = []
    for one in found:
        if one.job.state is not JobState.SUCCEEDED:
            continue
        result = (one.job.result or {}).get("total")
        if result != one.expected:
            wrong.append(f"{one.job.id}: its result is {result!r}, not {one.expected!r}")
        if not isinstance(one.output, str) and one.output != one.expected:
            wrong.append(f"{one.job.id}: its output is {one.output!r}, not {one.expected!r}")
    return wrong


def stale(found: Iterable[Evidence]) -> list[str]:
    """Events of an attempt that came after it was taken from its worker."""
    wrong = []
    for one in found:
        ended: dict[str, int] = {}
        for event in one.events:
            if event.attempt in ended:
                wrong.append(
                    f"{one.job.id}: event {event.seq} of {event.attempt} after its end at {ended[event.attempt]}"
                )
            leaves = event.type == "state" and event.data.get("state") not in (JobState.RUNNING, JobState.CANCELLING)
            if event.attempt is not None and leaves:
                ended[event.attempt] = event.seq
    return wrong


def history(one: Evidence) -> list[str]:
    """Its events as lines, for who looks for the cause of what is wrong."""
    return [
        f"        {event.seq:3} {event.time:%H:%M:%S.%f} {event.attempt or '-':24} {event.type} {event.data}"
        for event in one.events
    ]


def _numbered(event: Event) -> bool:
    return str(event.data.get("message", "")).startswith("step ")
