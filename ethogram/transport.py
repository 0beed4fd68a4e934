"""What both clients share: the forms of requests and answers, and when to send again. Nothing here waits."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ipaddress import ip_address, ip_network
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypedDict
from urllib.parse import quote
from urllib.request import getproxies, proxy_bypass

import httpx
from pydantic import BaseModel

from ethogram.errors import ERRORS, Conflict, EthogramError, Internal, InvalidInput, Unavailable, Violation
from ethogram.plain import plain
from ethogram.resources import Manifest

RETRY_SECONDS = 30.0
FOLLOW_SECONDS = 60.0
"""How long an open stream of events waits for a platform that went away."""
SILENCE_SECONDS = 45.0
"""A stream of events that is silent for so long is broken: a gateway sends a keep-alive every 15 s."""
PAGE = 200

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
# Silence is logged after this long.
_LOG_AFTER = 2.0
_BUSY = frozenset({502, 503, 504})
_REFUSED = 429
# For an answer without a reason: a proxy's, or one to a path that this server does not have.
_BY_STATUS = {cls.http_status: cls for cls in reversed(ERRORS.values())} | {400: InvalidInput}
_BY_STATUS |= dict.fromkeys((*_BUSY, _REFUSED), Unavailable)

logger = logging.getLogger("ethogram.client")


class SubmitOptions(TypedDict, total=False):
    """Options of a submission."""

    queue: str | None
    """Machine class; None: the kind's own."""
    priority: int
    """Higher runs first."""
    not_before: datetime | None
    """Not started earlier."""
    max_attempts: int | None
    """Attempts before it fails for good."""
    time_limit_seconds: float | None
    """Running time, over all attempts, after which it fails; None: none."""
    stall_limit_seconds: float | None
    """An attempt that is silent for so long is ended and retried; None: never. Left out: half an hour."""
    labels: Mapping[str, str] | None
    """For finding it again."""


class Tries:
    """The tries of one request: whether to send it again, and when.

    A request that never reached the platform, or that it refused as too many (429), is always sent again. One whose
    outcome is unknown (the connection broke, or 502, 503 or 504 came back) is sent again only if it is ``repeatable``:
    doing it twice does no harm. Pauses follow exponential back-off with full jitter, and are no shorter than the
    ``Retry-After`` of the answer. ``seconds`` after the first try, no other begins.
    """

    def __init__(self, url: str, seconds: float, *, repeatable: bool) -> None:
        self._url, self._seconds, self._repeatable = url, seconds, repeatable
        self._logged = False
        self.unsure = False
        """Whether an earlier try may have been carried out."""
        self.heard(progress=True)

    def heard(self, *, progress: bool = False) -> None:
        """The platform answered: restart the clock, and with ``progress`` also the pauses."""
        self._began = time.monotonic()
        if progress:
            self._next = _FIRST_PAUSE

    def following(self) -> None:
        """A stream has been opened, which may wait for longer from now on."""
        self._seconds = max(self._seconds, FOLLOW_SECONDS)
        self.heard()

    def pause(self, outcome: httpx.TransportError | httpx.Response) -> float | None:
        """Seconds to wait before the next try; None: ``outcome`` is final."""
        wait = random.uniform(0, self._next)
        if isinstance(outcome, httpx.Response):
            unsure = outcome.status_code in _BUSY
            if not unsure and outcome.status_code != _REFUSED:
                return None
            wait = max(wait, _retry_after(outcome))
        elif isinstance(outcome, httpx.UnsupportedProtocol | httpx.LocalProtocolError):
            return None
        else:
            unsure = not isinstance(outcome, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
        if unsure and not self._repeatable:
            return None
        self._next = min(2 * self._next, _LONGEST_PAUSE)
        silent = time.monotonic() - self._began
        if silent + wait >= self._seconds:
            return None
        self.unsure |= unsure
        if not self._logged and silent > _LOG_AFTER:
            self._logged = True
            logger.warning("%s does not answer; trying again for %.0f s", self._url, self._seconds - silent)
        return wait


def address(url: str | None, state: str | Path | None) -> str:
    """The platform's URL, given or found."""
    found = url or os.environ.get("ETHOGRAM_URL")
    if not found:
        from ethogram.platform.state import StateDir

        folder = StateDir.find(state)
        record = folder.read_record()
        if record is None:
            raise Unavailable(
                f"no platform runs in {folder.root}: start one with `ethogram up`, or name one with --url or "
                "ETHOGRAM_URL"
            )
        found = str(record["url"])
    found = found.rstrip("/")
    try:
        parts = httpx.URL(found)
    except httpx.InvalidURL:
        parts = httpx.URL()
    port = 80 if parts.port is None else parts.port
    if parts.scheme not in ("http", "https") or not parts.host or not 0 < port < 2**16:
        raise InvalidInput.field("url", f"{found!r} is not the URL of a platform; write http://HOST:PORT")
    return found


def connection(url: str, timeout: float) -> dict[str, Any]:
    """Options of an httpx client of the platform at ``url``. Raises :class:`InvalidInput` for a variable of the
    environment, such as a proxy, that cannot be used."""
    target = httpx.URL(url)
    proxy = _proxy(target)
    encrypted = "https" in (target.scheme, proxy.url.scheme if proxy is not None else "")
    return {
        "base_url": url,
        "timeout": timeout,
        # Every stream that is followed holds a connection.
        "limits": httpx.Limits(max_connections=None, max_keepalive_connections=20),
        # Without https nothing needs certificates, so that broken ones do no harm; this one trusts nobody.
        "verify": _trusted() if encrypted else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
        "proxy": proxy,
        # It would read the proxies of other hosts and schemes too, and refuse all for one that it cannot use.
        "trust_env": False,
    }


def _trusted() -> ssl.SSLContext:
    try:
        return httpx.create_ssl_context()
    except OSError as error:
        name = "SSL_CERT_FILE" if os.environ.get("SSL_CERT_FILE") else "SSL_CERT_DIR"
        text = f"{os.environ.get(name)} holds no certificates that can be read ({error.strerror})"
        raise InvalidInput.field(name, text) from None


def _proxy(url: httpx.URL) -> httpx.Proxy | None:
    proxies = getproxies()
    given = proxies.get(url.scheme) or proxies.get("all")
    if not given or _without_proxy(url, proxies.get("no", "")):
        return None
    try:
        proxy = httpx.Proxy(given if "://" in given else f"http://{given}")
        if not proxy.url.host or not 0 < (proxy.url.port or 1) < 2**16:
            raise ValueError("it has no host, or no such port")
        httpx.HTTPTransport(proxy=proxy, verify=False).close()
        return proxy
    except (ValueError, ImportError, httpx.InvalidURL) as error:
        names = (spelling for low in (f"{url.scheme}_proxy", "all_proxy") for spelling in (low, low.upper()))
        scheme, separator, rest = given.rpartition("://")
        shown = f"{scheme}{separator}{rest.rpartition('@')[2]}"
        raise InvalidInput.field(
            next(filter(os.environ.get, names), "proxy"),
            f"{shown} cannot be used as a proxy ({error}); write http://HOST:PORT, or put {url.host} into NO_PROXY",
        ) from None


def _without_proxy(url: httpx.URL, no_proxy: str) -> bool:
    """Whether ``url`` is on this machine, which no proxy can reach, or on the list ``no_proxy`` of names with their
    subdomains, addresses and networks."""
    with suppress(ValueError):
        here = ip_address(url.host)
        if here.is_loopback:
            return True
        for item in no_proxy.split(","):
            with suppress(ValueError):
                if here in ip_network(item.strip(" []"), strict=False):
                    return True
    return url.host == "localhost" or proxy_bypass(url.host) or proxy_bypass(f"{url.host}:{url.port}")


def submission(kind: str, spec: BaseModel | Mapping[str, Any], options: SubmitOptions) -> dict[str, Any]:
    """The body that submits a job."""
    values = spec.model_dump(mode="json") if isinstance(spec, BaseModel) else spec
    rest = given(**options)
    if "not_before" in rest:
        rest["not_before"] = rest["not_before"].isoformat()
    rest = {name: plain(value, name) for name, value in rest.items()}
    if "stall_limit_seconds" in options:
        # None is a value of its own here: there shall be no limit.
        rest["stall_limit_seconds"] = plain(options["stall_limit_seconds"], "stall_limit_seconds")
    return {"kind": kind, "spec": plain(values, "spec")} | rest


def body_of(response: httpx.Response, url: str) -> Any:
    """The body of an answer; raises the error that it carries."""
    if response.is_error:
        raise error_of(response)
    try:
        return response.json()
    except ValueError:
        raise stranger(url) from None


def stranger(url: str) -> Unavailable:
    """Whatever answers is not a platform."""
    return Unavailable(f"{url} answers, but not as an Ethogram platform does; is the URL right?")


def error_of(response: httpx.Response) -> EthogramError:
    """The error that an answer carries, in the class it was raised as."""
    problem: Any = None
    with suppress(ValueError):
        problem = response.json()
    problem = problem if isinstance(problem, dict) else {}
    text = str(problem.get("detail") or problem.get("title") or f"the server answered {response.status_code}")
    listed = problem.get("violations")
    items = [item for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
    violations = [Violation(str(item.get("field")), str(item.get("description"))) for item in items]
    cls = ERRORS.get(str(problem.get("reason"))) or _BY_STATUS.get(response.status_code, Internal)
    if cls is Internal and problem.get("request_id"):
        text += f" (request {problem['request_id']}; the gateway's log has it)"
    return cls(text, violations)


def lost(url: str, error: Exception) -> Unavailable:
    """The platform did not answer."""
    return Unavailable(f"the platform at {url} does not answer ({str(error) or type(error).__name__}); is it running?")


def given(**values: Any) -> dict[str, Any]:
    """Those of ``values`` that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def part(value: str) -> str:
    """``value`` quoted as one segment of a path."""
    if value in ("", ".", ".."):
        raise InvalidInput.field("id", f"{value!r} names nothing")
    return quote(value, safe="")


def header(value: str, field: str) -> str:
    """``value`` if a header can carry it."""
    if not (value.isascii() and value.isprintable() and value.strip() == value != ""):
        raise InvalidInput.field(field, "must be printable ASCII, without spaces at its ends, and not empty")
    return value


def files_in(path: str | Path) -> list[tuple[str, tuple[str, Upload]]]:
    """A file, or all files of a folder, as parts of an upload. Links are followed. Raises :class:`InvalidInput` for one
    that leads nowhere or to a folder that it is in, and for devices and the like."""
    root = Path(path)
    files = [root] if root.is_file() else sorted(_files_below(root)) if root.is_dir() else []
    if not files:
        raise InvalidInput.field("path", f"{root} is neither a file nor a folder with files")
    names = [file.name if root.is_file() else file.relative_to(root).as_posix() for file in files]
    for name in names:
        if '"' in name or not name.isprintable():
            raise InvalidInput.field("path", f"{name!r} has a quote or a control character in its name: rename it")
    return [("files", (name, Upload(file))) for name, file in zip(names, files, strict=True)]


def _files_below(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    above = (*above, folder.resolve())
    for entry in folder.iterdir():
        if entry.is_dir():
            if entry.resolve() in above:
                raise InvalidInput.field("path", f"{entry} is a link to a folder that it is in: remove it")
            yield from _files_below(entry, above)
        elif entry.is_file():
            yield entry
        else:
            what = "a link that leads nowhere" if entry.is_symlink() else "neither a file nor a folder"
            raise InvalidInput.field("path", f"{entry} is {what}: remove it, or put the file there")


def present_files(root: Path, manifest: Manifest) -> set[str]:
    """Paths of the files of an artifact that are in the folder ``root`` already. Raises :class:`Conflict` where
    something else is at one of its paths, and :class:`InvalidInput` for a path that leads out of the folder."""
    if os.path.lexists(root) and not root.is_dir():
        raise Conflict(f"{root} exists already and is not a folder; name another one")
    there = set[str]()
    for name, file in manifest.files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name:
            raise InvalidInput.field(f"files.{name}", "an artifact's path must stay inside its folder")
        target = root / path
        if os.path.lexists(target):
            if not target.is_file() or target.stat().st_size != file.size or sha256_of(target) != file.sha256:
                raise Conflict(f"{target} exists already and is not the artifact's; name another folder")
            there.add(name)
    return there


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Upload:
    """A file that is open only while it is read: a folder may hold more than a process may have open."""

    def __init__(self, path: Path) -> None:
        self._path, self._size, self._place = path, path.stat().st_size, 0
        self._file: BinaryIO | None = None

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """To the start or the end, which is how its length is asked for."""
        self._place = offset + (self._size if whence == os.SEEK_END else 0)
        self._close()
        return self._place

    def read(self, size: int) -> bytes:
        if self._file is None:
            self._file = self._path.open("rb")
            self._file.seek(self._place)
        data = self._file.read(size)
        self._place += len(data)
        if len(data) < size:
            self._close()
            if self._place < self._size:
                raise InvalidInput.field("path", f"{self._path} became shorter while it was read; try again")
        return data

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _retry_after(response: httpx.Response) -> float:
    """Seconds, or a date (RFC 9110, 10.2.3); 0 for neither."""
    value = response.headers.get("Retry-After", "")
    with suppress(ValueError):
        return max(0.0, float(value))
    with suppress(TypeError, ValueError):
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    return 0.0
