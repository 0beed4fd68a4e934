"""Subject networks, always a whole population at once: parameters are stacked along a first axis of models.

A population's parameters are a dictionary in layer order: ``layers.0.weight`` ``[models, fan_out, fan_in]``,
``layers.0.bias`` ``[models, fan_out]``, ``layers.1.weight``, ... The last layer has one output, the logit.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from services.zoo.hashing import mix

Params = dict[str, Tensor]

# Inputs that go through a population at once, so that the activations stay in the cache.
_CHUNK = 512

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
    architecture: Architecture,
    keys: Tensor,
    widths: Tensor | None = None,
    *,
    kaiming: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Params:
    """Fresh parameters of one network for each of ``keys`` (int64 ``[models]``; the same key, the same draw).

    Uniform in +-1/sqrt(fan_in) as in ``torch.nn.Linear``; ``kaiming``: weights in +-sqrt(6/fan_in) and biases 0 (He et
    al. 2015). ``widths``: neurons in each hidden layer of each network, int64 ``[models]``; those of ``architecture``
    that a network lacks have zeros for weights. A narrow network's draw is a part of a wide one's.
    """
    params: Params = {}
    last = len(architecture.layers) - 1
    for i, (fan_in, fan_out) in enumerate(architecture.layers):
        inputs = torch.full_like(keys, fan_in) if i == 0 or widths is None else widths
        outputs = torch.full_like(keys, fan_out) if i == last or widths is None else widths
        has_input = torch.arange(fan_in) < inputs.unsqueeze(1)
        has_output = torch.arange(fan_out) < outputs.unsqueeze(1)
        # By position, so that a narrow network's draw is a part of a wide one's; column 0 is for the biases.
        positions = torch.arange(fan_out).unsqueeze(1) * 2**20 + torch.arange(fan_in + 1)
        hashed = mix(mix(keys + i).view(-1, 1, 1) + positions)
        unit = ((hashed >> 11) & (2**53 - 1)).double() / 2**53
        drawn = (unit * 2 - 1) / inputs.double().sqrt().view(-1, 1, 1)
        weight = drawn[:, :, 1:] * (has_output.unsqueeze(2) & has_input.unsqueeze(1))
        params[f"layers.{i}.weight"] = (weight * (math.sqrt(6) if kaiming else 1.0)).to(dtype)
        params[f"layers.{i}.bias"] = (drawn[:, :, 0] * has_output * (0.0 if kaiming else 1.0)).to(dtype)
    return params


def depth(params: Params) -> int:
    """Number of layers, the output layer included."""
    return len(params) // 2


def activations(params: Params, inputs: Tensor, activation: str = "relu") -> list[Tensor]:
    """Pre-activations of every layer, each ``[models, n, fan_out]``, a transposed view; the last holds the logits.

    ``inputs``: ``[n, input_size]``, the same for all models, or ``[models, n, input_size]``.
    """
    return list(_layers(params, inputs, ACTIVATIONS[activation]))


def _layers(params: Params, inputs: Tensor, function: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """The pre-activations of one layer after the other."""
    # Examples last: these products are the faster ones, and biases are added in long runs.
    hidden = inputs.transpose(-1, -2)
    for i in range(depth(params)):
        weight, bias = params[f"layers.{i}.weight"], params[f"layers.{i}.bias"]
        if hidden.dim() == 2:
            # One product for all models: the weights' rows are stacked.
            pre = (weight.reshape(-1, weight.shape[-1]) @ hidden).view(*weight.shape[:2], -1)
        else:
            pre = torch.bmm(weight, hidden)
        # Not baddbmm, which would first spread the bias over the output and costs more.
        pre += bias.unsqueeze(2)
        yield pre.transpose(1, 2)
        hidden = function(pre)


def forward(params: Params, inputs: Tensor, activation: str = "relu") -> Tensor:
    """Logits ``[models, n]``; positive means yes. ``inputs`` as in :func:`activations`."""
    chunks = torch.split(inputs, _CHUNK, -2)
    # Of the layers only the last is kept, so that the others' memory is used again while it is in the cache.
    logits = (deque(_layers(params, chunk, ACTIVATIONS[activation]), maxlen=1)[0] for chunk in chunks)
    return torch.cat([chunk_logits.squeeze(-1) for chunk_logits in logits], 1)


def flatten(params: Params) -> Tensor:
    """Parameters as vectors ``[models, size]``, in layer order, weight before bias."""
    names = [f"layers.{i}.{kind}" for i in range(depth(params)) for kind in ("weight", "bias")]
    return torch.cat([params[name].flatten(1) for name in names], 1)


def unflatten(flat: Tensor, architecture: Architecture) -> Params:
    """The inverse of :func:`flatten`; ``flat`` is ``[models, size]``. The parameters are views."""
    shapes = architecture.shapes
    # Split rather than sliced, so that the gradient is assembled once, not once for each parameter.
    parameters = torch.split(flat, [math.prod(shape) for shape in shapes.values()], 1)
    return {name: p.reshape(-1, *shape) for (name, shape), p in zip(shapes.items(), parameters, strict=True)}


def select(params: Params, index: Tensor) -> Params:
    """The networks at ``index`` (int64 positions or a bool mask along the models)."""
    return {name: tensor[index] for name, tensor in params.items()}
