"""The artifact store: immutable folders under the digest of their manifest, and published models that point to them.

    blobs/ab/abcd…                         bytes, by their sha256
    manifests/ab/abcd….json                manifests, by theirs: the artifact's id
    models/<tenant>/<name>/<version>.json  published models
    owner.json                             the registry whose collector may delete here

Blobs are written first and the manifest last, so an artifact is whole or not there. Equal files are kept once. Safe to
use from several threads and processes at once, also while :mod:`services.artifacts.collect` deletes what nothing needs.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import ValidationError

from ethogram.errors import Conflict, EthogramError, IllegalState, InvalidInput, NotFound, Unavailable
from services.artifacts.backends import Backend, LocalBackend, blob_path, disk_is_full
from services.artifacts.manifest import Manifest, ModelPointer, canonical_json, check_names, check_path, digest

PUBLISHABLE = frozenset({"codec", "resource-encoder"})
"""Types of artifacts that the inference server can serve."""
MAX_FILES = 100_000
OWNER = "owner.json"
_ID = re.compile(r"[0-9a-f]{64}")


class Deleted(NotFound):
    """A published version that was deleted, as opposed to one that cannot be found, perhaps for a missing mount."""


class ArtifactStore:
    """Artifacts and published models in a folder, or at any URL that fsspec knows (``s3://bucket/prefix``)."""

    def __init__(self, url: str) -> None:
        """Raises :class:`InvalidInput` for an unknown URL scheme, :class:`Unavailable` when it cannot be reached."""
        self.url = url
        self.backend = self._connect(url)

    def put(
        self,
        folder: Path,
        *,
        name: str,
        type: str,
        tenant: str = "default",
        job: str | None = None,
        attempt: str | None = None,
        spec: Mapping[str, Any] | None = None,
        parents: Sequence[str] = (),
        meta: Mapping[str, Any] | None = None,
        record: Callable[[str, Manifest], object] | None = None,
    ) -> tuple[str, Manifest]:
        """Keep all files of ``folder``; the artifact's id and manifest. Empty folders inside are not kept.

        ``record`` is called when everything is written, to register that the artifact is needed; nothing is collected
        until it returns. A caller with another claim on the artifact, such as a job's attempt, needs none.

        Raises :class:`InvalidInput` for a folder without files, with a link or a device in it, or an invalid name;
        :class:`Unavailable` when the disk is full.
        """
        check_names(name=name, type=type, tenant=tenant)
        sources = _files(Path(folder))
        with self._writing():
            files = {path: self.backend.add(source) for path, source in sources.items()}
            try:
                manifest = Manifest(
                    name=name,
                    type=type,
                    files=files,
                    tenant=tenant,
                    job=job,
                    attempt=attempt,
                    spec=dict(spec) if spec is not None else None,
                    parents=list(parents),
                    code_version=code_version(),
                    created=_now().isoformat(),
                    meta=dict(meta or {}),
                )
                data = manifest.canonical()
            except ValidationError as error:
                raise InvalidInput.from_pydantic(error) from None
            except ValueError as error:
                raise InvalidInput.field("meta", f"cannot be kept as JSON: {error}") from None
            id = digest(data)
            self.backend.write(manifest_path(id), data)
            if record is not None:
                record(id, manifest)
            # What a collector deleted, which did not know of the artifact yet, is written again.
            by_blob = {blob_path(file.sha256): path for path, file in files.items()}
            missing = self.backend.missing([*by_blob, manifest_path(id)])
            for path in (by_blob[blob] for blob in missing if blob in by_blob):
                if self.backend.add(sources[path]) != files[path]:
                    raise Unavailable(f"{sources[path]} changed while it was put into the store; try again")
            if manifest_path(id) in missing:
                self.backend.write(manifest_path(id), data)
        return id, manifest

    def manifest(self, id: str) -> Manifest:
        """What is in an artifact. Raises :class:`NotFound`."""
        if not _ID.fullmatch(id):
            raise NotFound(f"there is no artifact {id[:80]!r}: an id has 64 hexadecimal digits")
        data = self._read(manifest_path(id))
        if data is None:
            raise NotFound(f"there is no artifact {id} in the store")
        if digest(data) != id:
            raise self._damaged(id, "its manifest")
        return Manifest.model_validate_json(data)

    def open(self, id: str, path: str) -> BinaryIO:
        """Open one file of an artifact. Raises :class:`NotFound`, :class:`InvalidInput`."""
        check_path(path)
        file = self.manifest(id).files.get(path)
        if file is None:
            raise NotFound(f"artifact {id} has no file {path!r}")
        with self.trouble():
            try:
                return self.backend.open(blob_path(file.sha256))
            except FileNotFoundError:
                raise self._damaged(id, path) from None

    def fetch(self, id: str, destination: Path) -> Path:
        """Write all files of an artifact into the folder ``destination``, which must be empty or not exist. They are
        read only: from a local store they are links to its own bytes.

        Every byte is verified. Raises :class:`NotFound`, :class:`Conflict` when there is something at
        ``destination``, :class:`IllegalState` when the store's copy is damaged.
        """
        manifest = self.manifest(id)
        with self.trouble(at=destination):
            if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
                raise Conflict(f"{destination} is not an empty folder: fetch to another place")
            destination.parent.mkdir(parents=True, exist_ok=True)
            partial = destination.parent / f".{destination.name}.{secrets.token_hex(4)}"
            try:
                partial.mkdir()
                for path, file in manifest.files.items():
                    # Checked again: a manifest from a shared store is somebody else's text.
                    target = partial / check_path(path)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    try:
                        sha256 = self.backend.materialise(blob_path(file.sha256), target)
                    except FileNotFoundError:
                        raise self._damaged(id, path) from None
                    if sha256 != file.sha256:
                        raise self._damaged(id, path)
                partial.replace(destination)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return destination

    def publish(self, tenant: str, name: str, artifact_id: str, version: str | None = None) -> ModelPointer:
        """Name an artifact for the inference server. Without ``version``: one more than the highest number.

        Raises :class:`NotFound`, :class:`InvalidInput` for an artifact that cannot be served, :class:`Conflict` when
        the version exists: a published version never changes.
        """
        check_names(tenant=tenant, name=name, version=version)
        with self._writing():
            manifest = self.manifest(artifact_id)
            if manifest.tenant != tenant:
                raise NotFound(f"there is no artifact {artifact_id} in the store")
            if manifest.type not in PUBLISHABLE:
                text = f"an artifact of type {manifest.type!r} cannot be served, only {', '.join(sorted(PUBLISHABLE))}"
                raise InvalidInput.field("artifact", text)
            while True:
                earlier = self._versions(tenant, name)
                # A clock that was set back must not make the new one look older.
                times = [_time(pointer) + timedelta(microseconds=1) for pointer in earlier.values() if pointer]
                pointer = ModelPointer(
                    tenant=tenant,
                    name=name,
                    version=version or str(max([0, *map(_number, earlier)]) + 1),
                    artifact=artifact_id,
                    created=max([_now(), *times]).isoformat(),
                )
                try:
                    self.backend.create(_pointer_path(pointer), canonical_json(pointer.model_dump()))
                    break
                except FileExistsError:
                    if version is not None:
                        text = f"model {name} has a version {version} already: leave the version out for the next one"
                        raise Conflict(text) from None
            if self.backend.missing([manifest_path(artifact_id)]):
                self._rewrite(pointer, retired=True, deleted=True)
                raise NotFound(f"artifact {artifact_id} was deleted at this moment")
            return pointer

    def model(self, tenant: str, name: str, version: str | None = None) -> ModelPointer:
        """A published model; without ``version`` the one published last and not retired. Raises :class:`NotFound`."""
        check_names(tenant=tenant, name=name, version=version)
        if version is not None:
            pointer = self._pointer(tenant, name, version)
            if pointer is None:
                raise NotFound(f"there is no model {name} version {version}")
            if pointer.deleted:
                raise Deleted(f"model {name} version {version} was deleted")
            return pointer
        current = [pointer for pointer in self._versions(tenant, name).values() if pointer and not pointer.retired]
        if not current:
            raise NotFound(f"there is no model {name}: publish one first")
        return max(current, key=_age)

    def models(self, tenant: str) -> list[ModelPointer]:
        """All published models, by name, and by age within a name; the retired ones too."""
        check_names(tenant=tenant)
        versions = [
            pointer for name in self._names(f"models/{tenant}") for pointer in self._versions(tenant, name).values()
        ]
        return sorted(
            (pointer for pointer in versions if pointer and not pointer.deleted), key=lambda p: (p.name, _age(p))
        )

    def retire(self, tenant: str, name: str, version: str) -> ModelPointer:
        """Serve this version only to requests that name it. Raises :class:`NotFound`."""
        with self._writing():
            pointer = self.model(tenant, name, version)
            # A retired pointer may be marked as deleted at this moment, which must not be overwritten.
            return pointer if pointer.retired else self._rewrite(pointer, retired=True)

    def withdraw(self, artifact_id: str) -> None:
        """Mark the models of an artifact as deleted. Raises :class:`IllegalState` while one of them is not retired."""
        with self._writing():
            pointers = [pointer for pointer in self._published() if pointer.artifact == artifact_id]
            for pointer in pointers:
                if not pointer.retired:
                    model = f"model {pointer.name} version {pointer.version}"
                    raise IllegalState(f"artifact {artifact_id} is published as {model}: retire that first")
            for pointer in pointers:
                self._rewrite(pointer, deleted=True)

    def published(self) -> set[str]:
        """Ids of all artifacts that models of any tenant are made of, the retired ones too.

        Raises :class:`IllegalState` when a pointer cannot be read.
        """
        return {pointer.artifact for pointer in self._published()}

    def claim(self, registry: str) -> None:
        """Allow only the collector of this registry to delete here. Raises :class:`IllegalState` if the store belongs
        to another: artifacts that one registry does not know may be all that the other has."""
        with self._writing():
            with suppress(FileExistsError):
                self.backend.create(OWNER, canonical_json({"registry": registry}))
            found = self.backend.read(OWNER)
        if found != canonical_json({"registry": registry}):
            raise IllegalState(
                f"the artifact store at {self.url} belongs to another registry, so nothing is deleted in it; give each "
                f"registry a store of its own, or, if the other one is gone, remove {OWNER} there"
            )

    def check_writable(self) -> None:
        """Raise :class:`Unavailable` when nothing can be written now."""
        with self._writing():
            self.backend.write("probe", b"")

    def _published(self) -> list[ModelPointer]:
        """All pointers that are not deleted. Raises :class:`IllegalState` for one that cannot be read."""
        models = [(tenant, name) for tenant in self._names("models") for name in self._names(f"models/{tenant}")]
        pointers = []
        for tenant, name in models:
            for version, pointer in self._versions(tenant, name).items():
                if pointer is None:
                    raise IllegalState(
                        f"models/{tenant}/{name}/{version}.json in the artifact store at {self.url} cannot be read, so "
                        "nothing can be deleted; restore it, or remove it if nobody uses that model"
                    )
                pointers.append(pointer)
        return [pointer for pointer in pointers if not pointer.deleted]

    def _rewrite(self, pointer: ModelPointer, **changes: bool) -> ModelPointer:
        pointer = pointer.model_copy(update=changes)
        self.backend.write(_pointer_path(pointer), canonical_json(pointer.model_dump()))
        return pointer

    def _versions(self, tenant: str, name: str) -> dict[str, ModelPointer | None]:
        """The pointer of each version that is taken; None where it cannot be read."""
        files = self._names(f"models/{tenant}/{name}")
        versions = [file.removesuffix(".json") for file in files if file.endswith(".json")]
        return {version: self._pointer(tenant, name, version) for version in versions}

    def _pointer(self, tenant: str, name: str, version: str) -> ModelPointer | None:
        data = self._read(f"models/{tenant}/{name}/{version}.json")
        try:
            return None if data is None else ModelPointer.model_validate_json(data)
        except ValidationError:
            # On file systems without links a pointer exists for a moment before its text does; after a crash, for good.
            return None

    def _read(self, path: str) -> bytes | None:
        with self.trouble(), suppress(FileNotFoundError):
            return self.backend.read(path)
        return None

    def _names(self, path: str) -> list[str]:
        with self.trouble():
            return self.backend.names(path)

    def _connect(self, url: str) -> Backend:
        with self.trouble():
            if "://" not in url:
                return LocalBackend(Path(url).absolute())
            if url.startswith("file://"):
                return LocalBackend(Path(url.removeprefix("file://")))
            # Only remote stores need it, and it is not quick to import.
            from fsspec.core import url_to_fs

            from services.artifacts.remote import RemoteBackend

            try:
                fs, root = url_to_fs(url)
            except (ValueError, ImportError) as error:
                raise InvalidInput.field("store", f"cannot be used: {error}") from None
            return RemoteBackend(fs, root)

    def _damaged(self, id: str, what: str) -> IllegalState:
        return IllegalState(
            f"artifact {id} is damaged: {what} in the store at {self.url} does not match its digest or is missing; put "
            "the same files again to repair it"
        )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold off collectors; for a store without locks see :mod:`services.artifacts.remote`."""
        with self.trouble():
            try:
                with self.backend.writing():
                    yield
            except FileNotFoundError as error:
                # The store's own folder, or a file that was to be kept, went away meanwhile.
                gone = error.filename or self.url
                raise Unavailable(f"cannot write to the artifact store at {self.url}: {gone} is gone") from error

    @contextmanager
    def trouble(self, at: Path | None = None) -> Iterator[None]:
        """Turn errors of the storage into the platform's; ``at``: where files are written, if not into the store."""
        try:
            yield
        except (EthogramError, FileNotFoundError, FileExistsError):
            raise
        except OSError as error:
            store = f"the artifact store at {self.url}"
            if disk_is_full(error):
                raise Unavailable(f"{at or store} has no space left; free some") from error
            cause = os.strerror(error.errno) if error.errno else str(error)
            raise Unavailable(f"{store} cannot be used ({cause}): see that it can") from error


def _files(folder: Path) -> dict[str, Path]:
    """Path inside to file, sorted. Raises :class:`InvalidInput`."""
    if not folder.is_dir():
        raise InvalidInput.field("folder", f"{folder} is not a folder")
    found: dict[str, Path] = {}
    for source in folder.rglob("*"):
        path = source.relative_to(folder).as_posix()
        if source.is_symlink() or not (source.is_dir() or source.is_file()):
            # A link could smuggle in any file of this machine.
            raise InvalidInput.field("folder", f"{path!a} is a link or a device: only plain files can be kept")
        if source.is_file():
            found[check_path(path, f"folder: {path!a}")] = source
    if not 1 <= len(found) <= MAX_FILES:
        raise InvalidInput.field("folder", f"{folder} must hold 1 to {MAX_FILES} files, it holds {len(found)}")
    return dict(sorted(found.items()))


def manifest_path(id: str) -> str:
    return f"manifests/{id[:2]}/{id}.json"


def _pointer_path(pointer: ModelPointer) -> str:
    return f"models/{pointer.tenant}/{pointer.name}/{pointer.version}.json"


def _number(version: str) -> int:
    return int(version) if version.isascii() and version.isdecimal() else 0


def _time(pointer: ModelPointer) -> datetime:
    return datetime.fromisoformat(pointer.created)


def _age(pointer: ModelPointer) -> tuple[datetime, int]:
    return _time(pointer), _number(pointer.version)


def _now() -> datetime:
    return datetime.now(UTC)


@cache
def code_version() -> str:
    """The installed version of Ethogram, ``unknown`` in a tree that is not installed."""
    try:
        return metadata.version("ethogram")
    except metadata.PackageNotFoundError:
        return "unknown"
