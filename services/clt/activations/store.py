"""A store of activations: shards of rows of several hook points; a pair of points is a view of it.

The folder has ``manifest.json``, which alone says what counts; ``statistics.safetensors``, moments of the training
rows; and shards ``train-00000.safetensors`` and ``validation-00000.safetensors``: for each hook point a tensor
``[rows, d]``, and of each row its ``instance`` and ``position``, int32 ``[rows]``. All rows of an instance are in one
split. They are in random order within blocks of :data:`BLOCK` shards. An interrupted store can be read, and resumed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

from ethogram.errors import InvalidInput, Unavailable
from services.artifacts.backends import disk_is_full
from services.clt.activations.hooks import Pair, SourceKind, mlp_pairs
from services.clt.activations.statistics import Moments, Statistics
from services.runtime.reading import reading
from services.runtime.seeds import generator
from services.runtime.tensors import write_durably

FORMAT = 1
MANIFEST, STATISTICS, POINTER = "manifest.json", "statistics.safetensors", "activation_store.json"
BLOCK = 4
"""Shards whose rows are permuted together."""
TRAIN, VALIDATION = "train", "validation"
SPLITS = (TRAIN, VALIDATION)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_CODES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int32: "I32"}
# Shards whose hash this process has compared, by path and hash.
_verified: set[tuple[str, str]] = set()


class Shard(BaseModel):
    """A file of rows."""

    file: str = Field(pattern=r"^(train|validation)-\d{5,}\.safetensors$")
    rows: int
    bytes: int
    sha256: str


class Hook(BaseModel):
    """A hook point."""

    name: str
    width: int


class Source(BaseModel):
    """The model that the activations are of."""

    kind: SourceKind
    digest: str
    """Hash of the model's architecture and weights."""
    name: str


class Instances(BaseModel):
    """Instances that are asked for; their ids are 0, 1, ..."""

    total: int
    validation: int
    """How many of them are kept for validation."""
    drawn: str
    """How the split is drawn."""


class Manifest(BaseModel):
    """Contents of a store."""

    format: int = FORMAT
    source: Source
    spec: dict[str, Any]
    """What was asked for, less where the source and the store are."""
    seed: int
    dtype: Literal["float16", "bfloat16", "float32"]
    hooks: list[Hook]
    """In the order of execution."""
    pairs: list[tuple[str, str]]
    """Pairs that were asked for."""
    rows_per_instance: int
    first_position: int
    """Position of the first row of an instance."""
    shard_instances: int
    """Instances of a full shard."""
    instances: Instances
    splits: dict[str, list[Shard]] = {TRAIN: [], VALIDATION: []}
    statistics: str = ""
    """SHA-256 of the file of moments; of another one they are had from the shards again."""
    complete: bool = False

    def wanted(self, split: str) -> int:
        """Instances that the split has in the end."""
        validation = self.instances.validation
        return validation if split == VALIDATION else self.instances.total - validation

    def rows(self, split: str) -> int:
        """Rows that are there."""
        return sum(shard.rows for shard in self.splits[split])

    @property
    def identity(self) -> dict[str, Any]:
        """All but the source and what was written so far: stores of one source and identity hold the same."""
        return self.model_dump(mode="json", exclude={"source", "splits", "statistics", "complete"})


class ActivationStore:
    """A store, open for reading."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest

    @classmethod
    def open(cls, folder: Path | str) -> ActivationStore:
        """The store in ``folder``, or where the ``activation_store.json`` in it says. Raises :class:`InvalidInput` for
        what is no store, for shards that are missing or cut off, and where the store is gone."""
        folder = follow(Path(folder))
        with reading(folder, MANIFEST, "store of activations") as path:
            manifest = Manifest.model_validate_json(path.read_text())
        if manifest.format != FORMAT:
            raise InvalidInput.field(MANIFEST, f"has format {manifest.format}; this version reads {FORMAT}")
        store = cls(folder, manifest)
        store.check()
        return store

    @property
    def hooks(self) -> list[str]:
        """Names of the hook points, in the order of execution."""
        return [hook.name for hook in self.manifest.hooks]

    @property
    def widths(self) -> dict[str, int]:
        """Numbers of a row, by hook point."""
        return {hook.name: hook.width for hook in self.manifest.hooks}

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers."""
        return DTYPES[self.manifest.dtype]

    @property
    def bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.bytes for shards in self.manifest.splits.values() for shard in shards)

    @property
    def digest(self) -> str:
        """Hash of what is in the store."""
        return hashlib.sha256(self.manifest.model_dump_json().encode()).hexdigest()

    def rows(self, split: str = TRAIN) -> int:
        """Rows of a split."""
        return self.manifest.rows(split)

    def shards(self, split: str) -> list[Shard]:
        """Files of a split, in order."""
        return self.manifest.splits[split]

    def check(self, verify: bool = False) -> None:
        """Raise :class:`InvalidInput` for a shard that is missing or cut off, and with ``verify`` for one whose bytes
        are not those that were written."""
        for shard in (shard for split in SPLITS for shard in self.shards(split)):
            path = self.folder / shard.file
            size = path.stat().st_size if path.is_file() else None
            if size is None:
                raise InvalidInput.field(shard.file, f"is missing in {self.folder}; record the activations again")
            if size != shard.bytes:
                text = f"has {size} bytes and not {shard.bytes}: it was cut off; record the activations again"
                raise InvalidInput.field(shard.file, text)
            if verify:
                self._verify(shard)

    def require(self, policy_digest: str, field: str = "activations") -> None:
        """Raise :class:`InvalidInput` of ``field`` unless the activations are of the model with this digest."""
        source = self.manifest.source
        if source.digest != policy_digest:
            text = f"the store has activations of {source.name} ({source.digest[:12]}), not of the model asked for"
            raise InvalidInput.field(field, f"{text} ({policy_digest[:12]}); record those of that model")

    def require_hooks(self, names: Sequence[str], field: str) -> None:
        """Raise :class:`InvalidInput` of ``field`` for a hook point that is not in the store."""
        for name in names:
            if name not in self.widths:
                near = get_close_matches(name, self.hooks, 3)
                hint = f"; did you mean {near[0]}?" if near else ""
                text = f"the store has no {name}; it has: {', '.join(self.hooks)}{hint}"
                raise InvalidInput.field(field, text)

    def read(
        self, split: str, number: int, names: Sequence[str], start: int = 0, stop: int | None = None
    ) -> list[Tensor]:
        """Rows from ``start`` to before ``stop`` of shard ``number``: ``[rows, d]`` for each hook point of ``names``,
        in the store's precision; ``instance`` and ``position`` are int32 ``[rows]``. Raises :class:`InvalidInput` for
        a file that is not what was written."""
        shard = self.shards(split)[number]
        self._verify(shard)
        found = []
        for name in names:
            # A file of its own for each, so that what it maps is let go of.
            with reading(self.folder, shard.file, "store of activations") as path, safe_open(path, "pt") as file:
                found.append(file.get_slice(name)[start : shard.rows if stop is None else stop])
        return found

    def mlp_pairs(self) -> list[Pair]:
        """What enters and leaves each MLP, as far as both are in the store."""
        return mlp_pairs(self.manifest.source.kind, self.hooks)

    def statistics(self, hook: str) -> Statistics:
        """Of the training rows at a hook point."""
        self.require_hooks([hook], "hook")
        return self._moments[hook].statistics

    @cached_property
    def _moments(self) -> dict[str, Moments]:
        return load_moments(self)

    def _verify(self, shard: Shard) -> None:
        path = self.folder / shard.file
        key = (str(path.resolve()), shard.sha256)
        if key in _verified:
            return
        with reading(self.folder, shard.file, "store of activations"), path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != shard.sha256:
            text = f"of {self.folder} does not have the bytes that were written; record the activations again"
            raise InvalidInput.field(shard.file, text)
        _verified.add(key)


class Writer:
    """Writes a store, block by block; a resumed writer keeps whole blocks only.

    A block is :data:`BLOCK` shards of one split. Its rows are in memory until it is full. Use it as a context manager:
    it holds a lock on the folder.
    """

    def __init__(self, folder: Path, manifest: Manifest, device: str = "cpu") -> None:
        """Of a folder that :meth:`open` has made ready."""
        self.folder, self.manifest = folder, manifest
        self._widths = {hook.name: hook.width for hook in manifest.hooks}
        self._block = BLOCK * manifest.shard_instances
        self._instances = {split: self._written(split) for split in SPLITS}
        self._buffers: dict[str, dict[str, Tensor]] = {}
        self._filled = dict.fromkeys(SPLITS, 0)
        self._moments = load_moments(ActivationStore(folder, manifest), device)
        self._lock: int | None = None

    @classmethod
    def open(cls, folder: Path, manifest: Manifest, device: str = "cpu") -> Writer:
        """A writer into ``folder``, which resumes after the last whole block of a store of the same identity; a
        complete store needs no more rows. ``device`` computes the covariances.

        Raises :class:`InvalidInput` for a store of another model or spec, and :class:`Unavailable` while another
        process writes it, or where nothing can be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise Unavailable(f"{folder} cannot be written ({error.strerror}); name another folder") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise Unavailable(f"another process writes the store in {folder}; wait until it is done") from None
        try:
            writer = cls(folder, cls._resumed(folder, manifest), device)
        except BaseException:
            os.close(lock)
            raise
        writer._lock = lock
        return writer

    @staticmethod
    def _resumed(folder: Path, manifest: Manifest) -> Manifest:
        if not (folder / MANIFEST).exists():
            fresh: dict[str, Any] = {"splits": {split: [] for split in SPLITS}, "statistics": "", "complete": False}
            return manifest.model_copy(update=fresh)
        # Shards that were cut off are found here.
        there = ActivationStore.open(folder).manifest
        if there.source.digest != manifest.source.digest:
            text = f"{folder} holds activations of another model, {there.source.name}; name another folder"
            raise InvalidInput.field("activations", text)
        old, new = there.identity, manifest.identity
        names = [name for name in new if old[name] != new[name]]
        if "spec" in names:
            names = [f"spec.{name}" for name in new["spec"] if old["spec"].get(name) != new["spec"][name]] or names
        if names:
            text = f"{folder} holds activations of another spec ({', '.join(names)}); name another folder, or delete it"
            raise InvalidInput.field("activations", text)
        if there.complete:
            return there
        whole = {split: shards[: len(shards) // BLOCK * BLOCK] for split, shards in there.splits.items()}
        return there.model_copy(update={"splits": whole})

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Unlock the folder; rows of blocks that are not full are lost."""
        self._buffers.clear()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def instances(self, split: str) -> int:
        """Instances of a split that are there or were added."""
        return self._instances[split] + self._filled[split] // self.manifest.rows_per_instance

    def room(self, split: str) -> int:
        """Instances until the present block is full, or the split has all."""
        return min(self._block, self.manifest.wanted(split) - self._instances[split]) - (
            self._filled[split] // self.manifest.rows_per_instance
        )

    def add(self, split: str, instances: Tensor, values: Mapping[str, Tensor]) -> None:
        """Rows of more instances, at most as many as there is :meth:`room` for: ids int64 ``[n]`` and ``[n, rows, d]``
        for each hook point.

        Raises :class:`InvalidInput` for numbers that are not finite in the store's precision, and :class:`Unavailable`
        when the disk is full.
        """
        count, per_instance = len(instances), self.manifest.rows_per_instance
        assert count <= self.room(split)
        buffers = self._buffers.get(split) or self._buffers.setdefault(split, self._new_buffers(split))
        start, stop = self._filled[split], self._filled[split] + count * per_instance
        for name in self._widths:
            rows = values[name].flatten(0, 1)
            if not bool(rows.isfinite().all()):
                half = self.manifest.dtype == "float16"
                hint = " in float16; set dtype to bfloat16 or float32" if half else "; check the model's weights"
                raise InvalidInput.field("spec.hooks", f"{name} has numbers that are not finite{hint}")
            buffers[name][start:stop] = rows
        first = self.manifest.first_position
        buffers["instance"][start:stop] = instances.repeat_interleave(per_instance)
        buffers["position"][start:stop] = torch.arange(first, first + per_instance).repeat(count)
        self._filled[split] = stop
        if self.room(split) == 0:
            self._flush(split)

    def finish(self) -> ActivationStore:
        """The store, complete."""
        assert all(self.instances(split) == self.manifest.wanted(split) for split in SPLITS)
        if not self.manifest.complete:
            self.manifest.complete = True
            self._write_manifest()
        return ActivationStore(self.folder, self.manifest)

    def files(self) -> list[Path]:
        """The files that :meth:`open` needs to resume from here."""
        names = [shard.file for split in SPLITS for shard in self.manifest.splits[split]]
        return [path for name in (*names, STATISTICS, MANIFEST) if (path := self.folder / name).exists()]

    def _written(self, split: str) -> int:
        return self.manifest.rows(split) // self.manifest.rows_per_instance

    def _new_buffers(self, split: str) -> dict[str, Tensor]:
        rows = self.room(split) * self.manifest.rows_per_instance
        buffers = {name: torch.empty(rows, dtype=torch.int32) for name in ("instance", "position")}
        dtype = DTYPES[self.manifest.dtype]
        return buffers | {name: torch.empty(rows, width, dtype=dtype) for name, width in self._widths.items()}

    def _flush(self, split: str) -> None:
        """Write a block: its rows in random order."""
        columns, rows = self._buffers[split], self._filled[split]
        shards, each = self.manifest.splits[split], self.manifest.shard_instances * self.manifest.rows_per_instance
        order = torch.randperm(rows, generator=generator(self.manifest.seed, "rows", split, len(shards) // BLOCK))
        for start in range(0, rows, each):
            index = order[start : start + each]
            file = f"{split}-{len(shards):05}.safetensors"

            def add_moments(name: str, values: Tensor) -> None:
                if split == TRAIN and name in self._moments:
                    self._moments[name].add(values)

            with self._writing():
                size, sha256 = write_shard(self.folder / file, columns, index, add_moments)
            shards.append(Shard(file=file, rows=len(index), bytes=size, sha256=sha256))
            self._write_manifest()
        if split == TRAIN:
            self._save_moments()
        self._instances[split] = self._written(split)
        self._filled[split] = 0
        del self._buffers[split]

    def _write_manifest(self) -> None:
        with self._writing():
            write_durably(self.folder / MANIFEST, [self.manifest.model_dump_json(indent=1).encode()])

    def _save_moments(self) -> None:
        tensors = {
            f"{hook}|{name}": tensor
            for hook, moments in self._moments.items()
            for name, tensor in moments.tensors().items()
        }
        with self._writing():
            _, self.manifest.statistics = write_durably(self.folder / STATISTICS, [save(tensors)])
        self._write_manifest()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Raise errors of the disk as :class:`Unavailable`, with what is kept."""
        try:
            yield
        except OSError as error:
            rows = {split: self.manifest.rows(split) for split in SPLITS}
            kept = f"{rows[TRAIN]} training and {rows[VALIDATION]} validation rows are kept"
            if disk_is_full(error):
                text = f"{self.folder} has no space left; {kept} there. Free some space and run it again to resume"
                raise Unavailable(text) from error
            raise Unavailable(f"{self.folder} cannot be written ({error.strerror}); {kept} there") from error


def load_moments(store: ActivationStore, device: str = "cpu") -> dict[str, Moments]:
    """Moments of the training rows, by hook point: those in the file, or computed from the shards if it is missing, has
    other bytes than were written or, after an interruption, covers other rows."""
    path, by_hook = store.folder / STATISTICS, dict[str, dict[str, Tensor]]()
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() == store.manifest.statistics:
        for name, tensor in load(content).items():
            hook, _, kind = name.rpartition("|")
            by_hook.setdefault(hook, {})[kind] = tensor
    saved = {hook: Moments.of(tensors, device) for hook, tensors in by_hook.items()}
    if saved.keys() == set(store.hooks) and all(moments.rows == store.rows(TRAIN) for moments in saved.values()):
        return saved
    computed = {hook: Moments(width, device) for hook, width in store.widths.items()}
    for number in range(len(store.shards(TRAIN))):
        for hook, moments in computed.items():
            moments.add(store.read(TRAIN, number, [hook])[0])
    return computed


def follow(folder: Path) -> Path:
    """The folder of the store that ``folder`` is or points to. Raises :class:`InvalidInput` where that is gone."""
    if not (folder / POINTER).is_file():
        return folder
    with reading(folder, POINTER, "store of activations") as path:
        place = Path(json.loads(path.read_text())["path"])
    if not (place / MANIFEST).is_file():
        raise InvalidInput.field("activations", f"the store was kept in {place}, which is gone; record it again")
    return place


def write_pointer(folder: Path, store: ActivationStore) -> None:
    """Write the path of the store into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {"format": FORMAT, "path": str(store.folder.resolve()), "digest": store.digest}
    (folder / POINTER).write_text(json.dumps(about, indent=1))


def write_shard(
    path: Path, columns: Mapping[str, Tensor], index: Tensor, on_column: Callable[[str, Tensor], None]
) -> tuple[int, str]:
    """Write the rows ``index`` of each column as a safetensors file; its size in bytes and its SHA-256. ``on_column``
    is called with what is written of each column. One column is in memory at a time.

    The format is 8 bytes of the header's length, a JSON header padded with spaces, and the tensors.
    """
    header, end = dict[str, Any](), 0
    for name, column in columns.items():
        start, end = end, end + len(index) * column[0].numel() * column.element_size()
        shape = [len(index), *column.shape[1:]]
        header[name] = {"dtype": _CODES[column.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def parts() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for name, column in columns.items():
            values = column.index_select(0, index)
            on_column(name, values)
            yield values.view(torch.uint8).numpy().data

    return write_durably(path, parts())
