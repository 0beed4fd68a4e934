"""Records the activations at a model's hook points into a store.

Each split goes through the model by itself, in batches that end where a block of the store does. So a block follows
from the spec and its number alone, and a store that was interrupted ends up with the bytes of one that was not.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from ethogram.errors import InvalidInput
from ethogram.specs.clt import ActivationsSpec
from services.clt.activations.hooks import HookPoint, capture, check_pair, trace
from services.clt.activations.sources import CHUNK, ActivationSource, open_source
from services.clt.activations.store import (
    DTYPES,
    MANIFEST,
    SPLITS,
    VALIDATION,
    ActivationStore,
    Hook,
    Instances,
    Manifest,
    Source,
    Writer,
    write_pointer,
)
from services.clt.policy.model import AttentionPolicy
from services.runtime.run import Run
from services.runtime.seeds import generator

ROOT = "ACTIVATIONS_ROOT"
"""Variable of the worker that names a folder for stores."""
SHARD_BYTES = 2**30
"""Maximum size of a shard: four are in memory while they are recorded, to be shuffled together."""
# Fields of the spec that do not change what is recorded.
_NOT_IDENTITY = {"policy", "root"}


def collect(
    spec: ActivationsSpec, folder: Path, run: Run, policy: AttentionPolicy | None = None, name: str = "policy"
) -> ActivationStore:
    """Record what ``spec`` asks for into ``folder``, or resume there. ``policy``: the model, called ``name``, unless it
    is a language model.

    With ``spec.root`` or ``ACTIVATIONS_ROOT`` the store is in a folder below that, which is resumed too, and ``folder``
    holds its path. Raises :class:`InvalidInput` for hook points that are not there, numbers that are not finite and too
    few texts, and :class:`ethogram.errors.Unavailable` when the disk is full.
    """
    with torch.no_grad():
        source = open_source(spec, run.device, policy, name)
        points, manifest = plan(spec, source)
        root = spec.root or os.environ.get(ROOT)
        target = folder if root is None else Path(root) / store_name(manifest)
        # What is in the folder is at least as far as the checkpoint.
        resume = run.resume if root is None and not (folder / MANIFEST).exists() else None
        if resume is not None and (resume / MANIFEST).exists():
            folder.mkdir(parents=True, exist_ok=True)
            _copy(list(resume.iterdir()), folder)
        with Writer.open(target, manifest, run.device) as writer:
            store = _record(spec, source, points, writer, run, checkpoints=root is None)
    if root is not None:
        write_pointer(folder, store)
        run.log(f"the store is in {target}")
    return store


def plan(spec: ActivationsSpec, source: ActivationSource) -> tuple[list[HookPoint], Manifest]:
    """The points to record, in the order of execution, and the manifest of a store without rows. Raises
    :class:`InvalidInput` for points and pairs that are not possible, and where a split has no instances."""
    named, pairs = source.select(spec.hooks, spec.pairs)
    example = source.example()
    points = [point for _, point in named]
    traced = trace(source.model, named, lambda: source.forward(example, points), (len(example), source.positions))
    order = [seen.point.name for seen in traced]
    for number, (begin, end) in enumerate(pairs):
        check_pair(order, begin, end, f"spec.pairs.{number}")
    rows = source.positions - source.first
    validation = _held_out(spec, spec.instances)
    if not 0 < validation < spec.instances:
        few = f"{spec.instances} with validation {spec.validation:g} leave none for training; ask for more instances"
        raise InvalidInput.field("spec.instances", few)
    size = sum(seen.width for seen in traced) * DTYPES[spec.dtype].itemsize
    manifest = Manifest(
        source=Source(kind=source.kind, digest=source.digest, name=source.name),
        spec=spec.model_dump(mode="json", exclude=_NOT_IDENTITY),
        seed=spec.seed,
        dtype=spec.dtype,
        hooks=[Hook(name=seen.point.name, width=seen.width) for seen in traced],
        pairs=pairs,
        rows_per_instance=rows,
        first_position=source.first,
        shard_instances=max(1, min(spec.shard_rows, SHARD_BYTES // size) // rows),
        instances=Instances(
            total=spec.instances,
            validation=validation,
            drawn=f"of each {CHUNK} ids in turn, so many that the share holds from the first on, the first of a "
            'permutation of generator(seed, "split", chunk)',
        ),
    )
    return [seen.point for seen in traced], manifest


def store_name(manifest: Manifest) -> str:
    """Name of the store's folder below a root; stores with the same contents have the same name."""
    identity = json.dumps([manifest.source.digest, manifest.identity], sort_keys=True)
    return f"{manifest.source.kind}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


def validation_mask(spec: ActivationsSpec, chunk: int) -> Tensor:
    """Which of the instances of a chunk are for validation, bool ``[CHUNK]`` or as many as the last one has."""
    start, stop = chunk * CHUNK, min((chunk + 1) * CHUNK, spec.instances)
    mask = torch.zeros(stop - start, dtype=torch.bool)
    order = torch.randperm(stop - start, generator=generator(spec.seed, "split", chunk))
    mask[order[: _held_out(spec, stop) - _held_out(spec, start)]] = True
    return mask


def _held_out(spec: ActivationsSpec, instances: int) -> int:
    """How many of the first ``instances`` are for validation."""
    # As it is written: 0.07 * 100 is more than 7.
    return math.ceil(Fraction(str(spec.validation)) * instances)


class Queue:
    """Instances of a split on their way to the model."""

    def __init__(self, passed: int, written: int) -> None:
        """``passed``: instances of the split before the first that will be added, of which ``written`` of the whole
        split are in the store."""
        self.passed, self._written = passed, written
        self._ids, self._instances = torch.empty(0, dtype=torch.long), torch.empty(0)

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, ids: Tensor, instances: Tensor) -> None:
        """Append instances, less those that are in the store."""
        known = min(max(0, self._written - self.passed), len(ids))
        self.passed += len(ids)
        old = [self._instances] if len(self) else []
        self._ids = torch.cat([self._ids, ids[known:]])
        self._instances = torch.cat([*old, instances[known:]])

    def take(self, count: int) -> tuple[Tensor, Tensor]:
        """The first ``count`` ids and instances, or as many as there are."""
        ids, self._ids = self._ids[:count], self._ids[count:]
        instances, self._instances = self._instances[:count], self._instances[count:]
        return ids, instances


def _record(
    spec: ActivationsSpec,
    source: ActivationSource,
    points: Sequence[HookPoint],
    writer: Writer,
    run: Run,
    *,
    checkpoints: bool,
) -> ActivationStore:
    """``checkpoints``: the run's checkpoints hold the store, which would be lost otherwise."""

    def recorded() -> int:
        return sum(writer.instances(split) for split in SPLITS)

    run.stage("record", spec.instances, "instances")
    if recorded() == spec.instances:
        return writer.finish()
    if recorded():
        run.log(f"resuming: {recorded()} of {spec.instances} instances are in the store")
        run.advance(recorded())
    # All chunks before this one are in the store.
    chunk = min(_chunk_of(spec, split, writer.instances(split)) for split in SPLITS)
    queues = {split: Queue(_before(spec, split, chunk), writer.instances(split)) for split in SPLITS}
    with capture(source.model, points, DTYPES[spec.dtype]) as activations:
        for drawn in source.chunks(chunk):
            mask = validation_mask(spec, chunk)
            if len(drawn) < len(mask):
                raise _few(spec, chunk * CHUNK + len(drawn), source.positions)
            ids = torch.arange(chunk * CHUNK, chunk * CHUNK + len(mask))
            for split in SPLITS:
                chosen, queue = (mask if split == VALIDATION else ~mask), queues[split]
                queue.add(ids[chosen], drawn[: len(mask)][chosen])
                last = queue.passed == writer.manifest.wanted(split)
                while len(queue) and (last or len(queue) >= min(spec.batch_size, writer.room(split))):
                    numbers, instances = queue.take(min(spec.batch_size, writer.room(split)))
                    source.forward(instances, points)
                    writer.add(
                        split, numbers, {name: value[:, source.first :].cpu() for name, value in activations.items()}
                    )
                    run.advance(recorded())
                    if checkpoints and run.checkpoint_due():
                        run.checkpoint(recorded(), lambda target: _copy(writer.files(), target))
            chunk += 1
            if recorded() == spec.instances:
                return writer.finish()
    raise _few(spec, chunk * CHUNK, source.positions)


def _few(spec: ActivationsSpec, there: int, positions: int) -> InvalidInput:
    text = f"the texts make {there} sequences of {positions} tokens, not {spec.instances}"
    return InvalidInput.field("spec.instances", f"{text}; ask for at most as many, or give more texts")


def _before(spec: ActivationsSpec, split: str, chunk: int) -> int:
    """Instances of a split before a chunk."""
    instances = min(chunk * CHUNK, spec.instances)
    validation = _held_out(spec, instances)
    return validation if split == VALIDATION else instances - validation


def _chunk_of(spec: ActivationsSpec, split: str, number: int) -> int:
    """The chunk of instance ``number`` of a split, counted from 0."""
    chunks = range(-(-spec.instances // CHUNK) + 1)
    return bisect_right(chunks, number, key=lambda chunk: _before(spec, split, chunk)) - 1


def _copy(files: Sequence[Path], folder: Path) -> None:
    """The same files in ``folder``: they are never written again, so links do."""
    for file in files:
        target = folder / file.name
        target.unlink(missing_ok=True)
        try:
            os.link(file, target)
        except OSError:
            shutil.copyfile(file, target)
