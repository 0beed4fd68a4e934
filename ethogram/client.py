"""The Python client of a platform: jobs, their events, artifacts and models.

    client = Client()                                   # ETHOGRAM_URL, or the platform of runs/state
    job = client.submit("generation", {"subjects": 512})
    client.wait(job.id, on_event=print).check()

Every method raises the classes of :mod:`ethogram.errors` that the server raised, with the same violations.
"""

# Generated from aio.py by scripts.sync_client.

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from ethogram import sse, transport
from ethogram.errors import Internal, NotFound, Unavailable
from ethogram.plain import plain
from ethogram.resources import Artifact, Event, Job, Kind, Manifest, Model
from ethogram.transport import SubmitOptions, Tries, body_of, given, part

R = TypeVar("R", bound=BaseModel)

if TYPE_CHECKING:
    from ethogram.embedding import Embedding
    from ethogram.inference import Inference


class Client:
    """A client of the platform at ``url``; safe to share between threads.

    Without ``url``: the platform in ``ETHOGRAM_URL``, else the one that runs in the state directory ``state``
    (by default ``ETHOGRAM_STATE``, else ``runs/state``). ``timeout``: seconds for one answer, not for a job.
    ``retry_seconds``: how long an idempotent request is repeated, with growing pauses, while the platform cannot be
    reached or is overloaded; 0: never. Uploads, retries of a job and models without a version are repeated only if they
    did not reach the platform.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        state: str | Path | None = None,
        timeout: float = 60.0,
        retry_seconds: float = transport.RETRY_SECONDS,
    ) -> None:
        self.url = transport.address(url, state)
        self._retry_seconds = retry_seconds
        self._timeout = timeout
        self._http = httpx.Client(**transport.connection(self.url, timeout))

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
        """Queue a job and return it. The same ``idempotency_key`` with the same request returns the first job."""
        body = transport.submission(kind, spec, options)
        return self._read(Job, self._post_once("/v1/jobs", body, idempotency_key))

    def dry_run(
        self, kind: str, spec: BaseModel | Mapping[str, Any], **options: Unpack[SubmitOptions]
    ) -> dict[str, Any]:
        """Check a submission as the server would, queue nothing, and return it with every default filled in."""
        body = transport.submission(kind, spec, options)
        checked: dict[str, Any] = self._json("POST", "/v1/jobs?dry_run=true", repeatable=True, json=body)
        return checked

    def pipeline(self, jobs: Mapping[str, Mapping[str, Any]], *, idempotency_key: str | None = None) -> dict[str, Job]:
        """Queue several jobs at once: name to ``{"kind": ..., "spec": ..., ...}``; an input ``{"job": NAME, "artifact":
        ...}`` names another of them. All are queued or none.
        """
        body = {"jobs": {name: plain(job, f"jobs.{name}") for name, job in jobs.items()}}
        answer = self._post_once("/v1/pipelines", body, idempotency_key)
        return {name: Job.model_validate(job) for name, job in answer["jobs"].items()}

    def job(self, id: str) -> Job:
        """The current state of a job."""
        return self._read(Job, self._json("GET", f"/v1/jobs/{part(id)}"))

    def jobs(
        self,
        *,
        kind: str | None = None,
        state: str | None = None,
        labels: Mapping[str, str] | None = None,
        parent: str | None = None,
        limit: int | None = 50,
    ) -> list[Job]:
        """Jobs, newest first, that have all of ``labels``; ``parent``: only the children of this job; ``limit`` None:
        all."""
        label = [f"{key}={value}" for key, value in (labels or {}).items()] or None
        return self._list(Job, "/v1/jobs", limit, kind=kind, state=state, label=label, parent=parent)

    def cancel(self, id: str) -> Job:
        """Ask a job to end; a running one is ``CANCELLING`` until it has."""
        tries = self._tries(repeatable=True)
        response = self._send(tries, "POST", f"/v1/jobs/{part(id)}/cancel")
        if tries.unsure and response.status_code == HTTPStatus.CONFLICT:
            # The try whose answer was lost may have done it.
            job = self.job(id)
            if job.state in ("CANCELLING", "CANCELLED"):
                return job
        return self._read(Job, body_of(response, self.url))

    def retry(self, id: str, *, from_start: bool = False) -> Job:
        """Queue a failed or cancelled job again; it resumes from its last checkpoint, unless ``from_start``."""
        params = {"from_start": "true"} if from_start else None
        return self._read(Job, self._json("POST", f"/v1/jobs/{part(id)}/retry", params=params))

    def delete_job(self, id: str) -> None:
        """Delete a job that has ended, with its events, outputs and children. Published outputs stay."""
        self._delete(f"/v1/jobs/{part(id)}")

    def events(self, id: str, *, after: int = 0, follow: bool = True) -> Iterator[Event]:
        """The events of a job, from ``after`` + 1 on, until it ends; ``follow`` False: those so far.

        A broken connection is resumed: every event comes once, in order. Raises :class:`Unavailable` when the platform
        cannot be reached for a minute.
        """
        last, tries = after, self._tries(repeatable=True)
        while True:
            try:
                with closing(self._event_frames(id, last, follow, tries)) as frames:
                    for frame in frames:
                        if frame.event == "end":
                            return
                        data = frame.json()
                        if frame.event == "progress":
                            data = {"type": "progress", "data": data, "job": id}
                        event = Event.model_validate(data)
                        if event.seq is None or event.seq > last:
                            last = event.seq or last
                            yield event
                if not follow:
                    return
                # A gateway that shuts down ends its streams; another gateway, or its successor, has the rest.
                outcome: httpx.TransportError | httpx.Response = httpx.RemoteProtocolError("the stream ended")
            except httpx.TransportError as error:
                outcome = error
            except httpx.HTTPStatusError as error:
                outcome = error.response
            pause = tries.pause(outcome)
            if pause is None:
                if isinstance(outcome, httpx.Response):
                    raise transport.error_of(outcome)
                raise transport.lost(self.url, outcome)
            time.sleep(pause)

    def wait(self, id: str, on_event: Callable[[Event], None] | None = None) -> Job:
        """Follow a job to its end and return it, succeeded or not; see :meth:`Job.check`."""
        for event in self.events(id):
            if on_event is not None:
                on_event(event)
        return self.job(id)

    # Artifacts and models

    def artifacts(self, *, job: str | None = None, type: str | None = None, limit: int | None = 50) -> list[Artifact]:
        """Artifacts, newest first; ``limit`` None: all."""
        return self._list(Artifact, "/v1/artifacts", limit, job=job, type=type)

    def artifact(self, id: str) -> Artifact:
        """One artifact with its manifest."""
        return self._read(Artifact, self._json("GET", f"/v1/artifacts/{part(id)}"))

    def output(self, job: str, name: str) -> Artifact:
        """The output ``name`` of a job. Raises :class:`NotFound`, which lists the outputs that exist, or says that
        there is no such job."""
        outputs = {artifact.name: artifact for artifact in reversed(self.artifacts(job=job, limit=None))}
        if name not in outputs:
            self.job(job)
            raise NotFound(f"job {job} has no artifact {name!r}; it has: {', '.join(sorted(outputs)) or 'none yet'}")
        return outputs[name]

    def put(self, path: str | Path, *, name: str, type: str) -> Artifact:
        """Upload a file, or all files of a folder, as one artifact."""
        files = transport.files_in(path)
        answer = self._json("POST", "/v1/artifacts", data={"name": name, "type": type}, files=files)
        manifest = self._read(Manifest, answer.get("manifest"))
        return Artifact(id=answer["id"], name=name, type=type, size=manifest.size, manifest=manifest)

    def get(self, id: str, destination: str | Path, *, on_bytes: Callable[[int], None] | None = None) -> Path:
        """Download an artifact into the folder ``destination``; files that exist with the right digest are kept.

        Every file is checked against its digest. ``on_bytes`` is called with the number of bytes of each chunk; a
        negative number takes back those of a failed try. Raises :class:`Conflict` where there is something else; then
        nothing is downloaded.
        """
        manifest = self.artifact(id).manifest
        if manifest is None:
            raise Internal(f"the server sent no manifest of artifact {id}")
        root = Path(destination)
        there = transport.present_files(root, manifest)
        for name, file in manifest.files.items():
            if name not in there:
                target, path = root / name, f"/v1/artifacts/{part(id)}/files/{quote(name)}"
                target.parent.mkdir(parents=True, exist_ok=True)
                self._download(path, target, file.sha256, on_bytes)
            elif on_bytes is not None:
                on_bytes(file.size)
        return root

    def delete_artifact(self, id: str) -> None:
        """Delete an artifact that no job needs any more, with its retired models."""
        self._delete(f"/v1/artifacts/{part(id)}")

    def publish(self, name: str, artifact: str, version: str | None = None) -> Model:
        """Publish an artifact as the model ``name``; without ``version``, the next number."""
        # A second time, a model without a version would get another number.
        tries = self._tries(repeatable=version is not None)
        body = given(name=name, artifact=artifact, version=version)
        response = self._send(tries, "POST", "/v1/models", json=body)
        if tries.unsure and response.status_code == HTTPStatus.CONFLICT:
            model = self.model(name, version)
            if model.artifact == artifact:
                return model
        return self._read(Model, body_of(response, self.url))

    def models(self) -> list[Model]:
        """All published models."""
        return self._list(Model, "/v1/models", None)

    def model(self, name: str, version: str | None = None) -> Model:
        """A published model; without ``version``, its latest."""
        return self._read(Model, self._json("GET", f"/v1/models/{part(name)}", params=given(version=version)))

    def retire(self, name: str, version: str) -> Model:
        """Stop serving a version, except to requests that name it."""
        path = f"/v1/models/{part(name)}/{part(version)}/retire"
        return self._read(Model, self._json("POST", path, repeatable=True))

    # The platform itself

    def kinds(self) -> list[Kind]:
        """The kinds of jobs that the platform runs."""
        return [self._read(Kind, item) for item in self._json("GET", "/v1/kinds")]

    def info(self) -> dict[str, Any]:
        """Version of the platform, and address of its inference service."""
        answer: dict[str, Any] = self._json("GET", "/v1/info")
        return answer

    def inference(self) -> Inference:
        """A client of the platform's inference service."""
        from ethogram.inference import Inference

        return Inference(str(self.info()["inference"]))

    def embedding(self) -> Embedding:
        """A client of the platform's embedding service."""
        from ethogram.embedding import Embedding

        return Embedding(str(self.info()["inference"]))

    # Transport

    def _read(self, type: type[R], answer: Any) -> R:
        try:
            return type.model_validate(answer)
        except ValidationError:
            raise transport.stranger(self.url) from None

    def _tries(self, *, repeatable: bool) -> Tries:
        return Tries(self.url, self._retry_seconds, repeatable=repeatable)

    def _send(self, tries: Tries, method: str, path: str, **request: Any) -> httpx.Response:
        """The response, which may be an error. Raises :class:`Unavailable` when there is none."""
        return self._answer(tries, lambda: self._http.request(method, path, **request))

    def _answer(self, tries: Tries, attempt: Callable[[], httpx.Response]) -> httpx.Response:
        """The last response of as many attempts as ``tries`` allows."""
        while True:
            try:
                response = attempt()
                pause = tries.pause(response)
                if pause is None:
                    return response
            except httpx.TransportError as error:
                pause = tries.pause(error)
                if pause is None:
                    raise transport.lost(self.url, error) from None
            time.sleep(pause)

    def _json(self, method: str, path: str, *, repeatable: bool | None = None, **request: Any) -> Any:
        """Body of the response."""
        tries = self._tries(repeatable=method == "GET" if repeatable is None else repeatable)
        return body_of(self._send(tries, method, path, **request), self.url)

    def _post_once(self, path: str, body: dict[str, Any], key: str | None) -> Any:
        # With a key a second try can do no harm.
        headers = {"Idempotency-Key": uuid.uuid4().hex if key is None else transport.header(key, "idempotency_key")}
        return self._json("POST", path, repeatable=True, json=body, headers=headers)

    def _delete(self, path: str) -> None:
        tries = self._tries(repeatable=True)
        response = self._send(tries, "DELETE", path)
        # The try whose answer was lost may have deleted it.
        if not (tries.unsure and response.status_code == HTTPStatus.NOT_FOUND):
            body_of(response, self.url)

    def _list(self, resource: type[R], path: str, limit: int | None, **filters: str | list[str] | None) -> list[R]:
        resources: list[R] = []
        cursor = None
        while limit is None or len(resources) < limit:
            size = transport.PAGE if limit is None else min(limit - len(resources), transport.PAGE)
            page = self._json("GET", path, params=given(**filters, limit=str(size), cursor=cursor))
            if not isinstance(page, dict) or not isinstance(page.get("items"), list):
                raise transport.stranger(self.url)
            resources += [self._read(resource, item) for item in page["items"]]
            cursor = page.get("next_cursor")
            if cursor is None:
                break
        return resources

    def _event_frames(self, id: str, last: int, follow: bool, tries: Tries) -> Generator[sse.Frame, None, None]:
        """The events of one connection; each chunk of data resets ``tries``."""
        params = given(follow=None if follow else "false", after=str(last) if last else None)
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": str(last)} if last else {})
        parser, path = sse.Parser(), f"/v1/jobs/{part(id)}/events"
        timeout = httpx.Timeout(self._timeout, read=max(self._timeout, transport.SILENCE_SECONDS))
        with self._http.stream("GET", path, params=params, headers=headers, timeout=timeout) as response:
            if response.is_error:
                response.read()
                response.raise_for_status()
            tries.following()
            for chunk in response.iter_bytes():
                tries.heard()
                for frame in parser.feed(chunk):
                    tries.heard(progress=True)
                    yield frame

    def _download(self, path: str, target: Path, sha256: str, on_bytes: Callable[[int], None] | None) -> None:
        partial = target.with_name(f".{uuid.uuid4().hex}.part")
        tries = self._tries(repeatable=True)
        digest, came, furthest = hashlib.sha256(), 0, 0

        def attempt() -> httpx.Response:
            nonlocal digest, came, furthest
            if came and on_bytes is not None:
                on_bytes(-came)
            digest, came = hashlib.sha256(), 0
            try:
                with self._http.stream("GET", path) as response:
                    if response.is_error:
                        response.read()
                        return response
                    with partial.open("wb") as file:
                        for chunk in response.iter_bytes():
                            digest.update(chunk)
                            file.write(chunk)
                            came += len(chunk)
                            if on_bytes is not None:
                                on_bytes(len(chunk))
                    return response
            except httpx.TransportError:
                if came > furthest:
                    furthest = came
                    tries.heard()
                raise

        try:
            response = self._answer(tries, attempt)
            if response.is_error:
                raise transport.error_of(response)
            if digest.hexdigest() != sha256:
                raise Unavailable(f"{path} arrived incomplete or damaged; try again")
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
