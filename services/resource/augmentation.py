"""Variants of rows for training: jittered numbers, numbers from the whole range, and unknown dimensions."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ethogram.specs.resource import AugmentationSpec
from services.resource.schema import Schema

VIEW = 0.05
"""How far the measured numbers of two views of a row differ at most, as a share."""


class Variants(NamedTuple):
    """Vectors as the encoder gets them, ``[batch, fields]``, and as their descriptions have them: the same."""

    values: Tensor
    unknown: Tensor
    """Which fields are not known to the encoder."""


class Augmenter:
    """Draws variants of rows."""

    def __init__(self, spec: AugmentationSpec, schema: Schema) -> None:
        dimensions = schema.dimensions
        self.spec = spec
        self.numbers = torch.tensor([dimension.number for dimension in dimensions])
        measured = torch.tensor([dimension.measured for dimension in dimensions])
        # Without a measured number any number may be jittered.
        self.jittered = self.numbers & measured if bool((self.numbers & measured).any()) else self.numbers
        self.maskable = measured.nonzero().flatten()
        self.low = torch.tensor([dimension.low or 0.0 for dimension in dimensions], dtype=torch.float64)
        self.high = torch.tensor([dimension.high or 0.0 for dimension in dimensions], dtype=torch.float64)
        self.scale = 10.0 ** torch.tensor([dimension.decimals for dimension in dimensions], dtype=torch.float64)

    def draw(self, values: Tensor, rng: torch.Generator) -> Variants:
        """A variant of each row of ``values`` ``[batch, fields]``."""
        batch = len(values)
        if self.spec.jitters:
            chosen = torch.rand(batch, generator=rng) < self.spec.share
            values = self._jitter(values, chosen, self.spec.jitter, rng)
        drawn = self.low + (self.high - self.low) * torch.rand(values.shape, generator=rng, dtype=torch.float64)
        anywhere = (torch.rand(batch, 1, generator=rng) < self.spec.range) & self.numbers
        values = self._rounded(torch.where(anywhere, drawn, values))
        unknown = torch.zeros_like(values, dtype=torch.bool)
        masked = torch.rand(batch, generator=rng) < self.spec.mask
        if len(self.maskable):
            column = self.maskable[torch.randint(len(self.maskable), (batch,), generator=rng)]
            # A number from the whole range cannot be known from the others.
            unknown[torch.arange(batch), column] = masked & ~anywhere.any(1)
        return Variants(values, unknown)

    def view(self, values: Tensor, rng: torch.Generator) -> Tensor:
        """Another view of rows: measured numbers differ by up to :data:`VIEW`."""
        return self._rounded(self._jitter(values, torch.ones(len(values), dtype=torch.bool), VIEW, rng))

    def _jitter(self, values: Tensor, rows: Tensor, most: float, rng: torch.Generator) -> Tensor:
        exponent = 2 * torch.rand(values.shape, generator=rng, dtype=torch.float64) - 1
        factor = torch.exp(exponent * math.log1p(most))
        jittered = torch.minimum(torch.maximum(values * factor, self.low), self.high)
        return torch.where(rows.unsqueeze(1) & self.jittered, jittered, values)

    def _rounded(self, values: Tensor) -> Tensor:
        """Numbers with the decimals that descriptions have."""
        return torch.where(self.numbers, (values * self.scale).round() / self.scale, values)

    def alike(self, values: Tensor) -> Tensor:
        """Which of the rows are the same but for jitter, ``[batch, batch]``."""
        fixed = values[:, ~self.jittered]
        return (fixed.unsqueeze(0) == fixed.unsqueeze(1)).all(-1)
