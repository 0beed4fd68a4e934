"""Tours from a policy: greedy, sampled, from every city; and the log-likelihood of given tours.

The query of a tour is the sum of a term of its first city, a term of its last city, and a fixed term; it meets the same
keys at every step, and the glimpse is linear in the values. So every product of two cities' vectors is computed once
per instance, and a step gathers and adds.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from services.clt.policy.model import AttentionPolicy

_CELLS = 2**25
"""About how many numbers the tables of the instances decoded at once may have."""


class Tables(NamedTuple):
    """Products of the decoder's vectors of the cities of each instance, float32."""

    first: Tensor
    """Attention scores of all cities from the tour's first city and the fixed term, ``[batch, nodes, heads * nodes]``.
    """
    last: Tensor
    """Attention scores from the tour's last city, same shape."""
    start: Tensor
    """Attention scores of an empty tour, ``[batch, 1, heads * nodes]``."""
    compatibility: Tensor
    """What attention to a city (second axis, by head) adds to each city's compatibility, ``[batch, heads * nodes,
    nodes]``."""
    heads: int
    clipping: float


def tables(policy: AttentionPolicy, stream: Tensor) -> Tables:
    """Tables of the encoder's output ``[batch, nodes, width]``."""
    decoder = policy.decoder
    memory = decoder.memory(stream)
    batch, heads, _, depth = memory.key.shape

    def by_head(vectors: Tensor) -> Tensor:
        return vectors.reshape(batch, -1, heads, depth).transpose(1, 2)

    def scores(query: Tensor) -> Tensor:
        products = by_head(query) @ memory.key.transpose(2, 3) / math.sqrt(depth)
        return products.transpose(1, 2).flatten(2).float()

    # The projection of the glimpse moves to the other side of the comparison.
    compare = by_head(memory.compare @ decoder.out.weight)
    compatibility = (memory.value @ compare.transpose(2, 3)).flatten(1, 2).float() / math.sqrt(heads * depth)
    first, start = memory.first + memory.fixed, memory.start + memory.fixed
    return Tables(scores(first), scores(memory.last), scores(start), compatibility, heads, decoder.clipping)


@torch.no_grad()
def construct(known: Tables, start: Tensor | None, noise: Tensor | None = None) -> Tensor:
    """Build tours ``[batch, tours, nodes]``: each next city is the likeliest, or a sample with Gumbel ``noise``
    ``[batch, tours, nodes, nodes]`` (step, city).

    ``start``: the first city of each tour, ``[batch, tours]``; None: the policy's choice, in one tour per instance or
    as many as the noise is for.
    """
    batch, nodes = known.first.shape[:2]
    count = start.shape[1] if start is not None else 1 if noise is None else noise.shape[1]
    heads, device = known.heads, known.first.device
    tours = torch.empty(batch, count, nodes, dtype=torch.long, device=device)
    # Minus infinity where a city is in the tour.
    visited = torch.zeros(batch, count, nodes, device=device)
    offset = (torch.arange(batch, device=device) * nodes).unsqueeze(1)

    def gathered(table: Tensor, city: Tensor) -> Tensor:
        rows = table.reshape(batch * nodes, heads * nodes).index_select(0, (city + offset).flatten())
        return rows.view(batch, count, heads, nodes)

    def choose(scores: Tensor, step: int) -> Tensor:
        attention = torch.softmax(scores, -1).view(batch, count, heads * nodes)
        logits = torch.bmm(attention, known.compatibility).tanh_().mul_(known.clipping).add_(visited)
        return (logits if noise is None else logits.add_(noise[:, :, step])).argmax(-1)

    city = start
    if city is None:
        scores = known.start.expand(-1, count, -1).reshape(batch, count, heads, nodes)
        city = choose(scores, 0)
    fixed = gathered(known.first, city)
    for step in range(1, nodes):
        tours[:, :, step - 1] = city
        visited.scatter_(2, city.unsqueeze(2), float("-inf"))
        fixed.scatter_(3, city[:, :, None, None].expand(-1, -1, heads, 1), float("-inf"))
        city = choose(gathered(known.last, city).add_(fixed), step)
    tours[:, :, -1] = city
    return tours


def gumbel(batch: int, tours: int, nodes: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
    """Noise for :func:`construct`, ``[batch, tours, nodes, nodes]``."""
    # Noise of a uniform 0 would be minus infinity, with which even the last city left would not be chosen.
    uniform = torch.rand(batch, tours, nodes, nodes, generator=generator).clamp_(min=1e-9)
    return uniform.log_().neg_().log_().neg_().to(device)


def greedy(policy: AttentionPolicy, cities: Tensor, start: int | None = None, stream: Tensor | None = None) -> Tensor:
    """One tour per instance that goes to the likeliest city at every step, ``[batch, 1, nodes]``.

    ``start``: its first city; None: the policy's own choice if it was trained to choose, else city 0. ``stream``: the
    encoder's output ``[batch, nodes, width]``, if it is known or another one is wanted.
    """
    return _construct(policy, cities, 1, _first_city(policy, start), stream=stream)


def multistart(policy: AttentionPolicy, cities: Tensor, stream: Tensor | None = None) -> Tensor:
    """A greedy tour from each city, ``[batch, nodes, nodes]``. ``stream``: see :func:`greedy`."""
    return _construct(policy, cities, cities.shape[1], torch.arange(cities.shape[1]), stream=stream)


def sample(
    policy: AttentionPolicy,
    cities: Tensor,
    samples: int,
    generator: torch.Generator,
    *,
    start: int | None = None,
    stream: Tensor | None = None,
) -> Tensor:
    """Tours sampled from the policy, ``[batch, samples, nodes]``. ``start``, ``stream``: see :func:`greedy`."""
    return _construct(policy, cities, samples, _first_city(policy, start), stream=stream, generator=generator)


def _first_city(policy: AttentionPolicy, start: int | None) -> Tensor | None:
    """The first city of all tours; None: each tour's is the policy's choice."""
    return None if start is None and policy.chooses_start else torch.tensor([start or 0])


@torch.no_grad()
def _construct(
    policy: AttentionPolicy,
    cities: Tensor,
    count: int,
    start: Tensor | None,
    *,
    stream: Tensor | None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``count`` tours of each instance, for as many instances at a time as fit into :data:`_CELLS`."""
    nodes = cities.shape[1]
    size = max(1, _CELLS // (nodes * nodes * (3 * policy.spec.heads + count)))
    tours = []
    for begin in range(0, len(cities), size):
        chunk = slice(begin, begin + size)
        known = tables(policy, policy.encoder(cities[chunk]) if stream is None else stream[chunk])
        batch = len(known.first)
        first = None if start is None else start.to(cities.device).expand(batch, count)
        noise = None if generator is None else gumbel(batch, count, nodes, generator, cities.device)
        tours.append(construct(known, first, noise))
    return torch.cat(tours)


def log_likelihood(known: Tables, tours: Tensor, chooses_start: bool) -> Tensor:
    """Log-probability of sampling each tour, ``[batch, tours]``, all steps in one pass.

    ``chooses_start``: whether the first city is the policy's choice too; otherwise it is given.
    """
    batch, count, nodes = tours.shape
    heads, device = known.heads, tours.device
    offset = (torch.arange(batch, device=device) * nodes).view(-1, 1, 1)
    # The last step has one city left. An empty tour's query is none of those of two cities.
    rows = (tours[:, :, : nodes - 2] + offset).flatten()
    last = known.last.reshape(batch * nodes, -1).index_select(0, rows).view(batch, count, nodes - 2, heads, nodes)
    rows = (tours[:, :, 0] + offset[..., 0]).flatten()
    first = known.first.reshape(batch * nodes, -1).index_select(0, rows).view(batch, count, 1, heads, nodes)
    # Before step k (from 1) the tour has the cities whose position is below k. Adding is faster than masking.
    position = torch.empty_like(tours).scatter_(2, tours, torch.arange(nodes, device=device).expand_as(tours))
    passed = position.unsqueeze(2) <= torch.arange(nodes - 2, device=device).unsqueeze(1)
    visited = torch.zeros(passed.shape, device=device).masked_fill_(passed, float("-inf"))
    # In place on a sum, not on what was gathered: that is a view, of which autograd would copy the whole.
    scores = (last + first).add_(visited.unsqueeze(3))
    attention = torch.softmax(scores, -1).view(batch, count * (nodes - 2), heads * nodes)
    compatibility = torch.bmm(attention, known.compatibility)
    logits = known.clipping * torch.tanh(compatibility).view(batch, count, nodes - 2, nodes)
    log_probabilities = torch.log_softmax(logits.add_(visited), -1)
    total = log_probabilities.gather(3, tours[:, :, 1:-1, None]).sum((2, 3))
    if chooses_start:
        attention = torch.softmax(known.start.view(batch, 1, heads, nodes), -1).flatten(2)
        logits = known.clipping * torch.tanh(attention @ known.compatibility)
        total = total + torch.log_softmax(logits, -1).squeeze(1).gather(1, tours[:, :, 0])
    return total
