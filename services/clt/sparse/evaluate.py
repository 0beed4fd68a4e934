"""How well a sparse model reconstructs validation rows, and how often its features are active there."""

from __future__ import annotations

import torch
from torch import Tensor

from services.clt.activations.loader import chunks
from services.clt.activations.store import VALIDATION, ActivationStore
from services.clt.sparse.model import SparseModel

CHUNK = 2048
"""Rows that go through the model at once; where codes are dense, those of all sources are in memory together."""


@torch.no_grad()
def evaluate(model: SparseModel, store: ActivationStore, rows: int) -> tuple[dict[str, float], Tensor]:
    """Figures on at most ``rows`` validation rows, and the share of rows in which each feature is active,
    ``[features]`` of all sources in turn.

    ``fvu``: fraction of variance unexplained, i.e. squared error over variance, each summed over rows and channels,
    averaged over the targets (and ``fvu.<hook>`` of each); ``explained_variance``: 1 - ``fvu``; ``mse``; ``cosine``: of
    reconstruction and target, the target's mean subtracted; ``l0``: active features per row, averaged over the sources;
    ``density``: the same as a share; ``silent``: share of features active in none of these rows.
    """
    was_training = model.training
    model.eval()
    streams, device, scales = model.streams, model.encoders[0].device, model.scales("write")
    centres = [store.statistics(hook).mean.float().to(device) for hook in streams.targets]
    hooks = list(dict.fromkeys([*streams.sources, *streams.targets]))
    counts = [torch.zeros(count, dtype=torch.int64) for count in model.features]
    errors, squares, cosines = (torch.zeros(len(streams.targets), dtype=torch.float64) for _ in range(3))
    sums = [torch.zeros(width, dtype=torch.float64) for width in streams.target_widths]
    seen = 0
    for chunk in chunks(store, hooks, VALIDATION, rows, CHUNK):
        by_hook = {hook: stream.to(device) for hook, stream in zip(hooks, chunk, strict=True)}
        inputs = model.scaled([by_hook[hook] for hook in streams.sources], "read")
        code = model.encode(inputs)
        outputs = [scale.undo(output) for scale, output in zip(scales, model.decode(code, inputs), strict=True)]
        for features, count in zip(code, counts, strict=True):
            count += features.counts().cpu()
        for t, (hook, output) in enumerate(zip(streams.targets, outputs, strict=True)):
            target, centre = by_hook[hook], centres[t]
            # Not every device has double precision.
            errors[t] += (output - target).square().sum(0).cpu().double().sum()
            squares[t] += (target - centre).square().sum(0).cpu().double().sum()
            sums[t] += (target - centre).sum(0).cpu().double()
            cosine = torch.nn.functional.cosine_similarity(output - centre, target - centre, dim=1)
            cosines[t] += cosine.sum().cpu().double()
        seen += len(chunk[0])
    model.train(was_training)
    # Around the mean of these rows, which differs from that of the training rows.
    variance = squares - torch.stack([total.square().sum() / seen for total in sums])
    fvu = errors / variance.clamp_min(1e-12)
    active = torch.cat(counts)
    figures = {
        "fvu": float(fvu.mean()),
        "explained_variance": float(1 - fvu.mean()),
        "mse": float((errors / torch.tensor(streams.target_widths)).mean() / seen),
        "cosine": float(cosines.mean() / seen),
        "l0": float(active.sum()) / seen / len(counts),
        "density": float(active.sum()) / seen / len(active),
        "silent": float((active == 0).float().mean()),
    }
    if len(streams.targets) > 1:
        figures |= {f"fvu.{hook}": float(share) for hook, share in zip(streams.targets, fvu, strict=True)}
    return figures, active.double() / seen
