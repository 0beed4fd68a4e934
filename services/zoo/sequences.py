"""Sequences as text and back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ethogram.errors import InvalidInput


def to_letters(sequences: Tensor) -> list[str]:
    """Rows of letter indices ``[n, length]`` as words."""
    codes = (sequences.cpu().numpy() + ord("A")).astype(np.uint8)
    return [row.tobytes().decode("ascii") for row in codes]


def from_letters(words: Sequence[str], vocab_size: int, length: int, field: str = "sequences") -> Tensor:
    """Words as rows of letter indices, int64 ``[n, length]``. Raises :class:`InvalidInput` for a word of another
    vocabulary or length."""
    rows = []
    for i, word in enumerate(words):
        row = [ord(letter) - ord("A") for letter in word]
        if len(row) != length or not all(0 <= letter < vocab_size for letter in row):
            last = chr(ord("A") + vocab_size - 1)
            raise InvalidInput.field(f"{field}.{i}", f"{word[:40]!r} is no word of {length} letters A to {last}")
        rows.append(row)
    return torch.tensor(rows, dtype=torch.int64).view(-1, length)
