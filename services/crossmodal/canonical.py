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
    """A change of vectors ``[models, size]`` of the same shape as its tensors: new[i] = old[entry[i]] x factor[i]."""

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
        self.layout, self.references, self._inputs = layout, list(references), inputs
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
            entries, factors = self._of_shape(self.layout.strip(vectors[rows], which), which)
            positions = self.layout.positions[which].to(vectors.device)
            index[rows.unsqueeze(1), positions] = positions[entries]
            factor[rows.unsqueeze(1), positions] = factors
        return Transform(index, factor)

    def _of_shape(self, flat: Tensor, which: int) -> tuple[Tensor, Tensor]:
        """Entries and factors, ``[models, size]`` each, of flat networks ``[models, size]`` of one shape."""
        architecture = self.layout.shapes[which]
        networks = unflatten(flat, architecture)
        layers = activations(networks, self._inputs.to(flat.device), architecture.activation)[:-1]
        # The transform so far, and the networks after it.
        entries = unflatten(torch.arange(flat.shape[1], device=flat.device).repeat(len(flat), 1), architecture)
        factors, transformed = unflatten(torch.ones_like(flat), architecture), dict(networks)
        for i, (layer, target) in enumerate(zip(layers, self._targets[which], strict=True)):
            similarity = torch.einsum("pr,mpn->mrn", target.to(flat.device), _unit(layer)).cpu().double().numpy()
            # The means of activations near float32's largest number are infinite.
            matches = [linear_sum_assignment(matrix, maximize=True)[1] for matrix in np.nan_to_num(similarity)]
            order = torch.from_numpy(np.stack(matches)).to(flat.device)
            weight, bias, onward = f"layers.{i}.weight", f"layers.{i}.bias", f"layers.{i + 1}.weight"
            scale = torch.ones_like(order, dtype=flat.dtype)
            if architecture.activation in HOMOGENEOUS:
                scale = 1 / transformed[weight].norm(dim=2).clamp_min(1e-6).gather(1, order)
            for params in (entries, factors, transformed):
                params[weight] = params[weight].gather(1, order.unsqueeze(2).expand(-1, -1, params[weight].shape[2]))
                params[bias] = params[bias].gather(1, order)
                params[onward] = params[onward].gather(2, order.unsqueeze(1).expand(-1, params[onward].shape[1], -1))
            for params in (factors, transformed):
                params[weight] = params[weight] * scale.unsqueeze(2)
                params[bias] = params[bias] * scale
                params[onward] = params[onward] / scale.unsqueeze(1)
        return flatten(entries), flatten(factors)


def _unit(layer: Tensor) -> Tensor:
    """Neurons' values on the probes ``[..., probes, neurons]``, centred and of norm 1."""
    return F.normalize(layer - layer.mean(-2, keepdim=True), dim=-2)
