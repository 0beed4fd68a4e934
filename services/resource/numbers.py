"""Features of the numbers and categories of a vector.

``digits``: those of ``fourier``, and an indicator for each character of the number as descriptions write it, from the
left; a language model writes from the left too, and which digit comes first depends on how long the number is.
``fourier``: sine and cosine of 2 pi x / 10^i, a pair for each decimal digit of the declared range, and log(1 + x). The
pair of a digit says it exactly, wherever the others are (FoNE, arXiv 2502.09741). ``xval``: the number itself scales a
direction (arXiv 2310.02989). ``zscore``: standardised over the table. ``raw``: as it is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ethogram.specs.resource import MOST, DimensionSpec
from services.resource.texts import number_text

Form = Literal["digits", "fourier", "zscore", "xval", "raw"]
CHARACTERS = 11
"""Ten digits and the point."""
XVAL_RANGE = 5.0
"""What the greatest number of a range becomes, as in the paper."""


class Features(nn.Module):
    """The features of a vector without its tool, ``[batch, width]``.

    Each dimension has a block: a number's features, or one indicator for each label; and an indicator that the value is
    unknown, and an estimate.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, form: Form, dimensions: Sequence[DimensionSpec], values: Tensor) -> None:
        """``values``: those of the training rows, ``[rows, dimensions]``, which ``zscore`` standardises by."""
        super().__init__()
        self.form, self.dimensions = form, tuple(dimensions)
        # In float32, since not every device has float64; the features are computed on the CPU.
        self.register_buffer("mean", values.mean(0).float())
        self.register_buffer("deviation", values.std(0, correction=0).clamp_min(1e-6).float())
        widths = [self._width(dimension) for dimension in self.dimensions]
        ends = list(itertools.accumulate(width + 1 for width in widths))
        self.width = ends[-1]
        self.columns = [slice(end - 1 - width, end - 1) for width, end in zip(widths, ends, strict=True)]
        """Those of each dimension, without that of what is unknown; the characters of a number are the last."""

    def _width(self, dimension: DimensionSpec) -> int:
        if not dimension.number:
            return len(dimension.labels)
        pairs = 2 * len(periods(dimension)) + 1
        match self.form:
            case "digits":
                return pairs + CHARACTERS * places(dimension)
            case "fourier":
                return pairs
            case _:
                return 1

    def forward(self, values: Tensor, unknown: Tensor) -> Tensor:
        """``values``: ``[batch, dimensions]``, float64 on the CPU; ``unknown``: which of them are estimates, of the
        same shape. The features are float32 on the CPU."""
        blocks = []
        for index, dimension in enumerate(self.dimensions):
            block = self._block(index, dimension, values[:, index])
            blocks += [block.float(), unknown[:, index : index + 1].float()]
        return torch.cat(blocks, 1)

    def _block(self, index: int, dimension: DimensionSpec, value: Tensor) -> Tensor:
        if not dimension.number:
            return nn.functional.one_hot(value.long(), len(dimension.labels)).to(value)
        column = value.unsqueeze(1)
        match self.form:
            case "digits":
                written = characters(value, dimension.decimals, places(dimension))
                # A blank is none of the characters.
                indicators = written.unsqueeze(2) == torch.arange(CHARACTERS)
                return torch.cat([_pairs(column, dimension), indicators.flatten(1).to(value)], 1)
            case "fourier":
                return _pairs(column, dimension)
            case "zscore":
                return (column - float(self.mean[index])) / float(self.deviation[index])
            case "xval":
                return column / (dimension.high or 1.0) * XVAL_RANGE
            case "raw":
                return column


def _pairs(column: Tensor, dimension: DimensionSpec) -> Tensor:
    # Angles of the rounded number: descriptions have no more digits.
    scale = 10.0**dimension.decimals
    angle = 2 * math.pi * (column * scale).round() / scale / column.new_tensor(periods(dimension))
    return torch.cat([angle.sin(), angle.cos(), column.log1p() / math.log(10)], 1)


def characters(value: Tensor, decimals: int, places: int) -> Tensor:
    """Characters of numbers ``[batch]`` as descriptions write them, from the left, ``[batch, places]``: 0 to 9, 10 for
    the point, 11 for a blank. Of a longer number the rest is left out."""
    scaled = (value * 10.0**decimals).round().long().unsqueeze(1)
    powers = 10 ** torch.arange(18)
    digits = scaled // powers % 10
    count = (scaled >= powers).sum(1, keepdim=True).clamp_min(decimals + 1)
    place, whole = torch.arange(places), count - decimals
    is_point = (place == whole) if decimals else torch.zeros(1, dtype=torch.bool)
    behind = (place > whole).long() if decimals else torch.zeros(1, dtype=torch.long)
    index = count - 1 - (place - behind)
    found = digits.gather(1, index.clamp(0, 17)).masked_fill(is_point, 10)
    return found.masked_fill(index < 0, CHARACTERS)


def places(dimension: DimensionSpec) -> int:
    """Characters of twice the greatest number of a range, as a template has slots for."""
    return len(number_text(min(2 * max(dimension.high or 1.0, 1.0), MOST), dimension.decimals))


def periods(dimension: DimensionSpec) -> list[float]:
    """Ten times the place value of each digit of a number, from its last decimal to twice its range."""
    digits = math.ceil(math.log10(2 * max(dimension.high or 1.0, 1.0) + 1))
    return [10.0**power for power in range(1 - dimension.decimals, digits + 1)]
