"""Several gateways, as processes: who watches, wherever, sees every event once, in order, whatever dies meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import redis

from ethogram.platform.stack import free_port
from ethogram.specs.generation import GenerationSpec
from services.jobs.registry import JobRegistry
from services.jobs.signals import Notifier
from tests.redis_server import start_redis

SECONDS = 240.0
"""All watchers must have seen the end by then."""


@dataclass
class Watcher:
    """Somebody who follows a job; fails at the first event that is not the next one."""

    job: str
    chance: random.Random
    leaves: bool = True
    last: int = 0
    """Events 1 to this one were seen, each once and in order."""
    streams: int = 0
    broken: int = 0
    ended: bool = False

    async def watch(self, http: httpx.AsyncClient, urls: list[str]) -> None:
        """Follow to the end, on one gateway or another; now and then leave and come again."""
        while not self.ended:
            url = self.chance.choice(urls)
            try:
                await self._stream(http, url)
            # No timeouts among these: a gateway that lives says something now and then.
            except (httpx.NetworkError, httpx.RemoteProtocolError):
                self.broken += 1
                await asyncio.sleep(self.chance.uniform(0.05, 0.3))

    async def _stream(self, http: httpx.AsyncClient, url: str) -> None:
        leave_at = self.last + self.chance.randrange(40, 400) if self.leaves else sys.maxsize
        resumed = self.last
        headers = {"Last-Event-ID": str(resumed)} if resumed else {}
        async with http.stream("GET", f"{url}/v1/jobs/{self.job}/events", headers=headers) as response:
            assert response.status_code == 200, await response.aread()
            self.streams += 1
            rest = b""
            async for chunk in response.aiter_raw():
                # What a connection that broke left unfinished goes with it.
                *whole, rest = (rest + chunk).split(b"\n\n")
                for frame in whole:
                    self._take(frame.decode(), f"{url}, resumed after {resumed}")
                if self.last > leave_at:
                    return

    def _take(self, frame: str, where: str) -> None:
        fields = dict(line.split(": ", 1) for line in frame.split("\n") if not line.startswith(":"))
        if "data" not in fields:
            return
        assert not self.ended, f"{where}: {fields} after the end"
        data = json.loads(fields["data"])
        if fields["event"] == "progress":
            assert "id" not in fields
        elif fields["event"] == "end":
            assert data == {"job": self.job, "state": "SUCCEEDED", "seq": self.last}, where
            self.ended = True
        else:
            assert int(fields["id"]) == data["seq"] == self.last + 1, f"{where}: {data['seq']} after {self.last}"
            self.last += 1


class Gateways:
    """Processes that serve one registry."""

    def __init__(self, folder: Path, count: int) -> None:
        self._folder = folder
        self.redis_port = free_port()
        self.redis_url = f"redis://127.0.0.1:{self.redis_port}/0"
        self._redis: subprocess.Popen[bytes] | None = None
        self._ports = [free_port() for _ in range(count)]
        self.urls = [f"http://127.0.0.1:{port}" for port in self._ports]
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, *, with_redis: bool) -> None:
        """All of them, until they answer."""
        if with_redis:
            self._redis = start_redis(self.redis_port, self._folder)
        for i in range(len(self.urls)):
            self._processes.append(self._start(i))
        for i in range(len(self.urls)):
            self._wait(i)

    def _start(self, i: int) -> subprocess.Popen[bytes]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ETHOGRAM_")}
        environment |= {
            "ETHOGRAM_STATE": str(self._folder / "state"),
            "ETHOGRAM_PORT": str(self._ports[i]),
            "REDIS_URL": self.redis_url,
        }
        with (self._folder / f"gateway-{i}.log").open("ab") as log:
            return subprocess.Popen([sys.executable, "-m", "gateway"], env=environment, stdout=log, stderr=log)

    def _wait(self, i: int) -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            assert self._processes[i].poll() is None, (self._folder / f"gateway-{i}.log").read_text()
            try:
                httpx.get(f"{self.urls[i]}/healthz", trust_env=False)
                return
            except httpx.TransportError:
                time.sleep(0.05)
        raise TimeoutError("the gateway does not answer")

    def kill(self, i: int) -> None:
        """``kill -9``, and another in its place."""
        self._processes[i].kill()
        self._processes[i].wait()
        self._processes[i] = self._start(i)
        self._wait(i)

    def pause(self, i: int, seconds: float) -> None:
        self._processes[i].send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        self._processes[i].send_signal(signal.SIGCONT)

    def kill_redis(self, seconds: float) -> None:
        """And start an empty one in its place."""
        assert self._redis is not None
        self._redis.kill()
        self._redis.wait()
        time.sleep(seconds)
        self._redis = start_redis(self.redis_port, self._folder)

    def flush_redis(self) -> None:
        with redis.Redis(port=self.redis_port) as client:
            client.flushall()

    def close(self) -> None:
        for process in (*self._processes, self._redis):
            if process is not None:
                process.kill()
                process.wait()


def follow(
    folder: Path,
    faults: Callable[[Gateways], None],
    *,
    gateways: int,
    jobs: int,
    watchers: int,
    events: int,
    with_redis: bool = True,
    leaves: bool = True,
) -> list[Watcher]:
    """``watchers`` of ``jobs`` that say at least ``events`` lines each, and as long as ``faults`` happen; all must see
    all."""
    served = Gateways(folder, gateways)
    try:
        served.start(with_redis=with_redis)
        registry, notifier = (
            JobRegistry.open(f"sqlite:///{folder / 'state' / 'registry.db'}"),
            Notifier(served.redis_url),
        )
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
                    lines = [("log", {"message": f"line {said + n}"}) for n in range(count)]
                    notifier.notify(job, registry.append_events(attempt, lines)[-1].seq)
                    registry.set_progress(attempt, {"stage": "train", "done": said, "total": None})
                said += count
                time.sleep(0.02)
            for job, attempt in attempts.items():
                notifier.notify(job, registry.succeed(attempt, {}).seq)

        def misfortune() -> None:
            try:
                faults(served)
            finally:
                over.set()

        chances = random.Random(2)
        people = [
            Watcher(job, random.Random(chances.random()), leaves) for _ in range(watchers // jobs) for job in attempts
        ]

        async def everything() -> None:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(trust_env=False, timeout=30, limits=limits) as http, asyncio.timeout(SECONDS):
                watching = (one.watch(http, served.urls) for one in people)
                await asyncio.gather(*watching, asyncio.to_thread(work), asyncio.to_thread(misfortune))

        try:
            asyncio.run(everything())
            for one in people:
                assert one.ended and one.last == registry.get(one.job).seq > events
        finally:
            notifier.close()
            registry.close()
    finally:
        served.close()
    return people


@pytest.mark.slow
def test_watchers_of_two_gateways_that_die(tmp_path: Path) -> None:
    def faults(served: Gateways) -> None:
        time.sleep(0.5)
        served.kill(0)
        served.flush_redis()
        served.pause(1, 1.5)
        served.kill_redis(0.5)
        served.kill(1)

    people = follow(tmp_path, faults, gateways=2, jobs=2, watchers=60, events=300)
    assert all(one.streams > 1 for one in people) and any(one.broken for one in people)


@pytest.mark.slow
def test_without_redis_the_registry_is_asked(tmp_path: Path) -> None:
    # Nobody leaves: who comes again reads what is new by that alone.
    people = follow(
        tmp_path,
        lambda served: time.sleep(2.5),
        gateways=2,
        jobs=1,
        watchers=10,
        events=50,
        with_redis=False,
        leaves=False,
    )
    assert [(one.streams, one.broken) for one in people] == [(1, 0)] * 10


@pytest.mark.slow
def test_hundreds_of_watchers_of_three_gateways(tmp_path: Path) -> None:
    def faults(served: Gateways) -> None:
        chance = random.Random(0)
        misfortunes: list[Callable[[], None]] = [
            lambda: served.kill(chance.randrange(3)),
            served.flush_redis,
            lambda: served.pause(chance.randrange(3), 3.0),
            lambda: served.kill_redis(1.0),
        ]
        for misfortune in misfortunes * 3:
            time.sleep(chance.uniform(0.2, 1.0))
            misfortune()

    people = follow(tmp_path, faults, gateways=3, jobs=4, watchers=400, events=1500)
    assert all(one.streams > 1 for one in people) and any(one.broken for one in people)
