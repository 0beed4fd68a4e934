"""Networks of several shapes in vectors of one size, so that they can be learned from and run together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from services.zoo.signatures import ActivationSignatureExtractor
from services.zoo.subjects import ACTIVATIONS, Architecture, Params, flatten, unflatten


class Layout:
    """Positions of the parameters of networks of several shapes in vectors of one size.

    The *envelope* is the network with the most hidden layers of any shape, all as wide as the widest. A smaller network
    has the first neurons of the first hidden layers, and the envelope's output layer; the parameters that it lacks are
    0, which changes nothing of what it computes. With one shape the envelope is that shape.
    """

    def __init__(self, shapes: Sequence[Architecture]) -> None:
        """``shapes``: distinct, of one input size."""
        self.shapes = tuple(shapes)
        self._width = max(max(shape.hidden) for shape in shapes)
        self._depth = max(len(shape.hidden) for shape in shapes)
        hidden = self.shapes[0].hidden if len(shapes) == 1 else (self._width,) * self._depth
        self.envelope = self.shapes[0]._replace(hidden=hidden)

    @property
    def size(self) -> int:
        """Numbers of a vector."""
        return self.envelope.size

    @property
    def neurons(self) -> int:
        """Neurons of the envelope, the logit included."""
        return self.envelope.neurons

    @cached_property
    def places(self) -> list[Tensor]:
        """Of each shape: where the numbers of :func:`services.zoo.subjects.flatten` stand, int64 ``[its size]``."""
        every = unflatten(torch.arange(self.size).unsqueeze(0), self.envelope)
        last = len(self.envelope.hidden)
        found = []
        for shape in self.shapes:
            params: Params = {}
            for i, (fan_in, fan_out) in enumerate(shape.layers):
                slot = last if i == len(shape.hidden) else i
                params[f"layers.{i}.weight"] = every[f"layers.{slot}.weight"][:, :fan_out, :fan_in]
                params[f"layers.{i}.bias"] = every[f"layers.{slot}.bias"][:, :fan_out]
            found.append(flatten(params)[0])
        return found

    @cached_property
    def neuron_places(self) -> list[Tensor]:
        """Of each shape: which of the envelope's neurons it has, in its own order, int64 ``[its neurons]``."""
        starts = torch.tensor([0, *self.envelope.hidden]).cumsum(0).tolist()
        return [
            torch.cat(
                [torch.arange(n) + start for n, start in zip(shape.hidden, starts, strict=False)]
                + [torch.tensor([starts[-1]])]
            )
            for shape in self.shapes
        ]

    @cached_property
    def present(self) -> Tensor:
        """Which numbers networks of each shape have: bool ``[shapes, size]``."""
        return _marked(self.places, self.size)

    @cached_property
    def present_neurons(self) -> Tensor:
        """Which neurons they have: bool ``[shapes, neurons]``."""
        return _marked(self.neuron_places, self.neurons)

    def pad(self, networks: Tensor, shape: int) -> Tensor:
        """Flat networks ``[models, its size]`` of one shape as vectors ``[models, size]``."""
        padded = networks.new_zeros(len(networks), self.size)
        return padded.index_copy_(1, self.places[shape].to(networks.device), networks)

    def strip(self, vectors: Tensor, shape: int) -> Tensor:
        """The inverse of :meth:`pad`."""
        return vectors[:, self.places[shape].to(vectors.device)]

    def pad_neurons(self, values: Tensor, shape: int) -> Tensor:
        """Values of the neurons of one shape, ``[models, its neurons, values]``, as ``[models, neurons, values]``."""
        padded = values.new_zeros(len(values), self.neurons, values.shape[2])
        return padded.index_copy_(1, self.neuron_places[shape].to(values.device), values)

    def signatures(self, vectors: Tensor, shape: Tensor, extractor: ActivationSignatureExtractor) -> Tensor:
        """Signatures of all of the extractor's methods, one after the other ``[models, neurons, values]``, of networks
        ``[models, size]`` of the shapes ``shape`` (int64 ``[models]``)."""
        signatures: Tensor | None = None
        for which, architecture in enumerate(self.shapes):
            rows = (shape == which).nonzero().squeeze(1)
            if len(rows):
                networks = unflatten(self.strip(vectors[rows], which), architecture)
                by_method = extractor.extract(networks, architecture)
                values = self.pad_neurons(torch.cat(list(by_method.values()), 2), which)
                signatures = vectors.new_zeros(len(vectors), *values.shape[1:]) if signatures is None else signatures
                signatures[rows] = values
        return vectors.new_zeros(0, self.neurons, 0) if signatures is None else signatures

    @cached_property
    def _kinds(self) -> list[tuple[int, str]]:
        """What networks must share to be run at once: hidden layers and activation."""
        return sorted({(len(shape.hidden), shape.activation) for shape in self.shapes})

    @cached_property
    def _kind_of_shape(self) -> Tensor:
        return torch.tensor([self._kinds.index((len(shape.hidden), shape.activation)) for shape in self.shapes])

    def answers(self, vectors: Tensor, shape: Tensor, inputs: Tensor) -> Tensor:
        """Logits ``[subjects, variants, n]`` of several variants of each subject on the same inputs.

        ``vectors``: ``[subjects, variants, size]``; ``shape``: of each subject, int64 ``[subjects]``; ``inputs``:
        ``[input_size, n]`` for all subjects, or ``[subjects, input_size, n]``, examples as columns.
        """
        if len(self._kinds) == 1:
            return answers(vectors, inputs, self.envelope)
        kinds = self._kind_of_shape.to(shape.device)[shape]
        logits = vectors.new_zeros(*vectors.shape[:2], inputs.shape[-1])
        for kind, (depth, activation) in enumerate(self._kinds):
            chosen = (kinds == kind).nonzero().squeeze(1)
            if len(chosen) == 0:
                continue
            shared = self.envelope._replace(hidden=self.envelope.hidden[:depth], activation=activation)
            rows = vectors[chosen]
            if depth < self._depth:
                output = self.envelope.layers[-1]
                tail = (output[0] + 1) * output[1]
                rows = torch.cat([rows[:, :, : shared.size - tail], rows[:, :, -tail:]], 2)
            examples = inputs if inputs.dim() == 2 else inputs[chosen]
            logits = logits.index_copy(0, chosen, answers(rows, examples, shared))
        return logits


def answers(weights: Tensor, inputs: Tensor, architecture: Architecture) -> Tensor:
    """Logits ``[subjects, variants, n]`` of several variants of each subject, all of one shape, on the same inputs.

    ``weights``: flat, ``[subjects, variants, size]``; ``inputs``: ``[input_size, n]`` for all subjects, or
    ``[subjects, input_size, n]``. Columns are examples, so that the variants' first layers are one matrix product.
    """
    subjects, variants, _ = weights.shape
    # Split rather than sliced: the gradient is then put together once, not once for each parameter.
    sizes = [math.prod(shape) for shape in architecture.shapes.values()]
    parts = torch.split(weights.flatten(0, 1), sizes, 1)
    activation = ACTIVATIONS[architecture.activation]
    hidden = inputs
    for i, (fan_in, fan_out) in enumerate(architecture.layers):
        weight, bias = parts[2 * i].view(-1, fan_out, fan_in), parts[2 * i + 1].unsqueeze(-1)
        if i > 0:
            hidden = torch.baddbmm(bias, weight, activation(hidden))
        elif inputs.dim() == 2:
            hidden = (weight.reshape(-1, fan_in) @ inputs).view(subjects * variants, fan_out, -1) + bias
        else:
            rows = weight.reshape(subjects, variants * fan_out, fan_in)
            hidden = torch.baddbmm(bias.reshape(subjects, -1, 1), rows, inputs).view(subjects * variants, fan_out, -1)
    return hidden.view(subjects, variants, -1)


def _marked(places: Sequence[Tensor], size: int) -> Tensor:
    marked = torch.zeros(len(places), size, dtype=torch.bool)
    for row, positions in zip(marked, places, strict=True):
        row[positions] = True
    return marked
