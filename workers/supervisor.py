"""One attempt at a job: a child process runs it, and the supervisor writes its events to the registry."""

from __future__ import annotations

import json
import logging
import math
import queue
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import grpc
from google.protobuf.message import Message
from pydantic import ValidationError

from ethogram.convert import to_proto
from ethogram.errors import EthogramError, Internal, InvalidInput, StaleAttempt, TimeLimit, Unavailable
from ethogram.rpc import CHANNEL_OPTIONS, error_of
from ethogram.specs.kinds import Kind
from ethogram.v1 import jobs_pb2
from services.jobs.registry import Claim, Job
from services.kinds import request_type, spec_message
from workers.ledger import Context, Ledger, Outcome, Pulse
from workers.process import READY_SECONDS, Child, ChildFailed, ForkServer, describe_exit
from workers.settings import Slot

logger = logging.getLogger(__name__)

# Events of the child are written in batches, this long after the first event of each.
BATCH_SECONDS = 0.05
MAX_BATCH = 500
# Time within which a cancel or a stop is acted upon, once this process knows of it.
LOOK_SECONDS = 0.2
# Status of a call whose process was asked to leave; see services.runtime.servicer.STOPPED.
STOPPED = grpc.StatusCode.ABORTED


def run_attempt(context: Context, claim: Claim, server: ForkServer) -> None:
    """Run the claimed job in a process of its own. Returns when the process is gone; never raises."""
    labels = {"job": claim.job.id, "attempt": claim.attempt, "kind": claim.job.kind, "slot": server.slot.index}
    logger.info("attempt begins", extra=labels)
    ledger, metrics = Ledger(context, claim), context.metrics
    outcome_label = "taken"
    try:
        with metrics.busy.track_inprogress(), Pulse(context, claim) as pulse:
            outcome = _supervise(context, claim, server, ledger, pulse)
            ledger.settle(outcome, pulse.seconds)
            metrics.seconds.labels(claim.job.kind).observe(pulse.seconds)
            outcome_label = outcome.kind
        logger.info("attempt ends", extra={**labels, "outcome": outcome.kind, "detail": outcome.message})
    except StaleAttempt:
        logger.warning("the attempt was taken from this worker, which writes nothing more for it", extra=labels)
    except Exception:
        logger.exception("the attempt's end could not be written; the reconciler will release it", extra=labels)
    finally:
        metrics.attempts.labels(claim.job.kind, outcome_label).inc()
        shutil.rmtree(context.work / claim.attempt, ignore_errors=True)


def _supervise(context: Context, claim: Claim, server: ForkServer, ledger: Ledger, pulse: Pulse) -> Outcome:
    work_dir = context.work / claim.attempt
    try:
        kind, request = _request(context, claim, server.slot, work_dir)
        work_dir.mkdir(parents=True, exist_ok=True)
        child = Child(kind, server, work_dir)
        try:
            return Attempt(context, claim.job, child, ledger, pulse).run(kind, request)
        finally:
            child.close(0.0 if pulse.stale.is_set() else context.config.grace_seconds)
    except (StaleAttempt, Unavailable):
        raise
    except EthogramError as error:
        # The spec cannot be read, or an event cannot be written: the next attempt would fail in the same way.
        return Outcome("failed", error.message, error=error)
    except ChildFailed as failure:
        return Outcome("crashed", str(failure))
    except OSError as error:
        return Outcome("crashed", f"the worker could not start the job's process: {error.strerror or error}")
    except Exception:
        logger.exception("the supervisor failed", extra={"job": claim.job.id})
        return Outcome("crashed", "the supervisor of the job failed; the worker's log says more")


def _request(context: Context, claim: Claim, slot: Slot, work_dir: Path) -> tuple[Kind, Message]:
    """The kind of the claimed job, and the request that its process gets."""
    job = claim.job
    kind = context.kinds.get(job.kind)
    if kind is None:
        raise InvalidInput.field("kind", f"this worker knows no {job.kind!r}; is it older than the gateway?")
    try:
        spec = kind.spec.model_validate(job.spec)
    except ValidationError as error:
        raise InvalidInput.from_pydantic(error, "spec", kind.spec) from None
    run = jobs_pb2.RunContext(
        job=job.id,
        attempt=claim.attempt,
        tenant=job.tenant,
        device=slot.device,
        threads=slot.threads,
        work_dir=str(work_dir),
        store=context.config.store_url,
        inputs=job.inputs,
        checkpoint=job.checkpoint["artifact"] if job.checkpoint else "",
        checkpoint_seconds=context.config.checkpoint_seconds,
        children=[
            jobs_pb2.ChildJob(
                name=child.name,
                job=child.job,
                state=child.state,
                outputs=child.outputs,
                error=str((child.error or {}).get("message", "")),
                result_json=json.dumps(child.result) if child.result is not None else "",
            )
            for child in claim.children
        ],
    )
    make: Any = request_type(kind)
    return kind, make(context=run, spec=to_proto(spec, spec_message(kind)))


@dataclass(frozen=True)
class Ended:
    """The end of the child's call."""

    error: grpc.RpcError | None


class Attempt:
    """One attempt while its child runs."""

    def __init__(self, context: Context, job: Job, child: Child, ledger: Ledger, pulse: Pulse) -> None:
        self._child, self._ledger, self._pulse = child, ledger, pulse
        self._stopping, self._grace = context.stopping, context.config.grace_seconds
        self._time_limit = math.inf if job.time_limit_seconds is None else job.time_limit_seconds
        """Run time of the job over all attempts, in seconds."""
        self._ran_before = job.ran_seconds
        self._stall_limit = math.inf if job.stall_limit_seconds is None else job.stall_limit_seconds
        """Time without an event, in seconds."""
        # Its process may take so long to start, and import the job's code.
        self._last_event = time.monotonic() + READY_SECONDS
        self._reason: Literal["", "cancel", "stop", "time", "stall"] = ""
        """Why the child was asked to leave or killed."""
        self._queue: queue.Queue[jobs_pb2.JobEvent | Ended] = queue.Queue(1000)
        self._over = threading.Event()

    def run(self, kind: Kind, request: Message) -> Outcome:
        """Follow the child from its start to the end of its call."""
        try:
            self._child.wait_ready(self._unwanted)
        except ChildFailed as failure:
            if self._pulse.stale.is_set():
                raise StaleAttempt("the attempt was taken from this worker") from None
            if self._pulse.cancel.is_set():
                return Outcome("cancelled")
            if self._stopping.is_set():
                return Outcome("stopped", "the worker was stopped")
            self._reason = self._limit()
            return self._limit_reached() or self._died(str(failure))
        with grpc.insecure_channel(f"unix:{self._child.socket}", options=CHANNEL_OPTIONS) as channel:
            rpc = channel.unary_stream(
                kind.rpc,
                request_serializer=type(request).SerializeToString,
                response_deserializer=jobs_pb2.JobEvent.FromString,
            )
            call = rpc(request)
            threading.Thread(target=self._read, args=[call], name="child-events", daemon=True).start()
            try:
                ended = self._follow(call)
            finally:
                self._over.set()
                call.cancel()
        return self._outcome(ended)

    def _unwanted(self) -> bool:
        stops = self._stopping.is_set() or self._pulse.cancel.is_set() or self._pulse.stale.is_set()
        return stops or bool(self._limit())

    def _limit(self) -> Literal["", "time", "stall"]:
        """The limit that is passed."""
        if self._ran_before + self._pulse.seconds > self._time_limit:
            return "time"
        return "stall" if time.monotonic() - self._last_event > self._stall_limit else ""

    def _read(self, call: Any) -> None:
        """Move events from the call to the queue; a full queue blocks the child."""
        ended = Ended(None)
        try:
            for event in call:
                self._enqueue(event)
        except grpc.RpcError as error:
            ended = Ended(error)
        self._enqueue(ended)

    def _enqueue(self, item: jobs_pb2.JobEvent | Ended) -> None:
        while not self._over.is_set():
            try:
                return self._queue.put(item, timeout=1.0)
            except queue.Full:
                continue

    def _follow(self, call: Any) -> Ended:
        deadline, self._last_event = math.inf, time.monotonic()
        while True:
            batch, ended = self._batch()
            self._ledger.write(batch)
            if ended is not None:
                return ended
            if self._pulse.stale.is_set():
                raise StaleAttempt("the attempt was taken from this worker")
            # If its fork server has died, so does the child.
            self._child.died(0.0)
            now = time.monotonic()
            self._last_event = now if batch else self._last_event
            if self._pulse.cancel.is_set() and self._reason != "cancel":
                self._reason, deadline = "cancel", now + self._grace
                call.cancel()
                self._child.ask_to_leave()
                self._child.hang_up()
            elif self._reason:
                if now > deadline:
                    self._child.kill()
            elif self._stopping.is_set() or self._limit() == "time":
                self._reason, deadline = "stop" if self._stopping.is_set() else "time", now + self._grace
                self._child.ask_to_leave()
            elif self._limit() == "stall":
                self._reason, deadline = "stall", now
                self._child.dump_stacks()

    def _batch(self) -> tuple[list[jobs_pb2.JobEvent], Ended | None]:
        """The events since the last call, and the end of the call if it has ended."""
        events: list[jobs_pb2.JobEvent] = []
        try:
            item = self._queue.get(timeout=LOOK_SECONDS)
            if not isinstance(item, Ended):
                time.sleep(BATCH_SECONDS)
            while not isinstance(item, Ended):
                events.append(item)
                if len(events) == MAX_BATCH:
                    return events, None
                item = self._queue.get_nowait()
            return events, item
        except queue.Empty:
            return events, None

    def _outcome(self, ended: Ended) -> Outcome:
        if ended.error is None:
            if self._ledger.waits:
                return Outcome("waiting", "for its children to end")
            if self._ledger.result is None:
                return Outcome("crashed", "the job ended without a result")
            return Outcome("succeeded", result=self._ledger.result)
        if self._pulse.cancel.is_set():
            return Outcome("cancelled")
        if (reached := self._limit_reached()) is not None:
            return reached
        code = ended.error.code()
        if self._stopping.is_set() or code == STOPPED:
            return Outcome("stopped", "the worker was stopped")
        status = self._child.died(2.0 if code == grpc.StatusCode.UNAVAILABLE else 0.0)
        if status is not None:
            return self._died(describe_exit(status))
        error = error_of(ended.error)
        if isinstance(error, Internal | Unavailable):
            return Outcome("crashed", error.message)
        return Outcome("failed", error.message, error=error)

    def _limit_reached(self) -> Outcome | None:
        """The outcome if the job was ended for a limit."""
        if self._reason == "time":
            limit = f"the job ran for {self._time_limit:g} s, its time limit"
            return Outcome("failed", limit, error=TimeLimit(f"{limit}; retry it to resume from its last checkpoint"))
        if self._reason == "stall":
            return self._died(f"the job sent no event for {self._stall_limit:g} s, its stall limit", "stalled")
        return None

    def _died(self, message: str, kind: Literal["crashed", "stalled"] = "crashed") -> Outcome:
        if output := self._child.last_output():
            self._ledger.log(output)
        return Outcome(kind, message)
