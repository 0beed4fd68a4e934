"""Estimates of unknown numbers from what is known of a row, so that a vector says them like any other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ethogram.specs.resource import MOST, DimensionSpec


class Completion(nn.Module):
    """An MLP from what is known of a row to the logarithm of each number: of ``log(1 + x)``, standardised over the
    training rows, what is known; an indicator of each label, and of what is unknown."""

    mean: Tensor
    deviation: Tensor

    def __init__(
        self, dimensions: Sequence[DimensionSpec], values: Tensor, hidden: int, generator: torch.Generator
    ) -> None:
        """``dimensions``: all fields, the tool among them; ``values``: of the training rows, ``[rows, fields]``."""
        super().__init__()
        self.fields = [(index, field) for index, field in enumerate(dimensions) if field.number]
        self.categories = [(index, len(field.labels)) for index, field in enumerate(dimensions) if not field.number]
        self._numbers = [index for index, _ in self.fields]
        logs = values[:, self._numbers].log1p()
        self.register_buffer("mean", logs.mean(0).float())
        self.register_buffer("deviation", logs.std(0, correction=0).clamp_min(1e-3).float())
        width = 2 * len(self.fields) + sum(labels for _, labels in self.categories)
        self.first, self.second = nn.Linear(width, hidden), nn.Linear(hidden, len(self.fields))
        nn.init.normal_(self.first.weight, std=width**-0.5, generator=generator)
        # At first an estimate is the mean.
        for parameter in (self.first.bias, self.second.weight, self.second.bias):
            nn.init.zeros_(parameter)

    def _inputs(self, values: Tensor, unknown: Tensor) -> Tensor:
        """What is known of vectors ``[batch, fields]``, on their device and in their precision."""
        hidden = unknown[:, self._numbers]
        # What is unknown must change nothing, not even as NaN.
        mean, deviation = (statistic.cpu().to(values) for statistic in (self.mean, self.deviation))
        logs = (self._logs(values) - mean) / deviation
        parts = [logs.masked_fill(hidden, 0.0), hidden.to(values)]
        for index, labels in self.categories:
            known = ~unknown[:, index]
            label = values[:, index].masked_fill(~known, 0.0).long()
            parts.append(nn.functional.one_hot(label, labels).to(values) * known.unsqueeze(1))
        return torch.cat(parts, 1)

    def _logs(self, values: Tensor) -> Tensor:
        return values[:, self._numbers].log1p()

    def loss(self, values: Tensor, unknown: Tensor) -> Tensor:
        """Mean squared error of the standardised logarithms of ``unknown`` numbers, a scalar. ``values`` and
        ``unknown``: ``[batch, fields]``, on the CPU."""
        device = self.mean.device
        inputs = self._inputs(values, unknown).float().to(device)
        wanted = (self._logs(values).float().to(device) - self.mean) / self.deviation
        hidden = unknown[:, self._numbers].to(device)
        estimates: Tensor = self.second(nn.functional.gelu(self.first(inputs)))
        return (estimates - wanted).square().masked_fill(~hidden, 0.0).sum() / hidden.sum().clamp_min(1)

    @torch.no_grad()
    def forward(self, values: Tensor, unknown: Tensor) -> Tensor:
        """``values`` ``[batch, fields]``, float64 on the CPU, with an estimate for each number that is ``unknown``, in
        its range and with its decimals."""
        if not self.fields or not bool(unknown[:, self._numbers].any()):
            return values
        # In float64, so that an estimate is rounded alike in every batch; not every device has it.
        states = nn.functional.gelu(_linear(self.first, self._inputs(values, unknown)))
        logs = _linear(self.second, states) * self.deviation.cpu().double() + self.mean.cpu().double()
        filled = values.clone()
        for place, (index, field) in enumerate(self.fields):
            scale = 10.0**field.decimals
            # Of a wide table the exponential may be anything.
            found = logs[:, place].clamp(0, 40).expm1().clamp(field.low or 0.0, field.high or float(MOST))
            filled[:, index] = torch.where(unknown[:, index], (found * scale).round() / scale, values[:, index])
        return filled


def _linear(layer: nn.Linear, inputs: Tensor) -> Tensor:
    """``layer`` on the CPU, in the precision of ``inputs``."""
    weight, bias = (parameter.cpu().to(inputs) for parameter in (layer.weight, layer.bias))
    return nn.functional.linear(inputs, weight, bias)
