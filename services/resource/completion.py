"""Estimates of unknown fields from what is known of a row, so that a vector says them like any other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ethogram.specs.resource import MOST, DimensionSpec
from services.resource.schema import step


class Completion(nn.Module):
    """An MLP from what is known of a row to the logarithm of each number, and to the label of each category.

    What is known: of numbers ``log(1 + x)``, in steps of the last decimal and standardised over the training rows; of
    categories an indicator of each label; and of numbers what is unknown.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self, dimensions: Sequence[DimensionSpec], values: Tensor, hidden: int, generator: torch.Generator
    ) -> None:
        """``dimensions``: all fields, the tool first; ``values``: of the training rows, ``[rows, fields]``."""
        super().__init__()
        self.numbers = [(index, field) for index, field in enumerate(dimensions) if field.number]
        self.categories = [(index, len(field.labels)) for index, field in enumerate(dimensions) if not field.number]
        self._columns = [index for index, _ in self.numbers]
        self._steps = torch.tensor([step(field) for _, field in self.numbers], dtype=torch.float64)
        logs = self._logs(values)
        mean = logs.mean(0)
        self.register_buffer("mean", mean.float())
        self.register_buffer("deviation", (logs - mean).square().mean(0).sqrt().clamp_min(1e-3).float())
        width = 2 * len(self.numbers) + sum(count for _, count in self.categories)
        self._parts = [len(self.numbers), *(count for _, count in self.categories)]
        self.first, self.second = nn.Linear(width, hidden), nn.Linear(hidden, sum(self._parts))
        nn.init.normal_(self.first.weight, std=width**-0.5, generator=generator)
        # At first an estimate is the mean, and the first label.
        for parameter in (self.first.bias, self.second.weight, self.second.bias):
            nn.init.zeros_(parameter)

    def _inputs(self, values: Tensor, unknown: Tensor) -> Tensor:
        """What is known of vectors ``[batch, fields]`` on the CPU, float64."""
        hidden = unknown[:, self._columns]
        # What is unknown must change nothing, not even as NaN.
        logs = self._standardised(values).masked_fill(hidden, 0.0)
        parts = [logs, hidden.to(values)]
        for index, count in self.categories:
            known = ~unknown[:, index]
            label = values[:, index].masked_fill(~known, 0.0).long()
            parts.append(nn.functional.one_hot(label, count).to(values) * known.unsqueeze(1))
        return torch.cat(parts, 1)

    def _standardised(self, values: Tensor) -> Tensor:
        mean, deviation = (statistic.cpu().to(values) for statistic in (self.mean, self.deviation))
        return (self._logs(values) - mean) / deviation

    def _logs(self, values: Tensor) -> Tensor:
        return (values[:, self._columns] / self._steps).log1p()

    def loss(self, values: Tensor, unknown: Tensor) -> Tensor:
        """Mean error of the fields that are ``unknown``, a scalar: squared, of the standardised logarithm of a number,
        and the cross-entropy of a label. ``values`` and ``unknown``: ``[batch, fields]``, on the CPU."""
        device = self.mean.device
        states = nn.functional.gelu(self.first(self._inputs(values, unknown).float().to(device)))
        logs, *logits = torch.split(self.second(states), self._parts, 1)
        wanted, known = self._standardised(values).float().to(device), ~unknown[:, self._columns]
        errors = [(logs - wanted).square().masked_fill(known.to(device), 0.0).sum()]
        for (index, _), scores in zip(self.categories, logits, strict=True):
            label, known = values[:, index].long(), ~unknown[:, index]
            entropy = nn.functional.cross_entropy(scores, label.to(device), reduction="none")
            errors.append(entropy.masked_fill(known.to(device), 0.0).sum())
        return torch.stack(errors).sum() / max(1, int(unknown.sum()))

    @torch.no_grad()
    def forward(self, values: Tensor, unknown: Tensor) -> Tensor:
        """``values`` ``[batch, fields]``, float64 on the CPU, with an estimate of each field that is ``unknown``: the
        likeliest label; a number in its range and with its decimals, or the nearest of its levels."""
        if not bool(unknown.any()):
            return values
        # In float64, so that an estimate is rounded alike in every batch; not every device has it.
        states = nn.functional.gelu(_linear(self.first, self._inputs(values, unknown)))
        outputs, *logits = torch.split(_linear(self.second, states), self._parts, 1)
        logs = outputs * self.deviation.cpu().double() + self.mean.cpu().double()
        estimates = values.clone()
        for (index, field), log in zip(self.numbers, logs.T, strict=True):
            if field.levels and not field.measured:
                levels = torch.tensor(field.levels, dtype=torch.float64)
                distances = (log.unsqueeze(1) - (levels / step(field)).log1p()).abs()
                estimates[:, index] = levels[distances.argmin(1)]
                continue
            scale = 10.0**field.decimals
            # Of a wide table the exponential may be anything.
            found = (log.clamp(0, 40).expm1() * step(field)).clamp(field.low or 0.0, field.high or float(MOST))
            estimates[:, index] = (found * scale).round() / scale
        for (index, _), scores in zip(self.categories, logits, strict=True):
            estimates[:, index] = scores.argmax(1).double()
        return torch.where(unknown, estimates, values)


def _linear(layer: nn.Linear, inputs: Tensor) -> Tensor:
    """``layer`` on the CPU, in the precision of ``inputs``."""
    weight, bias = (parameter.cpu().to(inputs) for parameter in (layer.weight, layer.bias))
    return nn.functional.linear(inputs, weight, bias)
