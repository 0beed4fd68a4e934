"""Networks and signatures as sequences of tokens, with what each token is, and back.

Granularity ``neuron``: a token is one neuron, layer after layer, the output neuron last: for a signature its values,
for weights its incoming weights and then its bias. ``chunk``, the form of earlier work, cuts the flat numbers of a
network into pieces of one length, whatever neuron they belong to; it takes weights alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ethogram.specs.crossmodal import CodecSpec
from services.crossmodal.data import Preprocessor
from services.zoo.layout import Layout
from services.zoo.subjects import Architecture, Params, flatten, unflatten

METADATA = ("layer", "parameter", "position", "fan_out", "fan_in", "token")
"""Columns of :attr:`Tokens.metadata`: the layer's index; 0 for signatures, 1 for weights and 2 for chunks; the neuron's
place in its layer (of a chunk, the place of its first number in the flat network); the layer's shape; the token's
index."""
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
    """How the networks of each shape of a layout become tokens; the first axis is the shapes'.

    A module, so that its tables are wherever the model is that holds it; none is part of its state.
    """

    entry: Tensor
    """Which entry of a vector each number of a token is: int64 ``[shapes, tokens, width]``, -1 for padding."""
    metadata: Tensor
    mask: Tensor

    def __init__(self, entry: Tensor, metadata: Tensor, mask: Tensor) -> None:
        super().__init__()
        for name, table in (("entry", entry), ("metadata", metadata), ("mask", mask)):
            self.register_buffer(name, table, persistent=False)

    def tokens(self, vectors: Tensor, shape: Tensor) -> Tokens:
        """``vectors`` ``[batch, size]`` of networks of the shapes ``shape`` (int64 ``[batch]``) as tokens."""
        index = self.entry[shape]
        values = vectors.gather(1, index.clamp_min(0).flatten(1)).view(index.shape)
        return Tokens(values.masked_fill(index < 0, 0.0), self.metadata[shape], self.mask[shape])

    def vectors(self, values: Tensor, shape: Tensor, size: int) -> Tensor:
        """The inverse: vectors ``[batch, size]`` of token values ``[batch, tokens, width]``; padding is not read."""
        index = self.entry[shape].flatten(1)
        # What is padding goes to one entry more, which is dropped.
        target = torch.where(index < 0, size, index)
        return values.new_zeros(len(values), size + 1).scatter(1, target, values.flatten(1))[:, :size]


class Tokenizer:
    """Tokens of the networks of a layout and of their signatures."""

    def __init__(
        self,
        layout: Layout,
        values: int,
        granularity: Literal["neuron", "chunk"] = "neuron",
        chunk: int = 64,
    ) -> None:
        """``values``: numbers of a signature for each neuron; ``chunk``: numbers of a chunk."""
        self.layout, self.values, self.granularity, self.chunk = layout, values, granularity, chunk

    @classmethod
    def of(cls, spec: CodecSpec, preprocessor: Preprocessor) -> Tokenizer:
        """The tokenizer that ``spec`` asks for."""
        return cls(preprocessor.layout, preprocessor.extractor.values, spec.granularity, spec.chunk)

    @cached_property
    def signature(self) -> Form:
        """For signatures, flat ``[batch, neurons x values]``."""
        entries = torch.arange(self.layout.neurons * self.values).view(self.layout.neurons, self.values)
        return _form(
            [
                (entries[places], _metadata(shape, SIGNATURE))
                for shape, places in zip(self.layout.shapes, self.layout.neuron_positions, strict=True)
            ],
        )

    @cached_property
    def weights(self) -> Form:
        """For flat networks ``[batch, layout.size]``."""
        return _form(
            [
                (_chunks(places, self.chunk) if self.granularity == "chunk" else _neurons(shape, places))
                for shape, places in zip(self.layout.shapes, self.layout.positions, strict=True)
            ]
        )

    def tokenize(self, networks: Params, shape: int = 0) -> Tokens:
        """Tokens of stacked networks, all of one of the layout's shapes."""
        rows = torch.full((len(networks["layers.0.weight"]),), shape)
        return self.weights.tokens(self.layout.pad(flatten(networks), shape), rows)

    def detokenize(self, tokens: Tensor, shape: int = 0) -> Params:
        """The networks of token values ``[batch, tokens, width]``: exactly those that were tokenized."""
        vectors = self.weights.vectors(tokens, torch.full((len(tokens),), shape), self.layout.size)
        return unflatten(self.layout.strip(vectors, shape), self.layout.shapes[shape])


def _metadata(shape: Architecture, parameter: int) -> Tensor:
    rows = [
        (layer, parameter, position, fan_out, fan_in)
        for layer, (fan_in, fan_out) in enumerate(shape.layers)
        for position in range(fan_out)
    ]
    return torch.tensor([(*row, token) for token, row in enumerate(rows)])


def _neurons(shape: Architecture, places: Tensor) -> tuple[Tensor, Tensor]:
    widest = max(fan_in for fan_in, _ in shape.layers) + 1
    rows = []
    network = unflatten(places.unsqueeze(0), shape)
    for layer in range(len(shape.layers)):
        weight, bias = network[f"layers.{layer}.weight"][0], network[f"layers.{layer}.bias"][0]
        neurons = torch.cat([weight, bias.unsqueeze(1)], 1)
        rows.append(torch.nn.functional.pad(neurons, (0, widest - neurons.shape[1]), value=-1))
    return torch.cat(rows), _metadata(shape, WEIGHT)


def _chunks(places: Tensor, length: int) -> tuple[Tensor, Tensor]:
    count = -(-len(places) // length)
    index = torch.nn.functional.pad(places, (0, count * length - len(places)), value=-1).view(count, length)
    token = torch.arange(count)
    metadata = torch.zeros(count, len(METADATA), dtype=torch.int64)
    metadata[:, 1], metadata[:, 2], metadata[:, 3], metadata[:, 5] = CHUNK, token * length, length, token
    return index, metadata


def _form(tables: Sequence[tuple[Tensor, Tensor]]) -> Form:
    tokens, width = max(len(index) for index, _ in tables), max(index.shape[1] for index, _ in tables)
    index = torch.full((len(tables), tokens, width), -1)
    metadata = torch.zeros(len(tables), tokens, len(METADATA), dtype=torch.int64)
    mask = torch.zeros(len(tables), tokens, dtype=torch.bool)
    for row, (entries, about) in enumerate(tables):
        count = len(entries)
        index[row, :count, : entries.shape[1]], metadata[row, :count], mask[row, :count] = entries, about, True
    return Form(index, metadata, mask)
