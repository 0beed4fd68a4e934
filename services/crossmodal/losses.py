"""The terms of the objective: means over the batch; all but the contrastive one have the minimum 0."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_weights(deviations: Tensor, layer: Tensor) -> Tensor:
    """Weight of each coordinate in :func:`reconstruction`, so that each layer counts alike: ``[size]``.

    ``deviations``: training weights minus their mean ``[subjects, size]``; ``layer``: the layer of each coordinate,
    int64 ``[size]``. A decoder that always returns the mean has a loss of 1.
    """
    total = torch.zeros(int(layer.max()) + 1, device=deviations.device)
    total.index_add_(0, layer, deviations.square().mean(0))
    return 1 / (total.clamp_min(1e-12)[layer] * len(total))


def reconstruction(decoded: Tensor, source: Tensor, weights: Tensor) -> Tensor:
    """Squared error of flat weights ``[batch, size]``, normalised per layer by ``weights`` (:func:`layer_weights`)."""
    return ((decoded - source).square() @ weights).mean()


def elementwise(decoded: Tensor, source: Tensor, present: Tensor, form: str) -> Tensor:
    """Error of standardised weights ``[batch, size]`` by ``form``: ``mse``, ``mae``, ``cosine`` (1 minus the cosine
    similarity) or ``combined``, their sum. ``present``: which of them each network has, as 0 and 1."""
    count = present.sum(1)
    difference = (decoded - source) * present
    terms = {
        "mse": difference.square().sum(1) / count,
        "mae": difference.abs().sum(1) / count,
        "cosine": 1 - F.cosine_similarity(decoded * present, source * present, dim=1),
    }
    return (sum(terms.values(), torch.zeros_like(count)) if form == "combined" else terms[form]).mean()


def variance(latents: Tensor) -> Tensor:
    """Guard against collapse: how far the standard deviations over the batch ``[batch, latent]`` are below 1, a mean
    over the latent dimensions (Bardes et al. 2021, arXiv 2105.04906, eq. 1); 0 for a batch of one."""
    if len(latents) < 2:
        return latents.new_zeros(())
    return F.relu(1 - (latents.var(0) + 1e-4).sqrt()).mean()


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    """KL divergence, elementwise, of the answer ``sigmoid(logits)`` from the probability ``target``, of any shape."""
    entropy = -(torch.xlogy(target, target) + torch.xlogy(1 - target, 1 - target))
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none") - entropy


def behavior(logits: Tensor, source: Tensor) -> Tensor:
    """How far decoded networks' answers ``[batch, n]`` are from their sources' answers, both as logits."""
    return divergence(logits, torch.sigmoid(source)).mean()


def steering(logits: Tensor, source: Tensor, before: Tensor, after: Tensor, locality: float, *, mend: bool) -> Tensor:
    """How far steered networks are from what the edit asks for; all ``[batch, n]``.

    Where the exact labels (bool) ``before`` and ``after`` the edit differ, the target is the label after it; elsewhere
    the source's own answer (``source``: its logits), or with ``mend``, where that is wrong, the exact label. In each
    network the sequences elsewhere have the total weight ``locality`` and the others the rest, so that a behaviour with
    few sequences counts; where a network has only one kind of them, that has all the weight.
    """
    decided = before != after
    exact = decided | ((source > 0) != before) if mend else decided
    target = torch.where(exact, after.to(source.dtype), torch.sigmoid(source))
    groups = (decided.to(source.dtype), (~decided).to(source.dtype))
    inside, outside = (group / group.sum(1, keepdim=True).clamp_min(1) for group in groups)
    weights = (1 - locality) * inside + locality * outside
    weights = weights / weights.sum(1, keepdim=True).clamp_min(1e-12)
    return (divergence(logits, target) * weights).sum(1).mean()


def contrastive(latents: Tensor, labels: Tensor, temperature: float, *, graded: bool = True) -> Tensor:
    """Supervised contrastive loss (Khosla et al. 2020, arXiv 2004.11362, L_out).

    Positives are subjects that share a behaviour; ``graded``: weighted by the Jaccard index of their behaviours, since
    with several behaviours each, most pairs share one. ``latents``: ``[batch, latent]``; ``labels``: bool ``[batch,
    behaviors]``. A subject without positives adds 0.
    """
    unit, member = F.normalize(latents, dim=1), labels.to(latents.dtype)
    shared = member @ member.T
    sizes = member.sum(1)
    union = sizes.unsqueeze(0) + sizes.unsqueeze(1) - shared
    itself = torch.eye(len(latents), dtype=torch.bool, device=latents.device)
    positive = shared / union.clamp_min(1) if graded else (shared > 0).to(latents.dtype)
    positive = positive.masked_fill(itself, 0)
    similarity = (unit @ unit.T / temperature).masked_fill(itself, float("-inf"))
    log_share = similarity.log_softmax(1).masked_fill(itself, 0)
    return -((positive * log_share).sum(1) / positive.sum(1).clamp_min(1e-12)).mean()
