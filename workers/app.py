"""The worker: woken through Celery, it claims jobs from the registry and runs each in a slot."""

from __future__ import annotations

import itertools
import logging
import os
import queue
import socket
import threading
from collections.abc import Mapping
from contextlib import closing, suppress
from typing import Any

import redis
from celery import signals
from celery.apps.worker import Worker
from celery.worker import state
from celery.worker.consumer import Consumer
from kombu.entity import Queue

from ethogram.errors import InvalidInput, Unavailable
from ethogram.specs.kinds import KINDS, Kind
from services.jobs.registry import JobRegistry
from services.jobs.signals import RING, Bell, Notifier, celery_app, celery_queue, redis_client, without_password
from services.runtime import scratch
from services.runtime.exporter import serve_metrics
from services.runtime.lifetime import run_process
from workers.ledger import Context
from workers.metrics import WorkerMetrics
from workers.process import ForkServer
from workers.settings import WorkerSettings, slots_of
from workers.supervisor import run_attempt

logger = logging.getLogger(__name__)

RECONNECT_SECONDS = 1
TURN_SECONDS = 0.1


class SlotRunner:
    """Claims jobs of a queue and runs them in a free slot, until none is left or the worker must leave."""

    def __init__(self, context: Context, bell: Bell) -> None:
        self._context, self._bell = context, bell
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        # Celery handles as many rings at once as there are slots, so none waits here for a free one.
        self._free: queue.SimpleQueue[ForkServer] = queue.SimpleQueue()
        for slot in slots_of(context.config):
            self._free.put(ForkServer(slot))

    def serve(self, queue_name: str) -> None:
        """Run the jobs of ``queue_name`` one after another in one slot."""
        server = self._free.get()
        registry, metrics, lease = self._context.registry, self._context.metrics, self._context.config.lease_seconds
        metrics.rings.inc()
        try:
            while not self._context.stopping.is_set():
                claim = registry.claim_next(queue_name, self._name, lease)
                if claim is None:
                    return
                metrics.claims.labels(queue_name).inc()
                # Rings are merged: this one may stand for several jobs, and another slot may be idle.
                with suppress(Unavailable):
                    if registry.has_work(queue_name):
                        self._bell.ring(queue_name)
                run_attempt(self._context, claim, server)
            # Another worker takes the remaining jobs.
            self._bell.ring(queue_name)
        except Unavailable as error:
            logger.warning(error.message)
        finally:
            self._free.put(server)

    def close(self) -> None:
        """End the fork servers of the free slots."""
        while not self._free.empty():
            self._free.get().close()


class PatientConsumer(Consumer):  # type: ignore[misc]
    """Celery's consumer, with one readable line when Redis is unreachable and a quick reconnection."""

    def ensure_connected(self, conn: Any) -> Any:
        """Connect, however long it takes."""
        attempts = itertools.count()

        def log_failure(error: Exception, _interval: float) -> None:
            if next(attempts) % 30 == 0:
                logger.error(
                    "Redis at %s does not answer; start it, or set REDIS_URL. Running jobs continue; queued ones start "
                    "when it is back",
                    without_password(conn.as_uri()),
                    extra={"error": str(error)[:300]},
                )

        conn.ensure_connection(
            log_failure,
            None,
            interval_start=RECONNECT_SECONDS,
            interval_step=0,
            interval_max=RECONNECT_SECONDS,
            callback=state.maybe_shutdown,
        )
        self.first_connection_attempt = False
        return conn

    def register_with_event_loop(self, hub: Any) -> None:
        """Join the loop and make it turn often: a slot that becomes free does not wake it, and the next ring would
        wait for up to a second."""
        super().register_with_event_loop(hub)
        hub.timer.call_repeatedly(TURN_SECONDS, lambda: None)


class PlainWorker(Worker):  # type: ignore[misc]
    """Celery's worker without its signal handlers, which :func:`run_process` replaces."""

    def install_platform_tweaks(self, worker: Any) -> None:
        """Install nothing: Celery would restart the process on SIGHUP and drop running jobs on SIGINT."""


def serve(config: WorkerSettings, kinds: Mapping[str, Kind], stopping: threading.Event) -> None:
    """Run jobs until ``stopping``, which must come with Celery's ``should_stop``."""
    app = celery_app(config.redis_url)
    refuse_cluster(config.redis_url)
    metrics = WorkerMetrics(config.slots)
    with (
        closing(JobRegistry.open(config.database)) as registry,
        serve_metrics(metrics.registry, config),
        scratch.folder(config.work, "worker") as work,
        closing(Notifier(config.redis_url)) as notifier,
        closing(Bell(config.redis_url)) as bell,
        closing(SlotRunner(Context(config, kinds, registry, notifier, metrics, work, stopping), bell)) as runner,
    ):
        _listen(app, config, runner, bell)
    logger.info("worker left")


def _listen(app: Any, config: WorkerSettings, runner: SlotRunner, bell: Bell) -> None:
    """Run Celery's loop; return when the process must leave and its slots are empty."""

    def ready(**_: Any) -> None:
        # ``ethogram up`` waits for this line.
        logger.info("worker ready", extra={"queues": config.queues, "slots": config.slots, "device": config.device})
        # Rings may have been lost while no worker was connected.
        for name in config.queues:
            bell.ring(name)

    app.conf.update(
        # With prefetching, a busy worker would hold rings that an idle one could answer.
        worker_disable_prefetch=True,
        worker_prefetch_multiplier=1,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        worker_redirect_stdouts=False,
        task_queues=[Queue(celery_queue(name)) for name in config.queues],  # type: ignore[no-untyped-call]
        task_create_missing_queues=False,
    )
    app.task(name=RING)(runner.serve)
    signals.worker_ready.connect(ready, weak=False)
    # A receiver keeps Celery from configuring the logs.
    signals.setup_logging.connect(lambda **_: None, weak=False)
    for noisy in ("celery.app.trace", "celery.worker.strategy"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    PlainWorker(
        app=app,
        hostname=f"ethogram@{socket.gethostname()}.{os.getpid()}",
        pool="threads",
        concurrency=config.slots,
        consumer_cls=PatientConsumer,
        quiet=True,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
    ).start()


def refuse_cluster(redis_url: str) -> None:
    """Raise :class:`InvalidInput` when the server at ``redis_url`` is a node of a Redis Cluster."""
    try:
        info: Any = redis_client(redis_url).info("cluster")
    except redis.RedisError:
        return  # Celery waits until it answers.
    if info.get("cluster_enabled"):
        raise InvalidInput.field(
            "REDIS_URL",
            f"{without_password(redis_url)} is a Redis Cluster, which Celery cannot use; run a single Redis",
        )


def main(kinds: Mapping[str, Kind] = KINDS) -> None:
    """``python -m workers``."""
    stopping = threading.Event()

    def leave() -> None:
        stopping.set()
        state.should_stop = os.EX_OK

    run_process("workers", "worker", WorkerSettings, lambda config: serve(config, kinds, stopping), leave, failure=2)
