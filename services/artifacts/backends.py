"""Where the store keeps its bytes: a local folder, or anything fsspec can reach.

Both know nothing of artifacts: they keep blobs under their sha256, and small files under paths. A reader sees a whole
file or none.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from services.artifacts.manifest import File

CHUNK = 2**20
FORGET_SECONDS = 24 * 3600.0
# What link() answers on file systems that cannot: other device, not supported, too many links.
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


def blob_path(sha256: str) -> str:
    """Where a blob lies."""
    return f"blobs/{sha256[:2]}/{sha256}"


class LocalBackend:
    """A folder. Files are written under a temporary name, synced and renamed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "tmp").mkdir(parents=True, exist_ok=True)
        self._forget_writers()

    def add(self, source: Path) -> File:
        """Keep the bytes of ``source``. A copy: whoever owns ``source`` may go on writing to it."""
        with self._temporary() as temporary:
            with source.open("rb") as reader, temporary.open("xb") as writer:
                sha256, size = _copy(reader, writer)
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
        """Create a small file, whole from the beginning: a hard link to it appears, or fails to."""
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
                return _copy(reader, writer)[0]
        return _digest(destination)

    def _forget_writers(self) -> None:
        """Remove what writers that were killed left behind. No write pauses for as long as a living one is given."""
        oldest = time.time() - FORGET_SECONDS
        for path in (self.root / "tmp").iterdir():
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < oldest:
                    path.unlink()

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


class RemoteBackend:
    """Any fsspec file system. Object stores show a file only when it is complete."""

    def __init__(self, fs: Any, root: str) -> None:
        self._fs = fs
        self._root = root.rstrip("/")

    def add(self, source: Path) -> File:
        """Keep the bytes of ``source``."""
        with source.open("rb") as reader:
            sha256, size = _copy(reader, None)
        target = self._path(blob_path(sha256))
        # Listings are cached, and another process may have written since.
        self._fs.invalidate_cache()
        if not self._fs.exists(target) or self._fs.size(target) != size:
            self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._fs.put_file(str(source), target)
        return File(sha256=sha256, size=size)

    def open(self, path: str) -> BinaryIO:
        """Read."""
        return cast(BinaryIO, self._fs.open(self._path(path), "rb"))

    def read(self, path: str) -> bytes:
        """All of a small file."""
        self._fs.invalidate_cache()
        return cast(bytes, self._fs.cat_file(self._path(path)))

    def write(self, path: str, data: bytes) -> None:
        """Create or replace a small file."""
        target = self._path(path)
        self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        self._fs.pipe_file(target, data)

    def create(self, path: str, data: bytes) -> None:
        """Create a small file, exclusively where the file system can; else after a look."""
        target = self._path(path)
        self._fs.invalidate_cache()
        self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        if self._fs.exists(target):
            raise FileExistsError(target)
        try:
            self._fs.pipe_file(target, data, mode="create")
        except (NotImplementedError, ValueError, TypeError):
            self._fs.pipe_file(target, data)

    def names(self, path: str) -> list[str]:
        """What a folder holds."""
        self._fs.invalidate_cache()
        try:
            found = self._fs.ls(self._path(path), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(str(name).rstrip("/").rpartition("/")[2] for name in found)

    def materialise(self, path: str, destination: Path) -> str:
        """Download."""
        with self.open(path) as reader, destination.open("xb") as writer:
            return _copy(reader, writer)[0]

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}"


def _copy(reader: BinaryIO, writer: BinaryIO | None) -> tuple[str, int]:
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
        return _copy(reader, None)[0]


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


def remove_folder(folder: Path) -> None:
    """Remove what there is of ``folder``."""
    shutil.rmtree(folder, ignore_errors=True)
