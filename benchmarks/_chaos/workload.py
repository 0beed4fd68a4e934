"""What users do meanwhile: submit, watch, cancel and retry, through gateways that come and go."""

from __future__ import annotations

import json
import random
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import httpx

from benchmarks._chaos.arena import Arena, spawn
from benchmarks._chaos.checks import Evidence, Submission
from benchmarks._chaos.jobs import FILE, OUTPUT, consumed, expected_total, parts
from ethogram.client import Client
from ethogram.errors import EthogramError, IllegalState, Unavailable
from ethogram.specs.base import ArtifactRef, Spec
from ethogram.specs.crossmodal import CrossmodalSpec
from ethogram.specs.generation import GenerationSpec, SubjectTrainingSpec
from services.jobs.records import Event, Job
from services.jobs.states import JobState

# Most jobs under way at once.
_OPEN = 8
_STEP_SECONDS, _STALL_SECONDS = 0.1, 4.0

R = TypeVar("R")


class Workload:
    """Jobs of one seed, submitted as others end."""

    def __init__(self, arena: Arena, seed: int) -> None:
        self._arena, self._chance = arena, random.Random(f"workload {seed}")
        self.submissions: list[Submission] = []
        self.uploads: dict[str, float] = {}
        """Artifacts that a user uploaded, and the number in each."""
        self.errors: list[str] = []
        """What the benchmark itself could not do."""
        self._threads: list[threading.Thread] = []
        self.enough = threading.Event()

    def run(self, at_least: int) -> None:
        """Submit until ``enough`` is set and ``at_least`` jobs were submitted."""
        self._spawn(self._upload)
        under_way: list[Submission] = []
        while not (self.enough.is_set() and len(self.submissions) >= at_least):
            under_way = [job for job in under_way if not self._state(job.ids[0]).terminal]
            if len(under_way) >= _OPEN:
                time.sleep(0.1)
                continue
            kind = self._chance.choices(["plain", "pair", "uploaded", "parent"], [6, 1, 1, 2])[0]
            match kind:
                case "pair":
                    first = self._submit_count()
                    job = self._submit_consume(ArtifactRef(job=first.ids[0], artifact=OUTPUT), first.expected)
                case "uploaded" if self.uploads:
                    upload, number = list(self.uploads.items())[-1]
                    job = self._submit_consume(ArtifactRef(artifact=upload), number)
                case "parent":
                    job = self._submit_count(subjects=self._chance.randint(2, 3), steps=8)
                case _:
                    job = self._submit_count()
            under_way.append(job)
            match self._chance.choices(["", "cancel", "watch"], [5, 2, 2])[0]:
                case "cancel":
                    self._spawn(self._cancel, job, self._chance.uniform(0.0, 6.0), self._chance.random() < 0.6)
                case "watch":
                    for client in self._arena.clients:
                        self._spawn(self._watch, job, client)

    def drain(self, seconds: float) -> None:
        """Wait until all have ended, at most ``seconds``."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.1, deadline - time.monotonic()))
        unfinished = [job.ids[0] for job in self.submissions]
        while time.monotonic() < deadline:
            unfinished = [job for job in unfinished if not self._state(job).terminal]
            if not unfinished:
                break
            time.sleep(0.2)
        for thread in self._threads:
            thread.join(5)
            if thread.is_alive():
                self.errors.append("a watcher or a canceller did not come to its end")

    def evidence(self, scratch: Path) -> list[Evidence]:
        """What became of each job and of its children."""
        jobs = []
        for submission in self.submissions:
            children = self._arena.registry.list(parent=submission.ids[0], limit=500)[0]
            jobs.append(self._evidence(submission, scratch, [child.name for child in children]))
            for child in children:
                if spec := submission.parts.get(str(child.name)):
                    part = _count(spec, ids=[child.id], cancelled=submission.cancelled)
                    jobs.append(self._evidence(part, scratch))
        return jobs

    def fetched(self, scratch: Path) -> dict[str, float | str]:
        """What the uploads hold now; a sentence where one cannot be fetched and verified."""
        found: dict[str, float | str] = dict.fromkeys(self.uploads, "the registry does not know it")
        known = {artifact.id for artifact in self._insist(lambda client: client.artifacts(limit=None))}
        for id in known & found.keys():
            try:
                found[id] = float(
                    (self._arena.store.fetch(id, scratch / f"upload-{id}") / FILE).read_text(encoding="utf-8")
                )
            except EthogramError as error:
                found[id] = error.message
        return found

    def roots(self) -> list[str]:
        """All jobs in the registry that are no children."""
        return [job.id for job in self._insist(lambda client: client.jobs(limit=None)) if job.parent is None]

    def _evidence(self, submission: Submission, scratch: Path, children: Sequence[str | None] = ()) -> Evidence:
        registry = self._arena.registry
        job = registry.get(submission.ids[0])
        rows = registry.artifacts(job=job.id, limit=100)[0]
        output: float | str = "there is none"
        steps: list[int] = []
        for row in rows:
            try:
                folder = self._arena.store.fetch(row.id, scratch / row.id)
            except EthogramError as error:
                output = f"{row.name}: {error.message}"
                break
            if row.name == OUTPUT:
                output = float((folder / FILE).read_text(encoding="utf-8"))
            elif row.name == "metrics":
                steps = [
                    json.loads(line)["step"]
                    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
                ]
        found: dict[str, Any] = {"events": self._events(job), "artifacts": rows, "output": output, "steps": steps}
        return Evidence(**vars(submission), job=job, children=children, **found)

    def _events(self, job: Job) -> list[Event]:
        events: list[Event] = []
        while page := self._arena.registry.events(job.id, after=events[-1].seq if events else 0):
            events += page
        return events

    def _submit_count(self, subjects: int = 1, steps: int = 30) -> Submission:
        training = SubjectTrainingSpec(steps=steps, learning_rate=_STEP_SECONDS)
        spec = GenerationSpec(seed=self._chance.randrange(2**31), subjects=subjects, training=training)
        return self._submit("generation", spec, _count(spec))

    def _submit_consume(self, source: ArtifactRef, number: float) -> Submission:
        return self._submit("crossmodal", CrossmodalSpec(zoo=source), Submission(expected=consumed(number)))

    def _submit(self, kind: str, spec: Spec, submission: Submission) -> Submission:
        submission.key = f"key-{len(self.submissions)}"

        def send(client: Client) -> str:
            job = client.submit(
                kind, spec, idempotency_key=submission.key, max_attempts=100, stall_limit_seconds=_STALL_SECONDS
            )
            return job.id

        submission.ids.append(self._insist(send))
        if self._chance.random() < 0.3:
            submission.ids.append(self._insist(send))
        self.submissions.append(submission)
        return submission

    def _insist(self, call: Callable[[Client], R]) -> R:
        """``call`` one gateway or another until one answers."""
        deadline = time.monotonic() + 120
        while True:
            try:
                return call(random.choice(self._arena.clients))
            except Unavailable:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def _state(self, job: str) -> JobState:
        try:
            return self._arena.registry.get(job).state
        except Unavailable:
            return JobState.RUNNING

    def _cancel(self, submission: Submission, seconds: float, retry: bool) -> None:
        """Cancel after ``seconds``, and perhaps retry."""
        time.sleep(seconds)
        job = submission.ids[0]
        submission.cancelled = True
        # The job had ended, or the answer to an earlier try was lost.
        with suppress(IllegalState):
            self._insist(lambda client: client.cancel(job))
        if not retry:
            return
        while not self._state(job).terminal:
            time.sleep(0.1)
        while self._insist(lambda client: client.job(job)).state == JobState.CANCELLED:
            submission.cancelled = False
            # A child is still being cancelled, or the answer to an earlier try was lost.
            with suppress(IllegalState):
                self._insist(lambda client: client.retry(job))
            time.sleep(0.1)

    def _upload(self) -> None:
        """Upload now and then what jobs take as input."""
        with tempfile.TemporaryDirectory() as folder:
            while not self.enough.wait(1.0):
                number = random.random()
                (Path(folder) / FILE).write_text(repr(number), encoding="utf-8")
                made = self._insist(lambda client: client.put(Path(folder), name=OUTPUT, type="number"))
                self.uploads[made.id] = number

    def _watch(self, submission: Submission, client: Client) -> None:
        seen: list[int] = []
        submission.watched.append(seen)
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            try:
                # Not Client.events, which drops events that come twice.
                after = seen[-1] if seen else 0
                for frame in client._event_frames(submission.ids[0], after, True, client._tries(repeatable=True)):
                    if frame.event == "end":
                        return
                    if frame.event != "progress":
                        seen.append(int(frame.id))
            except httpx.HTTPError:
                time.sleep(0.2)

    def _spawn(self, function: Callable[..., None], *arguments: Any) -> None:
        self._threads.append(spawn(self.errors, function, *arguments))


def _count(spec: GenerationSpec, **values: Any) -> Submission:
    """What a job with ``spec`` must come to."""
    if spec.subjects > 1:
        return Submission(expected=expected_total(spec), parts=parts(spec), **values)
    return Submission(expected=expected_total(spec), count=spec.training.steps, **values)
