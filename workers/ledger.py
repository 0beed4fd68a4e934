"""Writes to the registry for one attempt: heartbeats, the events of its job in order, and the outcome."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, ParamSpec, Self, TypeVar

from pydantic import ValidationError

from ethogram.errors import EthogramError, InvalidInput, StaleAttempt, TooLarge, Unavailable
from ethogram.specs.kinds import Kind
from ethogram.v1 import jobs_pb2
from services.jobs.registry import Claim, Job, JobRegistry
from services.jobs.signals import Notifier
from workers.metrics import WorkerMetrics
from workers.settings import WorkerSettings

logger = logging.getLogger(__name__)

BEATS_PER_LEASE = 3
RETRY_SECONDS = (0.2, 0.5, 1.0, 2.0)

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Context:
    """What the parts of one worker share."""

    config: WorkerSettings
    kinds: Mapping[str, Kind]
    registry: JobRegistry
    notifier: Notifier
    metrics: WorkerMetrics
    work: Path
    """Folder for the jobs' scratch folders."""
    stopping: threading.Event
    """Set when the worker must leave."""


@dataclass(frozen=True)
class Outcome:
    """How an attempt ends."""

    kind: Literal["succeeded", "failed", "cancelled", "stopped", "waiting", "crashed", "stalled"]
    """The last four end the attempt; the job continues in another one."""
    message: str = ""
    result: dict[str, Any] = field(default_factory=dict)
    error: EthogramError | None = None
    """Reason of a failure."""


class Pulse:
    """Renews the lease on its own timer and learns whether the job is to be cancelled.

    Events of the job do not count: a job that compiles for minutes sends none, and is alive.
    """

    def __init__(self, context: Context, claim: Claim) -> None:
        self.cancel, self.stale = threading.Event(), threading.Event()
        self._context, self._attempt = context, claim.attempt
        self._interval = claim.lease_seconds / BEATS_PER_LEASE
        self._done = threading.Event()
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def seconds(self) -> float:
        """How long the attempt has run."""
        return time.monotonic() - self._began

    def _beat(self) -> None:
        while not self._done.wait(self._interval):
            try:
                if self._context.registry.heartbeat(self._attempt, self.seconds):
                    self.cancel.set()
            except StaleAttempt:
                self.stale.set()
                return
            except Exception:
                # The registry may answer at the next beat; if it does so too late, the fence protects the job.
                self._context.metrics.missed.inc()
                logger.warning("no heartbeat", extra={"attempt": self._attempt}, exc_info=True)


class Ledger:
    """Events and outcome of one attempt.

    Every method raises :class:`StaleAttempt` once the attempt no longer owns the job.
    """

    def __init__(self, context: Context, claim: Claim) -> None:
        self._context, self._registry, self._metrics = context, context.registry, context.metrics
        self._attempt, self._job = claim.attempt, claim.job.id
        self._latest: dict[str, float] = {}
        """Last value of each metric."""
        self.result: dict[str, Any] | None = None
        """The job's result, once it has sent one."""
        self.waits = False
        """Whether the job ended the attempt to wait for its children."""
        self._seq = self._batch = 0
        self._notify(claim.job.seq)

    def write(self, events: Sequence[jobs_pb2.JobEvent]) -> None:
        """Write a batch of events; of several progress events, only the last."""
        progress: jobs_pb2.Progress | None = None
        lines: list[tuple[str, dict[str, Any]]] = []
        for event in events:
            match event.WhichOneof("event"):
                case "progress":
                    progress = event.progress
                case "metric":
                    self._latest.update(event.metric.values)
                case "log":
                    lines.append(("log", {"level": event.log.level, "message": event.log.message}))
                case "checkpoint":
                    self._append(lines)
                    self._checkpoint(event.checkpoint)
                case "artifact":
                    self._append(lines)
                    self._artifact(event.artifact)
                case "spawn":
                    self._append(lines)
                    self._spawn(event.spawn)
                case "wait":
                    self.waits = True
                case "result":
                    self.result = json.loads(event.result.json)
        self._append(lines)
        if progress is not None:
            self._progress(progress)

    def log(self, message: str, level: str = "error") -> None:
        """Add a line of the worker to the job's log."""
        self._append([("log", {"level": level, "message": message})])

    def settle(self, outcome: Outcome, seconds: float) -> None:
        """End the attempt, which ran for ``seconds``."""
        self._notify(self._persist(self._settle, outcome, seconds).seq)

    def _notify(self, seq: int) -> None:
        self._seq = seq
        self._context.notifier.notify(self._job, seq)

    def _append(self, lines: list[tuple[str, dict[str, Any]]]) -> None:
        if lines:
            self._batch += 1
            self._metrics.events.inc(len(lines))
            written = self._persist(self._registry.append_events, self._attempt, lines, self._batch)
            lines.clear()
            self._notify(written[-1].seq if written else self._seq)

    def _checkpoint(self, point: jobs_pb2.Checkpoint) -> None:
        event = self._persist(self._registry.commit_checkpoint, self._attempt, point.artifact, point.step)
        self._notify(event.seq)
        self._metrics.checkpoints.inc()

    def _artifact(self, output: jobs_pb2.Artifact) -> None:
        commit = self._registry.commit_artifact
        self._persist(commit, self._attempt, output.name, output.type, output.id, output.size)
        self._notify(self._persist(self._registry.get, self._job).seq)

    def _spawn(self, part: jobs_pb2.Spawn) -> None:
        field = f"children.{part.name}"
        kinds = self._context.kinds
        if part.kind not in kinds:
            raise InvalidInput.field(f"{field}.kind", f"is none of {', '.join(sorted(kinds))}")
        try:
            spec = kinds[part.kind].spec.model_validate_json(part.spec_json)
        except ValidationError as error:
            raise InvalidInput.from_pydantic(error, f"{field}.spec", kinds[part.kind].spec) from None
        child = self._persist(self._registry.spawn, self._attempt, part.name, part.kind, spec)
        self._context.notifier.notify(child.id, child.seq)

    def _progress(self, progress: jobs_pb2.Progress) -> None:
        state: dict[str, Any] = {name: getattr(progress, name) for name in ("stage", "done", "total", "unit")}
        self._persist(self._registry.set_progress, self._attempt, {**state, "metrics": dict(self._latest)})
        # There is no new event, but watchers read the progress again.
        self._notify(self._seq)

    def _settle(self, outcome: Outcome, seconds: float) -> Job:
        registry, attempt, error = self._registry, self._attempt, outcome.error
        match outcome.kind:
            case "succeeded":
                try:
                    return registry.succeed(attempt, outcome.result, seconds=seconds)
                except TooLarge as too_large:
                    error = too_large
            case "cancelled":
                return registry.cancelled(attempt, seconds=seconds)
            case "stopped" | "waiting" | "crashed" | "stalled" as reason:
                return registry.release(attempt, reason, outcome.message, seconds=seconds)
        assert error is not None, "a failure has a reason"
        violations = [violation._asdict() for violation in error.violations]
        details = {"reason": error.reason, "message": error.message, "violations": violations}
        return registry.fail(attempt, details, seconds=seconds)

    def _persist(self, write: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call ``write``, again while the registry does not answer; a stopping worker gives up after the grace."""
        tries, deadline = 0, 0.0
        while True:
            try:
                return write(*args, **kwargs)
            except Unavailable as error:
                if self._context.stopping.is_set():
                    deadline = deadline or time.monotonic() + self._context.config.grace_seconds
                    if time.monotonic() > deadline:
                        raise
                self._metrics.retries.inc()
                logger.warning("the registry does not answer; trying again", extra={"error": str(error)[:300]})
                time.sleep(RETRY_SECONDS[min(tries, len(RETRY_SECONDS) - 1)])
                tries += 1
