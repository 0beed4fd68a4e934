"""One attempt at a job: a child process runs it, and what it says is written down in the attempt's name."""

from __future__ import annotations

import json
import logging
import queue
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import grpc
from pydantic import ValidationError

from ethogram.convert import to_proto
from ethogram.errors import EthogramError, Internal, InvalidInput, StaleAttempt, TooLarge, Unavailable
from ethogram.rpc import CHANNEL_OPTIONS, error_of
from ethogram.v1 import jobs_pb2
from services.jobs.notify import Notifier
from services.jobs.registry import Claim, Job, JobRegistry
from services.kinds import Kind
from workers.process import Child, ChildFailed, describe_exit
from workers.slots import Slot

logger = logging.getLogger(__name__)

# What the child says is written in batches, this long after the first event of each.
BATCH_SECONDS = 0.05
MAX_BATCH = 500
# How soon a cancel or a stop is seen, once this process knows of it.
LOOK_SECONDS = 0.2
# A run that was asked to leave ends its call so; see services.runtime.servicer.STOPPED.
STOPPED = grpc.StatusCode.ABORTED
RETRY_SECONDS = (0.2, 0.5, 1.0, 2.0)

R = TypeVar("R")


@dataclass(frozen=True)
class Outcome:
    """How an attempt ends."""

    kind: str
    """``succeeded``, ``failed``, ``cancelled``, ``stopped``, ``crashed``."""
    message: str = ""
    result: dict[str, Any] = field(default_factory=dict)
    error: EthogramError | None = None


class Pulse:
    """Keeps an attempt's lease, on a timer of its own, and hears whether the job is to be cancelled."""

    def __init__(self, registry: JobRegistry, attempt: str, interval: float) -> None:
        self.cancel, self.stale = threading.Event(), threading.Event()
        self._registry, self._attempt, self._interval = registry, attempt, interval
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._done.wait(self._interval):
            try:
                if self._registry.heartbeat(self._attempt):
                    self.cancel.set()
            except StaleAttempt:
                self.stale.set()
                return
            except Exception:
                # The registry may be back at the next beat; if not in time, the fence keeps the job whole.
                logger.warning("no heartbeat", extra={"attempt": self._attempt}, exc_info=True)


class Supervisor:
    """Runs claimed jobs, each in a process of its own, one per slot."""

    def __init__(
        self,
        registry: JobRegistry,
        notifier: Notifier,
        kinds: Mapping[str, Kind],
        *,
        store: str,
        work: Path,
        stopping: threading.Event,
        checkpoint_seconds: float,
        grace_seconds: float,
    ) -> None:
        self._registry, self._notifier, self._kinds = registry, notifier, kinds
        self._store, self._work, self._stopping = store, work, stopping
        self._checkpoint_seconds, self._grace = checkpoint_seconds, grace_seconds

    def run(self, claim: Claim, slot: Slot) -> None:
        """Carry the attempt to its end. Returns when its process is gone; never raises."""
        told = {"job": claim.job.id, "attempt": claim.attempt, "kind": claim.job.kind, "slot": slot.index}
        logger.info("attempt begins", extra=told)
        work_dir = self._work / claim.attempt
        try:
            with Pulse(self._registry, claim.attempt, claim.lease_seconds / 3) as pulse:
                try:
                    outcome = Attempt(self, claim, slot, work_dir, pulse).run()
                except (StaleAttempt, Unavailable):
                    raise
                except EthogramError as error:
                    # What the job made cannot be written down: another attempt would meet the same.
                    outcome = Outcome("failed", error.message, error=error)
                except Exception:
                    logger.exception("the supervisor failed", extra=told)
                    outcome = Outcome("crashed", "the supervisor of the job failed; the worker's log says more")
                self._settle(claim, outcome)
            logger.info("attempt ends", extra={**told, "outcome": outcome.kind, "detail": outcome.message})
        except StaleAttempt:
            logger.warning("the attempt is no longer ours; nothing more is written in its name", extra=told)
        except Exception:
            logger.exception("the registry does not answer; the reconciler gives the job to another worker", extra=told)
        finally:
            shutil.rmtree(work_dir, ignore_errors=True)

    def _settle(self, claim: Claim, outcome: Outcome) -> None:
        registry, attempt = self._registry, claim.attempt

        def fail(error: EthogramError) -> Job:
            violations = [violation._asdict() for violation in error.violations]
            return registry.fail(attempt, {"reason": error.reason, "message": error.message, "violations": violations})

        def settle() -> Job:
            match outcome:
                case Outcome("succeeded"):
                    try:
                        return registry.succeed(attempt, outcome.result)
                    except TooLarge as error:
                        return fail(error)
                case Outcome("failed", error=EthogramError() as error):
                    return fail(error)
                case Outcome("cancelled"):
                    return registry.cancelled(attempt)
                case Outcome("stopped"):
                    return registry.release(attempt, "stopped", outcome.message)
                case _:
                    return registry.release(attempt, "crashed", outcome.message)

        self.notify(claim, self.persist(settle).seq)

    def persist(self, write: Callable[[], R]) -> R:
        """``write``, and again while the registry does not answer; who must leave tries no longer than the grace."""
        tries, deadline = 0, 0.0
        while True:
            try:
                return write()
            except Unavailable as error:
                if self._stopping.is_set():
                    deadline = deadline or time.monotonic() + self._grace
                    if time.monotonic() > deadline:
                        raise
                logger.warning("the registry does not answer; trying again", extra={"error": str(error)[:300]})
                time.sleep(RETRY_SECONDS[min(tries, len(RETRY_SECONDS) - 1)])
                tries += 1

    def notify(self, claim: Claim, seq: int) -> None:
        """Tell the gateways that the job has something new."""
        self._notifier.notify(claim.job.id, seq)


class Attempt:
    """One attempt while its child runs."""

    def __init__(self, supervisor: Supervisor, claim: Claim, slot: Slot, work_dir: Path, pulse: Pulse) -> None:
        self._s, self._claim, self._slot, self._work_dir, self._pulse = supervisor, claim, slot, work_dir, pulse
        self._registry = supervisor._registry
        self._queue: queue.Queue[jobs_pb2.JobEvent | Ended] = queue.Queue(1000)
        self._metrics: dict[str, float] = {}
        self._result: dict[str, Any] | None = None
        self._leaving: str | None = None
        self._deadline = float("inf")

    def run(self) -> Outcome:
        """Start the child, follow it, end it."""
        try:
            kind, request = self._request()
        except InvalidInput as error:
            return Outcome("failed", error.message, error=error)
        self._work_dir.mkdir(parents=True, exist_ok=True)
        child = Child(kind.servicer, self._slot, self._work_dir)
        try:
            try:
                child.wait_ready(self._s._stopping)
            except ChildFailed as failure:
                if self._s._stopping.is_set():
                    return Outcome("stopped", "the worker was stopped")
                return self._crashed(child, str(failure))
            with grpc.insecure_channel(f"unix:{child.socket}", options=CHANNEL_OPTIONS) as channel:
                rpc = channel.unary_stream(
                    kind.rpc,
                    request_serializer=kind.request.SerializeToString,
                    response_deserializer=jobs_pb2.JobEvent.FromString,
                )
                call = rpc(request)
                reader = threading.Thread(target=self._read, args=[call], name="child-events", daemon=True)
                reader.start()
                try:
                    ended = self._follow(child, call)
                finally:
                    call.cancel()
            return self._outcome(child, ended)
        finally:
            child.close(0.0 if self._pulse.stale.is_set() else self._s._grace)

    def _request(self) -> tuple[Kind, Any]:
        job = self._claim.job
        kind = self._s._kinds.get(job.kind)
        if kind is None:
            raise InvalidInput.field("kind", f"this worker knows no {job.kind!r}; is it older than the gateway?")
        try:
            spec = kind.spec.model_validate(job.spec)
        except ValidationError as error:
            raise InvalidInput.from_pydantic(error, "spec") from None
        context = jobs_pb2.RunContext(
            job=job.id,
            attempt=self._claim.attempt,
            tenant=job.tenant,
            device=self._slot.device,
            threads=self._slot.threads,
            work_dir=str(self._work_dir),
            store=self._s._store,
            inputs=job.inputs,
            checkpoint=job.checkpoint["artifact"] if job.checkpoint else "",
            checkpoint_seconds=self._s._checkpoint_seconds,
        )
        return kind, kind.request(context=context, spec=to_proto(spec, kind.spec_message))

    def _read(self, call: Any) -> None:
        """Move events from the call to the queue; a full queue holds the child back."""
        ended = Ended(None)
        try:
            for event in call:
                self._queue.put(event)
        except grpc.RpcError as error:
            ended = Ended(error)
        self._queue.put(ended)

    def _follow(self, child: Child, call: Any) -> Ended:
        while True:
            batch, ended = self._batch()
            self._write(batch)
            if ended is not None:
                return ended
            if self._pulse.stale.is_set():
                raise StaleAttempt(f"attempt {self._claim.attempt} was taken from this worker")
            now = time.monotonic()
            if self._pulse.cancel.is_set() and self._leaving != "cancel":
                self._leaving, self._deadline = "cancel", now + self._s._grace
                call.cancel()
                child.ask_to_leave()
                child.hang_up()
            elif self._s._stopping.is_set() and self._leaving is None:
                self._leaving, self._deadline = "stop", now + self._s._grace
                child.ask_to_leave()
            elif now > self._deadline:
                child.kill()

    def _batch(self) -> tuple[list[jobs_pb2.JobEvent], Ended | None]:
        events: list[jobs_pb2.JobEvent] = []
        wait: float | None = LOOK_SECONDS
        try:
            while len(events) < MAX_BATCH:
                item = self._queue.get(timeout=wait) if wait else self._queue.get_nowait()
                if isinstance(item, Ended):
                    return events, item
                events.append(item)
                if wait:
                    time.sleep(BATCH_SECONDS)
                wait = None
        except queue.Empty:
            pass
        return events, None

    def _write(self, events: list[jobs_pb2.JobEvent]) -> None:
        """Write a batch down, in order; of its progress only the last."""
        registry, attempt, persist = self._registry, self._claim.attempt, self._s.persist
        progress: jobs_pb2.Progress | None = None
        lines: list[tuple[str, dict[str, Any]]] = []
        seq = 0

        def append() -> int:
            if not lines:
                return seq
            written = persist(lambda: registry.append_events(attempt, lines))
            lines.clear()
            return written[-1].seq

        for event in events:
            match event.WhichOneof("event"):
                case "progress":
                    progress = event.progress
                case "metric":
                    self._metrics.update(event.metric.values)
                case "log":
                    lines.append(("log", {"level": event.log.level, "message": event.log.message}))
                case "checkpoint":
                    seq = append()
                    point = event.checkpoint
                    seq = persist(partial(registry.commit_checkpoint, attempt, point.artifact, point.step)).seq
                case "artifact":
                    seq = append()
                    made = event.artifact
                    persist(partial(registry.commit_artifact, attempt, made.name, made.type, made.id, made.size))
                    seq += 1
                case "result":
                    self._result = json.loads(event.result.json)
        seq = append()
        if progress is not None:
            state = {
                "stage": progress.stage,
                "done": progress.done,
                "total": progress.total,
                "unit": progress.unit,
                "metrics": dict(self._metrics),
            }
            persist(lambda: registry.set_progress(attempt, state))
        if events:
            self._s.notify(self._claim, seq)

    def _outcome(self, child: Child, ended: Ended) -> Outcome:
        if ended.error is None:
            if self._result is not None:
                return Outcome("succeeded", result=self._result)
            return Outcome("crashed", "the job ended without a result")
        if self._pulse.cancel.is_set():
            return Outcome("cancelled")
        code = ended.error.code()
        if self._s._stopping.is_set() or code == STOPPED:
            return Outcome("stopped", "the worker was stopped")
        status = child.died(2.0 if code == grpc.StatusCode.UNAVAILABLE else 0.0)
        if status is not None:
            return self._crashed(child, describe_exit(status))
        error = error_of(ended.error)
        if isinstance(error, Internal | Unavailable):
            return Outcome("crashed", error.message)
        return Outcome("failed", error.message, error=error)

    def _crashed(self, child: Child, message: str) -> Outcome:
        if words := child.last_words():
            event = ("log", {"level": "error", "message": words})
            self._s.persist(lambda: self._registry.append_events(self._claim.attempt, [event]))
        return Outcome("crashed", message)


@dataclass(frozen=True)
class Ended:
    """The child's call is over."""

    error: grpc.RpcError | None
