"""The loss of sparse models, term by term."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ethogram.specs.clt import SparseLossSpec
from services.clt.sparse.code import Code
from services.clt.sparse.model import SparseModel, Step
from services.runtime.parallel import ALONE, World


def error(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Squared error of reconstructions as a share of the targets' variance, averaged over the targets.

    All in the model's units, ``[rows, width]`` each: each channel has a mean square of 1 over the training rows.
    """
    return torch.stack(
        [(output - target).square().mean() for output, target in zip(outputs, targets, strict=True)]
    ).mean()


def l1(model: SparseModel, code: Sequence[Code]) -> Tensor:
    """Sum over features of their activation times the norm of their decoder direction, averaged over rows."""
    parts = [features.weighted(decoder.norm(dim=1)) for features, decoder in zip(code, model.decoders, strict=True)]
    return torch.stack(parts).sum() / code[0].rows


def l0(model: SparseModel, code: Sequence[Code]) -> Tensor:
    """Active features of a jumprelu, averaged over rows; gradient for the thresholds alone (Rajamanoharan et al. 2024,
    equation 11)."""
    parts: list[Tensor] = [
        Step.apply(features.pre, log.exp()).sum()  # type: ignore[no-untyped-call]
        for features, log in zip(code, model.log_thresholds, strict=False)
    ]
    return torch.stack(parts).sum() / code[0].rows if parts else torch.zeros((), device=model.encoders[0].device)


def orthogonality(model: SparseModel) -> Tensor:
    """Squared cosines between the decoder directions of different features, averaged over pairs and sources."""
    parts = []
    for decoder in model.decoders:
        unit, count = F.normalize(decoder, dim=1, eps=1e-6), len(decoder)
        # The sum over pairs is the squared norm of a width x width matrix, less each feature's term with itself.
        total = (unit.T @ unit).square().sum() - unit.square().sum(1).square().sum()
        parts.append(total / max(1, count * (count - 1)))
    return torch.stack(parts).mean()


def energy(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Squared difference of the squared norms of reconstructions and targets, relative to the targets' mean: their
    width, in the model's units."""
    parts = []
    for output, target in zip(outputs, targets, strict=True):
        difference = output.square().sum(1) - target.square().sum(1)
        parts.append((difference / target.shape[1]).square().mean())
    return torch.stack(parts).mean()


def alignment(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """1 minus the cosine between reconstructions and targets, in the model's units."""
    parts = [
        1 - F.cosine_similarity(output, target, dim=1).mean() for output, target in zip(outputs, targets, strict=True)
    ]
    return torch.stack(parts).mean()


def group_heads(model: SparseModel, heads: int) -> Tensor:
    """Group lasso of the decoder: norms of each feature's channels of one head, summed, averaged over features."""
    parts = []
    for source in range(len(model.streams.sources)):
        for target in model.streams.written(source):
            directions = model.decoder_directions(source, target)
            norms = (directions.view(len(directions), heads, -1).square().sum(2) + 1e-12).sqrt()
            parts.append(norms.sum(1).mean())
    return torch.stack(parts).sum()


def auxiliary(
    model: SparseModel,
    inputs: Sequence[Tensor],
    residuals: Sequence[Tensor],
    dead: Sequence[Tensor],
    *,
    features: int,
    variances: Tensor,
) -> Tensor:
    """Squared error of reconstructing the residuals of the targets from dead features alone, as a share of the
    residuals' variance; the ``features`` largest take part in each row (Gao et al. 2024, arXiv 2406.04093, A.2).

    ``residuals``: of each target, and ``variances``: their mean squares over the whole batch, ``[targets]``; ``dead``:
    bool ``[features]`` of each source. With fewer dead features the term
    weighs less, as all of them take part in every row: they would grow large and displace living ones. 0 where none
    is dead.
    """
    parts = []
    for s, (stream, mask) in enumerate(zip(inputs, dead, strict=True)):
        if not bool(mask.any()):
            continue
        which = mask.nonzero().squeeze(1)
        pre = stream @ model.encoders[s][which].T + model.encoder_biases[s][which]
        largest = pre.topk(min(features, len(which)), dim=1, sorted=False)
        values = torch.zeros_like(pre).scatter(1, largest.indices, largest.values.relu())
        written = model.streams.written(s)
        outputs = (values @ model.decoders[s][which]).split([model.streams.target_widths[t] for t in written], 1)
        share = min(1.0, len(which) / features)
        for t, output in zip(written, outputs, strict=True):
            parts.append(share * (output - residuals[t]).square().mean() / variances[t].clamp_min(1e-12))
    return torch.stack(parts).mean() if parts else torch.zeros((), device=inputs[0].device)


def terms(
    model: SparseModel,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    weight: SparseLossSpec,
    dead: Sequence[Tensor],
    *,
    bfloat16: bool = False,
    world: World = ALONE,
    share: float = 1.0,
) -> tuple[dict[str, Tensor], list[Code], list[Tensor]]:
    """The ``loss`` and its terms, the codes, and the reconstructions. Terms of weight 0 are not computed.

    ``inputs``, ``targets``: in the model's units, ``[rows, width]`` each; ``dead``: see :func:`auxiliary`. In each
    process of a ``world`` they are the ``share`` of a batch, and the terms are such that their sum, each times its
    process's share, is that of the whole batch.
    """
    code = model.encode(inputs, bfloat16=bfloat16, world=world)
    outputs = model.decode(code, inputs)
    forms: dict[str, Callable[[], Tensor]] = {
        "l1": lambda: l1(model, code),
        "l0": lambda: l0(model, code),
        "dictionary_l1": lambda: torch.stack([decoder.abs().sum(1).mean() for decoder in model.decoders]).sum(),
        "dictionary_l2": lambda: torch.stack([decoder.square().sum(1).mean() for decoder in model.decoders]).sum(),
        "orthogonality": lambda: orthogonality(model),
        "energy": lambda: energy(outputs, targets),
        "alignment": lambda: alignment(outputs, targets),
        "group_features": lambda: torch.stack([c.groups(weight.group_size) for c in code]).sum() / code[0].rows,
        "group_heads": lambda: group_heads(model, weight.heads),
    }
    values = {"error": error(outputs, targets)}
    values |= {name: form() for name, form in forms.items() if getattr(weight, name)}
    if weight.auxk and any(bool(mask.any()) for mask in dead):
        residuals = [target - output.detach() for output, target in zip(outputs, targets, strict=True)]
        variances = torch.stack([share * residual.square().mean() for residual in residuals])
        world.add([variances])
        values["auxk"] = auxiliary(
            *(model, inputs, residuals, dead), features=weight.auxk_features, variances=variances
        )
    factors = {name: 1.0 if name == "error" else float(getattr(weight, name)) for name in values}
    loss = torch.stack([factors[name] * value for name, value in values.items()]).sum()
    return {"loss": loss, **values}, code, outputs
