"""A store anywhere that fsspec can reach.

Object stores have no locks, so writers and collectors find each other by what they write, in an order in which one of
the two always sees the other:

- A collector writes a *mark* that names what it may delete, then decides (it reads what is named by now), deletes, and
  removes the mark.
- A writer writes what it needs, then what names it (the manifest, the row, the pointer), then looks for marks. It waits
  until none names anything of its own, and then writes again what is gone.

Whatever was named before the decision is seen by it; whatever is named after it is named under the mark, so the writer
waits and looks. This needs a file system that shows what was written to whoever reads or lists after it (S3, GCS and
Azure do), and files that are seen whole or not at all.

A collector that was killed leaves its mark. It deletes nothing later than ``MARK_SECONDS`` after it began; a writer
waits ``DEAD_SECONDS`` for a mark at the most, and the next collector removes those that stand so long. Each measures by
its own clock that is never set. What remains is a single request to delete that reaches the object store more than the
difference, ten minutes, after its collector last looked at that clock.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from services.artifacts.backends import Backend, blob_path, sha256_of
from services.artifacts.manifest import File

MARKS = "collecting"
MARK_SECONDS = 300.0
DEAD_SECONDS = 900.0
LOOK_SECONDS = 0.25


class RemoteBackend(Backend):
    """Any fsspec file system."""

    def __init__(self, fs: Any, root: str) -> None:
        self._fs = fs
        self._root = root.rstrip("/")

    def add(self, source: Path) -> File:
        file = File(sha256=sha256_of(source), size=source.stat().st_size)
        path = blob_path(file.sha256)
        if self._size(self._path(path)) != file.size:
            self._fs.put_file(str(source), self._new(path))
        return file

    def open(self, path: str) -> BinaryIO:
        return cast(BinaryIO, self._fs.open(self._path(path), "rb"))

    def read(self, path: str) -> bytes:
        self._fs.invalidate_cache()
        return cast(bytes, self._fs.cat_file(self._path(path)))

    def write(self, path: str, data: bytes) -> None:
        self._fs.pipe_file(self._new(path), data)

    def create(self, path: str, data: bytes) -> None:
        """Create a small file, exclusively where the file system can; else after a look."""
        self._fs.invalidate_cache()
        target = self._new(path)
        if self._fs.exists(target):
            raise FileExistsError(target)
        try:
            self._fs.pipe_file(target, data, mode="create")
        except (NotImplementedError, ValueError, TypeError):
            self._fs.pipe_file(target, data)

    def names(self, path: str) -> list[str]:
        self._fs.invalidate_cache()
        try:
            paths = self._fs.ls(self._path(path), detail=False)
            return sorted(str(path).rstrip("/").rpartition("/")[2] for path in paths)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def delete(self, path: str) -> int:
        target = self._path(path)
        size = self._size(target)
        with suppress(FileNotFoundError):
            self._fs.rm_file(target)
            return size or 0
        return 0

    def writing(self) -> AbstractContextManager[None]:
        """Nothing can be held here; see :meth:`missing`."""
        return nullcontext()

    def missing(self, paths: Collection[str]) -> list[str]:
        """Wait for the collectors whose mark names one of ``paths``, then look."""
        first_seen: dict[str, float] = {}
        while True:
            began = time.monotonic()
            marks = [mark for mark in self.names(MARKS) if self._names(mark, paths)]
            if all(began - first_seen.setdefault(mark, began) > DEAD_SECONDS for mark in marks):
                break
            time.sleep(LOOK_SECONDS)
        self._fs.invalidate_cache()
        return [path for path in paths if not self._fs.exists(self._path(path))]

    @contextmanager
    def collecting(self, paths: Collection[str]) -> Iterator[Callable[[], bool]]:
        """Mark ``paths``; the answer is False when that was too long ago."""
        began = uptime()
        mark = f"{MARKS}/{secrets.token_hex(12)}.json"
        self.write(mark, json.dumps(sorted(paths)).encode())
        try:
            yield lambda: uptime() - began < MARK_SECONDS
        finally:
            self.delete(mark)

    def _names(self, mark: str, paths: Collection[str]) -> bool:
        try:
            return not set(json.loads(self.read(f"{MARKS}/{mark}"))).isdisjoint(paths)
        except FileNotFoundError:
            return False
        except ValueError:
            # Half written: it may name anything.
            return True

    def _size(self, target: str) -> int | None:
        """Bytes of a file; None where there is none."""
        # Listings are cached, and another process may have written or deleted since.
        self._fs.invalidate_cache()
        try:
            # One request: between a look and another a collector may delete the file.
            return int(self._fs.size(target) or 0)
        except FileNotFoundError:
            return None

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _new(self, path: str) -> str:
        """Full path of a file to write; its folder is made."""
        target = self._path(path)
        self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        return target


def uptime() -> float:
    """Seconds of a clock that nobody sets, and that also counts while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
