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

    rows: list[Tensor]
    """``[rows, d]`` of each hook point, as they lie in the store."""
    order: Tensor
    """The order in which they come, int64 ``[rows]``; the same for all hook points."""


class Batches:
    """Rows of several hook points, in batches: the same rows in the same order of each.

    Each epoch goes through the shards in an order of its own. The first half of each shard and the second half of the
    next are a group, whose rows are permuted together; groups follow each other and epochs too, so a batch may lie
    across them and none is short. :meth:`at` is a pure function of seed and step: who keeps the step can go on.

    In memory there is the present group, of the size of a shard of the asked hook points, and with ``prefetch`` the
    next one, which a thread reads meanwhile. Use it as a context manager, or call :meth:`close`.
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
        self._here: tuple[tuple[int, int], Group] | None = None
        self._next: tuple[tuple[int, int], Future[Group]] | None = None
        self._pool = ThreadPoolExecutor(1, "batches") if prefetch else None

    @property
    def steps_per_epoch(self) -> float:
        """Batches of an epoch."""
        return self.rows / self._size

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread and let go of the rows."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool = self._here = self._next = None

    def at(self, step: int, rank: int = 0, size: int = 1) -> list[Tensor]:
        """The batch of ``step``, float32 ``[batch, d]`` of each hook point; with several processes the part of it that
        is process ``rank``'s of ``size``."""
        start = step * self._size + self._size * rank // size
        stop = step * self._size + self._size * (rank + 1) // size
        made = [torch.empty(stop - start, self._store.widths[hook]) for hook in self._hooks]
        row = start
        while row < stop:
            epoch, inside = divmod(row, self.rows)
            starts = self._epoch(epoch).starts
            number = bisect_right(starts, inside) - 1
            group = self._group(epoch, number)
            first = inside - starts[number]
            chosen = group.order[first : first + stop - row]
            for batch, rows in zip(made, group.rows, strict=True):
                batch[row - start : row - start + len(chosen)] = rows.index_select(0, chosen)
            row += len(chosen)
        return made

    def _plan(self, epoch: int) -> Epoch:
        shards = self._store.shards(self._split)
        order = torch.randperm(len(shards), generator=generator(self._seed, "shards", epoch)).tolist()
        groups = []
        for shard, after in zip(order, order[1:] + order[:1], strict=True):
            rows = shards[after].rows
            groups.append((Part(shard, 0, shards[shard].rows // 2), Part(after, rows // 2, rows)))
        sizes = [sum(part.stop - part.start for part in group) for group in groups]
        return Epoch(groups, [0, *accumulate(sizes)])

    def _group(self, epoch: int, number: int) -> Group:
        key = (epoch, number)
        if self._here is None or self._here[0] != key:
            # First, so that there are never more than two.
            self._here = None
            if self._next is not None and self._next[0] == key:
                group = self._next[1].result()
            else:
                if self._next is not None and not self._next[1].cancel():
                    self._next[1].exception()
                self._next = None
                group = self._load(epoch, number)
            self._here, self._next = (key, group), None
            if self._pool is not None:
                after = (epoch, number + 1) if number + 1 < len(self._epoch(epoch).groups) else (epoch + 1, 0)
                self._next = (after, self._pool.submit(self._load, *after))
        return self._here[1]

    def _load(self, epoch: int, number: int) -> Group:
        parts = self._epoch(epoch).groups[number]
        sizes = [part.stop - part.start for part in parts]
        rows = []
        for hook in self._hooks:
            made = torch.empty(sum(sizes), self._store.widths[hook], dtype=self._store.dtype)
            for part, place in zip(parts, (made[: sizes[0]], made[sizes[0] :]), strict=True):
                place.copy_(self._store.read(self._split, part.shard, [hook], part.start, part.stop)[0])
            rows.append(made)
        draws = generator(self._seed, "mix", epoch, number)
        return Group(rows, torch.randperm(sum(sizes), generator=draws))


def everything(store: ActivationStore, hooks: Sequence[str], split: str, limit: int | None = None) -> list[Tensor]:
    """The first ``limit`` rows of a split in the order of the files, float32 ``[rows, d]`` of each hook point."""
    store.require_hooks(hooks, "hooks")
    total = min(store.rows(split), store.rows(split) if limit is None else limit)
    made, done = [torch.empty(total, store.widths[hook]) for hook in hooks], 0
    for number, shard in enumerate(store.shards(split)):
        count = min(shard.rows, total - done)
        if count <= 0:
            break
        for whole, hook in zip(made, hooks, strict=True):
            whole[done : done + count] = store.read(split, number, [hook], 0, count)[0]
        done += count
    return made
