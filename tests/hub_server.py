"""A local HTTP server that speaks as the Hugging Face Hub does of datasets and models: repositories, files, commits."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from ruamel.yaml import YAML

TOKEN = "hf_of_one_who_may_write"


def reach(url: str, monkeypatch: pytest.MonkeyPatch, cache: Path, token: str = TOKEN) -> None:
    """As HF_ENDPOINT and HF_HOME do, which are read when the package is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    # Its other way to send large files is a protocol of its own.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", token)


class Hub:
    """What is in it. ``owner`` is the one namespace to which :data:`TOKEN` may write."""

    owner = "me"

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.commits: list[tuple[str, list[str]]] = []
        """Message and files of each."""
        self.objects: dict[str, bytes] = {}
        self.puts = 0
        """Large files that were sent."""
        self.failing = 0
        """So many of the next commits are answered with 503."""
        self.refusing = False
        """Whether large files are refused."""
        self.url = ""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._file(body=True)

    def do_HEAD(self) -> None:
        self._file(body=False)

    def do_PUT(self) -> None:
        oid, data = self.path.rsplit("/", 1)[1], self._body()
        if self.hub.refusing:
            return self._answer(403, {"error": "Forbidden"})
        if hashlib.sha256(data).hexdigest() != oid:
            return self._answer(400, {"error": "other bytes"})
        self.hub.objects[oid] = data
        self.hub.puts += 1
        return self._answer(200, {})

    def do_POST(self) -> None:
        body, hub = self._body(), self.hub
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid credentials in Authorization header"})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or hub.owner}/{asked['name']}"
            if not repo.startswith(f"{hub.owner}/"):
                return self._answer(403, {"error": f"You don't have the rights to create a dataset under {repo}"})
            if repo in hub.repos:
                return self._answer(
                    409, {"error": "You already created this dataset repo", "url": f"{hub.url}/datasets/{repo}"}
                )
            assert asked.get("type", "model") in ("dataset", "model")
            hub.repos[repo], hub.private[repo] = {}, asked.get("visibility") == "private"
            return self._answer(200, {"url": f"{hub.url}/datasets/{repo}", "name": repo})
        if self.path == "/api/validate-yaml":
            head = json.loads(body)["content"].split("---\n")[1]
            return self._answer(
                200, {"errors": [], "warnings": []} if YAML(typ="safe").load(head) else {"errors": [head]}
            )
        place = r"/(?:api/)?(?:(?:datasets|models)/)?([^/]+/[^/.]+)(?:\.git)?/(preupload|commit|info)"
        found = re.match(place, self.path)
        if found is None or found[1] not in hub.repos:
            return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return getattr(self, f"_{found[2]}")(hub.repos[found[1]], body)  # type: ignore[no-any-return]

    def _preupload(self, files: dict[str, bytes], body: bytes) -> None:
        answer = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".parquet", ".safetensors")) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._answer(200, {"files": answer})

    def _info(self, files: dict[str, bytes], body: bytes) -> None:
        objects: list[dict[str, Any]] = []
        for one in json.loads(body)["objects"]:
            known = one["oid"] in self.hub.objects
            actions = {} if known else {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}}
            objects.append(one | actions)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _commit(self, files: dict[str, bytes], body: bytes) -> None:
        hub = self.hub
        if hub.failing:
            hub.failing -= 1
            return self._answer(503, {"error": "Service Unavailable"})
        lines = [json.loads(line) for line in body.splitlines()]
        names = []
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                files[value["path"]] = hub.objects[value["oid"]]
            else:
                assert line["key"] == "file" and value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            names.append(value["path"])
        hub.commits.append((lines[0]["value"]["summary"], names))
        oid = hashlib.sha1(str(len(hub.commits)).encode()).hexdigest()
        return self._answer(200, {"commitUrl": f"{hub.url}/c/{oid}", "commitOid": oid, "success": True})

    def _file(self, *, body: bool) -> None:
        if asked := re.match(r"/api/(?:datasets|models)/([^/]+/[^/]+)(/revision/main|/tree/.*)?$", self.path):
            files = self.hub.repos.get(asked[1])
            if files is None:
                return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            if "/tree/" in self.path:
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
                return self._answer(200, tree)
            siblings = [{"rfilename": name} for name in files]
            return self._answer(200, {"id": asked[1], "sha": "0" * 40, "siblings": siblings})
        found = re.match(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path)
        if found is None:
            return self._answer(404, {"error": "not here"})
        data = self.hub.repos.get(found[1], {}).get(found[2])
        if data is None:
            return self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}, body=body)
        etag = hashlib.sha256(data).hexdigest()
        self.send_response(200)
        for name, value in (("ETag", f'"{etag}"'), ("X-Repo-Commit", "0" * 40), ("Content-Length", str(len(data)))):
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)
        return None

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, code: int, value: Any, headers: dict[str, str] | None = None, *, body: bool = True) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        for name, text in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, text)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serve() -> Iterator[Hub]:
    """A Hub on loopback."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
