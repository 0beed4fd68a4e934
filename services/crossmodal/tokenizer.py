"""Networks and signatures as sequences of tokens with metadata, and back.

Granularity ``neuron``: a token is one neuron, layer after layer, the output neuron last: for a signature its values,
for weights its incoming weights and then its bias. ``chunk``: weights are cut into pieces of one length, whatever
neuron they belong to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from services.zoo.layout import Layout
from services.zoo.subjects import Architecture, unflatten

METADATA = ("layer", "parameter", "position", "fan_out", "fan_in", "token")
"""Columns of :attr:`Tokens.metadata`: the layer's index; ``SIGNATURE``, ``WEIGHT`` or ``CHUNK``; the neuron's index in
its layer (of a chunk, the index of its first number in the flat network); the layer's shape; the token's index."""
SIGNATURE, WEIGHT, CHUNK = range(3)


class Tokens(NamedTuple):
    """A batch of token sequences, the shorter ones padded with zeros."""

    values: Tensor
    """float32 ``[batch, tokens, width]``."""
    metadata: Tensor
    """int64 ``[batch, tokens, len(METADATA)]``."""
    mask: Tensor
    """Whether a token is there: bool ``[batch, tokens]``."""


class Form(nn.Module):
    """How the networks of each shape of a layout become tokens; the first axis of its tables is the shapes'.

    It is a module so that its tables follow the model to a device; none is part of the state.
    """

    entry: Tensor
    """Which entry of a vector each number of a token is: int64 ``[shapes, tokens, width]``, -1 for padding."""
    metadata: Tensor
    mask: Tensor

    def __init__(self, tables: Sequence[tuple[Tensor, Tensor]]) -> None:
        """``tables``: of each shape, the entries ``[tokens, width]`` and the metadata of its tokens."""
        super().__init__()
        entries, metadata = zip(*tables, strict=True)
        width = max(table.shape[1] for table in entries)
        padded = [F.pad(table, (0, width - table.shape[1]), value=-1) for table in entries]
        self.register_buffer("entry", pad_sequence(padded, True, -1), persistent=False)
        self.register_buffer("metadata", pad_sequence(list(metadata), True), persistent=False)
        mask = pad_sequence([torch.ones(len(table), dtype=torch.bool) for table in entries], batch_first=True)
        self.register_buffer("mask", mask, persistent=False)

    def tokens(self, vectors: Tensor, shape: Tensor) -> Tokens:
        """``vectors`` ``[batch, size]`` of networks of the shapes ``shape`` (int64 ``[batch]``) as tokens."""
        index = self.entry[shape]
        values = vectors.gather(1, index.clamp_min(0).flatten(1)).view(index.shape)
        return Tokens(values.masked_fill(index < 0, 0.0), self.metadata[shape], self.mask[shape])

    def vectors(self, values: Tensor, shape: Tensor, size: int) -> Tensor:
        """The inverse: vectors ``[batch, size]`` of token values ``[batch, tokens, width]``; padding is not read."""
        index = self.entry[shape].flatten(1)
        # Padding goes to an additional entry, which is dropped.
        target = torch.where(index < 0, size, index)
        return values.new_zeros(len(values), size + 1).scatter(1, target, values.flatten(1))[:, :size]


def signature_form(layout: Layout, values: int) -> Form:
    """The form of signatures, flat ``[batch, neurons x values]``."""
    entries = torch.arange(layout.neurons * values).view(layout.neurons, values)
    shapes = zip(layout.shapes, layout.neuron_positions, strict=True)
    return Form([(entries[positions], _metadata(shape, SIGNATURE)) for shape, positions in shapes])


def weights_form(layout: Layout, granularity: Literal["neuron", "chunk"] = "neuron", chunk: int = 64) -> Form:
    """The form of flat networks ``[batch, layout.size]``; ``chunk``: numbers of a chunk."""
    if granularity == "chunk":
        return Form([_chunks(positions, chunk) for positions in layout.positions])
    return Form([_neurons(*table) for table in zip(layout.shapes, layout.positions, strict=True)])


def _metadata(shape: Architecture, parameter: int) -> Tensor:
    """Metadata of a token for each neuron of a network, ``[neurons, len(METADATA)]``."""
    rows = [
        (layer, parameter, position, fan_out, fan_in)
        for layer, (fan_in, fan_out) in enumerate(shape.layers)
        for position in range(fan_out)
    ]
    return torch.tensor([(*row, token) for token, row in enumerate(rows)])


def _neurons(shape: Architecture, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Entries ``[neurons, width]`` of a network's neurons, and their metadata."""
    widest = max(fan_in for fan_in, _ in shape.layers) + 1
    rows = []
    network = unflatten(positions.unsqueeze(0), shape)
    for layer in range(len(shape.layers)):
        weight, bias = network[f"layers.{layer}.weight"][0], network[f"layers.{layer}.bias"]
        rows.append(F.pad(torch.cat([weight, bias.T], 1), (0, widest - weight.shape[1] - 1), value=-1))
    return torch.cat(rows), _metadata(shape, WEIGHT)


def _chunks(positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Entries ``[chunks, length]`` of a network's chunks, and their metadata."""
    count = -(-len(positions) // length)
    entries = F.pad(positions, (0, count * length - len(positions)), value=-1).view(count, length)
    token, zero = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    columns = (zero, zero + CHUNK, token * length, zero + length, zero, token)
    return entries, torch.stack(columns, 1)
