"""Feature activations of a batch of rows, dense or sparse, whichever is cheaper.

On a CPU the sparse form has its own kernels (:mod:`services.clt.sparse.kernels`): the cost of its products, forward and
backward, grows with the active features, and no array of rows by features is kept. Elsewhere, and where many features
are active, codes are dense and products are torch's.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from services.clt.sparse import kernels
from services.runtime.parallel import ALONE, World

CHUNK = 512
"""Rows whose pre-activations are computed at once, so that they stay in a core's cache."""
SPARSE_BELOW = 0.07
"""Share of active features below which the sparse form is faster."""


class Pattern:
    """Which features are active, by rows: row ``i`` has ``cols[ptr[i]:ptr[i + 1]]``."""

    def __init__(self, ptr: kernels.Longs, cols: kernels.Ints, features: int) -> None:
        self.ptr, self.cols, self.features = ptr, cols, features

    @cached_property
    def by_feature(self) -> tuple[kernels.Longs, kernels.Longs, kernels.Ints]:
        """The same by features, see :func:`services.clt.sparse.kernels.by_feature`."""
        by_feature: tuple[kernels.Longs, kernels.Longs, kernels.Ints]
        by_feature = kernels.by_feature(self.ptr, self.cols, self.features)
        return by_feature


class Code:
    """Feature activations: dense ``[rows, features]``, or with a ``pattern`` those of its entries, ``[entries]``.
    ``pre``: the pre-activations of a jumprelu, ``[rows, features]``."""

    def __init__(self, values: Tensor, pattern: Pattern | None = None, pre: Tensor | None = None) -> None:
        self.values, self.pattern, self.pre = values, pattern, pre

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.values) if self.pattern is None else len(self.pattern.ptr) - 1

    def decode(self, decoder: Tensor) -> Tensor:
        """Code times ``decoder`` ``[features, width]``: ``[rows, width]``."""
        if self.pattern is None:
            return self.values @ decoder.to(self.values.dtype)
        output: Tensor = _Decode.apply(self.values, decoder, self.pattern)  # type: ignore[no-untyped-call]
        return output

    def weighted(self, weights: Tensor) -> Tensor:
        """Sum of all activations, each times its feature's weight (``[features]``)."""
        if self.pattern is None:
            return (self.values * weights).sum()
        return (self.values * weights[torch.from_numpy(self.pattern.cols).long()]).sum()

    def counts(self) -> Tensor:
        """Number of rows in which each feature is active, int64 ``[features]``."""
        if self.pattern is None:
            return (self.values > 0).sum(0)
        active = torch.from_numpy(self.pattern.cols)[self.values.detach() > 0]
        return torch.bincount(active, minlength=self.pattern.features)

    def dense(self) -> Tensor:
        """Activations as ``[rows, features]``."""
        if self.pattern is None:
            return self.values
        out = self.values.new_zeros(self.rows, self.pattern.features)
        rows = torch.arange(self.rows).repeat_interleave(torch.from_numpy(np.diff(self.pattern.ptr)))
        # Rows with fewer active features have entries of value 0 at feature 0.
        return out.index_put((rows, torch.from_numpy(self.pattern.cols).long()), self.values, accumulate=True)

    def groups(self, size: int) -> Tensor:
        """Norms of groups of ``size`` neighbouring features, summed over groups and rows."""
        values = self.dense()
        short = -values.shape[1] % size
        grouped = torch.nn.functional.pad(values, (0, short)).view(len(values), -1, size)
        return (grouped.square().sum(2) + 1e-12).sqrt().sum()


def top(inputs: Tensor, weight: Tensor, bias: Tensor, k: int, *, bfloat16: bool = False) -> Code:
    """The ``k`` largest pre-activations above 0 of each row, sparse; a row with a NaN has one. ``inputs`` ``[rows,
    width]``, ``weight`` ``[features, width]``, ``bias`` ``[features]``; inputs get no gradient."""
    rows = len(inputs)
    cols, vals = np.empty((rows, k), np.int32), np.empty((rows, k), np.float32)
    for begin, pre, nan in _pre_activations(inputs, weight, bias, bfloat16):
        end = begin + len(pre)
        kernels.spread(kernels.largest, len(pre), pre, k, cols[begin:end], vals[begin:end])
        if nan is not None:
            vals[begin:end, 0][nan.any(1)] = np.nan
    pattern = Pattern(np.arange(rows + 1, dtype=np.int64) * k, cols.ravel(), len(weight))
    return _coded(torch.from_numpy(vals.ravel()), inputs, weight, bias, pattern)


def above(inputs: Tensor, weight: Tensor, bias: Tensor, threshold: float, *, bfloat16: bool = False) -> Code:
    """The pre-activations above ``threshold`` (at least 0) or NaN, sparse."""
    counts, cols, vals = [], [], []
    for _, pre, nan in _pre_activations(inputs, weight, bias, bfloat16):
        active = pre > max(threshold, 0.0)
        if nan is not None:
            active |= nan
        counts.append(active.sum(1))
        cols.append(np.nonzero(active)[1].astype(np.int32))
        vals.append(pre[active])
    ptr = np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64)
    pattern = Pattern(ptr, np.concatenate(cols), len(weight))
    return _coded(torch.from_numpy(np.concatenate(vals)), inputs, weight, bias, pattern)


def batch_top(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor,
    k: int,
    *,
    guess: float,
    bfloat16: bool = False,
    world: World = ALONE,
) -> tuple[Code, float]:
    """The ``k`` x rows largest pre-activations above 0 of all rows of all processes together, sparse, and the least of
    them. ``guess``: a threshold that few more than these are expected to exceed; a bad one only costs time."""
    for threshold in dict.fromkeys((max(guess, 0.0), 0.0)):
        code = above(inputs, weight, bias, threshold, bfloat16=bfloat16)
        count, found = totals(k * len(inputs), len(code.values), device=inputs.device, world=world)
        if found >= count:
            break
    else:
        return code, 0.0
    assert code.pattern is not None
    least = kth_largest(code.values.detach(), count, world)
    values = code.values.detach().numpy()
    # A NaN is kept.
    kept = ~(values < least)
    running = np.concatenate([[0], np.cumsum(kept)])
    pattern = Pattern(running[code.pattern.ptr].astype(np.int64), code.pattern.cols[kept], len(weight))
    return _coded(torch.from_numpy(values[kept]), inputs, weight, bias, pattern), least


def totals(*numbers: int, device: torch.device, world: World) -> list[int]:
    """The sum of each number over the processes."""
    sums = torch.tensor(numbers, device=device)
    world.add([sums])
    return [int(total) for total in sums.tolist()]


def kth_largest(values: Tensor, k: int, world: World) -> float:
    """The ``k``-th largest of the ``values`` of all processes; NaN counts as the largest number."""
    if world.size > 1:
        values = world.gather(values if len(values) <= k else values.topk(k, sorted=False).values)
    if values.device.type == "cpu":
        # In half the time.
        return float(np.partition(values.numpy(), len(values) - k)[len(values) - k])
    return float(values.topk(k, sorted=False).values.min())


def _pre_activations(
    inputs: Tensor, weight: Tensor, bias: Tensor, bfloat16: bool
) -> Iterator[tuple[int, kernels.Floats, Any]]:
    """The first row of each chunk, the chunk's pre-activations in an array that the next one overwrites, and which of
    them are NaN (None: none)."""
    with torch.no_grad():
        transposed, buffer = weight.detach().T, torch.empty(min(CHUNK, len(inputs)), len(weight))
        half = transposed.bfloat16() if bfloat16 else None
        for begin in range(0, len(inputs), CHUNK):
            chunk = inputs[begin : begin + CHUNK]
            pre = buffer[: len(chunk)]
            if half is not None:
                torch.add((chunk.bfloat16() @ half).float(), bias.detach(), out=pre)
            else:
                torch.addmm(bias.detach(), chunk, transposed, out=pre)
            # The sum is NaN where a number is, and cheaper than a look at each.
            yield begin, pre.numpy(), pre.isnan().numpy() if bool(pre.sum().isnan()) else None


def _coded(values: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor, pattern: Pattern) -> Code:
    return Code(_Encode.apply(values, inputs, weight, bias, pattern), pattern)  # type: ignore[no-untyped-call]


def _array(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().numpy()


class _Encode(torch.autograd.Function):
    """Activations that are known already, with gradients for the encoder's parameters."""

    @staticmethod
    def forward(  # noqa: PLR0917 (apply takes them by place)
        ctx: Any, values: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor, pattern: Pattern
    ) -> Tensor:
        ctx.pattern, ctx.shape = pattern, weight.shape
        ctx.save_for_backward(values, inputs)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, inputs = ctx.saved_tensors
        gradient = _array(gradients[0] * (values > 0))
        start, entry, row = ctx.pattern.by_feature
        weight, bias = np.empty(ctx.shape, np.float32), np.empty(ctx.shape[0], np.float32)
        kernels.spread(kernels.gather, len(weight), start, entry, row, gradient, _array(inputs), weight)
        kernels.sums(start, entry, gradient, bias)
        return None, None, torch.from_numpy(weight), torch.from_numpy(bias), None


class _Decode(torch.autograd.Function):
    """A sparse code times a decoder ``[features, width]``."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, decoder: Tensor, pattern: Pattern) -> Tensor:
        ctx.pattern = pattern
        ctx.save_for_backward(values, decoder)
        out = torch.zeros(len(pattern.ptr) - 1, decoder.shape[1])
        arrays = pattern.ptr, pattern.cols, _array(values), _array(decoder), out.numpy()
        kernels.spread(kernels.decode, len(out), *arrays)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, decoder = ctx.saved_tensors
        pattern, gradient = ctx.pattern, _array(gradients[0])
        to_values = to_decoder = None
        if ctx.needs_input_grad[0]:
            to_values = torch.empty_like(values)
            arrays = pattern.ptr, pattern.cols, gradient, _array(decoder), to_values.numpy()
            kernels.spread(kernels.products, len(gradient), *arrays)
        if ctx.needs_input_grad[1]:
            to_decoder = torch.empty_like(decoder)
            arrays = *pattern.by_feature, _array(values), gradient, to_decoder.numpy()
            kernels.spread(kernels.gather, len(to_decoder), *arrays)
        return to_values, to_decoder, None
