"""Randomness: one seed, and a separate generator for each purpose."""

from __future__ import annotations

import hashlib
import json

import torch


def generator(seed: int, *path: str | int) -> torch.Generator:
    """A CPU generator for the purpose that ``path`` names, e.g. ``generator(spec.seed, "train", step)``.

    Generators of different seeds or paths are independent: their state comes from a hash of both, so adding a purpose
    changes no other, and a step's random numbers can be drawn again without replaying the steps before it.
    """
    digest = hashlib.sha256(json.dumps([seed, *path]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
