"""A thousand watchers of one job on one gateway: does each see every event, once and in order?

The watchers are raw connections of processes of their own, so that they take none of the gateway's time but the
machine's.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import httpx

from benchmarks._kit import say
from ethogram.platform.process import Child
from ethogram.platform.stack import free_port
from ethogram.platform.state import HOST
from ethogram.specs.generation import GenerationSpec
from services.jobs.registry import JobRegistry
from services.jobs.signals import Notifier

WATCHERS, EVENTS = 1000, 10_000
_PROCESSES, _BATCH = 2, 20


def watcher_events_lost(folder: Path, redis_url: str) -> int:
    """Events that were missed, doubled or out of order, over all watchers."""
    state, port = folder / "watchers", free_port()
    environment = {**os.environ, "ETHOGRAM_STATE": str(state), "ETHOGRAM_PORT": str(port), "REDIS_URL": redis_url}
    command = [sys.executable, "-m", "gateway", "--parent-pipe"]
    gateway = Child("gateway", command, environment, folder / "watchers-gateway.log")
    gateway.start()
    pool = ProcessPoolExecutor(_PROCESSES, get_context("spawn"))
    try:
        while not gateway.logged("gateway ready"):
            if gateway.exit_code is not None:
                raise RuntimeError(f"the gateway ended: {gateway.log_end()}")
            time.sleep(0.05)
        registry, notifier = JobRegistry.open(f"sqlite:///{state.absolute() / 'registry.db'}"), Notifier(redis_url)
        job, _ = registry.submit("generation", GenerationSpec(), queue="watched")
        claim = registry.claim_next("watched", "bench", 3600.0)
        assert claim is not None
        watchers = [pool.submit(_watch_all, port, job.id, WATCHERS // _PROCESSES) for _ in range(_PROCESSES)]
        metrics, all_watch = f"http://{HOST}:{port}/metrics", f"\nethogram_streams {WATCHERS:.1f}\n"
        while all_watch not in httpx.get(metrics, trust_env=False).text:
            for watcher in watchers:
                if watcher.done():
                    raise RuntimeError("watchers ended before the first event") from watcher.exception()
            time.sleep(0.2)
        began = time.monotonic()
        for start in range(0, EVENTS, _BATCH):
            lines = [("log", {"level": "info", "message": f"line {start + i}"}) for i in range(_BATCH)]
            written = registry.append_events(claim.attempt, lines)
            notifier.notify(job.id, written[-1].seq)
        done = registry.succeed(claim.attempt, {})
        notifier.notify(job.id, done.seq)
        counts = [count for watcher in watchers for count in watcher.result(timeout=600)]
        lost = sum(abs(done.seq - seen) + wrong for seen, wrong in counts)
        say(f"{WATCHERS} watchers of {done.seq} events: {lost} lost, {time.monotonic() - began:.0f} s")
        registry.close()
        notifier.close()
        return lost
    finally:
        # Open streams end with the gateway, and watchers with their streams.
        gateway.terminate()
        gateway.finish(time.monotonic() + 15)
        pool.shutdown()


def _watch_all(port: int, job: str, count: int) -> list[tuple[int, int]]:
    """Of ``count`` watchers in this process: how many events came, and how many of them were not the next."""

    async def watch_all() -> list[tuple[int, int]]:
        turn = asyncio.Semaphore(50)
        return await asyncio.gather(*(_watch(port, job, turn) for _ in range(count)))

    return asyncio.run(watch_all())


async def _watch(port: int, job: str, turn: asyncio.Semaphore) -> tuple[int, int]:
    async with turn:
        reader, writer = await asyncio.open_connection(HOST, port)
        request = f"GET /v1/jobs/{job}/events HTTP/1.1\r\nHost: {HOST}\r\nAccept: text/event-stream\r\n\r\n"
        writer.write(request.encode())
        head = await reader.readuntil(b"\r\n\r\n")
        assert b" 200 " in head.split(b"\r\n", 1)[0], head
    seen = wrong = 0
    while line := await reader.readline():
        if line.startswith(b"id:"):
            wrong += int(line[3:]) != seen + 1
            seen += 1
        elif line.startswith(b"event:") and line[6:].strip() == b"end":
            break
    writer.close()
    return seen, wrong
