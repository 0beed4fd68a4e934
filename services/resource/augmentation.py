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
        self.measured = torch.tensor([dimension.measured for dimension in dimensions])
        measured_numbers = self.numbers & self.measured
        # Without a measured number any number may be jittered.
        self.jittered = measured_numbers if bool(measured_numbers.any()) else self.numbers
        self.low = torch.tensor([dimension.low or 0.0 for dimension in dimensions], dtype=torch.float64)
        self.high = torch.tensor([dimension.high or 0.0 for dimension in dimensions], dtype=torch.float64)
        self.scale = 10.0 ** torch.tensor([dimension.decimals for dimension in dimensions], dtype=torch.float64)

    def draw(self, values: Tensor, generator: torch.Generator) -> Variants:
        """A variant of each row of ``values`` ``[batch, fields]``.

        A row with unknown fields is as the table has it: a number that was changed cannot be known from the others.
        """
        batch = len(values)
        masked = torch.rand(batch, generator=generator) < self.spec.mask
        if self.spec.jitters:
            chosen = torch.rand(batch, generator=generator) < self.spec.share
            values = self._jitter(values, chosen & ~masked, self.spec.jitter, generator)
        replaced = (torch.rand(batch, generator=generator) < self.spec.range) & ~masked
        anywhere = self._anywhere(values.shape, generator)
        values = self._rounded(torch.where(replaced.unsqueeze(1) & self.numbers, anywhere, values))
        return Variants(values, self.hide(batch, generator) & masked.unsqueeze(1))

    def view(self, values: Tensor, generator: torch.Generator) -> Tensor:
        """Another view of rows: measured numbers differ by up to :data:`VIEW`."""
        return self._rounded(self._jitter(values, torch.ones(len(values), dtype=torch.bool), VIEW, generator))

    def hide(self, batch: int, generator: torch.Generator) -> Tensor:
        """Fields that are not known, ``[batch, fields]``: in half of the rows those that are measured, in the others
        each but the tool with probability one half, and at least one."""
        fields = len(self.measured)
        unknown = torch.rand(batch, fields, generator=generator) < 0.5
        unknown[:, 0] = False
        empty = ~unknown.any(1)
        unknown[torch.arange(batch), torch.randint(1, fields, (batch,), generator=generator)] |= empty
        if not bool(self.measured.any()):
            return unknown
        half = torch.rand(batch, 1, generator=generator) < 0.5
        return torch.where(half, self.measured, unknown)

    def _anywhere(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Numbers from the declared ranges, ``shape`` ``[batch, fields]``: half uniform, half log-uniform, since of a
        wide range hardly any uniform number is small."""
        share = torch.rand(shape, generator=generator, dtype=torch.float64)
        # The smallest number above 0 that descriptions have.
        low, high = (end.maximum(1 / self.scale).log() for end in (self.low, self.high))
        logarithmic = torch.exp(low + (high - low) * share)
        uniform = self.low + (self.high - self.low) * share
        drawn = torch.where(torch.rand(shape, generator=generator) < 0.5, logarithmic, uniform)
        return torch.minimum(torch.maximum(drawn, self.low), self.high)

    def _jitter(self, values: Tensor, rows: Tensor, most: float, generator: torch.Generator) -> Tensor:
        exponent = 2 * torch.rand(values.shape, generator=generator, dtype=torch.float64) - 1
        factor = torch.exp(exponent * math.log1p(most))
        jittered = torch.minimum(torch.maximum(values * factor, self.low), self.high)
        return torch.where(rows.unsqueeze(1) & self.jittered, jittered, values)

    def _rounded(self, values: Tensor) -> Tensor:
        """Numbers with the decimals that descriptions have."""
        return torch.where(self.numbers, (values * self.scale).round() / self.scale, values)

    def alike(self, values: Tensor, unknown: Tensor) -> Tensor:
        """Which of the rows are the same to the encoder but for jitter, ``[batch, batch]``."""
        fixed = torch.cat([values.masked_fill(unknown, 0.0)[:, ~self.jittered], unknown], 1)
        return (fixed.unsqueeze(0) == fixed.unsqueeze(1)).all(-1)
