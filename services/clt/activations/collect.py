"""Records the activations at a model's hook points into a store.

Each split is recorded by itself, in batches that end where a block of the store ends. So a block depends on the spec
and its number alone, and a resumed store gets the same bytes as one that was never interrupted.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ethogram.errors import InvalidInput
from ethogram.paths import user_path
from ethogram.specs.clt import ActivationsSpec
from services.clt.activations.hooks import HookPoint, capture, check_pair, misshapen, trace
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
from services.clt.policy.tsp import digest
from services.runtime.checkpoints import link_or_copy
from services.runtime.run import Run
from services.runtime.seeds import generator

ROOT = "ACTIVATIONS_ROOT"
"""Environment variable of the worker: the folder for stores."""
SHARD_BYTES = 2**30
"""Maximum size of a shard; a block of four is in memory while it is recorded."""


def collect(
    spec: ActivationsSpec,
    folder: Path,
    run: Run,
    policy: AttentionPolicy | None = None,
    name: str = "policy",
    *,
    cities: Tensor | None = None,
) -> ActivationStore:
    """Record a store into ``folder``, or resume it. ``policy``: the model, called ``name``, unless ``spec`` names a
    language model; ``cities``: the instances ``[instances, nodes, 2]``, if it names some.

    With ``spec.root`` or ``ACTIVATIONS_ROOT`` the store is in a folder below that, which is resumed too, and ``folder``
    holds its path. Raises :class:`InvalidInput` for unknown hook points, numbers that are not finite and too few texts,
    and :class:`ethogram.errors.Unavailable` when the disk is full.
    """
    root = _root(spec, run)
    with torch.no_grad():
        source = open_source(spec, run.device, policy, name, cities)
        points, manifest = plan(spec, source, run)
        for field in source.unused() if run.resume is None else ():
            run.log(f"{field}: has no effect, because the dataset is a file, or a folder of files", "warning")
        if cities is not None:
            manifest.spec["cities"] = digest(cities)
        target = folder
        if root is not None:
            identity = json.dumps([source.digest, manifest.identity], sort_keys=True)
            target = root / f"{source.kind}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
        elif run.resume is not None and not (folder / MANIFEST).exists():
            # A store that is there already would be at least as far as the checkpoint.
            folder.mkdir(parents=True, exist_ok=True)
            _link(run.resume.iterdir(), folder)
        with Writer.open(target, manifest, run.device) as writer:
            store = _record(spec, source, points, writer, run, checkpoints=root is None)
    if root is not None:
        write_pointer(folder, store)
        run.log(f"the store is in {target}")
    return store


def _root(spec: ActivationsSpec, run: Run) -> Path | None:
    """The folder for stores, if ``spec`` or the environment names one. Raises :class:`InvalidInput`."""
    field, given = ("spec.root", spec.root) if spec.root else (ROOT, os.environ.get(ROOT))
    if not given:
        return None
    root = user_path(given, field)
    if run.in_scratch and not root.is_absolute():
        raise InvalidInput.field(field, f"{root} must be an absolute path: a job's current folder is removed after it")
    return root.absolute()


def plan(spec: ActivationsSpec, source: ActivationSource, run: Run) -> tuple[list[HookPoint], Manifest]:
    """The hook points to record, and the manifest of an empty store. Raises :class:`InvalidInput` for hook points and
    pairs that are not possible, and where a split has no instances."""
    named, pairs = source.select(spec.hooks, spec.pairs)
    example, points = source.example(), [point for _, point in named]
    shape = (len(example), source.positions)
    traced = trace(source.model, points, lambda: source.trial(example, points), shape)
    fields = {point.name: field for field, point in named}
    if not spec.hooks and not spec.pairs:
        # Text does not pass, say, the vision part of a vision-language model.
        faults = [found for found in traced.values() if isinstance(found, str)]
        every, pairs = pairs, [item for item in pairs if not any(isinstance(traced[end], str) for end in item[1])]
        if not pairs:
            raise InvalidInput.field("spec.hooks", f"none of the {len(every)} MLPs can be recorded: {faults[0]}")
        if faults:
            reason = faults[0].partition(";")[0]
            run.log(f"{len(every) - len(pairs)} of {len(every)} MLPs are left out ({reason}, ...)", "warning")
        fields = {end: "spec.hooks" for _, pair in pairs for end in pair}
    points, widths = [], dict[str, int]()
    for name, found in traced.items():
        if name not in fields:
            continue
        if isinstance(found, str):
            raise InvalidInput.field(fields[name], found)
        points.append(found[0])
        widths[name] = found[1]
    for field, (begin, end) in pairs:
        check_pair(list(widths), begin, end, field)
    validation = _count(spec, VALIDATION, spec.instances)
    if not 0 < validation < spec.instances:
        few = f"{spec.instances} with validation {spec.validation:g} leave none for training; ask for more instances"
        raise InvalidInput.field("spec.instances", few)
    rows, row_bytes = source.positions - source.first, sum(widths.values()) * DTYPES[spec.dtype].itemsize
    return points, Manifest(
        source=Source(kind=source.kind, digest=source.digest, name=source.name),
        spec=_recorded(spec),
        seed=spec.seed,
        dtype=spec.dtype,
        hooks=[Hook(name=name, width=width) for name, width in widths.items()],
        pairs=[pair for _, pair in pairs],
        rows_per_instance=rows,
        first_position=source.first,
        shard_instances=max(1, min(spec.shard_rows, SHARD_BYTES // row_bytes) // rows),
        instances=Instances(
            total=spec.instances,
            validation=validation,
            drawn=f"of each {CHUNK} ids in turn, so many that the share holds from the first on, the first of a "
            'permutation of generator(seed, "split", chunk)',
        ),
    )


def _recorded(spec: ActivationsSpec) -> dict[str, Any]:
    """The fields that change what is recorded."""
    fields = spec.model_dump(mode="json", exclude={"policy", "root", "cities"})
    if spec.distribution == "uniform":
        # As of a version that had no other, whose stores can be resumed.
        del fields["distribution"]
    return fields


def validation_mask(spec: ActivationsSpec, chunk: int) -> Tensor:
    """Which instances of a chunk are for validation, bool ``[CHUNK]``; the last chunk may be shorter."""
    start, stop = chunk * CHUNK, min((chunk + 1) * CHUNK, spec.instances)
    mask = torch.zeros(stop - start, dtype=torch.bool)
    order = torch.randperm(stop - start, generator=generator(spec.seed, "split", chunk))
    mask[order[: _count(spec, VALIDATION, stop) - _count(spec, VALIDATION, start)]] = True
    return mask


def _count(spec: ActivationsSpec, split: str, instances: int) -> int:
    """How many of the first ``instances`` are in a split."""
    # The decimal number: 0.07 * 100 is more than 7 in floating point.
    validation = math.ceil(Fraction(str(spec.validation)) * instances)
    return validation if split == VALIDATION else instances - validation


def _record(
    spec: ActivationsSpec,
    source: ActivationSource,
    points: Sequence[HookPoint],
    writer: Writer,
    run: Run,
    *,
    checkpoints: bool,
) -> ActivationStore:
    """``checkpoints``: whether the run's checkpoints hold the store, which would be lost otherwise."""

    def recorded() -> int:
        return sum(writer.instances(split) for split in SPLITS)

    run.stage("record", spec.instances, "instances")
    if 0 < recorded() < spec.instances:
        run.log(f"resuming: {recorded()} of {spec.instances} instances are in the store")
        run.advance(recorded())
    written = {split: writer.instances(split) for split in SPLITS}
    # Begin with the first chunk of which an instance is missing.
    start = 0
    while all(_count(spec, split, start + CHUNK) <= written[split] for split in SPLITS):
        start += CHUNK
    chunks = source.chunks(start // CHUNK)
    waiting: dict[str, list[tuple[int, Tensor]]] = {split: [] for split in SPLITS}
    with capture(source.model, points, DTYPES[spec.dtype]) as activations:
        while recorded() < spec.instances:
            drawn, mask = next(chunks), validation_mask(spec, start // CHUNK)
            if len(drawn) < len(mask):
                few = f"the texts make {start + len(drawn)} sequences of {source.positions} tokens"
                left_out = f" (left out: {source.left_out()})" if source.left_out() else ""
                hint = "ask for at most as many, or give more texts"
                raise InvalidInput.field("spec.instances", f"{few}, not {spec.instances}{left_out}; {hint}")
            stop = start + len(mask)
            for split in SPLITS:
                chosen = (mask == (split == VALIDATION)).nonzero().flatten()
                chosen = chosen[max(0, written[split] - _count(spec, split, start)) :]
                queue = waiting[split]
                queue += zip((start + chosen).tolist(), drawn[chosen], strict=True)
                last = _count(spec, split, stop) == writer.manifest.size(split)
                while queue and (last or len(queue) >= min(spec.batch_size, writer.room(split))):
                    size = min(spec.batch_size, writer.room(split))
                    ids, instances = zip(*queue[:size], strict=True)
                    del queue[:size]
                    # What the last batch left would pass for this one's.
                    activations.clear()
                    source.forward(torch.stack(instances), points)
                    rows = _rows(points, activations, (size, source.positions))
                    rows = {name: value[:, source.first :].cpu() for name, value in rows.items()}
                    writer.add(split, torch.tensor(ids), rows)
                    run.advance(recorded())
                    if checkpoints and run.checkpoint_due():
                        run.checkpoint(recorded(), lambda target: _link(writer.files(), target))
            start = stop
    if source.left_out():
        run.log(f"left out of the texts: {source.left_out()}", "warning")
    return writer.finish()


def _rows(points: Sequence[HookPoint], activations: Mapping[str, Tensor], shape: tuple[int, int]) -> dict[str, Tensor]:
    """Activations as ``[instances, positions, width]``. Raises :class:`InvalidInput` for a hook point that was reached
    in the trial, but for which a batch has not as many vectors as positions: an expert of a mixture."""
    rows = {}
    for point in points:
        tensor = activations.get(point.name)
        value = None if tensor is None else point.by_position(tensor, shape)
        if value is None:
            size = torch.Size([0]) if tensor is None else tensor.shape
            raise InvalidInput.field("spec.hooks", misshapen(point, size, shape))
        rows[point.name] = value
    return rows


def _link(files: Iterable[Path], folder: Path) -> None:
    """Put ``files`` into ``folder``. Links will do, as the files are never changed in place."""
    for file in files:
        target = folder / file.name
        target.unlink(missing_ok=True)
        link_or_copy(file, target)
