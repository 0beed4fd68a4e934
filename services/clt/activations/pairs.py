"""Pairs of hook points: views of a store, their statistics, and their export as files for other programs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ethogram.errors import InvalidInput
from services.clt.activations.hooks import Pair, candidate_pairs, check_pair, named_pairs, policy_points
from services.clt.activations.loader import everything
from services.clt.activations.store import SPLITS, TRAIN, VALIDATION, ActivationStore, write_pointer
from services.clt.policy.model import CONFIG, AttentionPolicy
from services.runtime.folders import artifact_in

SMALL = 0.01
"""A number is small below this share of the root mean square at its hook point."""
ROWS = 16_384
"""Maximum rows of each split for the statistics of a pair."""
# Penalty of the regression, as a share of the mean variance of the source's channels.
_RIDGE = 1e-5
# Correlations to list.
_TOP = 10


def pair_name(source: str, target: str) -> str:
    """Name of a pair: ``clt_L0_to_L2`` for the outputs of layers 0 and 2 of a policy, else ``clt_SOURCE_to_TARGET``
    with ``-`` for what is not safe in the name of a file."""
    found = [re.fullmatch(r"encoder_layer_(\d+)", end) for end in (source, target)]
    if found[0] is not None and found[1] is not None:
        return f"clt_L{found[0][1]}_to_L{found[1][1]}"
    begin, end = (re.sub(r"[^A-Za-z0-9_.]+", "-", name) for name in (source, target))
    return f"clt_{begin}_to_{end}"


def pairs_of(store: ActivationStore, names: Sequence[str] = (), field: str = "--pair") -> list[Pair]:
    """The pairs of ``names``, each ``SOURCE->TARGET`` or a set; without names those of the store's spec, or else input
    and output of each MLP. Raises :class:`InvalidInput` for pairs that are not possible."""
    named = named_pairs(names, store.manifest.source.kind, store.hooks, field)
    pairs = [pair for _, pair in named] or list(store.manifest.pairs) or store.mlp_pairs()
    if not pairs:
        text = f"the store has no pairs; name one as SOURCE->TARGET of {', '.join(store.hooks)}"
        raise InvalidInput.field(field, text)
    for source, target in pairs:
        check_pair(store.hooks, source, target, field)
    return pairs


def candidates_in(folder: Path) -> list[dict[str, str]]:
    """Candidate pairs of a policy's hook points, or of those in a store, with their set and name, for a table or JSON.
    ``folder``: of the policy, of the store, or of the run that made it."""
    if (folder / CONFIG).is_file() or (folder / "policy").is_dir():
        policy = AttentionPolicy.load(artifact_in(folder, "policy", "FOLDER"))
        candidates = candidate_pairs("policy", list(policy_points(policy)))
    else:
        store = ActivationStore.open(artifact_in(folder, "activations", "FOLDER"))
        candidates = candidate_pairs(store.manifest.source.kind, store.hooks)
    return [
        {"set": name, "source": source, "target": target, "name": pair_name(source, target)}
        for name, pairs in candidates.items()
        for source, target in pairs
    ]


def inspect(store: ActivationStore, pairs: Sequence[Pair], rows: int = ROWS) -> list[dict[str, Any]]:
    """Statistics of pairs, for a table or JSON.

    Of source and target: the width, the shares of zeros and of numbers below :data:`SMALL` root mean squares, and mean
    and deviation of the norm. Of the pair: the mean absolute correlation of a source channel with a target channel, the
    largest correlations, and ``linear_r2``, the share of the target's variance over the validation rows that a ridge
    regression on the training rows explains. At most ``rows`` rows of each split, in the order of the files.
    """
    return [_inspect(store, source, target, rows) for source, target in pairs]


def _inspect(store: ActivationStore, source: str, target: str, limit: int) -> dict[str, Any]:
    x, y = everything(store, [source, target], TRAIN, limit)
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    deviations = (centred.square().mean(0).sqrt() for centred in (x, y))
    # A channel that never changes is correlated with nothing.
    x_std, y_std = (torch.where(deviation > 0, deviation, torch.inf) for deviation in deviations)
    correlation = (x / x_std).T @ (y / y_std) / len(x)
    largest = correlation.abs().flatten().topk(min(_TOP, correlation.numel())).indices
    penalty = _RIDGE * x.square().mean() * len(x)
    gram = (x.T @ x).double() + penalty.double() * torch.eye(x.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, (x.T @ y).double()).float() if bool(penalty > 0) else torch.zeros(x.shape[1], 1)
    inputs, targets = everything(store, [source, target], VALIDATION, limit)
    linear_r2 = None
    if len(inputs):
        targets = targets - y_mean
        error = (targets - (inputs - x_mean) @ weights).square().sum()
        variance = (targets - targets.mean(0)).square().sum()
        linear_r2 = float(1 - error / variance) if bool(variance > 0) else None
    return {
        "pair": pair_name(source, target),
        "source": _describe(source, x + x_mean),
        "target": _describe(target, y + y_mean),
        "rows": {split: store.rows(split) for split in SPLITS},
        "mean_correlation": float(correlation.abs().mean()),
        "top_correlations": [
            {"source": index // y.shape[1], "target": index % y.shape[1], "value": float(correlation.flatten()[index])}
            for index in largest.tolist()
        ],
        "linear_r2": linear_r2,
    }


def _describe(name: str, rows: Tensor) -> dict[str, Any]:
    norms, scale = rows.norm(dim=1), rows.square().mean().sqrt()
    return {
        "hook": name,
        "width": rows.shape[1],
        "zeros": float((rows == 0).float().mean()),
        "small": float((rows.abs() < SMALL * scale).float().mean()),
        "norm_mean": float(norms.mean()),
        "norm_std": float(norms.std(correction=0)),
    }


def export(
    store: ActivationStore, pairs: Sequence[Pair], folder: Path, instances: int | None = None
) -> list[dict[str, Any]]:
    """Write each pair as ``<folder>/<its name>/sources.pt`` and ``targets.pt``, plain float32 tensors ``[rows, d]``,
    with ``metadata.json``; beside them ``activation_store.json``, which says where the store is. Returns the metadata.

    The rows are those of the first ``instances`` instances of both splits, by instance and position. Raises
    :class:`InvalidInput` if the store has fewer.
    """
    chosen = _complete_instances(store)
    if instances is not None:
        if len(chosen) < instances:
            text = f"the store has {len(chosen)} whole instances; ask for at most as many"
            raise InvalidInput.field("--num-instances-per-pair", text)
        chosen = chosen[:instances]
    write_pointer(folder, store)
    written = []
    for source, target in pairs:
        pair_folder = folder / pair_name(source, target)
        pair_folder.mkdir(parents=True, exist_ok=True)
        sides = dict[str, Any]()
        for side, hook in (("source", source), ("target", target)):
            rows = _ordered(store, hook, chosen)
            file = f"{side}s.pt"
            torch.save(rows, pair_folder / file)
            sides[side] = {
                "name": f"{side}_{hook}",
                "hook": hook,
                "file": file,
                "shape": list(rows.shape),
                "mean": rows.double().mean(0).tolist(),
                "std": rows.double().std(0, correction=0).tolist(),
            }
        manifest = store.manifest
        metadata: dict[str, Any] = {
            "format": 1,
            "pair": pair_name(source, target),
            **sides,
            "samples": len(chosen) * manifest.rows_per_instance,
            "instances": len(chosen),
            "rows_per_instance": manifest.rows_per_instance,
            "first_position": manifest.first_position,
            "policy": manifest.source.model_dump(),
            "dtype": {"stored": manifest.dtype, "exported": "float32"},
            "validation_instances": sorted(set(chosen.tolist()) & set(_instance_ids(store, VALIDATION).tolist())),
        }
        (pair_folder / "metadata.json").write_text(json.dumps(metadata, indent=1), encoding="utf-8")
        written.append(metadata)
    return written


def _instance_ids(store: ActivationStore, split: str) -> Tensor:
    """The instance of each row of a split: int32 ``[rows]``."""
    shards = [store.read(split, number, ["instance"])[0] for number in range(len(store.shards(split)))]
    return torch.cat([torch.empty(0, dtype=torch.int32), *shards])


def _complete_instances(store: ActivationStore) -> Tensor:
    """Ids of the instances that have all their rows, ascending; an interrupted recording has others too."""
    rows = torch.cat([_instance_ids(store, split) for split in SPLITS])
    ids, counts = np.unique(rows.numpy(), return_counts=True)
    return torch.from_numpy(ids[counts == store.manifest.rows_per_instance])


def _ordered(store: ActivationStore, hook: str, chosen: Tensor) -> Tensor:
    """Rows of the instances ``chosen`` (ascending), ordered by instance and position."""
    per_instance, first = store.manifest.rows_per_instance, store.manifest.first_position
    ordered = torch.empty(len(chosen) * per_instance, store.widths[hook])
    for split in SPLITS:
        for number in range(len(store.shards(split))):
            ids, positions = store.read(split, number, ["instance", "position"])
            index = torch.searchsorted(chosen, ids).clamp(max=len(chosen) - 1)
            selected = chosen[index] == ids
            if bool(selected.any()):
                rows = store.read(split, number, [hook])[0][selected]
                ordered[index[selected] * per_instance + positions[selected] - first] = rows.float()
    return ordered
