"""One order and scale for hidden neurons, so that networks from independent initialisations can be compared.

Each hidden neuron is matched to one of a reference network by what it does on the probes (as in Ainsworth et al. 2022,
arXiv 2209.04836, "matching activations"); where the activation is homogeneous its incoming weights are scaled to norm 1
and its outgoing ones by the inverse. Neither changes what the network computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from services.zoo.layout import Layout
from services.zoo.subjects import Params, activations, flatten, unflatten

HOMOGENEOUS = ("relu", "leaky_relu")
"""Activations with f(s x) = s f(x) for s > 0."""


class Transform(NamedTuple):
    """What was done to each of some vectors ``[models, size]``: new[i] = old[entry[i]] x factor[i]."""

    entry: Tensor
    factor: Tensor

    def apply(self, vectors: Tensor) -> Tensor:
        """Vectors in canonical form."""
        return vectors.gather(1, self.entry) * self.factor

    def undo(self, vectors: Tensor) -> Tensor:
        """Canonical vectors, or differences of such, back in the networks' own form."""
        return torch.zeros_like(vectors).scatter(1, self.entry, vectors / self.factor)


class Canonicalizer:
    """Brings networks into canonical form, by a reference network of each shape."""

    def __init__(self, layout: Layout, inputs: Tensor, references: Sequence[Params]) -> None:
        """``inputs``: encoded probes ``[probes, input_size]``; ``references``: one network of each shape, in order."""
        self.layout, self.references = layout, list(references)
        self._inputs = inputs
        self._targets = [
            [_unit(layer[0]) for layer in activations(network, inputs, shape.activation)[:-1]]
            for network, shape in zip(references, layout.shapes, strict=True)
        ]

    def transform(self, vectors: Tensor, shape: Tensor) -> Transform:
        """What brings ``vectors`` ``[models, size]`` of the shapes ``shape`` (int64 ``[models]``) into that form."""
        index = torch.arange(self.layout.size, device=vectors.device).repeat(len(vectors), 1)
        factor = torch.ones_like(vectors)
        for which in torch.unique(shape).tolist():
            rows = (shape == which).nonzero().squeeze(1)
            own_index, own_factor = self._of_shape(self.layout.strip(vectors[rows], which), which)
            places = self.layout.positions[which].to(vectors.device)
            index[rows.unsqueeze(1), places] = places[own_index]
            factor[rows.unsqueeze(1), places] = own_factor
        return Transform(index, factor)

    def _of_shape(self, flat: Tensor, which: int) -> tuple[Tensor, Tensor]:
        architecture = self.layout.shapes[which]
        networks = unflatten(flat, architecture)
        count = len(flat)
        inputs = self._inputs.to(flat.device)
        layers = activations(networks, inputs, architecture.activation)[:-1]
        # What was done so far, and the networks after it.
        entries = unflatten(torch.arange(flat.shape[1], device=flat.device).repeat(count, 1), architecture)
        factors, done = unflatten(torch.ones_like(flat), architecture), dict(networks)
        for i, (layer, target) in enumerate(zip(layers, self._targets[which], strict=True)):
            likeness = torch.einsum("pr,mpn->mrn", target.to(flat.device), _unit(layer)).cpu().double().numpy()
            # A mean of numbers close to float32's largest is none.
            likeness = np.nan_to_num(likeness)
            order = torch.stack(
                [torch.from_numpy(linear_sum_assignment(one, maximize=True)[1]) for one in likeness]
            ).to(flat.device)
            scale = torch.ones_like(order, dtype=flat.dtype)
            if architecture.activation in HOMOGENEOUS:
                norm = done[f"layers.{i}.weight"].norm(dim=2).clamp_min(1e-6)
                scale = 1 / norm.gather(1, order)
            weight, bias, onward = f"layers.{i}.weight", f"layers.{i}.bias", f"layers.{i + 1}.weight"
            for parts in (entries, factors, done):
                parts[weight] = parts[weight].gather(1, order.unsqueeze(2).expand(-1, -1, parts[weight].shape[2]))
                parts[bias] = parts[bias].gather(1, order)
                parts[onward] = parts[onward].gather(2, order.unsqueeze(1).expand(-1, parts[onward].shape[1], -1))
            for parts in (factors, done):
                parts[weight] = parts[weight] * scale.unsqueeze(2)
                parts[bias] = parts[bias] * scale
                parts[onward] = parts[onward] / scale.unsqueeze(1)
        return flatten(entries), flatten(factors)


def _unit(layer: Tensor) -> Tensor:
    """Neurons' values on the probes ``[..., probes, neurons]``, centred and of norm 1."""
    return F.normalize(layer - layer.mean(-2, keepdim=True), dim=-2)
