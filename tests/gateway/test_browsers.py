"""What web pages can do to a gateway that their reader's browser can reach: nothing."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from ethogram.client import Client
from ethogram.errors import Forbidden, InvalidInput
from gateway.settings import GatewaySettings
from tests.gateway.running import GENERATION, Gateway, fields, running, submit

HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}


@pytest.fixture(scope="module")
def open_gateway(tmp_path_factory: pytest.TempPathFactory, redis_url: str) -> Iterator[Gateway]:
    """One that believes to listen to other machines, under one name."""
    with running(tmp_path_factory.mktemp("state"), redis_url, host="0.0.0.0", hosts=["zoos.example"]) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def nameless_gateway(tmp_path_factory: pytest.TempPathFactory, redis_url: str) -> Iterator[Gateway]:
    """One that listens to other machines and was told no names."""
    with running(tmp_path_factory.mktemp("state"), redis_url, host="0.0.0.0") as gateway:
        yield gateway


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"},
        # A page of another port of this machine.
        {"Sec-Fetch-Site": "same-site", "Origin": "http://127.0.0.1:9"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "whatever"},
        # Browsers before 2023 send the origin alone.
        {"Origin": "https://evil.example"},
        {"Origin": "http://127.0.0.1:9"},
        {"Origin": "http://127.0.0.1"},
        {"Origin": "null"},
        {"Origin": "file://"},
        {"Origin": "chrome-extension://abc"},
        {"Origin": "http://127.0.0.1.evil.example"},
        {"Origin": ""},
    ],
)
def test_changes_from_other_sites_are_refused(gateway: Gateway, headers: dict[str, str]) -> None:
    job = submit(gateway, queue="nobody")
    for method, path, body in (
        ("POST", "/v1/jobs", {"json": GENERATION}),
        ("POST", f"/v1/jobs/{job}/cancel", {}),
        ("POST", "/v1/artifacts", {"data": {"name": "a", "type": "a"}, "files": [("files", ("a", b"1"))]}),
        ("POST", "/v1/models", {"json": {"name": "a", "artifact": "0" * 64}}),
        ("DELETE", f"/v1/jobs/{job}", {}),
        ("OPTIONS", "/v1/jobs", {}),
        ("POST", "/nowhere", {}),
    ):
        answer = gateway.http.request(method, path, headers=headers, **body)
        assert fields(answer, 403) == [] and answer.json()["reason"] == "FORBIDDEN"
        assert "only the gateway's own pages may" in answer.json()["detail"]
    assert gateway.http.get(f"/v1/jobs/{job}", headers=headers).json()["state"] == "QUEUED"


def test_changes_from_its_own_pages_and_from_programs_are_made(gateway: Gateway) -> None:
    port = urlsplit(gateway.url).port
    for headers in (
        {},
        {"Sec-Fetch-Site": "same-origin", "Origin": gateway.url},
        {"Sec-Fetch-Site": "none"},
        {"Origin": gateway.url},
        {"Origin": f"http://localhost:{port}", "Host": f"localhost:{port}"},
        {"Origin": "https://localhost", "Host": "localhost"},
        {"Origin": "https://localhost", "Host": "localhost:443"},
        {"Origin": "http://[::1]:80", "Host": "[::1]"},
    ):
        answer = gateway.http.post("/v1/jobs", json={**GENERATION, "queue": "nobody"}, headers=headers)
        assert answer.status_code == 201, (headers, answer.text)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8321", "10.0.0.1", "127.0.0.1.evil.example", "[::2]", "a:b"]
)
def test_on_loopback_other_names_are_refused_also_to_read(gateway: Gateway, host: str) -> None:
    for method, path in (("GET", "/v1/jobs"), ("HEAD", "/v1/jobs"), ("POST", "/v1/jobs"), ("GET", "/healthz")):
        answer = gateway.http.request(method, path, headers={"Host": host})
        assert answer.status_code == 403
    assert "put it into ETHOGRAM_HOSTS" in answer.json()["detail"]


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1", "localhost.", "zoo.localhost", "127.3.2.1:80", "[::1]:8321"]
)
def test_on_loopback_its_own_names_are_answered(gateway: Gateway, host: str) -> None:
    assert gateway.http.get("/v1/jobs", headers={"Host": host}).status_code == 200


def test_elsewhere_the_names_are_those_it_was_told(open_gateway: Gateway, nameless_gateway: Gateway) -> None:
    # Addresses are no danger: a page comes from a name. Probes and Prometheus ask for the address of a pod.
    for host in ("zoos.example", "ZOOS.example:8321", "10.1.2.3:8321", "[fd00::1]", "localhost:8321"):
        assert open_gateway.http.get("/v1/jobs", headers={"Host": host}).status_code == 200, host
    for host in ("evil.example", "sub.zoos.example", "zoos.example.evil.example"):
        assert open_gateway.http.get("/v1/jobs", headers={"Host": host}).status_code == 403, host
    assert nameless_gateway.http.get("/v1/jobs", headers={"Host": "gateway:8321"}).status_code == 200
    answer = nameless_gateway.http.post("/v1/jobs", headers={"Host": "gateway", "Origin": "http://evil.example"})
    assert answer.status_code == 403


def test_a_client_without_a_host_is_answered(gateway: Gateway) -> None:
    """As in HTTP/1.0."""
    parts = urlsplit(gateway.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port)
    connection._http_vsn, connection._http_vsn_str = 10, "HTTP/1.0"  # type: ignore[attr-defined]
    connection.putrequest("GET", "/v1/jobs", skip_host=True)
    connection.endheaders()
    assert connection.getresponse().status == 200
    connection.close()


def test_the_client_raises_what_the_gateway_refuses(gateway: Gateway) -> None:
    with Client(gateway.url) as client:
        client._http.headers["Origin"] = "http://evil.example"
        with pytest.raises(Forbidden, match="only the gateway's own pages may"):
            client.submit("generation", {"subjects": 3}, queue="nobody")


def test_every_answer_has_the_security_headers(gateway: Gateway) -> None:
    job = submit(gateway, queue="nobody")
    files = {"data": {"name": "a", "type": "a"}, "files": [("files", ("a.png", b"1"))]}
    artifact = gateway.http.post("/v1/artifacts", **files).json()["id"]  # type: ignore[arg-type]
    answers: list[httpx.Response] = [
        gateway.http.get("/v1/jobs"),
        gateway.http.get("/metrics"),
        gateway.http.get("/healthz"),
        gateway.http.get("/nowhere"),
        gateway.http.put("/v1/jobs"),
        gateway.http.post("/v1/jobs", json={}),
        gateway.http.post("/v1/jobs", content=b"x" * 70_000),
        gateway.http.post("/v1/jobs", headers={"Origin": "http://evil.example"}),
        gateway.http.get(f"/v1/artifacts/{artifact}/files/a.png"),
        gateway.http.get(f"/v1/jobs/{job}/events", params={"follow": "false"}),
        gateway.http.get("/openapi.json"),
    ]
    assert {answer.status_code for answer in answers} == {200, 404, 405, 413, 422, 403}
    for answer in answers:
        assert HEADERS.items() <= answer.headers.items(), answer.url
        assert all(len(answer.headers.get_list(name)) == 1 for name in HEADERS)
    for path in ("/docs", "/redoc"):
        policy = gateway.http.get(path).headers["content-security-policy"]
        assert "https://cdn.jsdelivr.net" in policy and "frame-ancestors 'none'" in policy


@pytest.mark.parametrize("name", ["http://zoos.example", "zoos.example:80", "*.example", "a b", "zöos.example"])
def test_names_that_are_none_are_refused_at_start(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ETHOGRAM_HOSTS", f"fine.example, {name}")
    with pytest.raises(InvalidInput, match=r"ETHOGRAM_HOSTS: .*is not a name such as zoos.example.org"):
        GatewaySettings.read()
    monkeypatch.setenv("ETHOGRAM_HOSTS", "Fine.example., other ,")
    assert GatewaySettings.read().hosts == ["fine.example", "other"]
