"""Sparse codes on a CPU: the largest values of each row, and products that touch active features alone.

A code is kept by rows: row ``i`` has the entries ``ptr[i]`` to ``ptr[i + 1]`` of ``cols`` (features) and ``vals``. The
backward pass needs it by features too, which :func:`by_feature` finds once for all products. All numbers are float32
and all arrays contiguous. A kernel does the rows, or features, from ``begin`` to before ``end``: :func:`spread` divides
all of them between threads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit
from numba.core.caching import FunctionCache
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
Longs = NDArray[np.int64]


class _FileCache(FunctionCache):
    """What numba has compiled, in files. Where they cannot be read or written, each process compiles for itself."""

    def load_overload(self, *arguments: Any) -> Any:
        with self._best_effort():
            return super().load_overload(*arguments)  # type: ignore[no-untyped-call]
        return None

    def save_overload(self, *arguments: Any) -> None:
        with self._best_effort():
            super().save_overload(*arguments)  # type: ignore[no-untyped-call]

    @contextmanager
    def _best_effort(self) -> Iterator[None]:
        try:
            yield
        # Of a damaged file, unpickling raises anything.
        except Exception as error:
            _warn(f"{self.cache_path} cannot be used ({error})")
            self.disable()  # type: ignore[no-untyped-call]


@cache
def _warn(reason: str) -> None:
    logger.warning("%s: the kernels are compiled again. Name a folder in NUMBA_CACHE_DIR", reason)


def _compile(**options: Any) -> Callable[[Any], Any]:
    def compiled(function: Any) -> Any:
        kernel = njit(nogil=True, **options)(function)
        try:
            kernel._cache = _FileCache(function)  # type: ignore[no-untyped-call]
        # There is no folder that can be written.
        except (RuntimeError, OSError) as error:
            _warn(str(error))
        return kernel

    return compiled


# Not all of fast mathematics: a NaN must stay one.
_products = _compile(fastmath={"reassoc", "contract", "nsz", "arcp", "afn"})
# Sorting: fast mathematics may assume that no number is NaN, and then overruns an array where one is.
_ordering = _compile()

_PARTS = 4
"""Parts of the work per thread, as they take unequal times."""


def spread(kernel: Callable[..., None], count: int, *arguments: object) -> None:
    """Call ``kernel`` for the rows 0 to ``count``, on as many threads as torch has.

    Numba's own threads wait for each other by spinning, as torch's do: on a busy machine a step then takes ten times as
    long.
    """
    threads = torch.get_num_threads()
    if threads == 1 or count < 2 * threads:
        kernel(0, count, *arguments)
        return
    parts = threads * _PARTS
    borders = [count * part // parts for part in range(parts + 1)]
    list(_pool(threads).map(lambda part: kernel(borders[part], borders[part + 1], *arguments), range(parts)))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "kernels")


@_ordering
def _keep_largest(vals: Floats, cols: Ints, count: int, k: int) -> None:  # pragma: no cover
    """Bring the ``k`` largest of the first ``count`` numbers to the front (Hoare 1961, quickselect)."""
    left, right = 0, count - 1
    while left < right:
        pivot = vals[(left + right) // 2]
        i, j = left, right
        while i <= j:
            while vals[i] > pivot:
                i += 1
            while vals[j] < pivot:
                j -= 1
            if i <= j:
                vals[i], vals[j] = vals[j], vals[i]
                cols[i], cols[j] = cols[j], cols[i]
                i += 1
                j -= 1
        if k - 1 <= j:
            right = j
        elif k - 1 >= i:
            left = i
        else:
            return


@_ordering
def largest(begin: int, end: int, pre: Floats, k: int, cols: Ints, vals: Floats) -> None:  # pragma: no cover
    """The ``k`` largest numbers above 0 of each row of ``pre`` ``[rows, features]`` into ``cols`` and ``vals`` ``[rows,
    k]``; where there are fewer, the rest has the value 0."""
    features, room = pre.shape[1], 4 * k
    kept, where = np.empty(room, np.float32), np.empty(room, np.int32)
    for i in range(begin, end):
        count, least = 0, np.float32(0)
        for j in range(features):
            value = pre[i, j]
            if value > least:
                kept[count], where[count] = value, j
                count += 1
                if count == room:
                    _keep_largest(kept, where, count, k)
                    count, least = k, kept[:k].min()
        if count > k:
            _keep_largest(kept, where, count, k)
            count = k
        for e in range(count):
            vals[i, e], cols[i, e] = kept[e], where[e]
        for e in range(count, k):
            vals[i, e], cols[i, e] = 0, 0


@_products
def decode(
    begin: int, end: int, ptr: Longs, cols: Ints, vals: Floats, decoder: Floats, out: Floats
) -> None:  # pragma: no cover
    """Add code times ``decoder`` ``[features, width]`` to ``out`` ``[rows, width]``."""
    width = decoder.shape[1]
    for i in range(begin, end):
        row = out[i]
        for e in range(ptr[i], ptr[i + 1]):
            value, direction = vals[e], decoder[cols[e]]
            if value != 0:
                for j in range(width):
                    row[j] += value * direction[j]


@_products
def products(
    begin: int, end: int, ptr: Longs, cols: Ints, gradient: Floats, decoder: Floats, out: Floats
) -> None:  # pragma: no cover
    """For each entry, the product of its row of ``gradient`` ``[rows, width]`` and its feature's decoder direction."""
    width = decoder.shape[1]
    for i in range(begin, end):
        row = gradient[i]
        for e in range(ptr[i], ptr[i + 1]):
            direction, total = decoder[cols[e]], np.float32(0)
            for j in range(width):
                total += row[j] * direction[j]
            out[e] = total


@_products
def by_feature(ptr: Longs, cols: Ints, features: int) -> tuple[Longs, Longs, Ints]:  # pragma: no cover
    """The code by features: where each begins ``[features + 1]``, and the index and the row of each of its entries."""
    start = np.zeros(features + 1, np.int64)
    for e in range(len(cols)):
        start[cols[e] + 1] += 1
    for f in range(features):
        start[f + 1] += start[f]
    at = start[:-1].copy()
    entry, row = np.empty(len(cols), np.int64), np.empty(len(cols), np.int32)
    for i in range(len(ptr) - 1):
        for e in range(ptr[i], ptr[i + 1]):
            index = at[cols[e]]
            entry[index], row[index] = e, i
            at[cols[e]] += 1
    return start, entry, row


@_products
def gather(
    begin: int, end: int, start: Longs, entry: Longs, row: Ints, vals: Floats, rows: Floats, out: Floats
) -> None:  # pragma: no cover
    """For each feature, the sum over its entries of their value times their row of ``rows`` ``[rows, width]``, into
    ``out`` ``[features, width]``."""
    width = rows.shape[1]
    for f in range(begin, end):
        total = out[f]
        total[:] = 0
        for index in range(start[f], start[f + 1]):
            value, source = vals[entry[index]], rows[row[index]]
            if value != 0:
                for j in range(width):
                    total[j] += value * source[j]


@_products
def sums(start: Longs, entry: Longs, vals: Floats, out: Floats) -> None:  # pragma: no cover
    """For each feature, the sum of its values."""
    for f in range(len(start) - 1):
        total = np.float32(0)
        for index in range(start[f], start[f + 1]):
            total += vals[entry[index]]
        out[f] = total
