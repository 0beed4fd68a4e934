"""Where the store keeps its bytes: a local folder here, anything else in :mod:`services.artifacts.remote`.

Both know nothing of artifacts: they keep blobs under their sha256, and small files under paths. A reader sees a whole
file or none.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, Protocol

from services.artifacts import locks
from services.artifacts.manifest import File

CHUNK = 2**20
# How long a collector waits for a moment without writers.
ALONE_SECONDS = 30.0
# Errors of link() where hard links are impossible: other device, not supported, too many links.
_NO_LINK = {errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS, errno.EACCES}


class Backend(Protocol):
    """The operations that the store is built from. Paths are relative, with ``/``."""

    def add(self, source: Path) -> File:
        """Keep the bytes of ``source``, once, and durably."""

    def open(self, path: str) -> BinaryIO:
        """Read. Raises ``FileNotFoundError``."""

    def read(self, path: str) -> bytes:
        """All of a small file. Raises ``FileNotFoundError``."""

    def write(self, path: str, data: bytes) -> None:
        """Create or replace a small file."""

    def create(self, path: str, data: bytes) -> None:
        """Create a small file. Raises ``FileExistsError``; of several callers at once, one succeeds."""

    def names(self, path: str) -> list[str]:
        """What a folder holds; empty when there is none."""

    def materialise(self, path: str, destination: Path) -> str:
        """Make ``destination`` a file with these bytes; their sha256."""

    def delete(self, path: str) -> int:
        """Remove a file, if it is there; the bytes that it had."""

    def writing(self) -> AbstractContextManager[None]:
        """Hold this from the first thing that is written to the last that names it."""

    def missing(self, paths: Collection[str]) -> list[str]:
        """Those of ``paths`` that a collector has deleted, once none that decided before this call can delete more:
        write them again. Call it when what names them is written, and before :meth:`writing` ends."""

    def collecting(self, paths: Collection[str]) -> AbstractContextManager[Callable[[], bool]]:
        """Hold this to decide about ``paths`` and to delete them; ask the answer before each deletion.

        The decision sees what is named when it begins; :meth:`missing` reports what is named later.
        """


def blob_path(sha256: str) -> str:
    """Where a blob lies."""
    return f"blobs/{sha256[:2]}/{sha256}"


class LocalBackend:
    """A folder. Files are written under a temporary name, synced and renamed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "tmp").mkdir(parents=True, exist_ok=True)

    def add(self, source: Path) -> File:
        """Keep a copy of the bytes of ``source``, which its owner may change later."""
        with self._temporary() as temporary:
            with source.open("rb") as reader, temporary.open("xb") as writer:
                sha256, size = copy(reader, writer)
                _sync(writer)
            temporary.chmod(0o444)
            target = self.root / blob_path(sha256)
            # One that is there already is trusted only as far as its bytes: this repairs a damaged blob.
            if not target.exists() or _digest(target) != sha256:
                self._rename(temporary, target)
        return File(sha256=sha256, size=size)

    def open(self, path: str) -> BinaryIO:
        """Read."""
        return (self.root / path).open("rb")

    def read(self, path: str) -> bytes:
        """All of a small file."""
        return (self.root / path).read_bytes()

    def write(self, path: str, data: bytes) -> None:
        """Create or replace a small file."""
        with self._temporary(data) as temporary:
            self._rename(temporary, self.root / path)

    def create(self, path: str, data: bytes) -> None:
        """Create a small file, whole from the beginning, by a hard link."""
        target = self.root / path
        self._make(target.parent)
        with self._temporary(data) as temporary:
            try:
                os.link(temporary, target)
            except FileExistsError:
                raise
            except OSError as error:
                if error.errno not in _NO_LINK:
                    raise
                with target.open("xb") as writer:
                    writer.write(data)
                    _sync(writer)
        _sync_folder(target.parent)

    def names(self, path: str) -> list[str]:
        """What a folder holds."""
        try:
            return sorted(os.listdir(self.root / path))  # noqa: PTH208  (names are wanted, not paths)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def materialise(self, path: str, destination: Path) -> str:
        """Link to the blob, which costs nothing; copy where links are not possible."""
        source = self.root / path
        try:
            os.link(source, destination)
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            with source.open("rb") as reader, destination.open("xb") as writer:
                return copy(reader, writer)[0]
        return _digest(destination)

    def delete(self, path: str) -> int:
        """Remove a file."""
        target = self.root / path
        try:
            size = target.stat().st_size
            target.unlink()
        except FileNotFoundError:
            return 0
        return size

    def writing(self) -> AbstractContextManager[None]:
        """Keep collectors away."""
        return locks.shared(self.root / "lock")

    def missing(self, paths: Collection[str]) -> list[str]:
        """Nothing: collectors are kept away."""
        return []

    @contextlib.contextmanager
    def collecting(self, paths: Collection[str]) -> Iterator[Callable[[], bool]]:
        """Keep writers away; the answer is False when they leave no gap."""
        with locks.alone(self.root / "lock", ALONE_SECONDS) as held:
            yield lambda: held

    @contextlib.contextmanager
    def _temporary(self, data: bytes | None = None) -> Iterator[Path]:
        path = self.root / "tmp" / secrets.token_hex(12)
        try:
            if data is not None:
                with path.open("xb") as writer:
                    writer.write(data)
                    _sync(writer)
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _rename(self, temporary: Path, target: Path) -> None:
        self._make(target.parent)
        temporary.replace(target)
        _sync_folder(target.parent)

    def _make(self, folder: Path) -> None:
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            _sync_folder(folder.parent)


def copy(reader: BinaryIO, writer: BinaryIO | None) -> tuple[str, int]:
    """Copy by chunks, or only read; sha256 and number of bytes."""
    sha256, size = hashlib.sha256(), 0
    while chunk := reader.read(CHUNK):
        sha256.update(chunk)
        size += len(chunk)
        if writer is not None:
            writer.write(chunk)
    return sha256.hexdigest(), size


def _digest(path: Path) -> str:
    with path.open("rb") as reader:
        return copy(reader, None)[0]


def _sync(writer: BinaryIO) -> None:
    writer.flush()
    os.fsync(writer.fileno())


def _sync_folder(folder: Path) -> None:
    # A rename is durable when the folder is.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
