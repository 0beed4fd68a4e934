"""A gateway to test against: a real server on a port of its own, in a thread so that tests can reach its parts."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import uvicorn

from ethogram import sse
from gateway.app import create_app
from gateway.services import Services
from gateway.settings import GatewaySettings

TINY = {"seed": 3, "subjects": 4, "training": {"steps": 5}}
GENERATION = {"kind": "generation", "spec": TINY}


class Gateway(NamedTuple):
    """A running gateway."""

    url: str
    http: httpx.Client
    services: Services


@contextmanager
def running(state: Path, redis_url: str, **settings: Any) -> Iterator[Gateway]:
    """A gateway on the state directory ``state``, for the length of the block."""
    app = create_app(GatewaySettings(state=state, redis_url=redis_url, **settings))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="on", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=url, trust_env=False, timeout=20) as http:
            yield Gateway(url, http, app.state.services)
    finally:
        app.state.services.tails.close_streams()
        server.should_exit = True
        thread.join()


def submit(gateway: Gateway, **body: Any) -> str:
    """A small job; its id."""
    answer = gateway.http.post("/v1/jobs", json=GENERATION | body)
    assert answer.status_code == 201, answer.text
    id: str = answer.json()["id"]
    return id


def stream(gateway: Gateway, job: str, *, last: int = 0, stop_after: int | None = None, **params: Any) -> list[Any]:
    """Frames ``(event, id, data)`` of a job's stream, until it ends or ``stop_after`` frames were read."""
    frames: list[Any] = []
    headers = {"Last-Event-ID": str(last)} if last else {}
    with gateway.http.stream("GET", f"/v1/jobs/{job}/events", headers=headers, params=params) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        for frame in frames_of(response.iter_raw()):
            frames.append((frame.event, frame.id, json.loads(frame.data)))
            if len(frames) == stop_after:
                break
    return frames


def frames_of(chunks: Iterable[bytes]) -> Iterator[sse.Frame]:
    """The events in ``chunks``."""
    parser = sse.Parser()
    for chunk in chunks:
        yield from parser.feed(chunk)


def seqs(frames: list[Any]) -> list[int]:
    """The numbers of the kept events among ``frames``."""
    return [int(id) for event, id, _ in frames if event not in ("progress", "end")]


def fields(answer: httpx.Response, status: int = 422) -> list[str]:
    """The paths of what is wrong, from an answer that must be a well-formed problem."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["status"] == status and body["title"] and body["detail"] and body["reason"]
    assert body["request_id"] == answer.headers["x-request-id"]
    return [violation["field"] for violation in body["violations"]]
