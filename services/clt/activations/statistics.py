"""Statistics of the rows at a hook point, updated batch by batch (Chan, Golub and LeVeque 1983, The American
Statistician 37)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from services.runtime.devices import double

WIDEST = 2048
"""Widest hook point whose covariance is kept."""
# Rows that are in double precision at once.
_ROWS = 4096


class Statistics:
    """Means and squared deviations in float64.

    The covariance is the sum of float32 products of rows less the mean of their batch, accumulated in float64.
    """

    def __init__(self, width: int, device: str = "cpu") -> None:
        self.rows, self.device = 0, device
        self.mean, self.squares = torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
        """``[d]``; ``squares``: sums of squared deviations from the mean."""
        self.sums = torch.zeros(3, dtype=torch.float64)
        """Sums of squared norms, of norms, and of the numbers of zeros."""
        self.scatter = torch.zeros(width, width, dtype=torch.float64) if width <= WIDEST else None

    def add(self, rows: Tensor) -> None:
        """Add rows ``[rows, d]`` of any precision."""
        for start in range(0, len(rows), _ROWS):
            values = double(rows[start : start + _ROWS].to(self.device))
            count, mean = len(values), values.mean(0)
            centred = values - mean
            norms = values.square().sum(1)
            shift, total = mean.cpu() - self.mean, self.rows + count
            weight = self.rows * count / total
            self.squares += centred.square().sum(0).cpu() + shift.square() * weight
            if self.scatter is not None:
                self.scatter += (centred.float().T @ centred.float()).cpu().double()
                self.scatter.addr_(shift, shift, alpha=weight)
            self.mean += shift * (count / total)
            self.sums += torch.stack([norms.sum(), norms.sqrt().sum(), (values == 0).sum()]).cpu()
            self.rows = total

    @property
    def std(self) -> Tensor:
        """The root of the mean squared deviation, ``[d]``."""
        return (self.squares / max(self.rows, 1)).sqrt()

    @property
    def covariance(self) -> Tensor | None:
        """``[d, d]``, divided by the number of rows; None for hook points wider than :data:`WIDEST`."""
        return None if self.scatter is None else self.scatter / max(self.rows, 1)

    @property
    def square_norm(self) -> float:
        """Mean squared norm of the rows."""
        return float(self.sums[0] / max(self.rows, 1))

    @property
    def norm(self) -> float:
        """Mean norm of the rows."""
        return float(self.sums[1] / max(self.rows, 1))

    @property
    def zeros(self) -> float:
        """Share of the numbers that are exactly 0."""
        return float(self.sums[2] / max(self.rows, 1)) / len(self.mean)

    def tensors(self) -> dict[str, Tensor]:
        """The state as tensors; :meth:`of` restores it."""
        state = {"rows": torch.tensor(self.rows), "mean": self.mean, "squares": self.squares, "sums": self.sums}
        state |= {"std": self.std, "square_norm": torch.tensor(self.square_norm, dtype=torch.float64)}
        return state if self.scatter is None else state | {"scatter": self.scatter}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], device: str = "cpu") -> Statistics:
        """Statistics from what :meth:`tensors` returned."""
        statistics = cls(0, device)
        statistics.rows, statistics.mean = int(tensors["rows"]), tensors["mean"]
        statistics.squares, statistics.sums = tensors["squares"], tensors["sums"]
        statistics.scatter = tensors.get("scatter")
        return statistics
