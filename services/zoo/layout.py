"""Networks of several shapes in vectors of one size, so that they can be learned from and run together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from services.zoo.signatures import ActivationSignatureExtractor
from services.zoo.subjects import ACTIVATIONS, Architecture, Params, flatten, unflatten


class Layout:
    """Positions of the parameters of networks of several shapes in vectors of one size.

    The *envelope* has as many hidden layers as the deepest shape, all as wide as the widest. A smaller network has the
    first neurons of the first hidden layers, and the envelope's output layer. The parameters that it lacks are 0, which
    does not change its outputs. With one shape the envelope is that shape.
    """

    def __init__(self, shapes: Sequence[Architecture]) -> None:
        """``shapes``: distinct, of one input size."""
        self.shapes = tuple(shapes)
        self._width = max(max(shape.hidden) for shape in shapes)
        self._depth = max(len(shape.hidden) for shape in shapes)
        hidden = self.shapes[0].hidden if len(shapes) == 1 else (self._width,) * self._depth
        self.envelope = self.shapes[0]._replace(hidden=hidden)
        self.size = self.envelope.size
        """Length of a vector."""
        self.neurons = self.envelope.neurons
        """Neurons of the envelope, the logit included."""

    @cached_property
    def positions(self) -> list[Tensor]:
        """Of each shape, positions in the vector of its flattened parameters: int64 ``[its size]``."""
        envelope = unflatten(torch.arange(self.size).unsqueeze(0), self.envelope)
        last = len(self.envelope.hidden)
        positions = []
        for shape in self.shapes:
            params: Params = {}
            for i, (fan_in, fan_out) in enumerate(shape.layers):
                slot = last if i == len(shape.hidden) else i
                params[f"layers.{i}.weight"] = envelope[f"layers.{slot}.weight"][:, :fan_out, :fan_in]
                params[f"layers.{i}.bias"] = envelope[f"layers.{slot}.bias"][:, :fan_out]
            positions.append(flatten(params)[0])
        return positions

    @cached_property
    def neuron_positions(self) -> list[Tensor]:
        """Of each shape, the envelope's neurons that it has, in order: int64 ``[its neurons]``."""
        layers = torch.split(torch.arange(self.neurons), [*self.envelope.hidden, 1])
        return [
            torch.cat([*(layer[:n] for n, layer in zip(shape.hidden, layers, strict=False)), layers[-1]])
            for shape in self.shapes
        ]

    @cached_property
    def present(self) -> Tensor:
        """Which parameters networks of each shape have: bool ``[shapes, size]``."""
        return _mask(self.positions, self.size)

    @cached_property
    def present_neurons(self) -> Tensor:
        """Which neurons networks of each shape have: bool ``[shapes, neurons]``."""
        return _mask(self.neuron_positions, self.neurons)

    def pad(self, networks: Tensor, shape: int) -> Tensor:
        """Flat networks ``[models, its size]`` of one shape as vectors ``[models, size]``."""
        padded = networks.new_zeros(len(networks), self.size)
        return padded.index_copy_(1, self.positions[shape].to(networks.device), networks)

    def strip(self, vectors: Tensor, shape: int) -> Tensor:
        """The inverse of :meth:`pad`."""
        return vectors[:, self.positions[shape].to(vectors.device)]

    def pad_neurons(self, values: Tensor, shape: int) -> Tensor:
        """Values of the neurons of one shape, ``[models, its neurons, values]``, as ``[models, neurons, values]``."""
        padded = values.new_zeros(len(values), self.neurons, values.shape[2])
        return padded.index_copy_(1, self.neuron_positions[shape].to(values.device), values)

    def signatures(self, vectors: Tensor, shape: Tensor, extractor: ActivationSignatureExtractor) -> Tensor:
        """Signatures of all of the extractor's methods, one after the other ``[models, neurons, values]``, of networks
        ``[models, size]`` of the shapes ``shape`` (int64 ``[models]``)."""
        signatures = vectors.new_zeros(len(vectors), self.neurons, extractor.values)
        for which, architecture in enumerate(self.shapes):
            rows = (shape == which).nonzero().squeeze(1)
            if len(rows):
                networks = unflatten(self.strip(vectors[rows], which), architecture)
                by_method = extractor.extract(networks, architecture)
                signatures[rows] = self.pad_neurons(torch.cat(list(by_method.values()), 2), which)
        return signatures

    def logits(self, vectors: Tensor, shape: Tensor, inputs: Tensor) -> Tensor:
        """Logits ``[subjects, variants, n]`` of several variants of each subject on the same inputs.

        ``vectors``: ``[subjects, variants, size]``; ``shape``: of each subject, int64 ``[subjects]``; ``inputs``:
        ``[input_size, n]`` for all subjects, or ``[subjects, input_size, n]``, examples as columns.
        """
        # What networks must share to run together.
        kinds = [(len(shape.hidden), shape.activation) for shape in self.shapes]
        if len(set(kinds)) == 1:
            return logits_of(vectors, inputs, self.envelope)
        logits = vectors.new_zeros(*vectors.shape[:2], inputs.shape[-1])
        for depth, activation in sorted(set(kinds)):
            same = torch.tensor([kind == (depth, activation) for kind in kinds], device=shape.device)
            chosen = same[shape].nonzero().squeeze(1)
            if len(chosen) == 0:
                continue
            shared = self.envelope._replace(hidden=self.envelope.hidden[:depth], activation=activation)
            rows = vectors[chosen]
            if depth < self._depth:
                output = self.envelope.layers[-1]
                tail = (output[0] + 1) * output[1]
                rows = torch.cat([rows[:, :, : shared.size - tail], rows[:, :, -tail:]], 2)
            examples = inputs if inputs.dim() == 2 else inputs[chosen]
            logits = logits.index_copy(0, chosen, logits_of(rows, examples, shared))
        return logits


def logits_of(weights: Tensor, inputs: Tensor, architecture: Architecture) -> Tensor:
    """Logits ``[subjects, variants, n]`` of several variants of each subject, all of one shape, on the same inputs.

    ``weights``: flat, ``[subjects, variants, size]``; ``inputs``: ``[input_size, n]`` for all subjects, or
    ``[subjects, input_size, n]``. Columns are examples, so that the variants' first layers are one matrix product.
    """
    subjects, variants, _ = weights.shape
    params = unflatten(weights.flatten(0, 1), architecture)
    activation = ACTIVATIONS[architecture.activation]
    hidden = inputs
    for i, (fan_in, fan_out) in enumerate(architecture.layers):
        weight, bias = params[f"layers.{i}.weight"], params[f"layers.{i}.bias"].unsqueeze(-1)
        if i > 0:
            hidden = torch.baddbmm(bias, weight, activation(hidden))
        elif inputs.dim() == 2:
            hidden = (weight.reshape(-1, fan_in) @ inputs).view(subjects * variants, fan_out, -1) + bias
        else:
            rows = weight.reshape(subjects, variants * fan_out, fan_in)
            hidden = torch.baddbmm(bias.reshape(subjects, -1, 1), rows, inputs).view(subjects * variants, fan_out, -1)
    return hidden.view(subjects, variants, -1)


def _mask(positions: Sequence[Tensor], size: int) -> Tensor:
    mask = torch.zeros(len(positions), size, dtype=torch.bool)
    for row, index in zip(mask, positions, strict=True):
        row[index] = True
    return mask
