"""Subject networks, always a whole population at once: parameters are stacked along a first axis of models.

A population's parameters are a dictionary in layer order: ``layers.0.weight`` ``[models, fan_out, fan_in]``,
``layers.0.bias`` ``[models, fan_out]``, ``layers.1.weight``, ... The last layer has one output, the logit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ethogram.specs.generation import GenerationSpec

Params = dict[str, Tensor]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
}


class Architecture(NamedTuple):
    """Shape of a subject network."""

    vocab_size: int
    length: int
    input_encoding: str
    hidden: tuple[int, ...]
    """Widths of the hidden layers."""
    activation: str

    @classmethod
    def of(cls, spec: GenerationSpec) -> Architecture:
        """The architecture that a zoo's spec asks for."""
        subject = spec.subject
        hidden = (subject.neurons,) * subject.layers
        return cls(spec.vocab_size, spec.sequence_length, subject.input_encoding, hidden, subject.activation)

    @property
    def input_size(self) -> int:
        """Numbers that enter the network."""
        return self.length * self.vocab_size if self.input_encoding == "one_hot" else self.length

    @property
    def layers(self) -> list[tuple[int, int]]:
        """``(fan_in, fan_out)`` of each layer, the output layer included."""
        widths = (self.input_size, *self.hidden, 1)
        return list(pairwise(widths))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter of one network, in order."""
        shapes: dict[str, tuple[int, ...]] = {}
        for i, (fan_in, fan_out) in enumerate(self.layers):
            shapes[f"layers.{i}.weight"] = (fan_out, fan_in)
            shapes[f"layers.{i}.bias"] = (fan_out,)
        return shapes

    @property
    def neurons(self) -> int:
        """Neurons of all layers, the logit included."""
        return sum(self.hidden) + 1

    @property
    def size(self) -> int:
        """Parameters of one network."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def encode(architecture: Architecture, sequences: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sequences ``[n, length]`` of letter indices as network inputs ``[n, input_size]``.

    One-hot inputs are position-major: entry ``position * vocab_size + letter``.
    """
    if architecture.input_encoding == "index":
        return sequences.to(dtype)
    inputs = torch.zeros(*sequences.shape, architecture.vocab_size, dtype=dtype, device=sequences.device)
    return inputs.scatter_(-1, sequences.long().unsqueeze(-1), 1).flatten(-2)


def init(
    architecture: Architecture, models: int, generators: list[torch.Generator], dtype: torch.dtype = torch.float32
) -> Params:
    """Fresh parameters for ``models`` networks, uniform in +-1/sqrt(fan_in) as in ``torch.nn.Linear``.

    ``generators`` holds one (all models start from the same draw) or one for each model.
    """
    draws: dict[str, list[Tensor]] = {name: [] for name in architecture.shapes}
    for generator in generators:
        for i, (fan_in, _) in enumerate(architecture.layers):
            for name in (f"layers.{i}.weight", f"layers.{i}.bias"):
                unit = torch.rand(architecture.shapes[name], generator=generator, dtype=torch.float64)
                draws[name].append(((unit * 2 - 1) / math.sqrt(fan_in)).to(dtype))
    stacked = {name: torch.stack(tensors) for name, tensors in draws.items()}
    if len(generators) == models:
        return stacked
    return {name: tensor.expand(models, *tensor.shape[1:]).clone() for name, tensor in stacked.items()}


def depth(params: Params) -> int:
    """Number of layers, the output layer included."""
    return len(params) // 2


def activations(params: Params, inputs: Tensor, activation: str = "relu") -> list[Tensor]:
    """Pre-activations of every layer, each ``[models, n, fan_out]``; the last holds the logits.

    ``inputs``: ``[n, input_size]``, the same for all models, or ``[models, n, input_size]``.
    """
    function, layers = ACTIVATIONS[activation], []
    hidden = inputs
    for i in range(depth(params)):
        weight, bias = params[f"layers.{i}.weight"], params[f"layers.{i}.bias"]
        if hidden.dim() == 2:
            # One product for all models: the weights' rows are stacked.
            flat = hidden @ weight.reshape(-1, weight.shape[-1]).T
            pre = flat.reshape(hidden.shape[0], *weight.shape[:2]).transpose(0, 1) + bias.unsqueeze(1)
        else:
            pre = torch.baddbmm(bias.unsqueeze(1), hidden, weight.transpose(1, 2))
        layers.append(pre)
        hidden = function(pre)
    return layers


def forward(params: Params, inputs: Tensor, activation: str = "relu") -> Tensor:
    """Logits ``[models, n]``; positive means yes. ``inputs`` as in :func:`activations`."""
    return activations(params, inputs, activation)[-1].squeeze(-1)


def flatten(params: Params) -> Tensor:
    """Parameters as vectors ``[models, size]``, in layer order, weight before bias."""
    names = [f"layers.{i}.{part}" for i in range(depth(params)) for part in ("weight", "bias")]
    return torch.cat([params[name].flatten(1) for name in names], 1)


def unflatten(flat: Tensor, architecture: Architecture) -> Params:
    """The inverse of :func:`flatten`; ``flat`` is ``[models, size]``. The parameters are views."""
    params, start = {}, 0
    for name, shape in architecture.shapes.items():
        stop = start + math.prod(shape)
        params[name] = flat[:, start:stop].reshape(-1, *shape)
        start = stop
    return params


def select(params: Params, index: Tensor) -> Params:
    """The networks at ``index`` (int64 positions or a bool mask along the models)."""
    return {name: tensor[index] for name, tensor in params.items()}
