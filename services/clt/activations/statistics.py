"""Moments of rows, added part by part (Chan, Golub and LeVeque 1983, The American Statistician 37)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WIDEST = 2048
"""Widest point whose covariance is kept."""
# Rows that are in double precision at once.
_ROWS = 4096


@dataclass(frozen=True)
class Statistics:
    """Of the training rows at one hook point, in float64."""

    rows: int
    mean: Tensor
    """``[d]``."""
    std: Tensor
    """``[d]``; the root of the mean squared deviation."""
    square_norm: float
    """Mean squared norm of the rows."""
    norm: float
    """Mean norm of the rows."""
    zeros: float
    """Share of the numbers that are exactly 0."""
    covariance: Tensor | None
    """``[d, d]``, divided by the rows; None for points wider than :data:`WIDEST`."""


class Moments:
    """Sums from which :class:`Statistics` follow.

    Means and squared deviations are in float64. The products of the covariance are of float32, of rows less the mean of
    their part, and summed in float64.
    """

    def __init__(self, width: int, device: str = "cpu") -> None:
        # A GPU of Apple has no float64.
        self.rows, self.device = 0, "cpu" if device == "mps" else device
        self.mean, self.squares = torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
        # Sums of squared norms, of norms and of zeros.
        self.sums = torch.zeros(3, dtype=torch.float64)
        self.scatter = torch.zeros(width, width, dtype=torch.float64) if width <= WIDEST else None

    def add(self, rows: Tensor) -> None:
        """Add rows ``[rows, d]`` of any precision."""
        for start in range(0, len(rows), _ROWS):
            values = rows[start : start + _ROWS].to(self.device).double()
            count, mean = len(values), values.mean(0)
            centred = values - mean
            norms = values.square().sum(1)
            sums = torch.stack([norms.sum(), norms.sqrt().sum(), (values == 0).sum()])
            scatter = (centred.float().T @ centred.float()).cpu().double() if self.scatter is not None else None
            self._merge(count, mean.cpu(), centred.square().sum(0).cpu(), sums.cpu(), scatter)

    def _merge(self, count: int, mean: Tensor, squares: Tensor, sums: Tensor, scatter: Tensor | None) -> None:
        total = self.rows + count
        apart, share = mean - self.mean, self.rows * count / total
        self.squares += squares + apart.square() * share
        if self.scatter is not None and scatter is not None:
            self.scatter += scatter
            self.scatter.addr_(apart, apart, alpha=share)
        self.mean += apart * (count / total)
        self.sums += sums
        self.rows = total

    def tensors(self) -> dict[str, Tensor]:
        """The state, to save it; :meth:`of` restores it."""
        found = {"rows": torch.tensor(self.rows), "mean": self.mean, "squares": self.squares, "sums": self.sums}
        found["std"] = (self.squares / max(self.rows, 1)).sqrt()
        found["square_norm"] = self.sums[0] / max(self.rows, 1)
        return found if self.scatter is None else found | {"scatter": self.scatter}

    @classmethod
    def of(cls, tensors: dict[str, Tensor], device: str = "cpu") -> Moments:
        """Moments from what :meth:`tensors` returned."""
        found = cls(0, device)
        found.rows, found.mean, found.squares = int(tensors["rows"]), tensors["mean"], tensors["squares"]
        found.sums, found.scatter = tensors["sums"], tensors.get("scatter")
        return found

    @property
    def statistics(self) -> Statistics:
        """The statistics of all rows so far."""
        rows, width = max(self.rows, 1), len(self.mean)
        square_norm, norm, zeros = (self.sums / rows).tolist()
        covariance = None if self.scatter is None else self.scatter / rows
        std = (self.squares / rows).sqrt()
        return Statistics(self.rows, self.mean, std, square_norm, norm, zeros / max(width, 1), covariance)
