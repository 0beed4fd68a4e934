"""Event streams over real connections: nothing lost, nothing doubled, in order, whoever else watches."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from ethogram.platform.stack import free_port
from gateway import tail
from services.jobs.signals import Notifier
from tests.gateway.running import Gateway, fields, frames_of, running, seqs, stream, submit


def start(gateway: Gateway, name: str) -> tuple[str, str]:
    """A job that runs; its id and attempt."""
    job = submit(gateway, queue=name)
    claim = gateway.services.registry.claim_next(name, "worker", 60)
    assert claim is not None and claim.job.id == job
    return job, claim.attempt


def log(gateway: Gateway, attempt: str, count: int, size: int = 10) -> int:
    """Append ``count`` log events; the last ``seq``."""
    return gateway.services.registry.append_events(attempt, [("log", {"message": "x" * size})] * count)[-1].seq


@contextmanager
def at_work(gateway: Gateway, attempt: str, rounds: int, notifier: Notifier | None = None) -> Iterator[None]:
    """A worker that appends events and moves the progress while the block runs, then succeeds."""

    def work() -> None:
        for done in range(rounds):
            seq = log(gateway, attempt, 1 + done % 4)
            gateway.services.registry.set_progress(attempt, {"stage": "train", "done": done, "total": rounds})
            if notifier is not None:
                notifier.notify(job, seq)
            time.sleep(0.005)
        gateway.services.registry.succeed(attempt, {"fine": True})

    job = next(a.job for a in gateway.services.registry.running_attempts() if a.attempt == attempt)
    worker = threading.Thread(target=work)
    worker.start()
    yield
    worker.join()


def test_past_and_present_then_end(gateway: Gateway) -> None:
    job, attempt = start(gateway, "whole")
    log(gateway, attempt, 5)
    with at_work(gateway, attempt, 40):
        frames = stream(gateway, job)
    final = gateway.http.get(f"/v1/jobs/{job}").json()
    assert seqs(frames) == list(range(1, final["seq"] + 1))
    assert frames[0][0] == "state" and frames[0][2]["data"] == {"state": "QUEUED"}
    assert [data["seq"] for event, _, data in frames if event == "log"]
    progress = [data for event, id, data in frames if event == "progress"]
    assert progress[-1] == {"stage": "train", "done": 39, "total": 40}
    assert [p["done"] for p in progress] == sorted(p["done"] for p in progress)
    assert frames[-1][0] == "end" and frames[-1][2] == {"job": job, "state": "SUCCEEDED", "seq": final["seq"]}
    again = stream(gateway, job)
    assert seqs(again) == seqs(frames)
    assert again[-2][2] == progress[-1] and again[-1] == frames[-1]


def test_resuming_loses_and_doubles_nothing(gateway: Gateway) -> None:
    job, attempt = start(gateway, "resume")
    seen: list[int] = []
    with at_work(gateway, attempt, 80):
        for cut in (1, 2, 3, 5, 8, 13, 21, None):
            frames = stream(gateway, job, last=seen[-1] if seen else 0, stop_after=cut)
            seen += seqs(frames)
    assert seen == list(range(1, gateway.http.get(f"/v1/jobs/{job}").json()["seq"] + 1))
    assert seqs(stream(gateway, job, after=seen[-3])) == seen[-2:]


def test_without_following(gateway: Gateway) -> None:
    job, attempt = start(gateway, "glance")
    log(gateway, attempt, 1200)
    frames = stream(gateway, job, follow="false")
    assert seqs(frames) == list(range(1, 1203))
    assert frames[-1][0] == "end" and frames[-1][2]["state"] == "RUNNING"
    assert seqs(stream(gateway, job, follow="false", after="1200")) == [1201, 1202]


def test_a_retried_job_goes_on(gateway: Gateway) -> None:
    job = submit(gateway)
    gateway.http.post(f"/v1/jobs/{job}/cancel")
    last = seqs(stream(gateway, job))[-1]
    gateway.http.post(f"/v1/jobs/{job}/retry")
    frames = stream(gateway, job, last=last, stop_after=1)
    assert frames[0][2]["data"]["state"] == "QUEUED"


def test_bad_places_to_resume(gateway: Gateway) -> None:
    job = submit(gateway)
    for bad in ("x", "-1", "1.5", "9" * 40, "0" * 20 + "9" * 5000):
        answer = gateway.http.get(f"/v1/jobs/{job}/events", headers={"Last-Event-ID": bad})
        assert fields(answer) == ["Last-Event-ID"]
    for bad in ("-1", "x", "9" * 40):
        assert fields(gateway.http.get(f"/v1/jobs/{job}/events", params={"after": bad})) == ["after"]
    assert fields(gateway.http.get(f"/v1/jobs/{job}/events", params={"after": "7"})) == ["after"]


def test_two_gateways_agree(gateway: Gateway, redis_url: str) -> None:
    job, attempt = start(gateway, "agree")
    notifier = Notifier(redis_url)
    with running(gateway.services.settings.state, redis_url) as other:
        found: dict[str, list[int]] = {}
        watchers = [
            threading.Thread(target=lambda g=g: found.update({g.url: seqs(stream(g, job))})) for g in (gateway, other)
        ]
        with at_work(gateway, attempt, 60, notifier):
            for watcher in watchers:
                watcher.start()
            for watcher in watchers:
                watcher.join()
        # What one did, the other's watchers hear of at once, and its answers show.
        queued = submit(gateway)
        heard = threading.Event()

        def listen() -> None:
            stream(other, queued)
            heard.set()

        threading.Thread(target=listen).start()
        time.sleep(0.2)
        gateway.http.post(f"/v1/jobs/{queued}/cancel")
        assert heard.wait(0.7)
        assert other.http.get(f"/v1/jobs/{queued}").json()["state"] == "CANCELLED"
        assert other.http.get("/v1/jobs").json() == gateway.http.get("/v1/jobs").json()
    notifier.close()
    assert found[gateway.url] == found[other.url] == list(range(1, 1 + len(found[other.url])))


def test_redis_makes_it_quick(gateway: Gateway, redis_url: str) -> None:
    job, attempt = start(gateway, "quick")
    notifier = Notifier(redis_url)
    arrived: dict[int, float] = {}

    def watch() -> None:
        with gateway.http.stream("GET", f"/v1/jobs/{job}/events") as response:
            for frame in frames_of(response.iter_raw()):
                if frame.id:
                    arrived[int(frame.id)] = time.monotonic()

    watcher = threading.Thread(target=watch)
    watcher.start()
    while 2 not in arrived:
        time.sleep(0.01)
    sent: dict[int, float] = {}
    for _ in range(6):
        seq = log(gateway, attempt, 1)
        sent[seq] = time.monotonic()
        notifier.notify(job, seq)
        time.sleep(0.12)
    gateway.services.registry.succeed(attempt, {})
    watcher.join()
    notifier.close()
    delays = sorted(arrived[seq] - sent[seq] for seq in sent)
    assert delays[len(delays) // 2] < 0.3, delays


def test_without_redis_submitting_is_quick_and_events_arrive(tmp_path: Path) -> None:
    with running(tmp_path, f"redis://127.0.0.1:{free_port()}/0") as gateway:
        # The first bell of a process imports Celery, which takes a moment of everybody's time.
        submit(gateway)
        gateway.services.bell.flush(10)
        times = []
        for _ in range(10):
            began = time.monotonic()
            submit(gateway, queue="alone")
            times.append(time.monotonic() - began)
        assert max(times) < 0.3, times
        claim = gateway.services.registry.claim_next("alone", "worker", 60)
        assert claim is not None
        with at_work(gateway, claim.attempt, 100):
            frames = stream(gateway, claim.job.id)
        assert seqs(frames) == list(range(1, len(seqs(frames)) + 1)) and frames[-1][0] == "end"
        ready = gateway.http.get("/readyz")
        assert ready.status_code == 503
        wrong = [check for check in ready.json()["checks"] if not check["ok"]]
        assert [check["name"] for check in wrong] == ["redis"] and "REDIS_URL" in wrong[0]["detail"]


def test_slow_watcher_costs_nothing_and_loses_nothing(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "WINDOW_BYTES", 2**18)
    job, attempt = start(gateway, "slow")
    with gateway.http.stream("GET", f"/v1/jobs/{job}/events") as slow:
        chunks = slow.iter_raw()
        first = next(chunks)
        # Far more than the buffers of both ends hold.
        for _ in range(20):
            last = log(gateway, attempt, 100, size=6000)
            time.sleep(0.02)
        assert seqs(stream(gateway, job, stop_after=last)) == list(range(1, last + 1))
        shared = gateway.services.tails._tails[job]
        assert shared.window_bytes <= 2**18 + 200 * 8000
        gateway.services.registry.succeed(attempt, {})
        frames = list(frames_of(part for whole in ([first], chunks) for part in whole))
    assert [int(frame.id) for frame in frames if frame.event in ("log", "state")] == list(range(1, last + 2))
    assert frames[-1].event == "end"


def test_many_watchers(gateway: Gateway) -> None:
    job, attempt = start(gateway, "many")

    async def watch(http: httpx.AsyncClient) -> list[int]:
        found: list[int] = []
        rest = b""
        async with http.stream("GET", f"/v1/jobs/{job}/events") as response:
            async for chunk in response.aiter_raw():
                *whole, rest = (rest + chunk).split(b"\n\n")
                found += [int(frame.split(b"\n")[0][4:]) for frame in whole if frame.startswith(b"id: ")]
        return found

    async def all_of_them() -> list[list[int]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=gateway.url, limits=limits, timeout=30, trust_env=False) as http:
            return await asyncio.gather(*(watch(http) for _ in range(100)))

    with at_work(gateway, attempt, 100):
        found = asyncio.run(all_of_them())
    last = gateway.http.get(f"/v1/jobs/{job}").json()["seq"]
    assert all(each == list(range(1, last + 1)) for each in found)
    deadline = time.monotonic() + 5
    while gateway.services.tails._tails and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not gateway.services.tails._tails, "a tailer outlived its watchers"


def test_watchers_that_leave_are_forgotten(gateway: Gateway) -> None:
    job = submit(gateway)
    stream(gateway, job, stop_after=1)
    deadline = time.monotonic() + 5
    while job in gateway.services.tails._tails and time.monotonic() < deadline:
        time.sleep(0.02)
    assert job not in gateway.services.tails._tails


def test_too_many_streams(tmp_path: Path, redis_url: str) -> None:
    with running(tmp_path, redis_url, stream_limit=1) as gateway:
        job = submit(gateway)
        with gateway.http.stream("GET", f"/v1/jobs/{job}/events") as response:
            chunks = response.iter_raw()
            next(chunks)
            refused = gateway.http.get(f"/v1/jobs/{job}/events")
            assert fields(refused, 503) == [] and refused.headers["retry-after"]


def test_stream_stays_alive_and_ends_with_the_server(
    tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail, "KEEP_ALIVE_SECONDS", 0.1)
    received: list[bytes] = []
    with running(tmp_path, redis_url) as gateway:
        job = submit(gateway)
        with httpx.stream("GET", f"{gateway.url}/v1/jobs/{job}/events", trust_env=False) as response:
            chunks = response.iter_raw()
            while received.count(b":\n\n") < 2:
                received.append(next(chunks))
            gateway.services.tails._loop.call_soon_threadsafe(gateway.services.tails.close_streams)
            rest = b"".join(chunks)
    # Not ended: the client comes back with its Last-Event-ID.
    assert b"event: end" not in rest
    assert json.loads(b"".join(received).split(b"data: ")[1].split(b"\n")[0])["seq"] == 1
