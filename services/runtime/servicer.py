"""The gRPC side of a job: one generic handler serves the RPC of any kind."""

from __future__ import annotations

import logging
import queue
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import Message

from ethogram.convert import from_proto
from ethogram.errors import EthogramError, Internal, printable
from ethogram.rpc import grpc_status_of
from ethogram.specs.kinds import Kind
from ethogram.v1 import jobs_pb2
from services.runtime.job_run import MAX_LOG, JobRun
from services.runtime.run import Cancelled, Stopped, Waiting, warn

logger = logging.getLogger(__name__)

JOB_THREAD = "job"
STOPPED = grpc.StatusCode.ABORTED
"""Status of a call whose process was asked to leave and has checkpointed."""
# Events that may wait for a slow supervisor; past them the job waits too.
MAX_WAITING = 1000


def add_to_server(server: grpc.Server, kind: Kind, request: type[Message], imports: float = 0.0) -> None:
    """Serve ``kind.rpc``, whose request message is ``request``, on ``server``. ``imports``: seconds that the job has
    waited for imports before."""
    service, method = kind.rpc.removeprefix("/").split("/")
    handler = grpc.unary_stream_rpc_method_handler(
        partial(_stream_job, kind, imports),
        request_deserializer=request.FromString,
        response_serializer=jobs_pb2.JobEvent.SerializeToString,
    )
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {method: handler})])


def _stream_job(kind: Kind, imports: float, request: Any, context: grpc.ServicerContext) -> Iterator[jobs_pb2.JobEvent]:
    """Run the job's function in a thread and yield its events. ``request`` has the fields ``context`` and ``spec``.

    An :class:`EthogramError` travels to the supervisor as it is; the traceback of any other exception goes to the job's
    log, and the call ends with INTERNAL.
    """
    try:
        spec = from_proto(request.spec, kind.spec)
    except EthogramError as error:
        context.abort_with_status(grpc_status_of(error))
    events: queue.Queue[jobs_pb2.JobEvent | None] = queue.Queue(MAX_WAITING)
    ended: list[BaseException] = []
    cancelled = threading.Event()

    def send(event: jobs_pb2.JobEvent | None) -> None:
        while not cancelled.is_set():
            try:
                return events.put(event, timeout=0.5)
            except queue.Full:
                continue
        # Nobody listens any more, but the loop below may still wait for the end.
        if event is None:
            while not events.empty():
                events.get_nowait()
            events.put(None)

    def work() -> None:
        try:
            began = time.monotonic()
            function = kind.load_job()
            imported = time.monotonic()
            torch = sys.modules.get("torch")
            if torch is not None and request.context.threads:
                torch.set_num_threads(request.context.threads)
            run = JobRun(spec, request.context, send, cancelled)
            run.seconds["imports"] = imports + imported - began
            run.log(f"computes on {run.device}" + (", from the last checkpoint" if run.resume else ""))
            warn(spec, run)
            try:
                run.finish(function(spec, run))
            except Waiting:
                run.wait()
            except BaseException:
                # A later attempt resumes from it.
                if not cancelled.is_set():
                    run.wait_for_checkpoint()
                raise
        except BaseException as error:
            ended.append(error)
            if not isinstance(error, Cancelled | Stopped | EthogramError):
                logger.exception("the job raised", extra={"job": request.context.job})
                text = printable("".join(traceback.format_exception(error)))[-MAX_LOG:]
                send(jobs_pb2.JobEvent(log=jobs_pb2.Log(level="error", message=text)))
        finally:
            send(None)

    if not context.add_callback(cancelled.set):
        return
    threading.Thread(target=work, name=JOB_THREAD, daemon=True).start()
    while (event := events.get()) is not None:
        yield event
    match ended:
        case []:
            return
        case [Cancelled()]:
            context.abort(grpc.StatusCode.CANCELLED, "the job was cancelled")
        case [Stopped()]:
            context.abort(STOPPED, "the process was asked to leave; the job's last checkpoint is in the store")
        case [EthogramError() as job_error]:
            context.abort_with_status(grpc_status_of(job_error))
        case [defect]:
            problem = Internal(f"the job's code raised {type(defect).__name__}; its log says more")
            context.abort_with_status(grpc_status_of(problem))
