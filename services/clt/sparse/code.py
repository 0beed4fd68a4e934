"""What features say of some rows, in the form that is cheapest: all numbers, or those of the active features alone.

The sparse form has kernels of its own on a CPU (:mod:`services.clt.sparse.kernels`): its products cost by active
features, forward and backward, and no array of rows by features is ever kept. Elsewhere, and where many features are
active, codes are dense and products are torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from services.clt.sparse import kernels

CHUNK = 512
"""Rows whose pre-activations are there at once: they stay in a core's cache."""
SPARSE_BELOW = 0.07
"""Share of active features up to which the sparse form is faster."""


class Pattern:
    """Which features are active, by rows: row ``i`` has ``cols[ptr[i]:ptr[i + 1]]``."""

    def __init__(self, ptr: kernels.Longs, cols: kernels.Ints, features: int) -> None:
        self.ptr, self.cols, self.features = ptr, cols, features
        self._by_feature: tuple[kernels.Longs, kernels.Longs, kernels.Ints] | None = None

    @property
    def by_feature(self) -> tuple[kernels.Longs, kernels.Longs, kernels.Ints]:
        """The same by features, see :func:`services.clt.sparse.kernels.by_feature`."""
        if self._by_feature is None:
            self._by_feature = kernels.by_feature(self.ptr, self.cols, self.features)
        return self._by_feature


class Code:
    """Values of features: dense ``[rows, features]``, or with a ``pattern`` those of its entries ``[entries]``.
    ``pre``: of a jumprelu, the pre-activations ``[rows, features]``."""

    def __init__(self, values: Tensor, pattern: Pattern | None = None, pre: Tensor | None = None) -> None:
        self.values, self.pattern, self.pre = values, pattern, pre

    @property
    def rows(self) -> int:
        """Rows."""
        return len(self.values) if self.pattern is None else len(self.pattern.ptr) - 1

    def decode(self, dictionary: Tensor) -> Tensor:
        """Code times ``dictionary`` ``[features, width]``: ``[rows, width]``."""
        if self.pattern is None:
            return self.values @ dictionary.to(self.values.dtype)
        found: Tensor = _Decode.apply(self.values, dictionary, self.pattern)  # type: ignore[no-untyped-call]
        return found

    def weighted(self, weights: Tensor) -> Tensor:
        """Sum of all values, each times its feature's weight (``[features]``)."""
        if self.pattern is None:
            return (self.values * weights).sum()
        return (self.values * weights[torch.from_numpy(self.pattern.cols).long()]).sum()

    def counts(self) -> Tensor:
        """In how many rows each feature is above 0, int64 ``[features]``."""
        if self.pattern is None:
            return (self.values > 0).sum(0)
        active = torch.from_numpy(self.pattern.cols)[self.values.detach() > 0]
        return torch.bincount(active, minlength=self.pattern.features)

    def dense(self) -> Tensor:
        """Values as ``[rows, features]``."""
        if self.pattern is None:
            return self.values
        out = self.values.new_zeros(self.rows, self.pattern.features)
        rows = torch.arange(self.rows).repeat_interleave(torch.from_numpy(np.diff(self.pattern.ptr)))
        # Rows with fewer active features have entries of value 0 at feature 0.
        return out.index_put((rows, torch.from_numpy(self.pattern.cols).long()), self.values, accumulate=True)

    def groups(self, size: int) -> Tensor:
        """Sum over rows and groups of ``size`` neighbouring features of the groups' norms."""
        values = self.dense()
        short = -values.shape[1] % size
        grouped = torch.nn.functional.pad(values, (0, short)).view(len(values), -1, size)
        return (grouped.square().sum(2) + 1e-12).sqrt().sum()


def top(inputs: Tensor, weight: Tensor, bias: Tensor, k: int, *, bfloat16: bool = False) -> Code:
    """The ``k`` largest pre-activations above 0 of each row, sparse. ``inputs`` ``[rows, width]``, ``weight``
    ``[features, width]``, ``bias`` ``[features]``; inputs get no gradient."""
    rows = len(inputs)
    cols, vals = np.empty((rows, k), np.int32), np.empty((rows, k), np.float32)
    for begin, pre in _pre_activations(inputs, weight, bias, bfloat16):
        end = begin + len(pre)
        _spread(kernels.largest, len(pre), pre, k, cols[begin:end], vals[begin:end])
    pattern = Pattern(np.arange(rows + 1, dtype=np.int64) * k, cols.ravel(), len(weight))
    return _coded(torch.from_numpy(vals.ravel()), inputs, weight, bias, pattern)


def above(inputs: Tensor, weight: Tensor, bias: Tensor, threshold: float, *, bfloat16: bool = False) -> Code:
    """The pre-activations above ``threshold`` (at least 0), sparse."""
    counts, cols, vals = [], [], []
    for _, pre in _pre_activations(inputs, weight, bias, bfloat16):
        active = pre > max(threshold, 0.0)
        counts.append(active.sum(1))
        cols.append(np.nonzero(active)[1].astype(np.int32))
        vals.append(pre[active])
    ptr = np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64)
    pattern = Pattern(ptr, np.concatenate(cols), len(weight))
    return _coded(torch.from_numpy(np.concatenate(vals)), inputs, weight, bias, pattern)


def batch_top(
    inputs: Tensor, weight: Tensor, bias: Tensor, k: int, *, guess: float, bfloat16: bool = False
) -> tuple[Code, float]:
    """The ``k`` x rows largest pre-activations above 0 of all rows together, sparse, and the least of them. ``guess``:
    a number that few more than these are expected to be above; a bad one costs time alone."""
    wanted = k * len(inputs)
    code = above(inputs, weight, bias, guess, bfloat16=bfloat16)
    if len(code.values) < wanted and guess > 0:
        code = above(inputs, weight, bias, 0.0, bfloat16=bfloat16)
    assert code.pattern is not None
    values = code.values.detach().numpy()
    if len(values) <= wanted:
        return code, float(values.min(initial=0.0))
    least = float(np.partition(values, len(values) - wanted)[len(values) - wanted])
    kept = values >= least
    running = np.concatenate([[0], np.cumsum(kept)])
    pattern = Pattern(running[code.pattern.ptr].astype(np.int64), code.pattern.cols[kept], len(weight))
    return _coded(torch.from_numpy(values[kept]), inputs, weight, bias, pattern), least


def _pre_activations(inputs: Tensor, weight: Tensor, bias: Tensor, bfloat16: bool) -> Any:
    """Where each chunk begins, and its pre-activations as an array that the next one overwrites."""
    with torch.no_grad():
        turned, buffer = weight.detach().T, torch.empty(min(CHUNK, len(inputs)), len(weight))
        halved = turned.bfloat16() if bfloat16 else None
        for begin in range(0, len(inputs), CHUNK):
            part = inputs[begin : begin + CHUNK]
            pre = buffer[: len(part)]
            if halved is not None:
                torch.add((part.bfloat16() @ halved).float(), bias.detach(), out=pre)
            else:
                torch.addmm(bias.detach(), part, turned, out=pre)
            yield begin, pre.numpy()


def _coded(values: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor, pattern: Pattern) -> Code:
    given: Tensor = _Encode.apply(values, inputs, weight, bias, pattern)  # type: ignore[no-untyped-call]
    return Code(given, pattern)


def _spread(kernel: Callable[..., None], count: int, *arguments: object) -> None:
    kernels.spread(kernel, count, torch.get_num_threads(), *arguments)


def _array(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().numpy()


class _Encode(torch.autograd.Function):
    """Values of entries that are known already, with their gradients for the encoder's parameters."""

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
        given = _array(gradients[0] * (values > 0))
        start, entry, row = ctx.pattern.by_feature
        weight, bias = np.empty(ctx.shape, np.float32), np.empty(ctx.shape[0], np.float32)
        _spread(kernels.gather, len(weight), start, entry, row, given, _array(inputs), weight)
        kernels.sums(start, entry, given, bias)
        return None, None, torch.from_numpy(weight), torch.from_numpy(bias), None


class _Decode(torch.autograd.Function):
    """A sparse code times a dictionary."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, dictionary: Tensor, pattern: Pattern) -> Tensor:
        ctx.pattern = pattern
        ctx.save_for_backward(values, dictionary)
        out = torch.zeros(len(pattern.ptr) - 1, dictionary.shape[1])
        arrays = pattern.ptr, pattern.cols, _array(values), _array(dictionary), out.numpy()
        _spread(kernels.decode, len(out), *arrays)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, dictionary = ctx.saved_tensors
        pattern, given = ctx.pattern, _array(gradients[0])
        by_value = by_word = None
        if ctx.needs_input_grad[0]:
            by_value = torch.empty_like(values)
            arrays = pattern.ptr, pattern.cols, given, _array(dictionary), by_value.numpy()
            _spread(kernels.products, len(given), *arrays)
        if ctx.needs_input_grad[1]:
            by_word = torch.empty_like(dictionary)
            _spread(kernels.gather, len(by_word), *pattern.by_feature, _array(values), given, by_word.numpy())
        return by_value, by_word, None
