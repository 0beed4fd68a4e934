"""The Python client of a platform: jobs, their events, artifacts and models.

    client = Client()                                   # ETHOGRAM_URL, or the platform of runs/state
    job = client.submit("generation", {"subjects": 512})
    client.wait(job.id, on_event=print).check()

Every method raises the classes of :mod:`ethogram.errors` that the server raised, with the same violations.
"""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, Self, TypedDict, Unpack
from urllib.parse import quote, urlsplit

import httpx
from pydantic import BaseModel

from ethogram import sse
from ethogram.errors import ERRORS, EthogramError, Internal, InvalidInput, NotFound, Unavailable, Violation
from ethogram.plain import plain
from ethogram.resources import Artifact, Event, Job, Kind, Manifest, Model

if TYPE_CHECKING:
    from ethogram.inference import Inference

_RETRY_PAUSES = (0.1, 0.4)
_LOST_SECONDS = 60.0
_PAGE = 200


class SubmitOptions(TypedDict, total=False):
    """What a submission may say beside its kind and spec."""

    queue: str | None
    """Machine class; None: the kind's own."""
    priority: int
    """Higher runs first."""
    not_before: datetime | None
    """Not started earlier."""
    max_attempts: int | None
    """Attempts before it fails for good."""
    labels: Mapping[str, str] | None
    """For finding it again."""


class Client:
    """A connection to the platform at ``url``; safe to share between threads.

    Without ``url``: what ``ETHOGRAM_URL`` names, else the platform that runs in the state directory ``state``
    (``ETHOGRAM_STATE``, ``runs/state``). ``timeout`` is in seconds and for one answer, not for a job.
    """

    def __init__(self, url: str | None = None, *, state: str | Path | None = None, timeout: float = 60.0) -> None:
        self.url = (url or os.environ.get("ETHOGRAM_URL") or _running(state)).rstrip("/")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidInput.field("url", f"{self.url!r} is no URL of a platform; write http://HOST:PORT")
        # A proxy of the user's environment has no way to this machine's own loopback.
        loopback = parts.hostname in ("localhost", "::1") or parts.hostname.startswith("127.")
        self._http = httpx.Client(base_url=self.url, timeout=timeout, trust_env=not loopback)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    # Jobs

    def submit(
        self,
        kind: str,
        spec: BaseModel | Mapping[str, Any],
        *,
        idempotency_key: str | None = None,
        **options: Unpack[SubmitOptions],
    ) -> Job:
        """Queue a job and return it. The same ``idempotency_key`` with the same request returns the job made first."""
        return Job.model_validate(self._post_once("/v1/jobs", _submission(kind, spec, options), idempotency_key))

    def dry_run(
        self, kind: str, spec: BaseModel | Mapping[str, Any], **options: Unpack[SubmitOptions]
    ) -> dict[str, Any]:
        """Check a submission as the server would, queue nothing, and return it with every default filled in."""
        body = _submission(kind, spec, options)
        checked: dict[str, Any] = self._json("POST", "/v1/jobs", params={"dry_run": "true"}, json=body, safe=True)
        return checked

    def pipeline(self, jobs: Mapping[str, Mapping[str, Any]], *, idempotency_key: str | None = None) -> dict[str, Job]:
        """Queue several jobs at once: name to ``{"kind": ..., "spec": ..., ...}``; an input ``{"job": NAME, "artifact":
        ...}`` names another of them. All are queued or none.
        """
        body = {"jobs": {name: plain(job, f"jobs.{name}") for name, job in jobs.items()}}
        answer = self._post_once("/v1/pipelines", body, idempotency_key)
        return {name: Job.model_validate(job) for name, job in answer["jobs"].items()}

    def job(self, id: str) -> Job:
        """One job as it is now."""
        return Job.model_validate(self._json("GET", f"/v1/jobs/{_part(id)}"))

    def jobs(
        self,
        *,
        kind: str | None = None,
        state: str | None = None,
        labels: Mapping[str, str] | None = None,
        limit: int | None = 50,
    ) -> list[Job]:
        """Jobs, newest first, that have all of ``labels``; ``limit`` None: all."""
        label = [f"{key}={value}" for key, value in (labels or {}).items()] or None
        found = self._pages("/v1/jobs", limit, kind=kind, state=state, label=label)
        return [Job.model_validate(item) for item in found]

    def cancel(self, id: str) -> Job:
        """Ask a job to end; a running one is ``CANCELLING`` until it has."""
        return Job.model_validate(self._json("POST", f"/v1/jobs/{_part(id)}/cancel"))

    def retry(self, id: str) -> Job:
        """Queue a failed or cancelled job again; it goes on from its last checkpoint."""
        return Job.model_validate(self._json("POST", f"/v1/jobs/{_part(id)}/retry"))

    def delete_job(self, id: str) -> Job:
        """Delete a job that has ended, with its events, outputs and children; the job as it was. Published outputs
        stay."""
        return Job.model_validate(self._json("DELETE", f"/v1/jobs/{_part(id)}"))

    def events(self, id: str, *, after: int = 0, follow: bool = True) -> Iterator[Event]:
        """What happens to a job, from event ``after`` + 1 on, until it ends; ``follow`` False: what there is by now.

        Goes on where it was when the connection breaks; raises :class:`Unavailable` when the platform stays away for
        a minute.
        """
        last, heard = after, time.monotonic()
        pause = 0.1
        while True:
            try:
                for frame in self._event_frames(id, last, follow):
                    heard, pause = time.monotonic(), 0.1
                    if frame.event == "end":
                        return
                    if frame.event == "progress":
                        yield Event(type="progress", data=frame.json(), job=id)
                        continue
                    event = Event.model_validate(frame.json())
                    if event.seq is not None and event.seq <= last:
                        continue
                    last = event.seq if event.seq is not None else last
                    yield event
                if not follow:
                    return
            except (httpx.TransportError, Unavailable) as error:
                if time.monotonic() - heard > _LOST_SECONDS:
                    raise _lost(self.url, error) from None
            time.sleep(pause)
            pause = min(2 * pause, 2.0)

    def wait(self, id: str, on_event: Callable[[Event], None] | None = None) -> Job:
        """Follow a job to its end and return it, whatever the end is (see :meth:`Job.check`)."""
        for event in self.events(id):
            if on_event is not None:
                on_event(event)
        return self.job(id)

    # Artifacts and models

    def artifacts(self, *, job: str | None = None, type: str | None = None, limit: int | None = 50) -> list[Artifact]:
        """Artifacts, newest first; ``limit`` None: all."""
        return [Artifact.model_validate(item) for item in self._pages("/v1/artifacts", limit, job=job, type=type)]

    def artifact(self, id: str) -> Artifact:
        """One artifact with its manifest."""
        return Artifact.model_validate(self._json("GET", f"/v1/artifacts/{_part(id)}"))

    def output(self, job: str, name: str) -> Artifact:
        """The output ``name`` of a job. Raises :class:`NotFound` naming what it has."""
        found = self.artifacts(job=job, limit=None)
        for artifact in found:
            if artifact.name == name:
                return artifact
        has = ", ".join(sorted({a.name for a in found})) or "none yet"
        raise NotFound(f"job {job} has no artifact {name!r}; it has: {has}")

    def put(self, path: str | Path, *, name: str, type: str) -> Artifact:
        """Upload a file, or all files of a folder, as one artifact."""
        root = Path(path)
        files = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.is_file())
        if not files:
            raise InvalidInput.field("path", f"{root} is no file and no folder with files")
        names = [file.name if root.is_file() else file.relative_to(root).as_posix() for file in files]
        parts = [("files", (path, _Upload(file))) for path, file in zip(names, files, strict=True)]
        answer = self._json("POST", "/v1/artifacts", data={"name": name, "type": type}, files=parts)
        manifest = Manifest.model_validate(answer["manifest"])
        return Artifact(id=answer["id"], name=name, type=type, size=manifest.size, manifest=manifest)

    def get(self, id: str, destination: str | Path, *, on_bytes: Callable[[int], None] | None = None) -> Path:
        """Download an artifact into the folder ``destination``; files that are there already are kept.

        Every file is checked against its digest. ``on_bytes`` is told how many bytes came.
        """
        manifest = self.artifact(id).manifest
        if manifest is None:
            raise Internal(f"the server sent no manifest of artifact {id}")
        root = Path(destination)
        for name, file in manifest.files.items():
            parts = PurePosixPath(name)
            if parts.is_absolute() or ".." in parts.parts or "\\" in name:
                raise InvalidInput.field(f"files.{name}", "an artifact's path must stay inside its folder")
            target = root / parts
            target.parent.mkdir(parents=True, exist_ok=True)
            if not (target.is_file() and target.stat().st_size == file.size and _digest(target) == file.sha256):
                self._download(f"/v1/artifacts/{_part(id)}/files/{quote(name)}", target, file.sha256, on_bytes)
            elif on_bytes is not None:
                on_bytes(file.size)
        return root

    def delete_artifact(self, id: str) -> Artifact:
        """Delete an artifact that no job needs any more, with the retired models made of it."""
        return Artifact.model_validate(self._json("DELETE", f"/v1/artifacts/{_part(id)}"))

    def publish(self, name: str, artifact: str, version: str | None = None) -> Model:
        """Publish an artifact as the model ``name``; without ``version``, the next number."""
        body = {"name": name, "artifact": artifact} | ({"version": version} if version is not None else {})
        return Model.model_validate(self._json("POST", "/v1/models", json=body))

    def models(self) -> list[Model]:
        """All published models."""
        return [Model.model_validate(item) for item in self._json("GET", "/v1/models")["items"]]

    def model(self, name: str, version: str | None = None) -> Model:
        """A published model; without ``version``, its latest."""
        return Model.model_validate(self._json("GET", f"/v1/models/{_part(name)}", params=_given(version=version)))

    def retire(self, name: str, version: str) -> Model:
        """Serve a version no more, but to those who ask for it by number."""
        return Model.model_validate(self._json("POST", f"/v1/models/{_part(name)}/{_part(version)}/retire"))

    # The platform itself

    def kinds(self) -> list[Kind]:
        """The kinds of jobs that the platform runs."""
        return [Kind.model_validate(item) for item in self._json("GET", "/v1/kinds")]

    def info(self) -> dict[str, Any]:
        """The platform's version and where its inference service is."""
        answer: dict[str, Any] = self._json("GET", "/v1/info")
        return answer

    def inference(self) -> Inference:
        """A client of the platform's inference service."""
        from ethogram.inference import Inference

        return Inference(str(self.info()["inference"]))

    # Transport

    def _post_once(self, path: str, body: dict[str, Any], key: str | None) -> Any:
        # With a key a second try can do no harm, so a broken connection is no reason to bother the user.
        headers = {"Idempotency-Key": key or uuid.uuid4().hex}
        return self._json("POST", path, json=body, headers=headers, safe=True)

    def _json(self, method: str, path: str, *, safe: bool | None = None, **request: Any) -> Any:
        """The body of the answer. ``safe``: may be sent twice; without it, only when nothing was sent at all."""
        again = httpx.TransportError if (method == "GET" if safe is None else safe) else httpx.ConnectError
        for pause in (*_RETRY_PAUSES, None):
            try:
                response = self._http.request(method, path, **request)
                break
            except httpx.TransportError as error:
                if pause is None or not isinstance(error, again):
                    raise _lost(self.url, error) from None
                time.sleep(pause)
        if response.is_error:
            raise error_of(response)
        try:
            return response.json()
        except ValueError:
            raise Unavailable(f"{self.url} answers, but not as an Ethogram platform does; is the URL right?") from None

    def _pages(self, path: str, limit: int | None, **filters: str | list[str] | None) -> Iterator[Any]:
        left, cursor = limit, None
        while left is None or left > 0:
            size = _PAGE if left is None else min(left, _PAGE)
            page = self._json("GET", path, params=_given(**filters, limit=str(size), cursor=cursor))
            yield from page["items"]
            cursor = page.get("next_cursor")
            if cursor is None:
                return
            left = None if left is None else left - len(page["items"])

    def _event_frames(self, id: str, last: int, follow: bool) -> Iterator[sse.Frame]:
        params = _given(follow=None if follow else "false", after=str(last) if last else None)
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": str(last)} if last else {})
        with self._http.stream("GET", f"/v1/jobs/{_part(id)}/events", params=params, headers=headers) as response:
            if response.is_error:
                response.read()
                raise error_of(response)
            yield from sse.frames(response.iter_bytes())

    def _download(self, path: str, target: Path, sha256: str, on_bytes: Callable[[int], None] | None) -> None:
        partial = target.with_name(f"{target.name}.part")
        digest = hashlib.sha256()
        try:
            with self._http.stream("GET", path) as response:
                if response.is_error:
                    response.read()
                    raise error_of(response)
                with partial.open("wb") as file:
                    for chunk in response.iter_bytes():
                        digest.update(chunk)
                        file.write(chunk)
                        if on_bytes is not None:
                            on_bytes(len(chunk))
            if digest.hexdigest() != sha256:
                raise Unavailable(f"{path} did not arrive whole; try again")
            partial.replace(target)
        except httpx.TransportError as error:
            raise _lost(self.url, error) from None
        finally:
            partial.unlink(missing_ok=True)


class _Upload:
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
        return data

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def error_of(response: httpx.Response) -> EthogramError:
    """The error that an answer carries, in the class it was raised as."""
    try:
        problem = response.json()
    except ValueError:
        problem = None
    if not isinstance(problem, dict):
        problem = {}
    text = str(problem.get("detail") or problem.get("title") or f"the server answered {response.status_code}")
    given = problem.get("violations")
    violations = [
        Violation(str(item.get("field")), str(item.get("description")))
        for item in (given if isinstance(given, list) else [])
        if isinstance(item, dict)
    ]
    cls = ERRORS.get(str(problem.get("reason")))
    if cls is None:
        # Not our gateway's own answer: a proxy's, or a path that this server does not have.
        by_status = {c.http_status: c for c in (InvalidInput, NotFound, Unavailable)}
        cls = by_status.get(response.status_code, Internal)
    if cls is Internal and problem.get("request_id"):
        text += f" (request {problem['request_id']}; the gateway's log has it)"
    return cls(text, violations)


def _running(state: str | Path | None) -> str:
    from ethogram.platform.state import StateDir

    folder = StateDir.find(state)
    record = folder.read_record()
    if record is None:
        raise Unavailable(
            f"no platform runs in {folder.root}: start one with `ethogram up`, or name one with --url or ETHOGRAM_URL"
        )
    return str(record["url"])


def _lost(url: str, error: Exception) -> Unavailable:
    return Unavailable(f"the platform at {url} does not answer ({str(error) or type(error).__name__}); is it running?")


def _submission(kind: str, spec: BaseModel | Mapping[str, Any], options: SubmitOptions) -> dict[str, Any]:
    values = spec.model_dump(mode="json") if isinstance(spec, BaseModel) else spec
    rest: dict[str, Any] = dict(options)
    if options.get("not_before") is not None:
        rest["not_before"] = rest["not_before"].isoformat()
    if options.get("labels") is not None:
        rest["labels"] = plain(rest["labels"], "labels")
    return {"kind": kind, "spec": plain(values, "spec")} | _given(**rest)


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _part(value: str) -> str:
    """``value`` as one part of a path, whatever it holds."""
    if value in ("", ".", ".."):
        raise InvalidInput.field("id", f"{value!r} names nothing")
    return quote(value, safe="")


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
