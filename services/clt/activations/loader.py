"""Batches from a store, in an order that depends on the seed and the step alone."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ethogram.errors import InvalidInput
from services.clt.activations.store import TRAIN, ActivationStore
from services.runtime.seeds import generator


class Part(NamedTuple):
    """Rows from ``start`` to before ``stop`` of a shard."""

    shard: int
    start: int
    stop: int


class Epoch(NamedTuple):
    """The groups of an epoch, and the number of rows before each of them and in all."""

    groups: list[tuple[Part, Part]]
    starts: list[int]


class Group(NamedTuple):
    """A group in memory, or one that a thread is reading."""

    rows: list[Tensor]
    """Rows at each hook point as they are in the store, ``[at least as many as the group has, d]``."""
    order: Future[Tensor]
    """The order in which the rows are used, int64 ``[rows]``; the same for all hook points."""


class Batches:
    """Rows of several hook points, in batches: the same rows in the same order at each hook point.

    Each epoch visits the shards in a random order. A quarter of a shard (from its first half) and a quarter of the next
    one (from its second half) are a group, whose rows are shuffled together. Groups and epochs follow each other
    without gaps, so a batch may span several and none is short. :meth:`at` is a pure function of seed and step: a run
    resumes from its step alone.

    The current group, half the size of a shard of the requested hook points, is in memory, and with ``prefetch`` the
    next one, which a thread reads meanwhile: less than two shards in all, copies included. Use it as a context manager,
    or call :meth:`close`.
    """

    def __init__(
        self,
        store: ActivationStore,
        hooks: Sequence[str],
        batch_size: int,
        split: str = TRAIN,
        seed: int = 0,
        *,
        prefetch: bool = True,
    ) -> None:
        """Raises :class:`InvalidInput` for hook points that the store does not have, and for a split without rows."""
        store.require_hooks(hooks, "hooks")
        self.rows = store.rows(split)
        """Rows of the split."""
        if not self.rows:
            raise InvalidInput.field("activations", f"the store has no {split} rows; record more instances")
        self._store, self._hooks, self._size, self._split, self._seed = store, list(hooks), batch_size, split, seed
        self._epoch = lru_cache(maxsize=2)(self._plan)
        self._groups: dict[tuple[int, int], Group] = {}
        """The current group and the next one, by epoch and number."""
        self._prefetch, self._pool = prefetch, ThreadPoolExecutor(1, "batches")
        # Allocated once: memory that threads free is not returned to the system.
        most = 2 * max(-(-shard.rows // 4) for shard in store.shards(split))
        self._free = [
            [torch.empty(most, store.widths[hook], dtype=store.dtype) for hook in hooks] for _ in range(1 + prefetch)
        ]

    @property
    def steps_per_epoch(self) -> float:
        """Batches of an epoch."""
        return self.rows / self._size

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread and free the rows."""
        self._pool.shutdown(cancel_futures=True)
        self._groups.clear()
        self._free.clear()

    def at(self, step: int, rank: int = 0, size: int = 1) -> list[Tensor]:
        """The batch of ``step``, float32 ``[batch, d]`` at each hook point; with several processes the part for process
        ``rank`` of ``size``."""
        start = step * self._size + self._size * rank // size
        stop = step * self._size + self._size * (rank + 1) // size
        batches = [torch.empty(stop - start, self._store.widths[hook]) for hook in self._hooks]
        row = start
        while row < stop:
            epoch, position = divmod(row, self.rows)
            starts = self._epoch(epoch).starts
            number = bisect_right(starts, position) - 1
            group = self._group(epoch, number)
            first = position - starts[number]
            chosen = group.order.result()[first : first + stop - row]
            for batch, rows in zip(batches, group.rows, strict=True):
                batch[row - start : row - start + len(chosen)] = rows.index_select(0, chosen)
            row += len(chosen)
        return batches

    def _plan(self, epoch: int) -> Epoch:
        shards = self._store.shards(self._split)
        order = torch.randperm(len(shards), generator=generator(self._seed, "shards", epoch)).tolist()
        groups = []
        for shard, after in zip(order, order[1:] + order[:1], strict=True):
            here, there = ([shards[which].rows * part // 4 for part in range(5)] for which in (shard, after))
            groups += [
                (Part(shard, here[part], here[part + 1]), Part(after, there[part + 2], there[part + 3]))
                for part in range(2)
            ]
        sizes = [sum(part.stop - part.start for part in group) for group in groups]
        return Epoch(groups, [0, *accumulate(sizes)])

    def _group(self, epoch: int, number: int) -> Group:
        """A group, which is in memory, or soon will be. Reads the next one meanwhile."""
        keys = [(epoch, number)]
        if self._prefetch:
            last = number + 1 == len(self._epoch(epoch).groups)
            keys.append((epoch + 1, 0) if last else (epoch, number + 1))
        for key in self._groups.keys() - {*keys}:
            group = self._groups.pop(key)
            if not group.order.cancel():
                # The thread must not write the rows any more.
                group.order.exception()
            self._free.append(group.rows)
        for key in keys:
            if key not in self._groups:
                rows = self._free.pop()
                self._groups[key] = Group(rows, self._pool.submit(self._load, key, rows))
        return self._groups[keys[0]]

    def _load(self, key: tuple[int, int], rows: list[Tensor]) -> Tensor:
        """Read a group into ``rows``. Returns its order."""
        epoch, number = key
        count = 0
        for part in self._epoch(epoch).groups[number]:
            after = count + part.stop - part.start
            for hook, whole in zip(self._hooks, rows, strict=True):
                whole[count:after] = self._store.read(self._split, part.shard, [hook], part.start, part.stop)[0]
            count = after
        return torch.randperm(count, generator=generator(self._seed, "mix", epoch, number))


def chunks(
    store: ActivationStore, hooks: Sequence[str], split: str, limit: int, size: int = 2**16
) -> Iterator[list[Tensor]]:
    """The first ``limit`` rows of a split in the order of the files, at most ``size`` at once: float32 ``[rows, d]`` of
    each hook point."""
    for number, shard in enumerate(store.shards(split)):
        for start in range(0, min(shard.rows, limit), size):
            stop = min(start + size, shard.rows, limit)
            yield [rows.float() for rows in store.read(split, number, hooks, start, stop)]
        limit -= shard.rows


def everything(store: ActivationStore, hooks: Sequence[str], split: str, limit: int | None = None) -> list[Tensor]:
    """The first ``limit`` rows of a split in the order of the files, float32 ``[rows, d]`` of each hook point."""
    store.require_hooks(hooks, "hooks")
    total = min(store.rows(split), store.rows(split) if limit is None else limit)
    tensors, done = [torch.empty(total, store.widths[hook]) for hook in hooks], 0
    for chunk in chunks(store, hooks, split, total):
        for tensor, rows in zip(tensors, chunk, strict=True):
            tensor[done : done + len(rows)] = rows
        done += len(chunk[0])
    return tensors
