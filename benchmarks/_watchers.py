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

from benchmarks import _kit
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
    watchers: list[subprocess.Popen[str]] = []
    try:
        while not gateway.logged("gateway ready"):
            if gateway.exit_code is not None:
                raise RuntimeError(f"the gateway ended: {gateway.log_end()}")
            time.sleep(0.05)
        registry, notifier = JobRegistry.open(f"sqlite:///{state.absolute() / 'registry.db'}"), Notifier(redis_url)
        job, _ = registry.submit("generation", GenerationSpec(), queue="watched")
        claim = registry.claim_next("watched", "bench", 3600.0)
        assert claim is not None
        arguments = HOST, port, job.id, WATCHERS // _PROCESSES
        watchers += [_kit.start("_watchers", *arguments) for _ in range(_PROCESSES)]
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
            counts = json.loads(answer)
            assert len(counts["seen"]) == WATCHERS // _PROCESSES
            lost += sum(abs(done.seq - seen) for seen in counts["seen"]) + counts["wrong"]
        _kit.say(f"{WATCHERS} watchers of {done.seq} events: {lost} lost, {time.monotonic() - began:.0f} s")
        registry.close()
        notifier.close()
        return lost
    finally:
        for watcher in watchers:
            watcher.kill()
            watcher.wait()
        gateway.terminate()
        gateway.finish(time.monotonic() + 15)


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
    seen, wrong = zip(*await asyncio.gather(*tasks), strict=True)
    sys.stdout.write(json.dumps({"seen": seen, "wrong": sum(wrong)}))


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
