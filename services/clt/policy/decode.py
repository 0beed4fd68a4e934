"""Tours from a policy: greedy, sampled, from every city; and how likely it finds given ones.

The query of a tour is a sum of what its first city adds, what its last one adds, and a fixed part, and it meets the
same keys at every step; so is what it finds linear in the values. Everything that is a product of two cities' vectors
is therefore computed once per instance, and a step gathers and adds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from services.clt.policy.model import AttentionPolicy

_CELLS = 2**25
"""Numbers in the tables of the instances that are decoded at once, about."""


class Tables(NamedTuple):
    """Products of the decoder's vectors of one instance's cities."""

    first: Tensor
    """Score of each city (last axis) by what the tour's first city adds to the query, with the fixed part, ``[batch,
    nodes, heads * nodes]``."""
    last: Tensor
    """The same of the tour's last city, without the fixed part."""
    start: Tensor
    """The same of an empty tour, ``[batch, 1, heads * nodes]``."""
    likeness: Tensor
    """What attention to a city (second axis, by head) adds to the likeness of each, ``[batch, heads * nodes, nodes]``.
    """
    heads: int
    clipping: float

    def detached(self) -> Tables:
        """Without gradients."""
        first, last, start, likeness = (part.detach() for part in self[:4])
        return Tables(first, last, start, likeness, self.heads, self.clipping)


def tables(policy: AttentionPolicy, stream: Tensor) -> Tables:
    """Of the encoder's output ``[batch, nodes, width]``."""
    decoder = policy.decoder
    memory = decoder.memory(stream)
    batch, heads, _, depth = memory.key.shape

    def by_head(vectors: Tensor) -> Tensor:
        return vectors.reshape(batch, -1, heads, depth).transpose(1, 2)

    def scores(query: Tensor) -> Tensor:
        products = by_head(query) @ memory.key.transpose(2, 3) / math.sqrt(depth)
        return products.transpose(1, 2).flatten(2).float()

    width = heads * depth
    # The projection of what attention finds moves to the other side of the comparison.
    compare = by_head(memory.compare @ decoder.out.weight)
    likeness = (memory.value @ compare.transpose(2, 3)).flatten(1, 2).float() / math.sqrt(width)
    first, start = memory.first + memory.fixed, memory.start + memory.fixed
    return Tables(scores(first), scores(memory.last), scores(start), likeness, heads, decoder.clipping)


@torch.no_grad()
def construct(found: Tables, start: Tensor | None, noise: Tensor | None = None) -> Tensor:
    """Tours ``[batch, tours, nodes]``, each city the likeliest; with Gumbel ``noise`` ``[batch, tours, nodes, nodes]``
    (step, city) each a draw. ``start``: the first city of each tour, ``[batch, tours]``; None: the policy's choice, in
    one tour per instance or as many as the noise is for."""
    batch, nodes = found.first.shape[:2]
    count = start.shape[1] if start is not None else 1 if noise is None else noise.shape[1]
    heads, device = found.heads, found.first.device
    tours = torch.empty(batch, count, nodes, dtype=torch.long, device=device)
    # Minus infinity where a city is in the tour.
    barred = torch.zeros(batch, count, nodes, device=device)
    offset = (torch.arange(batch, device=device) * nodes).unsqueeze(1)

    def gathered(table: Tensor, city: Tensor) -> Tensor:
        rows = table.reshape(batch * nodes, heads * nodes).index_select(0, (city + offset).flatten())
        return rows.view(batch, count, heads, nodes)

    def choose(scores: Tensor, step: int) -> Tensor:
        attention = torch.softmax(scores, -1).view(batch, count, heads * nodes)
        logits = torch.bmm(attention, found.likeness).tanh_().mul_(found.clipping).add_(barred)
        return (logits if noise is None else logits.add_(noise[:, :, step])).argmax(-1)

    city = start
    if city is None:
        scores = found.start.expand(-1, count, -1).reshape(batch, count, heads, nodes)
        city = choose(scores, 0)
    fixed = gathered(found.first, city)
    for step in range(1, nodes):
        tours[:, :, step - 1] = city
        barred.scatter_(2, city.unsqueeze(2), float("-inf"))
        fixed.scatter_(3, city[:, :, None, None].expand(-1, -1, heads, 1), float("-inf"))
        city = choose(gathered(found.last, city).add_(fixed), step)
    tours[:, :, -1] = city
    return tours


def gumbel(batch: int, tours: int, nodes: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
    """Noise for :func:`construct`."""
    # Of 0 it would be minus infinity, with which even the last city that is left would not be chosen.
    draws = torch.rand(batch, tours, nodes, nodes, generator=generator).clamp_(min=1e-9)
    return draws.log_().neg_().log_().neg_().to(device)


def _start(policy: AttentionPolicy, batch: int, tours: int, start: int | None, device: torch.device) -> Tensor | None:
    if start is None:
        if policy.chooses_start:
            return None
        start = 0
    return torch.full((batch, tours), start, device=device)


def _chunks(
    policy: AttentionPolicy, cities: Tensor, stream: Tensor | None, tours: int
) -> Iterator[tuple[slice, Tables]]:
    """Tables of as many instances at once as memory and caches like."""
    nodes = cities.shape[1]
    size = max(1, _CELLS // (nodes * nodes * (3 * policy.spec.heads + tours)))
    for begin in range(0, len(cities), size):
        part = slice(begin, begin + size)
        yield part, tables(policy, policy.encoder(cities[part]) if stream is None else stream[part])


@torch.no_grad()
def greedy(policy: AttentionPolicy, cities: Tensor, start: int | None = None, stream: Tensor | None = None) -> Tensor:
    """One tour per instance, ``[batch, 1, nodes]``, that goes to the likeliest city at every step.

    ``start``: its first city; None: the policy's own choice if it was trained to choose, else city 0. ``stream``: the
    encoder's output, if it is known or another one is wanted.
    """
    found = []
    for part, known in _chunks(policy, cities, stream, 1):
        found.append(construct(known, _start(policy, len(cities[part]), 1, start, cities.device)))
    return torch.cat(found)


@torch.no_grad()
def multistart(policy: AttentionPolicy, cities: Tensor, stream: Tensor | None = None) -> Tensor:
    """A greedy tour from each city, ``[batch, nodes, nodes]``."""
    nodes = cities.shape[1]
    start = torch.arange(nodes, device=cities.device)
    return torch.cat(
        [
            construct(known, start.expand(len(cities[part]), nodes))
            for part, known in _chunks(policy, cities, stream, nodes)
        ]
    )


@torch.no_grad()
def sample(
    policy: AttentionPolicy,
    cities: Tensor,
    samples: int,
    generator: torch.Generator,
    *,
    start: int | None = None,
    stream: Tensor | None = None,
) -> Tensor:
    """Tours as the policy draws them, ``[batch, samples, nodes]``. ``start``, ``stream``: see :func:`greedy`."""
    found = []
    for part, known in _chunks(policy, cities, stream, samples):
        noise = gumbel(len(cities[part]), samples, cities.shape[1], generator, cities.device)
        found.append(construct(known, _start(policy, len(noise), samples, start, cities.device), noise))
    return torch.cat(found)


def log_likelihood(
    policy: AttentionPolicy, cities: Tensor, tours: Tensor, *, chosen: bool | None = None, stream: Tensor | None = None
) -> Tensor:
    """Logarithm of the chance that the policy draws each tour, ``[batch, tours]``, all steps in one pass.

    ``chosen``: whether the first city is the policy's choice too (else it is given); None: if it was trained to choose.
    ``stream``: the encoder's output, if it is known.
    """
    known = tables(policy, policy.encoder(cities) if stream is None else stream)
    return tour_log_likelihood(known, tours, policy.chooses_start if chosen is None else chosen)


def tour_log_likelihood(known: Tables, tours: Tensor, chosen: bool) -> Tensor:
    """The same of an instance's tables."""
    batch, count, nodes = tours.shape
    heads, device = known.heads, tours.device
    offset = (torch.arange(batch, device=device) * nodes).view(-1, 1, 1)
    # The last step has one city left. An empty tour's query is none of those of two cities.
    rows = (tours[:, :, : nodes - 2] + offset).flatten()
    last = known.last.reshape(batch * nodes, -1).index_select(0, rows).view(batch, count, nodes - 2, heads, nodes)
    rows = (tours[:, :, 0] + offset[..., 0]).flatten()
    first = known.first.reshape(batch * nodes, -1).index_select(0, rows).view(batch, count, 1, heads, nodes)
    # In the tour before step k (from 1) are those with a place below k. Adding is faster than masking.
    place = torch.empty_like(tours).scatter_(2, tours, torch.arange(nodes, device=device).expand_as(tours))
    passed = place.unsqueeze(2) <= torch.arange(nodes - 2, device=device).unsqueeze(1)
    barred = torch.zeros(passed.shape, device=device).masked_fill_(passed, float("-inf"))
    # In place on a sum, not on what was gathered: that is a view, of which autograd would copy the whole.
    scores = (last + first).add_(barred.unsqueeze(3))
    attention = torch.softmax(scores, -1)
    likeness = torch.bmm(attention.view(batch, count * (nodes - 2), heads * nodes), known.likeness)
    logits = known.clipping * torch.tanh(likeness).view(batch, count, nodes - 2, nodes)
    chances = torch.log_softmax(logits.add_(barred), -1)
    total = chances.gather(3, tours[:, :, 1:-1, None]).sum((2, 3))
    if chosen:
        attention = torch.softmax(known.start.view(batch, 1, heads, nodes), -1).flatten(2)
        chances = torch.log_softmax(known.clipping * torch.tanh(attention @ known.likeness), -1)
        total = total + chances.squeeze(1).gather(1, tours[:, :, 0])
    return total
