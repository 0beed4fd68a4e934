"""A store of activations: shards of rows, each with the activations at several hook points.

The folder has ``manifest.json``, which lists what is valid; ``statistics.safetensors``, statistics of the training
rows; and shards ``train-00000.safetensors`` and ``validation-00000.safetensors``: for each hook point a tensor
``[rows, d]``, and of each row its ``instance`` and ``position``, int32 ``[rows]``. All rows of an instance are in one
split. Rows are shuffled within blocks of :data:`BLOCK` shards. An interrupted store can be read, and resumed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from services.clt.activations.hooks import Pair, SourceKind, mlp_pairs, unknown_point
from services.clt.activations.statistics import Statistics
from services.runtime.reading import reading
from services.runtime.seeds import generator
from services.runtime.tensors import write_durably

FORMAT = 1
MANIFEST, STATISTICS, POINTER = "manifest.json", "statistics.safetensors", "activation_store.json"
BLOCK = 4
"""Shards whose rows are shuffled together."""
TRAIN, VALIDATION = "train", "validation"
SPLITS = (TRAIN, VALIDATION)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_CODES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int32: "I32"}
_STORE = "store of activations"
# Path and hash of the shards whose bytes this process has checked.
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
    """The model whose activations are recorded."""

    kind: SourceKind
    digest: str
    """Hash of the model's architecture and weights."""
    name: str


class Instances(BaseModel):
    """Instances of a complete store; their ids are 0, 1, ..."""

    total: int
    validation: int
    """How many of them are held out for validation."""
    drawn: str
    """How the split is drawn."""


class Manifest(BaseModel):
    """Contents of a store."""

    format: int = FORMAT
    source: Source
    spec: dict[str, Any]
    """The spec of the recording, without the fields that say where the source and the store are."""
    seed: int
    dtype: Literal["float16", "bfloat16", "float32"]
    hooks: list[Hook]
    """In the order of execution."""
    pairs: list[tuple[str, str]]
    """Pairs that the spec names."""
    rows_per_instance: int
    first_position: int
    """Position of the first row of an instance."""
    shard_instances: int
    """Instances of a full shard."""
    instances: Instances
    splits: dict[str, list[Shard]] = {TRAIN: [], VALIDATION: []}
    statistics: str = ""
    """SHA-256 of the file of statistics. They are computed from the shards where the file has another hash."""
    complete: bool = False

    def size(self, split: str) -> int:
        """Instances of a split of the complete store."""
        validation = self.instances.validation
        return validation if split == VALIDATION else self.instances.total - validation

    def rows(self, split: str) -> int:
        """Rows of a split that are written."""
        return sum(shard.rows for shard in self.splits[split])

    @property
    def identity(self) -> dict[str, Any]:
        """All fields but the source and what is written; stores with equal source and identity become equal."""
        return self.model_dump(mode="json", exclude={"source", "splits", "statistics", "complete"})


class ActivationStore:
    """A store, open for reading."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest

    @classmethod
    def open(cls, folder: Path | str) -> ActivationStore:
        """The store in ``folder``, or where the ``activation_store.json`` in it points. Raises :class:`InvalidInput`
        for a folder without a store, a store that was moved or deleted, and shards that are missing or cut off."""
        folder = Path(folder)
        if (folder / POINTER).is_file():
            with reading(folder, POINTER, _STORE) as path:
                folder = Path(json.loads(path.read_text(encoding="utf-8"))["path"])
            if not (folder / MANIFEST).is_file():
                raise InvalidInput.field(
                    "activations", f"the store was kept in {folder}, which is gone; record it again"
                )
        with reading(folder, MANIFEST, _STORE) as path:
            manifest = Manifest.model_validate_json(path.read_text(encoding="utf-8"))
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
        """Width of a row at each hook point."""
        return {hook.name: hook.width for hook in self.manifest.hooks}

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the activations."""
        return DTYPES[self.manifest.dtype]

    @property
    def bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.bytes for shards in self.manifest.splits.values() for shard in shards)

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, which has the hashes of all files."""
        return hashlib.sha256(self.manifest.model_dump_json().encode()).hexdigest()

    def rows(self, split: str = TRAIN) -> int:
        """Number of rows of a split."""
        return self.manifest.rows(split)

    def shards(self, split: str) -> list[Shard]:
        """Files of a split, in order."""
        return self.manifest.splits[split]

    def check(self, verify: bool = False) -> None:
        """Raise :class:`InvalidInput` for a shard that is missing or cut off, and with ``verify`` also for one whose
        bytes have changed."""
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
                text = unknown_point(name, self.hooks, "the store has no")
                raise InvalidInput.field(field, f"{text}; others are recorded by `activations --pair`")

    def read(
        self, split: str, number: int, names: Sequence[str], start: int = 0, stop: int | None = None
    ) -> list[Tensor]:
        """Rows from ``start`` to before ``stop`` of shard ``number``: ``[rows, d]`` for each hook point of ``names``,
        in the store's precision; ``instance`` and ``position`` are int32 ``[rows]``. Raises :class:`InvalidInput` for
        a file whose bytes have changed."""
        shard = self.shards(split)[number]
        self._verify(shard)
        tensors = []
        for name in names:
            # Opened for each tensor, so that its memory map is released.
            with reading(self.folder, shard.file, _STORE) as path, safe_open(path, "pt") as file:
                tensors.append(file.get_slice(name)[start : shard.rows if stop is None else stop])
        return tensors

    def mlp_pairs(self) -> list[Pair]:
        """Input and output of each MLP, where both are in the store."""
        return mlp_pairs(self.manifest.source.kind, self.hooks)

    def statistics(self, hook: str) -> Statistics:
        """Statistics of the training rows at a hook point."""
        self.require_hooks([hook], "hook")
        return self._statistics[hook]

    @cached_property
    def _statistics(self) -> dict[str, Statistics]:
        return load_statistics(self)

    def _verify(self, shard: Shard) -> None:
        path = self.folder / shard.file
        key = (str(path.resolve()), shard.sha256)
        if key in _verified:
            return
        with reading(self.folder, shard.file, _STORE), path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 != shard.sha256:
            text = f"of {self.folder} does not have the bytes that were written; record the activations again"
            raise InvalidInput.field(shard.file, text)
        _verified.add(key)


class Writer:
    """Writes a store, block by block; a resumed writer keeps whole blocks only.

    A block is :data:`BLOCK` shards of one split. Its rows are in memory until it is full.
    """

    def __init__(self, folder: Path, manifest: Manifest, device: str) -> None:
        """For a ``folder`` that :meth:`open` has locked; it holds the shards of ``manifest``."""
        self.folder, self.manifest = folder, manifest
        self._buffers: dict[str, dict[str, Tensor]] = {}
        # Instances in the buffers.
        self._filled = dict.fromkeys(SPLITS, 0)
        self._statistics = load_statistics(ActivationStore(folder, manifest), device)

    @classmethod
    @contextmanager
    def open(cls, folder: Path, manifest: Manifest, device: str = "cpu") -> Iterator[Writer]:
        """Lock ``folder`` and write the store of ``manifest``, which has no shards yet, or resume it after its last
        whole block. ``device`` computes the covariances.

        Raises :class:`InvalidInput` for a store of another model or spec, and :class:`Unavailable` while another
        process writes it, or where nothing can be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / "lock").open("a", encoding="utf-8")
        except OSError as error:
            raise Unavailable(f"{folder} cannot be written ({error.strerror}); name another folder") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise Unavailable(f"another process writes the store in {folder}; wait until it is done") from None
            yield cls(folder, cls._resumed(folder, manifest), device)

    @staticmethod
    def _resumed(folder: Path, manifest: Manifest) -> Manifest:
        if not (folder / MANIFEST).exists():
            return manifest.model_copy(deep=True)
        # Raises for shards that were cut off.
        earlier = ActivationStore.open(folder).manifest
        if earlier.source.digest != manifest.source.digest:
            text = f"{folder} holds activations of another model, {earlier.source.name}; name another folder"
            raise InvalidInput.field("activations", text)
        old, new = earlier.identity, manifest.identity
        names = [name for name in new if old[name] != new[name]]
        if "spec" in names:
            fields = sorted(new["spec"].keys() | old["spec"].keys())
            names = [f"spec.{name}" for name in fields if old["spec"].get(name) != new["spec"].get(name)] or names
        if names:
            text = f"{folder} holds activations of another spec ({', '.join(names)}); name another folder, or delete it"
            raise InvalidInput.field("activations", text)
        if earlier.complete:
            return earlier
        whole = {split: shards[: len(shards) // BLOCK * BLOCK] for split, shards in earlier.splits.items()}
        return earlier.model_copy(update={"splits": whole})

    def instances(self, split: str) -> int:
        """Instances of a split that are written or in memory."""
        return self._written(split) + self._filled[split]

    def room(self, split: str) -> int:
        """Instances until the present block is full, or the split complete."""
        left = self.manifest.size(split) - self._written(split)
        return min(BLOCK * self.manifest.shard_instances, left) - self._filled[split]

    def add(self, split: str, instances: Tensor, values: Mapping[str, Tensor]) -> None:
        """Add the rows of at most :meth:`room` instances: their ids, int64 ``[n]``, and ``[n, rows, d]`` for each hook
        point.

        Raises :class:`InvalidInput` for numbers that are not finite in the store's precision, and :class:`Unavailable`
        when the disk is full.
        """
        manifest, count = self.manifest, len(instances)
        assert count <= self.room(split)
        first, per_instance = manifest.first_position, manifest.rows_per_instance
        if split not in self._buffers:
            rows, dtype = self.room(split) * per_instance, DTYPES[manifest.dtype]
            buffers = {name: torch.empty(rows, dtype=torch.int32) for name in ("instance", "position")}
            buffers |= {hook.name: torch.empty(rows, hook.width, dtype=dtype) for hook in manifest.hooks}
            self._buffers[split] = buffers
        columns = {hook.name: values[hook.name].flatten(0, 1) for hook in manifest.hooks}
        for name, column in columns.items():
            if not bool(column.isfinite().all()):
                half = manifest.dtype == "float16"
                hint = " in float16; set dtype to bfloat16 or float32" if half else "; check the model's weights"
                raise InvalidInput.field("spec.hooks", f"{name} has numbers that are not finite{hint}")
        columns["instance"] = instances.repeat_interleave(per_instance)
        columns["position"] = torch.arange(first, first + per_instance).repeat(count)
        start = self._filled[split] * per_instance
        for name, column in columns.items():
            self._buffers[split][name][start : start + len(column)] = column
        self._filled[split] += count
        if self.room(split) == 0:
            self._flush(split)

    def finish(self) -> ActivationStore:
        """Mark the store as complete and return it."""
        assert all(self.instances(split) == self.manifest.size(split) for split in SPLITS)
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

    def _flush(self, split: str) -> None:
        """Write a block, its rows in random order."""
        columns, manifest = self._buffers.pop(split), self.manifest
        shards, shard_rows = manifest.splits[split], manifest.shard_instances * manifest.rows_per_instance
        rows = self._filled[split] * manifest.rows_per_instance
        order = torch.randperm(rows, generator=generator(manifest.seed, "rows", split, len(shards) // BLOCK))
        self._filled[split] = 0
        for index in torch.split(order, shard_rows):
            file = f"{split}-{len(shards):05}.safetensors"
            size, sha256 = self._write(file, shard_parts(columns, index))
            if split == TRAIN:
                for hook, statistics in self._statistics.items():
                    statistics.add(columns[hook].index_select(0, index))
            shards.append(Shard(file=file, rows=len(index), bytes=size, sha256=sha256))
            self._write_manifest()
        if split == TRAIN:
            tensors = {
                f"{hook}|{name}": tensor
                for hook, statistics in self._statistics.items()
                for name, tensor in statistics.tensors().items()
            }
            _, manifest.statistics = self._write(STATISTICS, [save(tensors)])
            self._write_manifest()

    def _write_manifest(self) -> None:
        self._write(MANIFEST, [self.manifest.model_dump_json(indent=1).encode()])

    def _write(self, file: str, parts: Iterable[bytes | memoryview]) -> tuple[int, str]:
        """Write a file; its size in bytes and its SHA-256. Raises :class:`Unavailable`, with what is kept."""
        try:
            return write_durably(self.folder / file, parts)
        except OSError as error:
            rows = {split: self.manifest.rows(split) for split in SPLITS}
            kept = f"{rows[TRAIN]} training and {rows[VALIDATION]} validation rows are kept"
            if disk_is_full(error):
                text = f"{self.folder} has no space left; {kept} there. Free some space and run it again to resume"
                raise Unavailable(text) from error
            raise Unavailable(f"{self.folder} cannot be written ({error.strerror}); {kept} there") from error


def load_statistics(store: ActivationStore, device: str = "cpu") -> dict[str, Statistics]:
    """Statistics of the training rows, by hook point: those of the file, or computed from the shards where the file is
    missing, has changed or, after an interruption, covers other rows."""
    path, by_hook = store.folder / STATISTICS, dict[str, dict[str, Tensor]]()
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() == store.manifest.statistics:
        for name, tensor in load(content).items():
            hook, _, kind = name.rpartition("|")
            by_hook.setdefault(hook, {})[kind] = tensor
    saved = {hook: Statistics.of(tensors, device) for hook, tensors in by_hook.items()}
    if saved.keys() == set(store.hooks) and all(found.rows == store.rows(TRAIN) for found in saved.values()):
        return saved
    computed = {hook: Statistics(width, device) for hook, width in store.widths.items()}
    for number in range(len(store.shards(TRAIN))):
        for hook, statistics in computed.items():
            statistics.add(store.read(TRAIN, number, [hook])[0])
    return computed


def write_pointer(folder: Path, store: ActivationStore) -> None:
    """Write the path of the store into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {"format": FORMAT, "path": str(store.folder.resolve()), "digest": store.digest}
    (folder / POINTER).write_text(json.dumps(about, indent=1), encoding="utf-8")


def shard_parts(columns: Mapping[str, Tensor], index: Tensor) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file with the rows ``index`` of each column. One column is in memory at a time.

    The format is 8 bytes of the header's length, a JSON header padded with spaces, and the tensors.
    """
    header, end = dict[str, Any](), 0
    for name, column in columns.items():
        start, end = end, end + len(index) * column[0].numel() * column.element_size()
        shape = [len(index), *column.shape[1:]]
        header[name] = {"dtype": _CODES[column.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for column in columns.values():
        yield column.index_select(0, index).view(torch.uint8).numpy().data
