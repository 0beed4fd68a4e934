"""Several gateways, as processes: who watches, wherever, sees every event once, in order, whatever dies meanwhile."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import redis

from ethogram import sse
from ethogram.specs.generation import GenerationSpec
from services.jobs.notify import Notifier
from services.jobs.registry import JobRegistry
from tests.conftest import free_port
from tests.redis_server import start_redis


@dataclass
class Watcher:
    """Somebody who follows a job, and what the streams said."""

    job: str
    chance: random.Random
    seen: list[int] = field(default_factory=list)
    streams: int = 0
    ended: bool = False

    async def watch(self, http: httpx.AsyncClient, urls: list[str]) -> None:
        """Follow to the end, on one gateway or another; now and then leave and come again."""
        while not self.ended:
            leave_at = len(self.seen) + self.chance.randrange(40, 400)
            headers = {"Last-Event-ID": str(self.seen[-1])} if self.seen else {}
            parser = sse.Parser()
            self.streams += 1
            try:
                url = f"{self.chance.choice(urls)}/v1/jobs/{self.job}/events"
                async with http.stream("GET", url, headers=headers) as response:
                    if response.is_error:
                        await asyncio.sleep(0.2)
                        continue
                    async for chunk in response.aiter_raw():
                        for frame in parser.feed(chunk):
                            if frame.event == "end":
                                self.ended = True
                            elif frame.event != "progress":
                                self.seen.append(int(frame.id))
                        if self.ended or len(self.seen) > leave_at:
                            break
            except httpx.TransportError:
                await asyncio.sleep(self.chance.uniform(0.05, 0.3))


class Gateways:
    """Processes that serve one registry."""

    def __init__(self, folder: Path, count: int) -> None:
        self._folder = folder
        self.redis_port = free_port()
        self.redis_url = f"redis://127.0.0.1:{self.redis_port}/0"
        self.redis = start_redis(self.redis_port, folder)
        self._ports = [free_port() for _ in range(count)]
        self.urls = [f"http://127.0.0.1:{port}" for port in self._ports]
        self.processes = [self._start(i) for i in range(count)]
        for i in range(count):
            self.wait(i)

    def _start(self, i: int) -> subprocess.Popen[bytes]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ETHOGRAM_")}
        environment |= {
            "ETHOGRAM_STATE": str(self._folder / "state"),
            "ETHOGRAM_PORT": str(self._ports[i]),
            "REDIS_URL": self.redis_url,
        }
        with (self._folder / f"gateway-{i}.log").open("ab") as log:
            return subprocess.Popen([sys.executable, "-m", "gateway"], env=environment, stdout=log, stderr=log)

    def wait(self, i: int) -> None:
        """Until it answers."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                httpx.get(f"{self.urls[i]}/healthz", trust_env=False)
                return
            except httpx.TransportError:
                time.sleep(0.05)
        raise TimeoutError("the gateway does not answer")

    def kill(self, i: int) -> None:
        """``kill -9``, and another in its place."""
        self.processes[i].kill()
        self.processes[i].wait()
        self.processes[i] = self._start(i)
        self.wait(i)

    def pause(self, i: int, seconds: float) -> None:
        self.processes[i].send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        self.processes[i].send_signal(signal.SIGCONT)

    def kill_redis(self, seconds: float) -> None:
        self.redis.kill()
        self.redis.wait()
        time.sleep(seconds)
        self.redis = start_redis(self.redis_port, self._folder)

    def flush_redis(self) -> None:
        with redis.Redis(port=self.redis_port) as client:
            client.flushall()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self.redis.kill()
        self.redis.wait()


def follow(
    folder: Path, *, gateways: int, jobs: int, watchers: int, events: int, faults: Callable[[Gateways], None]
) -> list[Watcher]:
    """``watchers`` of ``jobs`` that say ``events`` lines each, while ``faults`` happen; checks what they saw."""
    served = Gateways(folder, gateways)
    registry = JobRegistry.open(f"sqlite:///{folder / 'state' / 'registry.db'}")
    notifier = Notifier(served.redis_url)
    over = threading.Event()
    attempts = {}
    for _ in range(jobs):
        registry.submit("generation", GenerationSpec())
        claim = registry.claim_next("cpu", "worker", 600)
        assert claim is not None
        attempts[claim.job.id] = claim.attempt

    def work() -> None:
        chance, said = random.Random(1), 0
        while said < events or not over.is_set():
            count = chance.randrange(1, 8)
            for job, attempt in attempts.items():
                made = registry.append_events(attempt, [("log", {"message": f"line {said + n}"}) for n in range(count)])
                notifier.notify(job, made[-1].seq)
            said += count
            time.sleep(0.02)
        for job, attempt in attempts.items():
            notifier.notify(job, registry.succeed(attempt, {}).seq)

    people = [Watcher(job, random.Random(f"{job} {n}")) for n in range(watchers // jobs) for job in attempts]

    async def all_watch() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(trust_env=False, timeout=30, limits=limits) as http:
            await asyncio.wait_for(asyncio.gather(*(one.watch(http, served.urls) for one in people)), 200)

    def misfortune() -> None:
        try:
            faults(served)
        finally:
            over.set()

    threads = [threading.Thread(target=target) for target in (work, misfortune)]
    try:
        for thread in threads:
            thread.start()
        asyncio.run(all_watch())
    finally:
        for thread in threads:
            thread.join()
        last = {job: registry.get(job).seq for job in attempts}
        notifier.close()
        registry.close()
        served.close()
    for one in people:
        assert one.seen == list(range(1, last[one.job] + 1)), "lost, doubled or out of order"
    return people


def test_watchers_of_two_gateways_that_die(tmp_path: Path) -> None:
    def faults(served: Gateways) -> None:
        time.sleep(0.5)
        served.kill(0)
        served.flush_redis()
        served.pause(1, 1.0)
        served.kill_redis(0.5)
        served.kill(1)

    people = follow(tmp_path, gateways=2, jobs=2, watchers=60, events=300, faults=faults)
    assert all(one.streams > 1 for one in people)


def test_without_redis_the_registry_is_asked(tmp_path: Path) -> None:
    def faults(served: Gateways) -> None:
        served.redis.kill()
        time.sleep(2.5)

    follow(tmp_path, gateways=2, jobs=1, watchers=10, events=50, faults=faults)


@pytest.mark.slow
def test_hundreds_of_watchers_of_three_gateways(tmp_path: Path) -> None:
    def faults(served: Gateways) -> None:
        chance = random.Random(0)
        misfortunes: list[Callable[[], None]] = [
            lambda: served.kill(chance.randrange(3)),
            served.flush_redis,
            lambda: served.pause(chance.randrange(3), 2.0),
            lambda: served.kill_redis(1.0),
        ]
        for misfortune in misfortunes * 3:
            time.sleep(chance.uniform(0.2, 1.0))
            misfortune()

    follow(tmp_path, gateways=3, jobs=4, watchers=400, events=1500, faults=faults)
