"""The worker: hears the bell through Celery, claims jobs from the registry, and runs each in a slot."""

from __future__ import annotations

import argparse
import logging
import os
import queue
import signal
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import redis
from celery import signals
from celery.apps.worker import Worker
from celery.worker import state
from celery.worker.consumer import Consumer
from kombu.entity import Queue

from ethogram.errors import EthogramError, InvalidInput, Unavailable
from ethogram.specs.kinds import KINDS, Kind
from services.jobs.bell import RING, Bell, celery_app, celery_queue, redis_client, without_password
from services.jobs.notify import Notifier
from services.jobs.registry import JobRegistry
from services.runtime import lifetime, logs, scratch
from workers.metrics import WorkerMetrics, served
from workers.settings import WorkerSettings
from workers.slots import Slot, slots_of
from workers.supervisor import Supervisor

logger = logging.getLogger(__name__)

RECONNECT_SECONDS = 1
TURN_SECONDS = 0.1


class Ringer:
    """What a ring does: claim the next job and run it, until none is left or the worker must leave."""

    def __init__(
        self,
        registry: JobRegistry,
        supervisor: Supervisor,
        bell: Bell,
        *,
        slots: list[Slot],
        stopping: threading.Event,
        lease_seconds: float,
        metrics: WorkerMetrics,
    ) -> None:
        self._metrics = metrics
        self._registry, self._supervisor, self._bell = registry, supervisor, bell
        self._stopping, self._lease_seconds = stopping, lease_seconds
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        # Celery runs as many rings at once as there are slots, so a ring never waits here.
        self._free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        for slot in slots:
            self._free.put(slot)

    def serve(self, queue_name: str) -> None:
        """Run the jobs of ``queue_name``, one after the other, in one slot."""
        slot = self._free.get()
        self._metrics.rings.inc()
        try:
            while not self._stopping.is_set():
                try:
                    claim = self._registry.claim_next(queue_name, self._name, self._lease_seconds)
                except Unavailable as error:
                    logger.warning(error.message)
                    return
                if claim is None:
                    return
                self._metrics.claims.labels(queue_name).inc()
                # Rings are merged: this one may have meant several jobs, and another slot may be idle.
                with suppress(Unavailable):
                    if self._registry.has_work(queue_name):
                        self._bell.ring(queue_name)
                self._supervisor.run(claim, slot)
            # What is left is for another worker.
            self._bell.ring(queue_name)
        finally:
            self._free.put(slot)


class PatientConsumer(Consumer):  # type: ignore[misc]
    """Celery's consumer, but it says in a sentence that Redis is gone, and sees soon that it is back."""

    def ensure_connected(self, conn: Any) -> Any:
        """Connect, however long it takes."""
        tries = 0

        def tell(error: Exception, _interval: float) -> None:
            nonlocal tries
            if tries % 30 == 0:
                logger.error(
                    "Redis at %s does not answer; start it, or set REDIS_URL. Running jobs go on, waiting ones start "
                    "when it is back",
                    without_password(conn.as_uri()),
                    extra={"error": str(error)[:300]},
                )
            tries += 1

        conn.ensure_connection(
            tell,
            None,
            interval_start=RECONNECT_SECONDS,
            interval_step=0,
            interval_max=RECONNECT_SECONDS,
            callback=_leave_if_asked,
        )
        self.first_connection_attempt = False
        return conn

    def register_with_event_loop(self, hub: Any) -> None:
        """Join the loop, and let it turn often.

        A slot that becomes free does not wake the loop, which would else take the next ring up to a second later.
        """
        super().register_with_event_loop(hub)
        hub.timer.call_repeatedly(TURN_SECONDS, _nothing)


class PlainWorker(Worker):  # type: ignore[misc]
    """Celery's worker, but the signal handlers are ours."""

    def install_platform_tweaks(self, worker: Any) -> None:
        """Celery's own would restart the process on SIGHUP, and drop what runs on SIGINT."""


def _nothing() -> None:
    pass


def _leave_if_asked() -> None:
    state.maybe_shutdown()


def serve(config: WorkerSettings, kinds: Mapping[str, Kind]) -> None:
    """Work until asked to leave."""
    stopping = threading.Event()

    def leave(*_: Any) -> None:
        stopping.set()
        state.should_stop = os.EX_OK

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, leave)
    app = celery_app(config.redis_url)
    refuse_cluster(config.redis_url)
    registry = JobRegistry.open(config.database)
    bell, notifier = Bell(config.redis_url), Notifier(config.redis_url)
    metrics = WorkerMetrics(config.slots)
    with served(metrics, config), scratch.folder(config.work, "worker") as work:
        supervisor = Supervisor(
            registry,
            notifier,
            kinds,
            metrics,
            store=config.store_url,
            work=work,
            stopping=stopping,
            checkpoint_seconds=config.checkpoint_seconds,
            grace_seconds=config.grace_seconds,
        )
        _listen(
            app,
            config,
            Ringer(
                registry,
                supervisor,
                bell,
                slots=slots_of(config),
                stopping=stopping,
                lease_seconds=config.lease_seconds,
                metrics=metrics,
            ),
            bell,
        )
        bell.close()
        notifier.close()
    registry.close()
    logger.info("worker left")


def _listen(app: Any, config: WorkerSettings, ringer: Ringer, bell: Bell) -> None:
    """Celery's loop; returns when the process must leave and its slots are empty."""

    def ring(queue_name: str) -> None:
        ringer.serve(queue_name)

    def ready(**_: Any) -> None:
        # ``ethogram up`` waits for this line.
        logger.info("worker ready", extra={"queues": config.queues, "slots": config.slots, "device": config.device})
        # Rings may have been lost while nobody listened.
        for name in config.queues:
            bell.ring(name)

    def keep_logging(**_: Any) -> None:
        pass

    # Untyped.
    queue_type: Any = Queue
    app.conf.update(
        # Without it a busy worker keeps rings that an idle one could answer.
        worker_disable_prefetch=True,
        worker_prefetch_multiplier=1,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        worker_redirect_stdouts=False,
        task_queues=[queue_type(celery_queue(name)) for name in config.queues],
        task_create_missing_queues=False,
    )
    app.task(name=RING)(ring)
    signals.worker_ready.connect(ready, weak=False)
    signals.setup_logging.connect(keep_logging, weak=False)
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
    """Raises :class:`InvalidInput` when the server at ``redis_url`` is a node of a Redis Cluster."""
    try:
        info: Any = redis_client(redis_url).info("cluster")
    except redis.RedisError:
        return  # Celery waits for it and says so.
    if info.get("cluster_enabled"):
        raise InvalidInput.field(
            "REDIS_URL",
            f"{without_password(redis_url)} is a Redis Cluster, which Celery cannot use; run a single Redis",
        )


def main(kinds: Mapping[str, Kind] = KINDS) -> None:
    """``python -m workers``."""
    parser = argparse.ArgumentParser(prog="python -m workers", description=__doc__)
    parser.add_argument("--parent-pipe", action="store_true", help="leave when standard input ends")
    arguments = parser.parse_args()
    logs.configure("worker")
    try:
        config = WorkerSettings.read()
        logs.configure("worker", config.log_level)
        if arguments.parent_pipe:
            lifetime.exit_on_eof(lambda: os.kill(os.getpid(), signal.SIGTERM))
        serve(config, kinds)
    except EthogramError as error:
        logger.critical(error.message)
        raise SystemExit(2) from None
