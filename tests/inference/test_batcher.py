"""The batcher: what shares a batch, what a fault or a cancellation does to the others, and its bounds."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from ethogram.errors import InvalidInput, TooLarge
from services.inference.batcher import Arrays, Batcher


@asynccontextmanager
async def batcher(**options: Any) -> AsyncIterator[Batcher]:
    made = Batcher(**options)
    made.start()
    try:
        yield made
    finally:
        await made.stop()


class Doubler:
    """Doubles rows, and remembers how many rows each batch had. ``gate`` holds it until it is set."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def __call__(self, arrays: Arrays) -> Arrays:
        self.batches.append(len(arrays["x"]))
        self.entered.set()
        assert self.gate.wait(10)
        return {"y": arrays["x"] * 2}


def rows(*values: float) -> Arrays:
    return {"x": np.array(values)}


async def entered(double: Doubler) -> None:
    while not double.entered.is_set():
        await asyncio.sleep(0.001)


async def test_requests_of_one_key_share_a_batch_and_get_their_own_rows_back() -> None:
    double = Doubler()
    async with batcher(max_wait=0.05) as batches:
        answers = await asyncio.gather(*(batches.run("a", double, rows(i, i + 0.5)) for i in range(20)))
    assert double.batches == [40]
    for i, answer in enumerate(answers):
        np.testing.assert_array_equal(answer["y"], [2 * i, 2 * i + 1])


async def test_other_keys_never_share_a_batch() -> None:
    one, other = Doubler(), Doubler()
    async with batcher(max_wait=0.02) as batches:
        await asyncio.gather(*(batches.run(f, f, rows(1)) for f in (one, other, one, other)))
    assert one.batches == other.batches == [2]


async def test_a_full_batch_does_not_wait_and_none_is_larger_than_the_limit() -> None:
    double = Doubler()
    async with batcher(max_rows=4, max_wait=30) as batches:
        answers = await asyncio.gather(*(batches.run("a", double, rows(i)) for i in range(8)))
        large = await batches.run("a", double, rows(*range(12)))
    assert double.batches == [4, 4, 4, 4, 4]
    assert [answer["y"].item() for answer in answers] == [2 * i for i in range(8)]
    np.testing.assert_array_equal(large["y"], np.arange(12) * 2)


async def test_a_large_request_lets_others_in_between_its_pieces() -> None:
    double, small_done_after = Doubler(), 0

    async def small() -> None:
        nonlocal small_done_after
        await entered(double)
        await batches.run("small", Doubler(), rows(1))
        small_done_after = len(double.batches)

    async with batcher(max_rows=1, max_wait=0) as batches:
        await asyncio.gather(batches.run("large", double, rows(*range(200))), small())
    assert small_done_after < 100


async def test_cancelling_one_of_a_running_or_waiting_batch_leaves_the_others() -> None:
    double = Doubler()
    double.gate.clear()
    async with batcher(max_wait=0.02) as batches:
        running = [asyncio.create_task(batches.run("a", double, rows(i))) for i in range(3)]
        await entered(double)
        waiting = [asyncio.create_task(batches.run("a", double, rows(i))) for i in range(3)]
        await asyncio.sleep(0.01)
        running[1].cancel()
        waiting[1].cancel()
        await asyncio.sleep(0.01)
        double.gate.set()
        answers = await asyncio.gather(*running, *waiting, return_exceptions=True)
    assert [isinstance(answer, asyncio.CancelledError) for answer in answers] == [False, True, False] * 2
    assert [answer["y"].item() for answer in answers if isinstance(answer, dict)] == [0, 4, 0, 4]
    assert double.batches == [3, 2]


async def test_a_fault_reaches_only_the_request_that_caused_it() -> None:
    def refuses_seven(arrays: Arrays) -> Arrays:
        if 7 in arrays["x"]:
            raise InvalidInput.field("x", "is seven")
        return {"y": arrays["x"]}

    async with batcher(max_wait=0.02) as batches:
        answers = await asyncio.gather(
            *(batches.run("a", refuses_seven, rows(i)) for i in (6, 7, 8)), return_exceptions=True
        )
    assert isinstance(answers[1], InvalidInput)
    assert [answer["y"].item() for answer in answers if isinstance(answer, dict)] == [6, 8]


async def test_out_of_memory_halves_the_batch_and_then_says_so() -> None:
    released: list[None] = []

    def holds(limit: int) -> Callable[[Arrays], Arrays]:
        def function(arrays: Arrays) -> Arrays:
            if len(arrays["x"]) > limit:
                raise MemoryError
            return {"y": arrays["x"] + 1}

        return function

    async with batcher(release_memory=lambda: released.append(None)) as batches:
        answer = await batches.run("a", holds(3), rows(*range(10)))
        np.testing.assert_array_equal(answer["y"], np.arange(10) + 1)
        assert released
        with pytest.raises(TooLarge, match="cannot hold even one"):
            await batches.run("b", holds(0), rows(1, 2))


async def test_the_queue_is_bounded_and_room_comes_back() -> None:
    double = Doubler()
    double.gate.clear()
    async with batcher(max_wait=0, max_pending_rows=4) as batches:
        first = asyncio.create_task(batches.run("a", double, rows(1, 2, 3)))
        await entered(double)
        with pytest.raises(TooLarge, match="busy"):
            await batches.run("a", double, rows(1, 2))
        with pytest.raises(TooLarge, match="networks: 5 rows") as caught:
            await batches.run("a", double, rows(*range(5)), name="networks")
        assert caught.value.violations[0].field == "networks"
        second = asyncio.create_task(batches.run("a", double, rows(4)))
        await asyncio.sleep(0.01)
        second.cancel()
        double.gate.set()
        await first
        await asyncio.gather(second, return_exceptions=True)
        await batches.run("a", double, rows(1, 2, 3, 4))


async def test_a_waiting_request_waits_for_room() -> None:
    double = Doubler()
    double.gate.clear()
    async with batcher(max_wait=0, max_pending_rows=4) as batches:
        first = asyncio.create_task(batches.run("a", double, rows(1, 2, 3)))
        await entered(double)
        waiting = [asyncio.create_task(batches.run("a", double, rows(i, i), wait_for_room=True)) for i in (4, 5, 6)]
        await asyncio.sleep(0.01)
        waiting[1].cancel()
        double.gate.set()
        await first
        answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(answers[1], asyncio.CancelledError)
    assert [answer["y"].tolist() for answer in answers if isinstance(answer, dict)] == [[8, 8], [12, 12]]


async def test_a_wrong_number_of_rows_is_a_defect_not_a_wrong_answer() -> None:
    async with batcher() as batches:
        with pytest.raises(ValueError, match="as many rows"):
            await batches.run("a", lambda arrays: {"y": arrays["x"][:1]}, rows(1, 2))


async def test_stopping_cancels_what_waits() -> None:
    double = Doubler()
    double.gate.clear()
    async with batcher(max_wait=0) as batches:
        tasks = [asyncio.create_task(batches.run(key, double, rows(1))) for key in "ab"]
        await entered(double)
        threading.Timer(0.05, double.gate.set).start()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(answer, asyncio.CancelledError) for answer in answers)
