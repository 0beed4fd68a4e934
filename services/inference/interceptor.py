"""A wrapper around every method of ours: errors become statuses, and the server knows when it is idle."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import grpc
from google.protobuf.message import Message

from ethogram.errors import EthogramError, Internal
from ethogram.rpc import grpc_status_of
from services.inference.messages import check_known
from services.inference.metrics import InferenceMetrics

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


class Boundary(grpc.aio.ServerInterceptor):
    """Maps exceptions to ``google.rpc.Status``, refuses unknown fields, and counts calls."""

    def __init__(self, metrics: InferenceMetrics) -> None:
        self._metrics = metrics
        self._active = 0
        self.idle = asyncio.Event()
        """Set while no call of ours is running."""
        self.idle.set()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler: Any = await continuation(handler_call_details)
        # Health and reflection are the library's; their watches never end.
        method = str(handler_call_details.method)
        if handler is None or not method.startswith("/ethogram."):
            return handler  # type: ignore[no-any-return]
        name = method.rpartition(".")[2]
        coders = (handler.request_deserializer, handler.response_serializer)
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(self._unary(handler.unary_unary, name), *coders)
        return grpc.stream_stream_rpc_method_handler(self._stream(handler.stream_stream, name), *coders)

    def _unary(self, method: Callable[[Any, Context], Awaitable[Any]], name: str) -> Any:
        async def call(request: Message, context: Context) -> Any:
            async with self._guarded(context, name):
                check_known(request)
                return await method(request, context)

        return call

    def _stream(self, method: Callable[[Any, Context], AsyncIterator[Any]], name: str) -> Any:
        async def call(requests: AsyncIterator[Message], context: Context) -> AsyncIterator[Any]:
            async with self._guarded(context, name):
                async for response in method(requests, context):
                    yield response

        return call

    @asynccontextmanager
    async def _guarded(self, context: Context, name: str) -> AsyncIterator[None]:
        self._active += 1
        self.idle.clear()
        began, code = time.perf_counter(), "CANCELLED"
        try:
            yield
            code = "OK"
        except EthogramError as error:
            code = error.grpc_code
            await _abort(context, error)
        except (grpc.aio.BaseError, grpc.RpcError):
            raise
        except Exception:
            code = Internal.grpc_code
            number = uuid.uuid4().hex[:12]
            log.exception("a call failed", extra={"request": number})
            await _abort(context, Internal(f"internal error; the server's log has it under request {number}"))
        finally:
            self._metrics.calls.labels(name, code).inc()
            self._metrics.seconds.labels(name).observe(time.perf_counter() - began)
            self._active -= 1
            if not self._active:
                self.idle.set()


async def _abort(context: Context, error: EthogramError) -> NoReturn:
    status = grpc_status_of(error)
    await context.abort(status.code, status.details, status.trailing_metadata)
    raise AssertionError("abort returned")
