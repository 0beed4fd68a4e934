"""An error raised in a servicer arrives at the client as the same class, over a real channel."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest

from ethogram.errors import ERRORS, MAX_VIOLATIONS, EthogramError, Internal, InvalidInput, Unavailable, Violation
from ethogram.rpc import CHANNEL_OPTIONS, error_of, grpc_status_of

Raising = tuple[list[EthogramError], "grpc.UnaryUnaryMultiCallable[bytes, bytes]"]


@pytest.fixture
def raising() -> Iterator[Raising]:
    """A box for the error to raise, and a call that raises it."""
    box: list[EthogramError] = []

    def handler(request: bytes, context: grpc.ServicerContext) -> bytes:
        if box:
            context.abort_with_status(grpc_status_of(box[0]))
        return b"" if request else b"x" * (65 * 2**20)

    server = grpc.server(futures.ThreadPoolExecutor(1), options=CHANNEL_OPTIONS)
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("t.T", {"Call": grpc.unary_unary_rpc_method_handler(handler)})]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) as channel:
        yield box, channel.unary_unary("/t.T/Call")
    server.stop(None)


@pytest.mark.parametrize("cls", ERRORS.values(), ids=list(ERRORS))
def test_class_message_and_violations_survive(cls: type[EthogramError], raising: Raising) -> None:
    box, call = raising
    box.append(cls("do this", [Violation("spec.a.b", "too small")]))
    with pytest.raises(grpc.RpcError) as caught:
        call(b"x")
    error = error_of(caught.value)
    assert type(error) is cls
    assert (error.message, error.violations) == ("do this", box[0].violations)


def test_many_long_violations_are_cut_and_still_arrive(raising: Raising) -> None:
    box, call = raising
    box.append(InvalidInput("ä" * 9000, [Violation("f" * 5000, "d\ud800" * 5000)] * 500))
    with pytest.raises(grpc.RpcError) as caught:
        call(b"x")
    error = error_of(caught.value)
    assert isinstance(error, InvalidInput)
    assert 3 <= len(error.violations) <= MAX_VIOLATIONS


def test_a_message_over_the_limit_says_what_to_do(raising: Raising) -> None:
    _, call = raising
    with pytest.raises(grpc.RpcError) as caught:
        call(b"")
    assert "send less" in error_of(caught.value).message


def test_nobody_there_is_unavailable() -> None:
    with grpc.insecure_channel("127.0.0.1:1", options=CHANNEL_OPTIONS) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/t.T/Call")
            call(b"", timeout=2)
        assert isinstance(error_of(caught.value), Unavailable)
    assert not isinstance(error_of(caught.value), Internal)
