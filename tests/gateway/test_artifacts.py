"""Uploads, downloads and published models."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.artifacts.store import ArtifactStore
from services.runtime import scratch
from tests.gateway.running import Gateway, fields, running, submit

FILES = {"weights.safetensors": os.urandom(300_000), "tables/a b/ö.json": b"{}", "empty": b""}


def put(
    gateway: Gateway, files: dict[str, bytes] | list[tuple[str, bytes]], name: str = "codec", type: str = "codec"
) -> httpx.Response:
    items = files.items() if isinstance(files, dict) else files
    parts = [("files", (path, data)) for path, data in items]
    return gateway.http.post("/v1/artifacts", data={"name": name, "type": type}, files=parts)


def work_is_empty(gateway: Gateway) -> bool:
    """Whether no upload has left anything, or soon has not."""
    for _ in range(100):
        if {path.name for path in gateway.services.work.iterdir()} == {scratch.LOCK}:
            return True
        time.sleep(0.02)
    return False


def test_round_trip(gateway: Gateway) -> None:
    answer = put(gateway, FILES)
    assert answer.status_code == 201, answer.text
    id, manifest = answer.json()["id"], answer.json()["manifest"]
    assert set(manifest["files"]) == set(FILES) and work_is_empty(gateway)

    detail = gateway.http.get(f"/v1/artifacts/{id}").json()
    assert detail["manifest"] == manifest and detail["size"] == sum(map(len, FILES.values())) and detail["job"] is None
    for path, data in FILES.items():
        got = gateway.http.get(f"/v1/artifacts/{id}/files/{path}")
        assert got.content == data and got.headers["content-length"] == str(len(data))
        digest = hashlib.sha256(data).hexdigest()
        assert got.headers["etag"] == f'"{digest}"' and manifest["files"][path]["sha256"] == digest
        again = gateway.http.get(f"/v1/artifacts/{id}/files/{path}", headers={"If-None-Match": got.headers["etag"]})
        assert again.status_code == 304 and again.content == b""
    assert fields(gateway.http.get(f"/v1/artifacts/{id}/files/other"), 404) == []


def test_list(gateway: Gateway) -> None:
    ids = [put(gateway, {"a": str(n).encode()}, type="listed").json()["id"] for n in range(3)]
    page = gateway.http.get("/v1/artifacts", params={"type": "listed", "limit": "2"}).json()
    rest = gateway.http.get(
        "/v1/artifacts", params={"type": "listed", "limit": "2", "cursor": page["next_cursor"]}
    ).json()
    assert [row["id"] for row in page["items"] + rest["items"]] == ids[::-1] and rest["next_cursor"] is None


def test_outputs_of_a_job(gateway: Gateway, tmp_path: Path) -> None:
    job = submit(gateway, queue="outputs")
    claim = gateway.services.registry.claim_next("outputs", "worker", 30)
    assert claim is not None
    (tmp_path / "zoo.json").write_text("{}")
    id, manifest = gateway.services.store.put(tmp_path, name="zoo", type="zoo", job=job, attempt=claim.attempt)
    gateway.services.registry.commit_artifact(claim.attempt, "zoo", "zoo", id, manifest.size)
    items = gateway.http.get("/v1/artifacts", params={"job": job}).json()["items"]
    assert [(item["id"], item["name"], item["attempt"]) for item in items] == [(id, "zoo", claim.attempt)]


@pytest.mark.parametrize(
    "path", ["../a", "a/../../b", "/etc/passwd", "a\\b", "a//b", ".", "a/.", "x" * 300, "y/" * 600]
)
def test_path_that_leaves_the_artifact(gateway: Gateway, path: str) -> None:
    answer = put(gateway, [("fine", b"1"), (path, b"2")])
    assert fields(answer) == ["files.1"]
    assert work_is_empty(gateway)


@pytest.mark.parametrize("paths", [("a", "a"), ("a", "a/b"), ("a/b", "a"), ("a/b/c", "a/b")])
def test_path_that_is_there_twice(gateway: Gateway, paths: tuple[str, str]) -> None:
    assert fields(put(gateway, [(path, b"") for path in paths])) == ["files.1"]


@pytest.mark.parametrize(
    ("names", "path"),
    [
        (b"filename*=UTF-8''tables%2F%C3%B6%20%22b%22.json", 'tables/ö "b".json'),
        (b"filename=\"o.json\"; filename*=utf-8'de'%C3%B6.json", "ö.json"),
        # As .NET writes it, unquoted and with a fallback that is not one.
        (b"filename=\"=?utf-8?B?w7YuanNvbg==?=\"; filename*=utf-8''%C3%B6.json", "ö.json"),
        (b"FileName*=iso-8859-1''%F6.json", "ö.json"),
        (b"filename=\"a; filename*=UTF-8''b.json\"", "a; filename*=UTF-8''b.json"),
        (b"filename*=\"UTF-8''%C3%B6.json\"", "ö.json"),
    ],
)
def test_extended_file_names(gateway: Gateway, names: bytes, path: str) -> None:
    answer = post_raw(gateway, FORM_HEAD + part(b"name=files; " + names) + b"--b--\r\n")
    assert answer.status_code == 201, answer.text
    assert list(answer.json()["manifest"]["files"]) == [path]


@pytest.mark.parametrize(
    ("names", "field"),
    [
        (b"filename*=%C3%B6.json", "(root)"),
        (b"filename*=KOI8-R''%C3", "(root)"),
        (b"filename*=UTF-8''%FF", "files.0"),
        (b"filename*=UTF-8''..%2F..%2Fa", "files.0"),
        (b"filename*=UTF-8''a%00b", "files.0"),
    ],
)
def test_wrong_extended_file_names(gateway: Gateway, names: bytes, field: str) -> None:
    answer = post_raw(gateway, FORM_HEAD + part(b'name="files"; ' + names) + b"--b--\r\n")
    assert fields(answer) == [field] and work_is_empty(gateway)


def part(disposition: bytes, data: bytes = b"1") -> bytes:
    return b"--b\r\nContent-Disposition: form-data; " + disposition + b"\r\n\r\n" + data + b"\r\n"


FORM_HEAD = part(b'name="name"', b"zoo") + part(b'name="type"', b"zoo")


def post_raw(gateway: Gateway, body: bytes, kind: str = "multipart/form-data; boundary=b") -> httpx.Response:
    return gateway.http.post("/v1/artifacts", content=body, headers={"Content-Type": kind})


def test_wrong_forms(gateway: Gateway) -> None:
    head = FORM_HEAD

    def raw(*body: Any) -> list[str]:
        return fields(post_raw(gateway, *body))

    assert raw(head + part(b'name="files"; filename="a\0b"') + b"--b--\r\n") == ["files.0"]
    assert raw(head + part(b'name="files"; filename="\xff"') + b"--b--\r\n") == ["files.0"]
    assert raw(head + part(b'name="files"; filename="a"')) == ["(root)"]
    assert raw(head + b"--b--\r\n") == ["files"]
    assert raw(head + part(b'name="name"', b"zoo")) == ["name"]
    assert raw(head + part(b'name="colour"')) == ["colour"]
    assert raw(head + part(b'name="other"; filename="a"')) == ["other"]
    assert raw(b"nonsense") == ["(root)"]
    assert raw(b"{}", "application/json") == ["(root)"]
    assert raw(b"", "multipart/form-data") == ["(root)"]
    assert raw(b"--json\r\n", "multipart/form-data; boundary=json") == ["(root)"]
    assert fields(put(gateway, {"a": b""}, name="../x")) == ["name"]
    assert fields(put(gateway, {"a": b""}, name="n" * 5000)) == ["(root)"]
    assert fields(put(gateway, {"a": b""}, type="a b")) == ["type"]
    assert fields(gateway.http.post("/v1/artifacts", files=[("files", ("a", b""))])) == ["name", "type"]
    assert work_is_empty(gateway)


def test_upload_over_the_limit(gateway: Gateway) -> None:
    answer = put(gateway, {"a": bytes(3 * 2**20 + 1)})
    assert fields(answer, 413) == []
    assert put(gateway, {"a": bytes(2**21)}).status_code == 201
    assert work_is_empty(gateway)


def test_upload_that_breaks_off_leaves_nothing(gateway: Gateway) -> None:
    def cut() -> object:
        yield b'--b\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n' + bytes(2**21)
        raise ConnectionError

    with pytest.raises(ConnectionError):
        gateway.http.post(
            "/v1/artifacts",
            content=cut(),  # type: ignore[arg-type]
            headers={"Content-Type": "multipart/form-data; boundary=b"},
        )
    assert gateway.http.get("/healthz").status_code == 200
    assert work_is_empty(gateway)


def test_download_paths(gateway: Gateway) -> None:
    id = put(gateway, {"a": b"1"}).json()["id"]
    for path in ("..%2F..%2Fregistry.db", "%2Fetc%2Fpasswd", "a%5Cb"):
        assert fields(gateway.http.get(f"/v1/artifacts/{id}/files/{path}")) == ["path"]


def test_models(gateway: Gateway) -> None:
    artifact = put(gateway, FILES).json()["id"]

    def publish(**body: str) -> httpx.Response:
        return gateway.http.post("/v1/models", json={"name": "codec", "artifact": artifact} | body)

    first, second = publish(), publish()
    assert first.status_code == 201 and (first.json()["version"], second.json()["version"]) == ("1", "2")
    assert fields(publish(version="1"), 409) == []
    assert gateway.http.get("/v1/models").json()["items"] == [first.json(), second.json()]
    assert gateway.http.get("/v1/models/codec").json() == second.json()
    assert gateway.http.get("/v1/models/codec", params={"version": "1"}).json() == first.json()
    # Another process sees it in the store, without asking the gateway.
    assert ArtifactStore(gateway.services.store.url).model("default", "codec").version == "2"

    assert fields(publish(artifact="0" * 64), 404) == []
    assert fields(publish(artifact="../x")) == ["artifact"]
    assert fields(publish(name="../x")) == ["name"]
    assert fields(publish(version="a/b")) == ["version"]
    assert fields(publish(colour="red")) == ["colour"]
    zoo = put(gateway, {"a": b"1"}, name="zoo", type="zoo").json()["id"]
    assert fields(publish(artifact=zoo)) == ["artifact"]


def test_full_disk_says_what_to_do(tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with running(tmp_path, redis_url) as gateway:
        monkeypatch.setattr("gateway.uploads.tempfile.mkdtemp", full)
        answer = put(gateway, {"a": b"1"})
        assert fields(answer, 503) == [] and "space" in answer.json()["detail"]
