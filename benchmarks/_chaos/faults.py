"""Faults, drawn by a seed. Each returns once it has happened, so that their count is what was done."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial

import psutil
from sqlalchemy import text

from benchmarks._chaos import points
from benchmarks._chaos.arena import GATEWAYS, LEASE, NAMES, WORKERS, Arena, spawn
from ethogram.errors import EthogramError, StaleAttempt, Unavailable
from ethogram.specs.generation import GenerationSpec
from services.jobs.registry import JobRegistry

# A point that no process passes within this time is disarmed and not counted.
_PATIENCE_SECONDS = 6.0


class FaultInjector:
    """Does faults to an arena."""

    def __init__(self, arena: Arena, chance: random.Random) -> None:
        self._arena, self._chance = arena, chance
        self.counts = Counter[str]()
        """Faults by name."""
        self.detection: list[float] = []
        """Lease periods between a worker's death and the loss of each of its attempts."""
        self.stale_refused = 0
        self.stale_accepted: list[str] = []
        self.errors: list[str] = []
        """What the benchmark itself could not do."""
        self._watches: list[threading.Thread] = []
        self._database_down = 0.0
        self._deck: list[str] = []
        self._kinds: dict[str, tuple[Callable[[], object], int]] = {
            "kill a worker": (self._kill_worker, 3),
            "kill a job's process": (partial(self._stop_child, psutil.Process.kill), 3),
            "kill a gateway": (partial(self._kill, *GATEWAYS), 2),
            "kill the reconciler": (partial(self._kill, "reconciler"), 2),
            "kill Redis": (partial(self._kill_redis, empty=False), 1),
            "kill Redis, and its data": (partial(self._kill_redis, empty=True), 1),
            "empty Redis": (arena.flush_redis, 2),
            "pause a worker beyond its lease": (self._pause_worker, 2),
            "pause a job's process": (partial(self._stop_child, _pause), 1),
            "restart the database": (self._restart_database, 1),
            "step a clock": (self._step_clock, 2),
            **{point: (partial(self._arm, point), 2) for point in points.POINTS},
        }
        """By name: what does it (returns False when it did not happen) and its share of the deck."""

    def inject(self) -> None:
        """Do one more; it is counted if it happened."""
        if not self._deck:
            # A deck, not independent draws: each fault has its turn.
            self._deck = [name for name, (_, weight) in self._kinds.items() for _ in range(weight)]
            self._chance.shuffle(self._deck)
        name = self._deck.pop()
        self.counts[name] += self._kinds[name][0]() is not False

    def close(self) -> None:
        """Disarm all points and wait for what is being watched."""
        for path in self._arena.faults.iterdir():
            path.unlink(missing_ok=True)
        for watch in self._watches:
            watch.join()

    def _kill(self, *names: str) -> None:
        self._arena.kill(self._chance.choice(names))

    def _kill_worker(self) -> None:
        name = self._chance.choice(WORKERS)
        self._watch_loss(name)
        self._arena.kill(name)

    def _stop_child(self, stop: Callable[[psutil.Process], None]) -> bool:
        """``stop`` one of the jobs' processes, if there is one."""
        children = self._arena.children()
        with suppress(IndexError, psutil.NoSuchProcess):
            stop(self._chance.choice(children))
            return True
        return False

    def _kill_redis(self, *, empty: bool) -> None:
        self._arena.restart_redis(self._chance.choice([0.0, 1.0, 3.0]), empty=empty)

    def _pause_worker(self) -> None:
        """Its attempts are lost; what it sends when it wakes is refused, and its jobs' processes end."""
        name = self._chance.choice(WORKERS)
        self._watch_loss(name)
        pid = self._arena.pid(name)
        os.kill(pid, signal.SIGSTOP)
        if self._database_is_locked():
            # Paused in the middle of a write, it keeps all others from writing: no loss can be recorded.
            self._database_down = time.monotonic()
        time.sleep(LEASE * self._chance.uniform(2.2, 2.8))
        os.kill(pid, signal.SIGCONT)

    def _database_is_locked(self) -> bool:
        time.sleep(0.3)
        if self._arena.postgres is not None:
            idle = "state like 'idle in transaction%' and now() - state_change > interval '0.2 s'"
            try:
                with self._arena.registry._database.read() as session:
                    return bool(session.scalar(text(f"select count(*) from pg_stat_activity where {idle}")))
            except Unavailable:
                return True
        try:
            self._lock_sqlite(0.0, timeout=0.5)
            return False
        except sqlite3.OperationalError:
            return True

    def _lock_sqlite(self, seconds: float, timeout: float) -> None:
        connection = sqlite3.connect(self._arena.sqlite_file, isolation_level=None, timeout=timeout)
        try:
            connection.execute("BEGIN IMMEDIATE")
            time.sleep(seconds)
            connection.execute("ROLLBACK")
        finally:
            connection.close()

    def _restart_database(self) -> None:
        self._database_down = time.monotonic()
        if self._arena.postgres is None:
            # There is no server to restart; a writer that does not let go is what a file can suffer.
            self._lock_sqlite(self._chance.uniform(1.0, 3.0), timeout=30)
        elif self._chance.random() < 0.5:
            self._arena.postgres.restart("immediate")
        else:
            self._arena.postgres.kill()
            time.sleep(self._chance.uniform(0.0, 2.0))
            self._arena.postgres.start()
        self._database_down = time.monotonic()

    def _step_clock(self) -> None:
        name = self._chance.choice(NAMES)
        (self._arena.faults / f"clock of {name}").write_text(
            str(self._chance.choice([-7200, -600, 600, 7200])), encoding="utf-8"
        )

    def _arm(self, point: str) -> bool:
        path = self._arena.faults / point
        path.write_text("", encoding="utf-8")
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while path.exists():
            if time.monotonic() > deadline:
                # A process may take it at this very moment.
                return not points.take(self._arena.faults, point)
            time.sleep(0.02)
        return True

    def _watch_loss(self, name: str) -> None:
        """Measure, in a thread, when the attempts of worker ``name``, which dies or sleeps now, are found lost."""
        try:
            pid = self._arena.pid(name)
            running = self._arena.registry.running_attempts()
        except Unavailable:
            return
        attempts = {attempt.attempt: attempt.job for attempt in running if attempt.worker.endswith(f":{pid}")}
        began = time.monotonic()
        if attempts and self._arena.ready("reconciler"):
            self._watches.append(spawn(self.errors, self._measure_loss, began, attempts))

    def _measure_loss(self, began: float, attempts: Mapping[str, str]) -> None:
        waiting, seconds = dict(attempts), list[float]()
        while waiting and time.monotonic() - began < 10 * LEASE:
            try:
                running = {attempt.attempt for attempt in self._arena.registry.running_attempts()}
            except Unavailable:
                return
            now = time.monotonic()
            for attempt in waiting.keys() - running:
                job = waiting.pop(attempt)
                # It may have ended, or been released, just before; but later it should have been lost.
                if now - began > 2 * LEASE or self._was_lost(job, attempt):
                    seconds.append(now - began)
                self.write_stale(attempt)
            time.sleep(0.05)
        seconds += [time.monotonic() - began] * len(waiting)
        if self._arena.started["reconciler"] < began and self._database_down < began:
            self.detection += [value / LEASE for value in seconds]

    def _was_lost(self, job: str, attempt: str) -> bool:
        with suppress(Unavailable):
            events = self._arena.registry.events(job)
            return any(event.attempt == attempt and event.data.get("reason") == "lost" for event in events)
        return False

    def write_stale(self, attempt: str) -> None:
        """Try every write in the name of an attempt that no longer owns its job."""
        refused, accepted = write(self._arena.registry, attempt)
        self.stale_refused += refused
        self.stale_accepted += accepted


def _pause(process: psutil.Process) -> None:
    process.suspend()
    time.sleep(LEASE * 1.2)
    process.resume()


def write(registry: JobRegistry, attempt: str) -> tuple[int, list[str]]:
    """Try every write in the name of ``attempt``: how many were refused as stale, and what became of the others."""
    refused, accepted, artifact = 0, list[str](), "0" * 64
    writes: dict[str, Callable[[], object]] = {
        "heartbeat": lambda: registry.heartbeat(attempt),
        "append_events": lambda: registry.append_events(attempt, [("log", {"message": "stale"})], 10**6),
        "set_progress": lambda: registry.set_progress(attempt, {"stage": "stale"}),
        "commit_checkpoint": lambda: registry.commit_checkpoint(attempt, artifact, 1),
        "commit_artifact": lambda: registry.commit_artifact(attempt, "stale", "stale", artifact, 1),
        "spawn": lambda: registry.spawn(attempt, "stale", "generation", GenerationSpec()),
        "succeed": lambda: registry.succeed(attempt, {"stale": True}),
        "fail": lambda: registry.fail(attempt, {"reason": "STALE", "message": "stale"}),
        "cancelled": lambda: registry.cancelled(attempt),
        "release": lambda: registry.release(attempt, "crashed"),
    }
    for name, call in writes.items():
        try:
            call()
            accepted.append(f"{attempt}: {name} was accepted")
        except StaleAttempt:
            refused += 1
        except Unavailable:
            continue
        except EthogramError as error:
            accepted.append(f"{attempt}: {name} raised {error!r}")
    return refused, accepted
