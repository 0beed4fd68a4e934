"""A local HTTP server that speaks as Weights & Biases does to its own client: runs, and the metrics that they log."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789" * 4


class Service:
    """What is in it."""

    def __init__(self) -> None:
        self.history: dict[str, list[dict[str, Any]]] = {}
        """Rows of each run, by its id."""
        self.status = 200
        """Of every answer."""
        self.url = ""

    def rows(self, id: str) -> list[tuple[int, float]]:
        """Step and loss of each row."""
        return [(row["_step"], row["loss"]) for row in self.history[id] if "loss" in row]


class _Handler(BaseHTTPRequestHandler):
    service: Service
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _do(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        answer: dict[str, Any] = {}
        if self.path == "/graphql":
            answer = {"data": self._data(**json.loads(body))}
        elif self.path.endswith("/file_stream"):
            lines = json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            self.service.history[self.path.split("/")[-2]] += map(json.loads, lines)
        data = json.dumps(answer).encode()
        self.send_response(self.service.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = _do

    def _data(self, query: str, variables: dict[str, Any], **_: object) -> dict[str, Any]:
        history, entity = self.service.history, {"id": "e", "name": "me"}
        project = {"id": "p", "name": "zoos", "entity": entity}
        run = {"id": "b", "displayName": "mine", "config": "{}", "sweepName": None, "project": project}
        if "RunResumeStatus" in query:
            rows = history.get(variables["name"])
            if rows is None:
                return {"model": project | {"bucket": None}}
            counts = {"historyLineCount": len(rows), "logLineCount": 0, "eventsLineCount": 0}
            tail = {"historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]), "eventsTail": "[]"}
            more = {
                "name": variables["name"],
                "summaryMetrics": "{}",
                "tags": [],
                "notes": "",
                "wandbConfig": '{"t": 1}',
            }
            return {"model": project | {"bucket": run | counts | tail | more}}
        if "UpsertBucket" in query:
            new = variables["name"] not in history
            history.setdefault(variables["name"], [])
            bucket = run | {"name": variables["name"], "historyLineCount": 0, "description": ""}
            return {"upsertBucket": {"bucket": bucket, "inserted": new}}
        if "CreateRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.service.url}/files/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {}


@contextmanager
def serve() -> Iterator[Service]:
    """A service on loopback."""
    service = Service()
    handler = type("Handler", (_Handler,), {"service": service})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        service.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield service
        server.shutdown()
