"""Garbage collection: the store keeps what somebody needs, and deletes the rest.

Garbage is an artifact that the registry does not name, that no running attempt can still commit, and that no published
model is made of; and a file that no manifest names. It is deleted when every pass of the grace period saw it as
garbage, by a clock that nobody sets; a new collector starts over. The manifest goes first, and files that only it named
follow after another grace period.

Each deletion is decided once more when it happens, in a way that no writer can slip by (see
:meth:`Backend.collecting`), so it is right however short the grace period is. That is for people, and for defects.

A pass that cannot see everything (a manifest or a model's pointer that cannot be read, a folder that cannot be listed)
raises and deletes nothing. Any number of collectors may run; each may be killed at any point.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import NamedTuple

from ethogram.errors import IllegalState, NotFound
from services.artifacts.backends import blob_path
from services.artifacts.remote import DEAD_SECONDS, MARKS, uptime
from services.artifacts.store import ArtifactStore, manifest_path

BATCH = 200
"""Deletions at a time; between batches writers have their turn."""


@dataclass(frozen=True)
class Needs:
    """Which artifacts the registry needs, by id."""

    live: AbstractSet[str]
    """Named by it: these stay."""
    attempts: AbstractSet[str]
    """Running attempts: what they wrote may still be committed, ..."""
    spent: AbstractSet[str]
    """... except these, which were committed and have since been replaced."""


@dataclass
class Collected:
    """What one pass deleted."""

    artifacts: int = 0
    files: int = 0
    bytes: int = 0
    """Of files and manifests."""


class Watch:
    """How long each key has been seen without a gap."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._seconds, self._clock = seconds, clock
        self._since: dict[str, float] = {}

    def look(self, seen: Collection[str]) -> list[str]:
        """Those of ``seen`` that every look of the last ``seconds`` has seen."""
        now = self._clock()
        self._since = {key: self._since.get(key, now) for key in seen}
        return [key for key, since in self._since.items() if now - since >= self._seconds]


class Known(NamedTuple):
    """The attempt and the paths of the blobs in a manifest, which never changes."""

    attempt: str | None
    blobs: frozenset[str]


class Collector:
    """Deletes what is garbage in ``store``. Not for several threads at once."""

    def __init__(
        self,
        store: ArtifactStore,
        needs: Callable[[], Needs],
        forget: Callable[[AbstractSet[str]], AbstractSet[str]],
        *,
        grace_seconds: float,
        clock: Callable[[], float] = uptime,
    ) -> None:
        """``forget``: deletes the registry's rows of those artifacts that it still does not need, and returns which;
        nothing can need them from then on."""
        self._store, self._needs, self._forget = store, needs, forget
        self._artifacts = Watch(grace_seconds, clock)
        self._files = Watch(grace_seconds, clock)
        self._marks = Watch(DEAD_SECONDS, clock)
        self._known: dict[str, Known] = {}

    def collect(self) -> Collected:
        """One pass. Raises :class:`Unavailable`, and :class:`IllegalState` for a store that cannot be understood."""
        done = Collected()
        with self._store.trouble():
            for mark in self._marks.look(self._store.backend.names(MARKS)):
                self._store.backend.delete(f"{MARKS}/{mark}")
            self._collect_artifacts(done)
            self._collect_files(done)
        return done

    def _collect_artifacts(self, done: Collected) -> None:
        # Listed before the registry is asked: an attempt that wrote one of these has ended, or runs when asked.
        manifests = self._manifests()
        needs, published = self._needs(), self._store.published()

        def may_be_needed(id: str, attempt: str | None) -> bool:
            return id in needs.live or id in published or (attempt in needs.attempts and id not in needs.spent)

        due = self._artifacts.look([id for id, known in manifests.items() if not may_be_needed(id, known.attempt)])

        def garbage(paths: Sequence[str]) -> list[str]:
            ids = {_artifact_of(path) for path in paths}
            return [manifest_path(id) for id in self._forget(ids - self._store.published())]

        for size in self._delete([manifest_path(id) for id in due], garbage):
            done.artifacts, done.bytes = done.artifacts + 1, done.bytes + size

    def _collect_files(self, done: Collected) -> None:
        # Listed before the manifests are: one that is written now names files that are not listed, or is itself read.
        files = {*self._all("blobs"), *(f"tmp/{name}" for name in self._store.backend.names("tmp"))}
        for size in self._delete(self._files.look(self._unnamed(files)), self._unnamed):
            done.files, done.bytes = done.files + 1, done.bytes + size

    def _delete(self, due: Sequence[str], garbage: Callable[[Sequence[str]], Iterable[str]]) -> Iterator[int]:
        """Delete those of the paths ``due`` that are ``garbage`` at that moment too; yields the bytes of each."""
        for start in range(0, len(due), BATCH):
            batch = due[start : start + BATCH]
            with self._store.backend.collecting(batch) as may_delete:
                if not may_delete():
                    return
                for path in garbage(batch):
                    if not may_delete():
                        return
                    yield self._store.backend.delete(path)

    def _unnamed(self, paths: Collection[str]) -> set[str]:
        """Those of ``paths`` that no present manifest names."""
        return set(paths).difference(*(known.blobs for known in self._manifests().values()))

    def _manifests(self) -> dict[str, Known]:
        """All manifests by artifact. Raises :class:`IllegalState` when one of them cannot be read."""
        listed = {_artifact_of(path) for path in self._all("manifests", ".json")}
        self._known = {id: found for id in listed if (found := self._known.get(id) or self._read(id)) is not None}
        return self._known

    def _read(self, id: str) -> Known | None:
        try:
            manifest = self._store.manifest(id)
        except NotFound:
            # Another collector was here.
            return None
        except (IllegalState, ValueError) as error:
            raise IllegalState(
                f"{manifest_path(id)} in the artifact store at {self._store.url} cannot be read, so nothing is deleted "
                "there; restore it, or remove it if nobody needs that artifact"
            ) from error
        return Known(manifest.attempt, frozenset(blob_path(file.sha256) for file in manifest.files.values()))

    def _all(self, folder: str, suffix: str = "") -> Iterator[str]:
        """Paths of what ``folder`` holds by digest."""
        for part in self._store.backend.names(folder):
            for name in self._store.backend.names(f"{folder}/{part}"):
                if name.startswith(part) and name.endswith(suffix) and len(name) == 64 + len(suffix):
                    yield f"{folder}/{part}/{name}"


def _artifact_of(path: str) -> str:
    """Id of the artifact whose manifest is at ``path``."""
    return path.rpartition("/")[2].removesuffix(".json")
