"""Event streams: one tailer per watched job reads the registry once for all who watch.

Redis only signals that a job has new events; a poll each second does so when Redis is down. The events come from the
registry, so any number of gateways agree and nothing is lost or doubled. A watcher holds a cursor instead of a queue:
it takes the newest chunks from the tailer's window and older ones from the registry. A slow watcher therefore costs no
memory and delays no other.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple, TypeVar

import anyio
import anyio.to_thread
import redis.asyncio
from redis.exceptions import RedisError

from ethogram.errors import EthogramError, InvalidInput, NotFound, Unavailable
from gateway.sse import KEEP_ALIVE, RETRY, frame
from services.jobs.records import Job
from services.jobs.registry import JobRegistry
from services.jobs.signals import CHANNEL

logger = logging.getLogger(__name__)

T = TypeVar("T")

POLL_SECONDS = 1.0
PACE_SECONDS = 0.03
KEEP_ALIVE_SECONDS = 15.0
BATCH = 500
WINDOW_BYTES = 2**20
WRITE_BYTES = 2**16
READERS = 8


class Chunk(NamedTuple):
    """The events after ``after`` up to and including ``last``, ready to send."""

    after: int
    last: int
    data: bytes


class _Tail:
    """State that the watchers of one job share; used in the event loop only."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.last = job.seq
        """Newest event that was read; it is the last in the window."""
        self.window: OrderedDict[int, Chunk] = OrderedDict()
        self.window_bytes = 0
        self.gone: EthogramError | None = None
        self.watchers = 0
        self.wake = asyncio.Event()
        self.changed = asyncio.Event()
        self.task: asyncio.Task[None]

    def push(self, chunk: Chunk) -> None:
        """Append the events after ``last``."""
        self.window[chunk.after] = chunk
        self.window_bytes += len(chunk.data)
        self.last = chunk.last
        while self.window_bytes > WINDOW_BYTES:
            self.window_bytes -= len(self.window.popitem(last=False)[1].data)
        self.notify()

    def ahead(self, cursor: int) -> Chunk | None:
        """The events after ``cursor`` that are in the window and fit one write; None if they left the window."""
        parts, last, size = [], cursor, 0
        while size < WRITE_BYTES and (chunk := self.window.get(last)) is not None:
            parts.append(chunk.data)
            last, size = chunk.last, size + len(chunk.data)
        return Chunk(cursor, last, b"".join(parts)) if parts else None

    def notify(self) -> None:
        """Wake all watchers."""
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()


class Tails:
    """All tailers of this process; start and stop it in the event loop that serves."""

    def __init__(self, registry: JobRegistry, redis_url: str, limit: int) -> None:
        self._registry, self._redis_url, self._limit = registry, redis_url, limit
        self._tails: dict[str, _Tail] = {}
        self._closing = False
        self._loop: asyncio.AbstractEventLoop
        self._listener: asyncio.Task[None]
        self._readers: anyio.CapacityLimiter | None = None
        self.streams = 0
        """Number of open streams."""

    def start(self) -> None:
        """Subscribe to Redis."""
        self._loop = asyncio.get_running_loop()
        # Own threads, so that watchers that catch up do not delay other routes.
        self._readers = anyio.CapacityLimiter(READERS)
        self._listener = asyncio.create_task(self._listen())

    def close_streams(self) -> None:
        """End all streams so that the server can stop; clients reconnect elsewhere and resume where they were."""
        self._closing = True
        for tail in self._tails.values():
            tail.notify()

    async def stop(self) -> None:
        """End all streams and tasks."""
        self.close_streams()
        tasks = [self._listener, *(tail.task for tail in self._tails.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def wake(self, job: str) -> None:
        """Read the new events of ``job``. May be called from any thread."""
        with suppress(RuntimeError):  # The loop is closed, so nobody watches.
            self._loop.call_soon_threadsafe(self._wake, job)

    async def open(self, job_id: str, after: int, follow: bool) -> AsyncGenerator[bytes, None]:
        """The stream of a job's events after ``after``, as bytes to send.

        Raises :class:`NotFound` for an unknown job, :class:`InvalidInput` if it has no event ``after``, and
        :class:`Unavailable` if too many streams are open.
        """
        job = await self._read(lambda: self._registry.get(job_id))
        if after > job.seq:
            raise InvalidInput.field("after", f"the job's newest event is {job.seq}")
        if self.streams >= self._limit:
            raise Unavailable(f"this gateway already serves {self._limit} event streams; try another gateway, or later")
        return self._follow(job, after) if follow else self._replay(job, after)

    async def _replay(self, job: Job, after: int) -> AsyncGenerator[bytes, None]:
        while after < job.seq:
            chunk = await self._chunk(job.id, after, job.seq)
            yield chunk.data
            after = chunk.last
        if job.progress is not None:
            yield _progress(job)
        yield _end(job)

    async def _follow(self, job: Job, cursor: int) -> AsyncGenerator[bytes, None]:
        progress = None
        async with self._tail(job) as tail:
            yield RETRY
            while not self._closing:
                changed, job, last = tail.changed, tail.job, tail.last
                while cursor < last and not self._closing:
                    chunk = tail.ahead(cursor) or await self._chunk(job.id, cursor, last)
                    yield chunk.data
                    cursor = chunk.last
                if job.progress is not None and job.progress != progress:
                    progress = job.progress
                    yield _progress(job)
                if tail.gone is not None:
                    return
                if job.state.terminal and cursor >= job.seq:
                    yield _end(job)
                    return
                while not changed.is_set():
                    try:
                        await asyncio.wait_for(changed.wait(), KEEP_ALIVE_SECONDS)
                    except TimeoutError:
                        yield KEEP_ALIVE

    @asynccontextmanager
    async def _tail(self, job: Job) -> AsyncIterator[_Tail]:
        tail = self._tails.get(job.id)
        if tail is None:
            tail = self._tails[job.id] = _Tail(job)
            tail.task = asyncio.create_task(self._run(tail))
        elif job.seq > tail.job.seq:
            # The tailer's older row might show an end that a retry has undone.
            tail.job = job
            tail.wake.set()
        tail.watchers += 1
        self.streams += 1
        try:
            yield tail
        finally:
            self.streams -= 1
            tail.watchers -= 1
            if not tail.watchers:
                del self._tails[job.id]
                tail.task.cancel()

    async def _run(self, tail: _Tail) -> None:
        """Read new events when woken, and each second."""
        failing = False
        while tail.gone is None:
            try:
                tail.wake.clear()
                # Read the job before its events, so that all events up to its `seq` exist.
                job = await self._read(lambda: self._registry.get(tail.job.id))
                while tail.last < job.seq:
                    tail.push(await self._chunk(job.id, tail.last, job.seq))
                known, tail.job = tail.job, job
                if (job.seq, job.state, job.progress) != (known.seq, known.state, known.progress):
                    tail.notify()
                failing = False
            except NotFound as error:
                tail.gone = error
                tail.notify()
            except Exception:
                if not failing:
                    logger.exception("cannot read the events of a job; trying again", extra={"job": tail.job.id})
                failing = True
                await asyncio.sleep(POLL_SECONDS)
            # Send events in quick succession together, which is what costs with many watchers.
            await asyncio.sleep(PACE_SECONDS)
            with suppress(TimeoutError):
                await asyncio.wait_for(tail.wake.wait(), POLL_SECONDS)

    async def _chunk(self, job: str, after: int, last: int) -> Chunk:
        """Read events from the registry: at least one of those after ``after`` up to ``last``."""
        limit = min(BATCH, last - after)

        def read() -> Chunk:
            events = self._registry.events(job, after, limit)
            if not events:
                raise NotFound(f"the events of job {job} after {after} are no longer kept")
            return Chunk(after, events[-1].seq, b"".join(frame(e.type, e.model_dump_json(), id=e.seq) for e in events))

        return await self._read(read)

    async def _read(self, call: Callable[[], T]) -> T:
        return await anyio.to_thread.run_sync(call, limiter=self._readers)

    def _wake(self, job: str) -> None:
        tail = self._tails.get(job)
        if tail is not None:
            tail.wake.set()

    async def _listen(self) -> None:
        """Receive from Redis which jobs have new events, for as long as the process lives."""
        client = redis.asyncio.Redis.from_url(
            self._redis_url, socket_connect_timeout=2, socket_keepalive=True, retry=None
        )
        # A subscriber waits for as long as nothing happens, whatever the URL says of single commands.
        client.connection_pool.connection_kwargs["socket_timeout"] = None
        failing = False
        while True:
            try:
                async with client.pubsub(ignore_subscribe_messages=True) as pubsub:
                    await pubsub.subscribe(CHANNEL)
                    if failing:
                        logger.info("Redis announces new events again")
                    failing = False
                    # Announcements may have been missed meanwhile.
                    for tail in self._tails.values():
                        tail.wake.set()
                    async for message in pubsub.listen():
                        with suppress(ValueError, KeyError, TypeError):
                            self._wake(json.loads(message["data"])["job"])
            except (RedisError, OSError) as error:
                if not failing:
                    text = "Redis does not answer; polling for events each second until it is back"
                    logger.warning(text, extra={"cause": str(error)})
                failing = True
                await asyncio.sleep(POLL_SECONDS)


def _progress(job: Job) -> bytes:
    return frame("progress", json.dumps(job.progress))


def _end(job: Job) -> bytes:
    return frame("end", json.dumps({"job": job.id, "state": job.state, "seq": job.seq}))
