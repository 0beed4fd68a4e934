"""What both clients send again, against a real platform on a way that loses answers."""

from __future__ import annotations

import asyncio
import inspect
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from ethogram.aio import AsyncClient
from ethogram.client import Client
from ethogram.errors import Conflict, IllegalState, InvalidInput, NotFound, TooLarge, Unavailable
from ethogram.platform.stack import Platform, free_port
from ethogram.transport import Tries
from tests.client.relay import relay

IDLE = "nobody"
Connect = Callable[..., Client]


class Blocking:
    """An AsyncClient that is used as if it were a Client."""

    def __init__(self, *words: Any, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = AsyncClient(*words, **options)

    def close(self) -> None:
        self._runner.run(self._client.aclose())
        self._runner.close()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*words: Any, **options: Any) -> Any:
            made = method(*words, **options)
            return self._runner.run(_all(made) if inspect.isasyncgen(made) else made)

        return call


async def _all(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]


@pytest.fixture(params=[Client, Blocking], ids=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Makes clients of one sort."""
    made: list[Any] = []

    def call(*words: Any, **options: Any) -> Client:
        made.append(request.param(*words, **options))
        return cast(Client, made[-1])

    yield call
    for client in made:
        client.close()


@pytest.fixture
def artifact(client: Client, tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(str(random.random()))
    return client.put(tmp_path, name="codec", type="codec").id


def test_a_submission_whose_answer_is_lost_makes_one_job(connect: Connect, platform: Platform, client: Client) -> None:
    mark = {"lost": str(random.random())}
    with relay(platform.url, "drop", "drop") as way:
        job = connect(way.url).submit("generation", {}, queue=IDLE, labels=mark)
    assert [job.id] == [found.id for found in client.jobs(labels=mark)]
    assert len(set(way.heads(b"idempotency-key"))) == 1 < len(way.requests)
    client.cancel(job.id)


def test_what_was_done_already_is_no_error(
    connect: Connect, platform: Platform, client: Client, artifact: str, tmp_path: Path
) -> None:
    job = client.submit("generation", {}, queue=IDLE)
    name = f"again-{random.randrange(10**9)}"
    with relay(platform.url) as way:
        lossy = connect(way.url)

        def lost(call: Callable[[], Any]) -> Any:
            way.requests.clear()
            way.plan[:] = ["drop"]
            answer = call()
            assert len(way.requests) > 1
            return answer

        assert lost(lambda: lossy.cancel(job.id)).state == "CANCELLED"
        assert lost(lambda: lossy.delete_job(job.id)) is None
        assert lost(lambda: lossy.publish(name, artifact, "1")).artifact == artifact
        assert lost(lambda: lossy.retire(name, "1")).retired
        assert lost(lambda: lossy.delete_artifact(artifact)) is None
        assert lost(lambda: lossy.dry_run("generation", {}))["dry_run"]
        # But what another did, or what never was, is one.
        with pytest.raises(NotFound):
            lossy.delete_job(job.id)
        ended = client.submit("generation", {}, queue=IDLE)
        client.cancel(ended.id)
        with pytest.raises(IllegalState):
            lossy.cancel(ended.id)
        other = client.put(tmp_path, name="other", type="codec").id
        client.publish(name, other, "2")
        way.plan[:] = ["busy"]
        with pytest.raises(Conflict):
            lossy.publish(name, client.put(tmp_path, name="third", type="codec").id, "2")


def test_what_would_be_done_twice_is_sent_once(
    connect: Connect, platform: Platform, client: Client, artifact: str, tmp_path: Path
) -> None:
    job = client.submit("generation", {}, queue=IDLE)
    client.cancel(job.id)
    with relay(platform.url) as way:
        lossy = connect(way.url)
        for call in (
            lambda: lossy.retry(job.id),
            lambda: lossy.publish(f"once-{random.randrange(10**9)}", artifact),
            lambda: lossy.put(tmp_path, name="x", type="file"),
        ):
            for fate in ("busy", "drop"):
                way.plan[:] = [fate]
                with pytest.raises(Unavailable):
                    call()
        assert len(way.requests) == 6
    assert client.job(job.id).state == "QUEUED"
    client.cancel(job.id)


def test_a_refusal_as_too_many_is_tried_again_whatever_it_was(
    connect: Connect, platform: Platform, client: Client, tmp_path: Path
) -> None:
    (tmp_path / "a").write_text("a")
    with relay(platform.url, "many", "many") as way:
        assert connect(way.url).put(tmp_path, name="x", type="file").id
    assert len(way.requests) == 3


def test_a_busy_platform_says_how_long_to_wait(connect: Connect, platform: Platform) -> None:
    with relay(platform.url, "busy") as way:
        began = time.monotonic()
        assert connect(way.url).kinds()
        assert 1.0 <= time.monotonic() - began < 5.0
        way.plan[:] = ["busy"]
        began = time.monotonic()
        with pytest.raises(Unavailable, match="503"):
            connect(way.url, retry_seconds=0.9).kinds()
        assert time.monotonic() - began < 0.9, "it would not have been in time"


@pytest.mark.parametrize("seconds", [0.0, 0.5])
def test_a_platform_that_stays_away_is_given_up(connect: Connect, seconds: float) -> None:
    client = connect(f"http://127.0.0.1:{free_port()}", retry_seconds=seconds)
    for call in (client.info, lambda: client.retry("job_x"), lambda: list(client.events("job_x"))):
        began = time.monotonic()
        with pytest.raises(Unavailable, match="is it running"):
            call()
        assert time.monotonic() - began < seconds + 0.5


def test_an_answer_that_is_final_is_asked_for_once(connect: Connect, platform: Platform) -> None:
    with relay(platform.url) as way:
        client = connect(way.url)
        for call, error in (
            (lambda: client.job("job_none"), NotFound),
            (lambda: client.submit("generation", {"subjects": 0}), InvalidInput),
            (lambda: list(client.events("job_none")), NotFound),
            (lambda: client.submit("generation", {}, idempotency_key="a\nb"), InvalidInput),
        ):
            with pytest.raises(error):
                call()
        assert len(way.requests) == 3


def test_events_go_on_where_the_stream_broke(connect: Connect, platform: Platform, client: Client) -> None:
    job = client.submit("generation", {"subjects": 4}, queue=IDLE)
    for _ in range(3):
        client.cancel(job.id)
        client.retry(job.id)
    client.cancel(job.id)
    whole = [event.seq for event in client.events(job.id)]
    assert len(whole) > 6
    with relay(platform.url, 700, "busy", 600, "drop") as way:
        assert [event.seq for event in connect(way.url).events(job.id)] == whole
    assert len(way.requests) == 5
    assert way.heads(b"last-event-id")


def test_a_download_that_breaks_is_taken_up_again(
    connect: Connect, platform: Platform, client: Client, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.bin").write_bytes(os.urandom(200_000))
    made = client.put(tmp_path / "in", name="bytes", type="file")
    came: list[int] = []
    with relay(platform.url, "pass", 100_000, "drop", "busy") as way:
        folder = connect(way.url).get(made.id, tmp_path / "out", on_bytes=came.append)
    assert (folder / "a.bin").read_bytes() == (tmp_path / "in" / "a.bin").read_bytes()
    assert sum(came) == 200_000
    assert [file.name for file in folder.iterdir()] == ["a.bin"]


@contextmanager
def gateway(state: Path, redis_url: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    environment = os.environ | {"ETHOGRAM_STATE": str(state), "ETHOGRAM_PORT": str(port), "REDIS_URL": redis_url}
    child = subprocess.Popen([sys.executable, "-m", "gateway"], env=environment, stdout=subprocess.DEVNULL)
    try:
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/healthz", trust_env=False)
                break
            except httpx.TransportError:
                assert child.poll() is None
                time.sleep(0.05)
        yield child
    finally:
        child.kill()
        child.wait()


@pytest.mark.slow
def test_a_gateway_that_is_killed_and_comes_back(connect: Connect, redis_url: str, tmp_path: Path) -> None:
    port = free_port()
    client = connect(f"http://127.0.0.1:{port}")
    # That it was quiet for longer is no reason to give up at once.
    followed = connect(f"http://127.0.0.1:{port}", retry_seconds=0.5)
    seen: list[int | None] = []
    with gateway(tmp_path, redis_url, port) as first:
        job = client.submit("generation", {}, queue=IDLE)
        events = partial(followed.events, job.id, after=job.seq)
        following = threading.Thread(target=lambda: seen.extend(event.seq for event in events()))
        following.start()
        time.sleep(1.0)
        first.send_signal(signal.SIGKILL)
        first.wait()
    begun = threading.Event()
    answers: list[str] = []

    def cancel() -> None:
        begun.set()
        answers.append(client.cancel(job.id).state)

    asking = threading.Thread(target=cancel)
    asking.start()
    begun.wait()
    with gateway(tmp_path, redis_url, port):
        asking.join(20)
        following.join(20)
        assert answers == ["CANCELLED"]
        assert seen == list(range(job.seq + 1, client.job(job.id).seq + 1))


def test_many_streams_leave_room_for_other_requests(platform: Platform, client: Client) -> None:
    job = client.submit("generation", {}, queue=IDLE)

    async def follow() -> list[str]:
        async with AsyncClient(platform.url) as one:
            waits = [asyncio.create_task(one.wait(job.id)) for _ in range(120)]
            await asyncio.sleep(0.5)
            await asyncio.wait_for(one.cancel(job.id), 20)
            async for _ in one.events(job.id):
                break
            return [done.state for done in await asyncio.gather(*waits)]

    assert asyncio.run(follow()) == ["CANCELLED"] * 120


@pytest.mark.parametrize("url", ["http://127.0.0.1:abc", "http://127.0.0.1:0", "http://[::1", "ftp://x", "http://"])
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(InvalidInput, match="http://HOST:PORT"):
        Client(url)


@pytest.mark.parametrize(("body", "status"), [(b"[]", 200), (b'{"a": 1}', 200), (b"<html>", 200), (b"{}", 413)])
def test_something_else_at_the_url(connect: Connect, body: bytes, status: int) -> None:
    class Stranger(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Stranger) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = connect(f"http://127.0.0.1:{server.server_port}")
        for ask in (lambda: client.job("job_x"), client.models, client.jobs):
            with pytest.raises(TooLarge if status == 413 else Unavailable):
                ask()
        server.shutdown()


def test_a_name_that_would_arrive_as_another_is_refused(client: Client, tmp_path: Path) -> None:
    (tmp_path / 'a"b.txt').write_text("x")
    with pytest.raises(InvalidInput, match="rename it"):
        client.put(tmp_path, name="x", type="file")


def test_pauses_grow_and_differ() -> None:
    def pauses() -> list[float]:
        tries = Tries("http://x", 60.0, repeatable=False)
        found = [tries.pause(httpx.ConnectError("refused")) for _ in range(12)]
        assert not tries.unsure
        return [pause for pause in found if pause is not None]

    drawn = [pauses() for _ in range(200)]
    for step in range(12):
        most = min(0.1 * 2**step, 5.0)
        column = [one[step] for one in drawn]
        assert all(0 <= pause <= most for pause in column)
        assert most / 3 < sum(column) / len(column) < most / 1.5


@pytest.mark.parametrize(
    ("said", "least", "most"),
    [("7", 7, 7), ("", 0, 0.1), ("soon", 0, 0.1), ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0.1), ("-3", 0, 0.1)],
)
def test_forms_of_retry_after(said: str, least: float, most: float) -> None:
    answer = httpx.Response(503, headers={"Retry-After": said})
    pause = Tries("http://x", 60.0, repeatable=True).pause(answer)
    assert pause is not None
    assert least <= pause <= most
    assert Tries("http://x", 60.0, repeatable=False).pause(answer) is None
