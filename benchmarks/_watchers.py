"""A thousand watchers of one job on one gateway: does each see every event, once and in order?

The watchers are raw connections of processes of their own, ``python -m benchmarks._watchers HOST PORT JOB COUNT``, so
that they take none of the gateway's time but the machine's.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks import _kit
from ethogram.specs.generation import GenerationSpec
from services.jobs.registry import JobRegistry
from services.jobs.signals import Notifier

WATCHERS, EVENTS = 1000, 10_000
_PROCESSES, _BATCH = 2, 20


def watcher_events_lost(folder: Path, redis_url: str) -> int:
    """Events that were missed, doubled or out of order, over all watchers."""
    state = folder / "watchers"
    environment = {**os.environ, "ETHOGRAM_STATE": str(state), "ETHOGRAM_PORT": "0", "REDIS_URL": redis_url}
    with (folder / "watchers-gateway.log").open("wb") as log:
        gateway = subprocess.Popen(
            [sys.executable, "-m", "gateway", "--parent-pipe"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    assert gateway.stdout is not None
    assert gateway.stdin is not None
    watchers: list[subprocess.Popen[str]] = []
    try:
        parts = urlsplit(gateway.stdout.readline().split()[-1])
        registry, notifier = JobRegistry.open(f"sqlite:///{state.absolute() / 'registry.db'}"), Notifier(redis_url)
        job, _ = registry.submit("generation", GenerationSpec(), queue="watched")
        claim = registry.claim_next("watched", "bench", 3600.0)
        assert claim is not None
        about = parts.hostname, parts.port, job.id, WATCHERS // _PROCESSES
        watchers += [_kit.start("_watchers", *about) for _ in range(_PROCESSES)]
        for watcher in watchers:
            assert watcher.stdout is not None
            assert watcher.stdout.readline() == "connected\n"
        began = time.monotonic()
        for start in range(0, EVENTS, _BATCH):
            lines = [("log", {"level": "info", "message": f"line {start + i}"}) for i in range(_BATCH)]
            written = registry.append_events(claim.attempt, lines)
            notifier.notify(job.id, written[-1].seq)
        done = registry.succeed(claim.attempt, {})
        notifier.notify(job.id, done.seq)
        lost = 0
        for watcher in watchers:
            answer, _ = watcher.communicate(timeout=600)
            found = json.loads(answer)
            assert found["watchers"] == WATCHERS // _PROCESSES
            lost += sum(abs(done.seq - seen) for seen in found["seen"]) + found["wrong"]
        _kit.say(f"{WATCHERS} watchers of {done.seq} events: {lost} lost, {time.monotonic() - began:.0f} s")
        registry.close()
        notifier.close()
        return lost
    finally:
        for watcher in watchers:
            watcher.kill()
            watcher.wait()
        gateway.stdin.close()
        try:
            gateway.wait(15)
        except subprocess.TimeoutExpired:
            gateway.kill()
            gateway.wait()


async def _watch(host: str, port: int, job: str, turn: asyncio.Semaphore, opened: asyncio.Event) -> tuple[int, int]:
    """How many events came, and how many of them were not the next."""
    async with turn:
        reader, writer = await asyncio.open_connection(host, port)
        request = f"GET /v1/jobs/{job}/events HTTP/1.1\r\nHost: {host}\r\nAccept: text/event-stream\r\n\r\n"
        writer.write(request.encode())
        head = await reader.readuntil(b"\r\n\r\n")
        assert b" 200 " in head.split(b"\r\n", 1)[0], head
    opened.set()
    seen = wrong = 0
    while line := await reader.readline():
        if line.startswith(b"id:"):
            wrong += int(line[3:]) != seen + 1
            seen += 1
        elif line.startswith(b"event:") and line[6:].strip() == b"end":
            break
    writer.close()
    return seen, wrong


async def _main(host: str, port: int, job: str, count: int) -> None:
    turn, opened = asyncio.Semaphore(50), [asyncio.Event() for _ in range(count)]
    tasks = [asyncio.create_task(_watch(host, port, job, turn, event)) for event in opened]
    for event in opened:
        await event.wait()
    sys.stdout.write("connected\n")
    sys.stdout.flush()
    found = await asyncio.gather(*tasks)
    answer = {"watchers": len(found), "seen": [seen for seen, _ in found], "wrong": sum(wrong for _, wrong in found)}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
