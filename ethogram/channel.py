"""A connection to an inference service: deadlines, errors, and sets of rows of any size, sent in parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, TypeVar

import grpc
from google.protobuf.message import Message

from ethogram.errors import EthogramError, TooLarge
from ethogram.rpc import CHANNEL_OPTIONS, error_of
from ethogram.v1 import inference_pb2 as pb

# A message far below its limit keeps a large set flowing: one part computes while the next travels.
PART_BYTES, PART_ROWS = 8 * 2**20, 512

R = TypeVar("R")


Methods = tuple[Callable[..., R], Callable[..., Iterator[R]]]
"""A method that answers row by row: unary, and as a stream."""


class Channel:
    """A connection to ``target`` (``host:port``); a call fails after ``timeout`` seconds per part.

    Thread-safe. A failed call raises the :class:`~ethogram.errors.EthogramError` that the server raised, or
    :class:`~ethogram.errors.Unavailable` when it does not answer.
    """

    def __init__(self, target: str, *, timeout: float = 60.0) -> None:
        self.timeout = timeout
        self._channel = grpc.insecure_channel(target, options=CHANNEL_OPTIONS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._channel.close()

    def _call(self, method: Callable[..., R], request: Message) -> R:
        """The answer of a unary method."""
        try:
            return method(request, timeout=self.timeout)
        except grpc.RpcError as error:
            raise error_of(error) from None

    def _run_parts(
        self,
        methods: Methods[R],
        request: Callable[[pb.ModelRef, slice], Message],
        model: pb.ModelRef,
        pinned: Callable[[], pb.ModelRef],
        *,
        rows: int,
        row_bytes: int,
    ) -> list[R]:
        """The answers to all parts of ``rows`` rows of about ``row_bytes`` bytes each, in order.

        One message where the rows fit, else a stream whose parts are halved until the server takes them. ``pinned``
        gives ``model`` with a version, so that all parts of a stream get the same one.
        """
        unary, stream = methods
        size = max(1, min(PART_ROWS, PART_BYTES // max(row_bytes, 1)))
        if rows <= size:
            try:
                return [self._call(unary, request(model, slice(0, rows)))]
            except TooLarge as error:
                half = _half(min(size, rows), error)
                if half is None:
                    raise
                size = half
        model = pinned()
        answers: list[R] = []
        start = 0
        while start < rows:
            parts = [slice(at, min(at + size, rows)) for at in range(start, rows, size)]
            try:
                for answer in self._stream(stream, (request(model, part) for part in parts), len(parts)):
                    answers.append(answer)
                    start = min(start + size, rows)
            except EthogramError as error:
                half = _half(size, error) if isinstance(error, TooLarge) else None
                if half is None:
                    raise self._relocate_error(error, parts) from None
                size = half
        return answers

    def _relocate_error(self, error: EthogramError, parts: Sequence[slice]) -> EthogramError:
        """``error`` of a stream that sent a set of rows in ``parts``, in terms of the whole set."""
        return error

    def _stream(self, method: Callable[..., Any], requests: Iterator[Message], parts: int) -> Iterator[Any]:
        answers = method(requests, timeout=self.timeout * parts)
        try:
            yield from answers
        except grpc.RpcError as error:
            raise error_of(error) from None
        finally:
            # Does nothing to a call that has ended; one that is left in the middle, by Ctrl-C say, ends too.
            answers.cancel()


def _half(size: int, error: TooLarge) -> int | None:
    """Half of ``size``, if the server named a field that is too large and there are rows to split."""
    return size // 2 if size > 1 and error.violations else None
