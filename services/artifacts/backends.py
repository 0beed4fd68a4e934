"""Where the store keeps its bytes: a local folder here, anything else in :mod:`services.artifacts.remote`.

A backend knows nothing of artifacts: it keeps blobs under their sha256, and small files under paths. A reader sees a
whole file or none.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

from ethogram.errors import Unavailable
from services.artifacts.manifest import File

CHUNK = 2**20
# How long a collector waits for a moment without writers, and between two looks.
ALONE_SECONDS, LOOK_SECONDS = 30.0, 0.005
# Errors of link() where hard links are impossible: other device, not supported, too many links.
_NO_LINK = {errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS, errno.EACCES}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}


class Backend(Protocol):
    """The operations that the store is built from. Paths are relative, with ``/``."""

    def add(self, source: Path) -> File:
        """Keep a copy of the bytes of ``source``, once, and durably."""

    def open(self, path: str) -> BinaryIO:
        """Read. Raises ``FileNotFoundError``."""

    def read(self, path: str) -> bytes:
        """All of a small file. Raises ``FileNotFoundError``."""

    def write(self, path: str, data: bytes) -> None:
        """Create or replace a small file."""

    def create(self, path: str, data: bytes) -> None:
        """Create a small file. Raises ``FileExistsError``; of several callers at once, one succeeds."""

    def names(self, path: str) -> list[str]:
        """Names in a folder, sorted; empty when there is none."""

    def materialise(self, path: str, destination: Path) -> str:
        """Make ``destination`` a file with these bytes; returns their sha256."""
        with self.open(path) as reader, destination.open("xb") as writer:
            return copy(reader, writer).sha256

    def delete(self, path: str) -> int:
        """Remove a file if it is there; returns its size in bytes."""

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


class LocalBackend(Backend):
    """A folder. Files are written under a temporary name, synced and renamed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "tmp").mkdir(parents=True, exist_ok=True)

    def add(self, source: Path) -> File:
        with self._temporary() as temporary:
            with source.open("rb") as reader, temporary.open("xb") as writer:
                file = copy(reader, writer)
                _sync(writer)
            temporary.chmod(0o444)
            target = self.root / blob_path(file.sha256)
            # One that is there already is trusted only as far as its bytes: this repairs a damaged blob.
            if not target.exists() or sha256_of(target) != file.sha256:
                self._rename(temporary, target)
        return file

    def open(self, path: str) -> BinaryIO:
        return (self.root / path).open("rb")

    def read(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def write(self, path: str, data: bytes) -> None:
        with self._temporary(data) as temporary:
            self._rename(temporary, self.root / path)

    def create(self, path: str, data: bytes) -> None:
        target = self.root / path
        self._make(target.parent)
        # By a link it is whole from the beginning.
        with self._temporary(data) as temporary:
            if not _link(temporary, target):
                _write(target, data)
        _sync_folder(target.parent)

    def names(self, path: str) -> list[str]:
        try:
            return sorted(os.listdir(self.root / path))  # noqa: PTH208  (names are wanted, not paths)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def materialise(self, path: str, destination: Path) -> str:
        # A link costs nothing.
        if _link(self.root / path, destination):
            return sha256_of(destination)
        return super().materialise(path, destination)

    def delete(self, path: str) -> int:
        target = self.root / path
        try:
            size = target.stat().st_size
            target.unlink()
            return size
        except FileNotFoundError:
            return 0

    @contextmanager
    def writing(self) -> Iterator[None]:
        # Writers share the lock. It is the kernel's, and ends with its holder, however that ends.
        with self._lock() as descriptor:
            _locked(descriptor, fcntl.LOCK_SH)
            yield

    def missing(self, paths: Collection[str]) -> list[str]:
        # Writers keep collectors away.
        return []

    @contextmanager
    def collecting(self, paths: Collection[str]) -> Iterator[Callable[[], bool]]:
        """Keep writers away; the answer is False when they leave no gap. Raises :class:`Unavailable` on a file system
        without locks: nothing is ever collected there."""
        deadline = time.monotonic() + ALONE_SECONDS
        with self._lock() as descriptor:
            while (
                alone := _locked(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ) is False and time.monotonic() <= deadline:
                time.sleep(LOOK_SECONDS)
            if alone is None:
                raise Unavailable(
                    f"the file system of {self.root} has no locks, so nothing is collected there; keep the store on "
                    "another one, or set ETHOGRAM_GC_PERIOD_SECONDS=0"
                )
            yield lambda: alone

    def _lock(self) -> AbstractContextManager[int]:
        return _opened(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)

    @contextmanager
    def _temporary(self, data: bytes | None = None) -> Iterator[Path]:
        path = self.root / "tmp" / secrets.token_hex(12)
        try:
            if data is not None:
                _write(path, data)
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


def copy(reader: BinaryIO, writer: BinaryIO) -> File:
    """Copy by chunks; what was copied."""
    sha256, size = hashlib.sha256(), 0
    while chunk := reader.read(CHUNK):
        sha256.update(chunk)
        size += len(chunk)
        writer.write(chunk)
    return File(sha256=sha256.hexdigest(), size=size)


def sha256_of(path: Path) -> str:
    """Of the bytes of a file, in hexadecimal digits."""
    with path.open("rb") as reader:
        return hashlib.file_digest(reader, "sha256").hexdigest()


def disk_is_full(error: OSError) -> bool:
    """Whether a write failed for lack of space, or of quota."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _locked(descriptor: int, operation: int) -> bool | None:
    """Take a lock: whether it was free, or None on a file system without locks."""
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


def _link(source: Path, target: Path) -> bool:
    """Give a file a second name; False where that is not possible."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        return False
    return True


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as writer:
        writer.write(data)
        _sync(writer)


def _sync(writer: BinaryIO) -> None:
    writer.flush()
    os.fsync(writer.fileno())


def _sync_folder(folder: Path) -> None:
    # A rename is durable when the folder is.
    with _opened(folder, os.O_RDONLY) as descriptor:
        os.fsync(descriptor)


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
