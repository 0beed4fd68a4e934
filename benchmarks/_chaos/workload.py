"""What users do meanwhile: submit, watch, cancel and retry, through gateways that come and go."""

from __future__ import annotations

import json
import random
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import httpx

from benchmarks._chaos.arena import Arena, spawn
from benchmarks._chaos.checks import Evidence
from benchmarks._chaos.science import FILE, OUTPUT, consumed, parts, total
from ethogram.client import Client
from ethogram.errors import EthogramError, IllegalState, Unavailable
from ethogram.specs.base import ArtifactRef
from ethogram.specs.crossmodal import CrossmodalSpec
from ethogram.specs.generation import GenerationSpec, SubjectTrainingSpec
from services.jobs.records import Event, Job
from services.jobs.states import JobState

# So many are under way at once.
_OPEN = 8
_STEPS, _SECONDS = 30, 0.1
_OPTIONS = {"max_attempts": 100, "stall_limit_seconds": 4.0}

R = TypeVar("R")


@dataclass
class Asked:
    """A job that was submitted."""

    key: str
    expected: float
    steps: int = 0
    """Steps that its metrics must have; 0: none."""
    parts: dict[str, GenerationSpec] = field(default_factory=dict)
    """What its children do."""
    ids: list[str] = field(default_factory=list)
    """What each submission with the key was answered with."""
    cancelled: bool = False
    watched: list[list[int]] = field(default_factory=list)


class Workload:
    """Jobs of one seed, submitted as others end."""

    def __init__(self, arena: Arena, seed: int) -> None:
        self._arena, self._chance = arena, random.Random(f"workload {seed}")
        self.asked: list[Asked] = []
        self.uploads: dict[str, float] = {}
        """Artifacts that were taken from a user, and the number in each."""
        self.wrong: list[str] = []
        self._threads: list[threading.Thread] = []
        self.enough = threading.Event()

    def run(self, at_least: int) -> None:
        """Submit until ``enough`` is set and ``at_least`` jobs were."""
        self._spawn(self._upload)
        under_way: list[Asked] = []
        while not (self.enough.is_set() and len(self.asked) >= at_least):
            under_way = [asked for asked in under_way if not self._state(asked.ids[0]).terminal]
            if len(under_way) >= _OPEN:
                time.sleep(0.1)
                continue
            kind = self._chance.choices(["plain", "pair", "uploaded", "parent"], [6, 1, 1, 2])[0]
            match kind:
                case "pair":
                    first = self._count()
                    ref = ArtifactRef(job=first.ids[0], artifact=OUTPUT)
                    asked = self._submit("crossmodal", CrossmodalSpec(zoo=ref), consumed(first.expected))
                case "uploaded" if self.uploads:
                    ref, number = ArtifactRef(artifact=list(self.uploads)[-1]), list(self.uploads.values())[-1]
                    asked = self._submit("crossmodal", CrossmodalSpec(zoo=ref), consumed(number))
                case "parent":
                    spec = self._spec(subjects=self._chance.randint(2, 3), steps=8)
                    asked = self._submit("generation", spec, total(spec), parts=parts(spec))
                case _:
                    asked = self._count()
            under_way.append(asked)
            match self._chance.choices(["", "meddle", "watch"], [5, 2, 2])[0]:
                case "meddle":
                    self._spawn(self._meddle, asked, self._chance.uniform(0.0, 6.0), self._chance.random() < 0.6)
                case "watch":
                    for client in self._arena.clients:
                        self._spawn(self._watch, asked, client)

    def drain(self, seconds: float) -> None:
        """Wait until all have ended, or time is over."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.1, deadline - time.monotonic()))
        unfinished = [asked.ids[0] for asked in self.asked]
        while time.monotonic() < deadline:
            unfinished = [job for job in unfinished if not self._state(job).terminal]
            if not unfinished:
                break
            time.sleep(0.2)
        for thread in self._threads:
            thread.join(5)
            if thread.is_alive():
                self.wrong.append("a watcher or a canceller did not come to its end")

    def evidence(self, scratch: Path) -> list[Evidence]:
        """What became of each job, and of its children."""
        found = []
        for asked in self.asked:
            children = self._arena.registry.list(parent=asked.ids[0], limit=500)[0]
            mine = self._evidence(asked, scratch)
            mine.parts, mine.children = list(asked.parts), [child.name for child in children]
            found.append(mine)
            for child in children:
                if spec := asked.parts.get(str(child.name)):
                    part = Asked("", total(spec), spec.training.steps, ids=[child.id], cancelled=asked.cancelled)
                    found.append(self._evidence(part, scratch))
        return found

    def fetched(self, scratch: Path) -> dict[str, float | str]:
        """What the uploads hold now; a sentence where one cannot be fetched and verified."""
        found: dict[str, float | str] = {}
        rows = {row.id for row in self._pages(self._arena.registry.artifacts)}
        for id in self.uploads:
            try:
                held = float((self._arena.store.fetch(id, scratch / f"upload-{id}") / FILE).read_text())
                found[id] = held if id in rows else "the registry does not know it"
            except EthogramError as error:
                found[id] = error.message
        return found

    def roots(self) -> list[str]:
        """All jobs in the registry that are no children."""
        return [job.id for job in self._pages(self._arena.registry.list) if job.parent is None]

    @staticmethod
    def _pages(read: Callable[..., tuple[list[R], str | None]]) -> list[R]:
        found, cursor = list[R](), None
        while True:
            page, cursor = read(limit=500, cursor=cursor)
            found += page
            if cursor is None:
                return found

    def _evidence(self, asked: Asked, scratch: Path) -> Evidence:
        registry, store = self._arena.registry, self._arena.store
        job = registry.get(asked.ids[0])
        rows = registry.artifacts(job=job.id, limit=100)[0]
        output: float | str = "there is none"
        steps: list[int] = []
        for row in rows:
            try:
                folder = store.fetch(row.id, scratch / row.id)
            except EthogramError as error:
                output = f"{row.name}: {error.message}"
                break
            if row.name == OUTPUT:
                output = float((folder / FILE).read_text())
            elif row.name == "metrics":
                steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        count = asked.steps if job.state is JobState.SUCCEEDED else 0
        return Evidence(
            job=job,
            events=self._events(job),
            artifacts=rows,
            expected=asked.expected,
            output=output,
            steps=steps,
            count=count,
            cancelled=asked.cancelled,
            watched=asked.watched,
        )

    def _events(self, job: Job) -> list[Event]:
        found: list[Event] = []
        while page := self._arena.registry.events(job.id, after=found[-1].seq if found else 0):
            found += page
        return found

    def _count(self) -> Asked:
        spec = self._spec()
        return self._submit("generation", spec, total(spec), spec.training.steps)

    def _spec(self, subjects: int = 1, steps: int = _STEPS) -> GenerationSpec:
        training = SubjectTrainingSpec(steps=steps, learning_rate=_SECONDS)
        return GenerationSpec(seed=self._chance.randrange(2**31), subjects=subjects, training=training)

    def _submit(
        self,
        kind: Literal["generation", "crossmodal"],
        spec: GenerationSpec | CrossmodalSpec,
        expected: float,
        steps: int = 0,
        parts: dict[str, GenerationSpec] | None = None,
    ) -> Asked:
        asked = Asked(f"key-{len(self.asked)}", expected, steps, parts or {})
        body: dict[str, Any] = spec.model_dump(mode="json", exclude_defaults=True)

        def send(client: Client) -> str:
            return client.submit(kind, body, idempotency_key=asked.key, **_OPTIONS).id  # type: ignore[arg-type]

        asked.ids.append(self._patiently(send))
        if self._chance.random() < 0.3:
            asked.ids.append(self._patiently(send))
        self.asked.append(asked)
        return asked

    def _patiently(self, call: Callable[[Client], R]) -> R:
        """``call`` on one gateway or another until one answers."""
        deadline = time.monotonic() + 120
        while True:
            client = self._arena.clients[random.randrange(len(self._arena.clients))]
            try:
                return call(client)
            except Unavailable:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def _state(self, job: str) -> JobState:
        try:
            return self._arena.registry.get(job).state
        except Unavailable:
            return JobState.RUNNING

    def _meddle(self, asked: Asked, seconds: float, retry: bool) -> None:
        """Cancel at some moment, and perhaps think better of it."""
        time.sleep(seconds)
        job = asked.ids[0]
        asked.cancelled = True
        # It had ended, or the first answer was lost.
        with suppress(IllegalState):
            self._patiently(lambda client: client.cancel(job))
        if not retry:
            return
        while not self._state(job).terminal:
            time.sleep(0.1)
        if self._state(job) is JobState.CANCELLED:
            # The first answer was lost.
            with suppress(IllegalState):
                self._patiently(lambda client: client.retry(job))
            asked.cancelled = False

    def _upload(self) -> None:
        """Upload now and then what jobs take as input."""
        with tempfile.TemporaryDirectory() as folder:
            while not self.enough.wait(1.0):
                number = random.random()
                (Path(folder) / FILE).write_text(repr(number))
                made = self._patiently(lambda client: client.put(Path(folder), name=OUTPUT, type="number"))
                self.uploads[made.id] = number

    def _watch(self, asked: Asked, client: Client) -> None:
        seen: list[int] = []
        asked.watched.append(seen)
        after = 0
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            try:
                # Below what drops events that come twice.
                for frame in client._event_frames(asked.ids[0], after, True, client._tries(repeatable=True)):
                    if frame.event == "end":
                        return
                    if frame.event != "progress":
                        after = int(frame.id)
                        seen.append(after)
            except httpx.HTTPError:
                time.sleep(0.2)

    def _spawn(self, function: Callable[..., None], *words: Any) -> None:
        self._threads.append(spawn(self.wrong, function, *words))
