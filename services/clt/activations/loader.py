"""Batches from a store, in an order that follows from the seed and the step alone."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
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
    """The mixing groups of an epoch, and the rows before each and at the end."""

    groups: list[tuple[Part, Part]]
    starts: list[int]


class Group(NamedTuple):
    """A mixing group in memory."""

    key: tuple[int, int]
    """Its epoch and its number there."""
    memory: list[Tensor]
    """Rows of each hook point as they lie in the store, ``[at least as many as the group has, d]``."""
    order: Tensor
    """The order in which they come, int64 ``[rows]``; the same for all hook points."""


class PendingGroup(NamedTuple):
    """A group that is being read into ``memory``."""

    key: tuple[int, int]
    memory: list[Tensor]
    group: Future[Group]


class Batches:
    """Rows of several hook points, in batches: the same rows in the same order of each.

    Each epoch goes through the shards in an order of its own. A quarter of each shard (of its first half) and a quarter
    of the next (of its second half) are a group, whose rows are permuted together; groups follow each other and epochs
    too, so a batch may lie across them and none is short. :meth:`at` is a pure function of seed and step, so
    a run resumes from its step alone.

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
        """Of the split."""
        if not self.rows:
            raise InvalidInput.field("activations", f"the store has no {split} rows; record more instances")
        self._store, self._hooks, self._size, self._split, self._seed = store, list(hooks), batch_size, split, seed
        self._epoch = lru_cache(maxsize=2)(self._plan)
        self._current: Group | None = None
        self._next: PendingGroup | None = None
        self._prefetch, self._pool = prefetch, ThreadPoolExecutor(1, "batches")
        # Allocated once: what threads free is not given back to the system.
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
        self._current = self._next = None
        self._free.clear()

    def at(self, step: int, rank: int = 0, size: int = 1) -> list[Tensor]:
        """The batch of ``step``, float32 ``[batch, d]`` of each hook point; with several processes the part of it that
        is process ``rank``'s of ``size``."""
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
            chosen = group.order[first : first + stop - row]
            for batch, rows in zip(batches, group.memory, strict=True):
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
        key = (epoch, number)
        if self._current is None or self._current.key != key:
            if self._current is not None:
                self._free.append(self._current.memory)
                self._current = None
            pending, self._next = self._next, None
            if pending is not None and pending.key != key:
                self._discard(pending)
                pending = None
            pending = pending or self._begin(key)
            try:
                self._current = pending.group.result()
            except BaseException:
                self._discard(pending)
                raise
            if self._prefetch:
                last = number + 1 == len(self._epoch(epoch).groups)
                self._next = self._begin((epoch + 1, 0) if last else (epoch, number + 1))
        return self._current

    def _begin(self, key: tuple[int, int]) -> PendingGroup:
        memory = self._free.pop()
        return PendingGroup(key, memory, self._pool.submit(self._load, key, memory))

    def _discard(self, pending: PendingGroup) -> None:
        """Take back the memory of a group that is not needed."""
        if not pending.group.cancel():
            pending.group.exception()
        self._free.append(pending.memory)

    def _load(self, key: tuple[int, int], memory: list[Tensor]) -> Group:
        epoch, number = key
        parts = self._epoch(epoch).groups[number]
        rows = 0
        for part in parts:
            after = rows + part.stop - part.start
            for hook, whole in zip(self._hooks, memory, strict=True):
                whole[rows:after] = self._store.read(self._split, part.shard, [hook], part.start, part.stop)[0]
            rows = after
        order = torch.randperm(rows, generator=generator(self._seed, "mix", epoch, number))
        return Group(key, memory, order)


def everything(store: ActivationStore, hooks: Sequence[str], split: str, limit: int | None = None) -> list[Tensor]:
    """The first ``limit`` rows of a split in the order of the files, float32 ``[rows, d]`` of each hook point."""
    store.require_hooks(hooks, "hooks")
    total = min(store.rows(split), store.rows(split) if limit is None else limit)
    tensors, done = [torch.empty(total, store.widths[hook]) for hook in hooks], 0
    for number, shard in enumerate(store.shards(split)):
        count = min(shard.rows, total - done)
        if count <= 0:
            break
        for tensor, hook in zip(tensors, hooks, strict=True):
            tensor[done : done + count] = store.read(split, number, [hook], 0, count)[0]
        done += count
    return tensors
