"""Gather compatible requests into batches and run them on the device, one batch at a time.

It knows neither gRPC nor torch: a request is a dictionary of arrays that share their first axis, and a function from
such a dictionary to another.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ethogram.errors import TooLarge

Arrays = dict[str, NDArray[Any]]
"""Arrays by name; the batch is the first axis of each."""

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Piece:
    """At most a batch's worth of rows of one request."""

    key: Hashable
    function: Callable[[Arrays], Arrays]
    arrays: Arrays
    rows: int
    arrived: float
    result: asyncio.Future[Arrays]


class Batcher:
    """One device's queue, and the one thread that runs what is in it.

    Requests with an equal key are compatible. A batch leaves when it has ``max_rows`` rows or its oldest request has
    waited ``max_wait`` seconds; while the device is busy, batches grow by themselves. A request of more rows goes
    piece by piece, each queued behind what others sent meanwhile.
    """

    def __init__(
        self,
        *,
        max_rows: int = 256,
        max_wait: float = 0.002,
        max_pending_rows: int = 16_384,
        out_of_memory: tuple[type[Exception], ...] = (MemoryError,),
        release_memory: Callable[[], None] = lambda: None,
        set_up_thread: Callable[[], object] = lambda: None,
        observe: Callable[[Sequence[float], float, int], object] = lambda *_: None,
    ) -> None:
        """``observe`` is told of each batch that was computed: how long its pieces waited and it took, in seconds, and
        its rows."""
        self._observe = observe
        self._max_rows, self._max_wait, self._max_pending = max_rows, max_wait, max_pending_rows
        self._out_of_memory, self._release_memory = out_of_memory, release_memory
        # Not yet on the device, oldest first: the keys of a dictionary.
        self._waiting: dict[_Piece, None] = {}
        self._pending = 0
        self._changed, self._room = asyncio.Event(), asyncio.Event()
        self._executor = ThreadPoolExecutor(1, "device", initializer=set_up_thread)
        self._task: asyncio.Task[None] | None = None

    @property
    def pending(self) -> int:
        """Rows that wait or are computed."""
        return self._pending

    def start(self) -> None:
        """Start running batches; call it on the event loop."""
        self._task = asyncio.get_running_loop().create_task(self._dispatch())

    async def stop(self) -> None:
        """Cancel all requests; returns when the device is idle."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for piece in self._waiting:
            piece.result.cancel()
        await asyncio.to_thread(self._executor.shutdown)

    async def run(
        self,
        key: Hashable,
        function: Callable[[Arrays], Arrays],
        arrays: Arrays,
        *,
        name: str = "request",
        wait_for_room: bool = False,
    ) -> Arrays:
        """``function(arrays)``, computed together with other requests of an equal ``key``.

        All arrays share their first axis, in and out, and a row's result must not depend on the other rows. ``name``
        is the field to blame when there are too many rows. ``wait_for_room``: wait while the queue is full, for a
        stream, whose sender is held back meanwhile. Cancelling takes this request's rows out of the queue, or drops
        their result, and leaves the others alone.

        Raises :class:`TooLarge` when the queue is full, or the device's memory cannot hold one row.
        """
        rows = len(next(iter(arrays.values())))
        if rows > self._max_pending:
            description = f"{rows} rows in one request, at most {self._max_pending}; send several, or use a stream"
            raise TooLarge.field(name, description)
        while self._pending + rows > self._max_pending:
            if not wait_for_room:
                raise TooLarge(f"the server is busy: {self._pending} rows are waiting already; try again shortly")
            self._room.clear()
            await self._room.wait()
        self._pending += rows
        try:
            results = []
            for start in range(0, rows, self._max_rows):
                results.append(await self._submit(key, function, _rows(arrays, start, start + self._max_rows)))
            return _join(results)
        finally:
            self._pending -= rows
            self._room.set()

    async def _submit(self, key: Hashable, function: Callable[[Arrays], Arrays], arrays: Arrays) -> Arrays:
        loop = asyncio.get_running_loop()
        rows = len(next(iter(arrays.values())))
        piece = _Piece(key, function, arrays, rows, loop.time(), loop.create_future())
        self._waiting[piece] = None
        self._changed.set()
        try:
            return await piece.result
        finally:
            self._waiting.pop(piece, None)

    async def _dispatch(self) -> None:
        while True:
            pieces, delay = self._take()
            if pieces:
                await self._run_batch(pieces)
                continue
            self._changed.clear()
            try:
                async with asyncio.timeout(delay):
                    await self._changed.wait()
            except TimeoutError:
                pass

    def _take(self) -> tuple[list[_Piece], float | None]:
        """The pieces of the next batch; or none, and the seconds until one is due, None for "when one arrives"."""
        now = asyncio.get_running_loop().time()
        groups: dict[Hashable, list[_Piece]] = {}
        for piece in self._waiting:
            groups.setdefault(piece.key, []).append(piece)
        # In the order of their oldest pieces.
        for pieces in groups.values():
            rows = list(accumulate(piece.rows for piece in pieces))
            if rows[-1] >= self._max_rows or now - pieces[0].arrived >= self._max_wait:
                batch = [piece for piece, end in zip(pieces, rows, strict=True) if end <= self._max_rows]
                for piece in batch:
                    del self._waiting[piece]
                return batch, None
        oldest = next(iter(self._waiting), None)
        return [], None if oldest is None else max(oldest.arrived + self._max_wait - now, 0)

    async def _run_batch(self, pieces: Sequence[_Piece]) -> None:
        pieces = [piece for piece in pieces if not piece.result.done()]
        if not pieces:
            return
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            results = await loop.run_in_executor(self._executor, self._compute_batch, pieces)
        except asyncio.CancelledError:
            for piece in pieces:
                piece.result.cancel()
            raise
        except Exception as error:
            if len(pieces) > 1:
                # One request's fault must not become the others': find whose it is.
                log.warning("a batch of %d requests failed (%s); running them one by one", len(pieces), error)
                for piece in pieces:
                    await self._run_batch([piece])
            elif not pieces[0].result.done():
                pieces[0].result.set_exception(error)
            return
        waits = [began - piece.arrived for piece in pieces]
        self._observe(waits, loop.time() - began, sum(piece.rows for piece in pieces))
        for piece, result in zip(pieces, results, strict=True):
            if not piece.result.done():
                piece.result.set_result(result)

    def _compute_batch(self, pieces: Sequence[_Piece]) -> list[Arrays]:
        ends = list(accumulate(piece.rows for piece in pieces))
        result = self._compute(pieces[0].function, _join([piece.arrays for piece in pieces]), ends[-1])
        return [_rows(result, end - piece.rows, end) for piece, end in zip(pieces, ends, strict=True)]

    def _compute(self, function: Callable[[Arrays], Arrays], arrays: Arrays, rows: int) -> Arrays:
        try:
            result = function(arrays)
            if any(len(array) != rows for array in result.values()):
                raise ValueError("a batch function must answer with as many rows as it is given")
            return result
        except self._out_of_memory:
            pass
        # Past the handler, so that the traceback no longer keeps the device's tensors alive.
        self._release_memory()
        if rows == 1:
            raise TooLarge("the device's memory cannot hold even one row now; try again, or use a smaller model")
        log.warning("the device is out of memory for a batch of %d rows; halving it", rows)
        halves = ((0, rows // 2), (rows // 2, rows))
        return _join([self._compute(function, _rows(arrays, start, end), end - start) for start, end in halves])


def _rows(arrays: Arrays, start: int, stop: int) -> Arrays:
    return {name: array[start:stop] for name, array in arrays.items()}


def _join(parts: Sequence[Arrays]) -> Arrays:
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
