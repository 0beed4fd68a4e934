"""The faults, drawn by a seed. Each waits until it has happened, so that their number is what was done."""

from __future__ import annotations

import random
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import psutil
from sqlalchemy import text

from benchmarks._chaos import points
from benchmarks._chaos.arena import LEASE, Arena, spawn
from ethogram.errors import EthogramError, StaleAttempt, Unavailable
from ethogram.specs.generation import GenerationSpec
from services.jobs.registry import JobRegistry

# A point that nobody passes for so long is disarmed and not counted.
_PATIENCE = 6.0
_WORKERS = ("worker-0", "worker-1")


@dataclass
class Findings:
    """What is seen while faults happen."""

    done: dict[str, int] = field(default_factory=dict)
    """Faults by name."""
    detection: list[float] = field(default_factory=list)
    """Lease periods between a worker's death and the loss of each of its attempts."""
    stale_tried: int = 0
    stale_accepted: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """What the benchmark itself could not do."""


class Faults:
    """Does faults to an arena."""

    def __init__(self, arena: Arena, chance: random.Random) -> None:
        self._arena, self._chance = arena, chance
        self.found = Findings()
        self._watches: list[threading.Thread] = []
        self._database_down = 0.0
        self._deck: list[str] = []
        kinds: dict[str, tuple[Callable[[], bool], int]] = {
            "kill a worker": (self._kill_worker, 3),
            "kill a job's process": (self._kill_child, 3),
            "kill a gateway": (lambda: self._kill("gateway-0", "gateway-1"), 2),
            "kill the reconciler": (lambda: self._kill("reconciler"), 2),
            "kill Redis": (lambda: self._kill_redis(empty=False), 1),
            "kill Redis, and its data": (lambda: self._kill_redis(empty=True), 1),
            "empty Redis": (self._empty_redis, 2),
            "pause a worker beyond its lease": (self._pause_worker, 2),
            "pause a job's process": (self._pause_child, 1),
            "restart the database": (self._restart_database, 1),
            "step a clock": (self._step_clock, 2),
        }
        for point in points.POINTS:
            kinds[point] = (lambda point=point: self._arm(point), 2)  # type: ignore[misc]
        self._kinds = kinds

    def one(self) -> None:
        """One more; counted if it happened."""
        if not self._deck:
            # Not drawn one by one: each must have its turn.
            self._deck = [name for name, (_, weight) in self._kinds.items() for _ in range(weight)]
            self._chance.shuffle(self._deck)
        name = self._deck.pop()
        if self._kinds[name][0]():
            self.found.done[name] = self.found.done.get(name, 0) + 1

    def close(self) -> None:
        """Undo what would last, and wait for what is being watched."""
        for path in self._arena.faults.iterdir():
            path.unlink(missing_ok=True)
        for watch in self._watches:
            watch.join()

    def _kill(self, *names: str) -> bool:
        self._arena.kill(self._chance.choice(names))
        return True

    def _kill_worker(self) -> bool:
        name = self._chance.choice(_WORKERS)
        self._watch_loss(name)
        self._arena.kill(name)
        return True

    def _kill_child(self) -> bool:
        children = [child for name in _WORKERS for child in self._arena.children(name)]
        if not children:
            return False
        with suppress(psutil.NoSuchProcess):
            self._chance.choice(children).kill()
            return True
        return False

    def _kill_redis(self, *, empty: bool) -> bool:
        self._arena.restart_redis(self._chance.choice([0.0, 1.0, 3.0]), empty=empty)
        return True

    def _empty_redis(self) -> bool:
        self._arena.flush_redis()
        return True

    def _pause_worker(self) -> bool:
        """Its attempts are lost; what it sends when it wakes is refused, and its jobs' processes end."""
        name = self._chance.choice(_WORKERS)
        process = self._arena.processes[name]
        self._watch_loss(name)
        process.send_signal(signal.SIGSTOP)
        if self._holds_the_database():
            # Paused in the middle of a write, it keeps all others from writing: no loss can be recorded.
            self._database_down = time.monotonic()
        time.sleep(LEASE * self._chance.uniform(2.2, 2.8))
        process.send_signal(signal.SIGCONT)
        return True

    def _holds_the_database(self) -> bool:
        time.sleep(0.3)
        if self._arena.postgres is not None:
            idle = "state like 'idle in transaction%' and now() - state_change > interval '0.2 s'"
            try:
                with self._arena.registry._database.read() as session:
                    return bool(session.scalar(text(f"select count(*) from pg_stat_activity where {idle}")))
            except Unavailable:
                return True
        other = sqlite3.connect(self._arena.file, isolation_level=None, timeout=0.5)
        try:
            other.execute("BEGIN IMMEDIATE")
            other.execute("ROLLBACK")
            return False
        except sqlite3.OperationalError:
            return True
        finally:
            other.close()

    def _pause_child(self) -> bool:
        children = [child for name in _WORKERS for child in self._arena.children(name)]
        if not children:
            return False
        child = self._chance.choice(children)
        with suppress(psutil.NoSuchProcess):
            child.suspend()
            time.sleep(LEASE * 1.2)
            child.resume()
            return True
        return False

    def _restart_database(self) -> bool:
        self._database_down = time.monotonic()
        if self._arena.postgres is None:
            # There is no server to restart; a writer that does not let go is what a file can suffer.
            locked = sqlite3.connect(self._arena.file, isolation_level=None, timeout=30)
            locked.execute("BEGIN IMMEDIATE")
            time.sleep(self._chance.uniform(1.0, 3.0))
            locked.execute("ROLLBACK")
            locked.close()
        elif self._chance.random() < 0.5:
            self._arena.postgres.restart("immediate")
        else:
            self._arena.postgres.kill()
            time.sleep(self._chance.uniform(0.0, 2.0))
            self._arena.postgres.start()
        self._database_down = time.monotonic()
        return True

    def _step_clock(self) -> bool:
        name = self._chance.choice(self._arena.names)
        path = self._arena.faults / f"clock of {name}"
        path.write_text(str(self._chance.choice([-7200, -600, 600, 7200])))
        return True

    def _arm(self, point: str) -> bool:
        path = self._arena.faults / point
        path.write_text("")
        deadline = time.monotonic() + _PATIENCE
        while path.exists():
            if time.monotonic() > deadline:
                # It may be taken at this very moment.
                return not points.take(self._arena.faults, point)
            time.sleep(0.02)
        return True

    def _watch_loss(self, name: str) -> None:
        """See how long the attempts of worker ``name``, which dies or sleeps now, are taken for alive."""
        try:
            pid = self._arena.pid(name)
            mine = [a for a in self._arena.registry.running_attempts() if a.worker.endswith(f":{pid}")]
        except Unavailable:
            return
        began = time.monotonic()
        if mine and self._arena.ready("reconciler"):
            self._watches.append(spawn(self.found.wrong, self._see_loss, began, {a.attempt: a.job for a in mine}))

    def _see_loss(self, began: float, attempts: Mapping[str, str]) -> None:
        registry, waiting, seconds = self._arena.registry, dict(attempts), dict[str, float]()
        while waiting and time.monotonic() - began < 10 * LEASE:
            try:
                running = {attempt.attempt for attempt in registry.running_attempts()}
            except Unavailable:
                return
            now = time.monotonic()
            for attempt in [attempt for attempt in waiting if attempt not in running]:
                job = waiting.pop(attempt)
                # It may have ended, or been released, just before; but later it should have been lost.
                if now - began > 2 * LEASE or self._was_lost(job, attempt):
                    seconds[attempt] = now - began
                self.write_stale(attempt)
            time.sleep(0.05)
        for attempt in waiting:
            seconds[attempt] = time.monotonic() - began
        quiet = self._arena.started["reconciler"] < began and self._database_down < began
        if quiet:
            self.found.detection += [found / LEASE for found in seconds.values()]

    def _was_lost(self, job: str, attempt: str) -> bool:
        with suppress(Unavailable):
            events = self._arena.registry.events(job)
            return any(event.attempt == attempt and event.data.get("reason") == "lost" for event in events)
        return False

    def write_stale(self, attempt: str) -> None:
        """Every write in the name of an attempt that owns its job no more."""
        refused, accepted = write(self._arena.registry, attempt)
        self.found.stale_tried += refused
        self.found.stale_accepted += accepted


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
        except StaleAttempt:
            refused += 1
        except Unavailable:
            continue
        except EthogramError as error:
            accepted.append(f"{attempt}: {name} raised {error!r}")
        else:
            accepted.append(f"{attempt}: {name} was accepted")
    return refused, accepted
