"""Integer hashing: randomness that depends on what is asked for, never on the order of asking."""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def mix(value: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele et al. 2014), elementwise on int64 ``value`` (any shape), wrapping."""
    value = value + _GOLDEN
    # torch shifts arithmetically; the masks make the shifts logical.
    value = (value ^ ((value >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    value = (value ^ ((value >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return value ^ ((value >> 31) & (2**33 - 1))


def below(hashed: Tensor, limit: Tensor) -> Tensor:
    """Hashes (int64, any shape) to integers in ``[0, limit)`` (int64, broadcast), for limits below 2^31."""
    return (((hashed >> 32) & (2**32 - 1)) * limit) >> 32


def hash_sequences(sequences: Tensor) -> Tensor:
    """One int64 hash per row of ``sequences`` ``[n, length]``."""
    state = torch.zeros(len(sequences), dtype=torch.int64)
    for column in sequences.unbind(1):
        state = mix(state ^ column)
    return state
