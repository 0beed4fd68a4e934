"""The options of a Redis URL mean the same to every process: TLS, time limits, the database."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from ethogram.errors import EthogramError, InvalidInput, Unavailable
from ethogram.platform import redis
from services.jobs.signals import Bell, celery_app, celery_queue, check_redis, redis_client
from tests.gateway.running import running


class TlsProxy:
    """Takes TLS connections on loopback, and passes on to a Redis server what is in them."""

    def __init__(self, certificate: Path, key: Path, redis_url: str) -> None:
        self._target = urlsplit(redis_url)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate, key)
        self._loop, started = asyncio.new_event_loop(), threading.Event()
        self.port = 0

        async def serve() -> None:
            server = await asyncio.start_server(self._connect, "127.0.0.1", 0, ssl=self._context)
            self.port = server.sockets[0].getsockname()[1]
            started.set()

        self._loop.create_task(serve())
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        assert started.wait(10)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection(self._target.hostname, self._target.port)

        async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            with suppress(OSError):
                while data := await source.read(65_536):
                    target.write(data)
                    await target.drain()
            target.close()

        await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate of localhost that it has signed itself, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes a certificate, is not installed here")
    folder = tmp_path_factory.mktemp("tls")
    words = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    files = ["-out", str(folder / "certificate.pem"), "-keyout", str(folder / "key.pem")]
    subprocess.run(["openssl", *words.split(), *files], check=True, capture_output=True)
    return folder / "certificate.pem", folder / "key.pem"


@pytest.fixture(scope="module")
def proxy(certificate: tuple[Path, Path], redis_url: str) -> Iterator[TlsProxy]:
    proxy = TlsProxy(*certificate, redis_url)
    yield proxy
    proxy.close()


def answers(url: str) -> None:
    """Ask the server as each process does; raises what the first of them raises."""
    check_redis(url)
    redis_client(url).ping()
    with celery_app(url).connection() as connection:
        connection.ensure_connection(max_retries=1, interval_start=0, timeout=5)
        connection.default_channel.client.ping()


def test_tls_with_the_servers_certificate_or_without_verification(
    proxy: TlsProxy, certificate: tuple[Path, Path]
) -> None:
    base = f"rediss://localhost:{proxy.port}/0"
    for options in ("ssl_cert_reqs=none", f"ssl_ca_certs={certificate[0]}", "ssl_cert_reqs=none&ssl_min_version=771"):
        answers(f"{base}?{options}")


@pytest.mark.parametrize("options", ["", "?ssl_cert_reqs=required", "?ssl_ca_certs=/nowhere.pem"])
def test_a_certificate_that_nobody_vouches_for_is_refused_by_all(proxy: TlsProxy, options: str) -> None:
    url = f"rediss://localhost:{proxy.port}/0{options}"
    with pytest.raises(Unavailable, match=r"(certificate verify failed|No such file).*\?ssl_ca_certs=.*_reqs=none"):
        check_redis(url)
    with pytest.raises(Exception, match=r"certificate verify failed|No such file"), celery_app(url).connection() as c:
        c.ensure_connection(max_retries=1, interval_start=0, timeout=5)


def test_up_and_doctor_ask_as_the_processes_do(proxy: TlsProxy) -> None:
    redis.check(f"rediss://localhost:{proxy.port}/0?ssl_cert_reqs=none")
    with pytest.raises(Unavailable, match="certificate verify failed"):
        redis.check(f"rediss://localhost:{proxy.port}/0")


def test_a_gateway_is_ready_and_rings_over_tls(proxy: TlsProxy, redis_url: str, tmp_path: Path) -> None:
    url = f"rediss://localhost:{proxy.port}/0?ssl_cert_reqs=none"
    with running(tmp_path, url) as gateway:
        assert gateway.http.get("/readyz").json()["status"] == "ready"
    bell = Bell(url)
    bell.ring("over-tls")
    bell.close(10)
    assert redis_client(redis_url).llen(celery_queue("over-tls")) == 1


def test_options_without_tls(redis_url: str) -> None:
    plain = redis_url.partition("?")[0].rsplit("/", 1)[0]
    for options in (
        "/1?socket_timeout=5&socket_keepalive=true",
        "?db=2",
        "/0?client_name=mine&health_check_interval=7",
    ):
        answers(plain + options)
    bell = Bell(f"{plain}?db=2")
    bell.ring("of-two")
    bell.close(10)
    assert redis_client(f"{plain}/2").llen(celery_queue("of-two")) == 1
    assert redis_client(f"{plain}/0").llen(celery_queue("of-two")) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("colour=red", "colour"),
        ("socket_timeout=soon", "socket_timeout"),
        ("ssl_cert_reqs=none", "ssl_cert_reqs"),
    ],
)
def test_an_option_that_is_wrong_is_named(redis_url: str, options: str, said: str) -> None:
    url = f"{redis_url.partition('?')[0]}?{options}"
    for ask in (check_redis, redis_client, celery_app, redis.check):
        with pytest.raises(InvalidInput, match=f"REDIS_URL: has an option that is wrong or unknown.*{said}"):
            ask(url)


def test_a_wrong_requirement_of_tls_is_named() -> None:
    with pytest.raises(EthogramError, match=r"REDIS_URL: has an option that is wrong or unknown.*maybe"):
        check_redis("rediss://localhost:1/0?ssl_cert_reqs=maybe")
