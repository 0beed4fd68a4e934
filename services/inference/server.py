"""The inference server: repository, batcher, services, health and reflection on one port."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ethogram.errors import Conflict
from ethogram.rpc import CHANNEL_OPTIONS
from ethogram.v1 import embedding_pb2, embedding_pb2_grpc, inference_pb2, inference_pb2_grpc
from services.artifacts.store import ArtifactStore
from services.inference.batcher import Batcher
from services.inference.codec.served import ServedCodec
from services.inference.codec.servicer import CodecServicer, SteeringServicer
from services.inference.dataplane import Dataplane
from services.inference.interceptor import Boundary
from services.inference.metrics import InferenceMetrics
from services.inference.repository import ModelRepository
from services.inference.resource.served import GROUP, Readers, ServedResource
from services.inference.resource.servicer import EmbeddingServicer
from services.inference.settings import InferenceSettings
from services.runtime import scratch
from services.runtime.devices import chosen_device
from services.runtime.exporter import serve_metrics

SERVICES = tuple(
    service.full_name
    for module in (inference_pb2, embedding_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
)
LOADERS: dict[str, Callable[..., object]] = {"codec": ServedCodec.load, "resource-encoder": ServedResource.load}
"""Functions ``(folder, device=...)`` that load a served model, by type of artifact."""
THREADS = 2
"""Threads that check requests and build answers."""
OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
"""Errors of a device, or this machine, without enough memory."""
# Beyond it gRPC itself refuses, before a message is read into memory.
MAX_CALLS = 1024

log = logging.getLogger(__name__)


class InferenceServer:
    """One device's server. Use :meth:`start` and :meth:`stop` on one event loop."""

    def __init__(self, settings: InferenceSettings) -> None:
        self._settings = settings
        self._device = chosen_device(None if settings.device == "auto" else settings.device, "ETHOGRAM_DEVICE")
        self._stack = ExitStack()
        # Each Python thread has its own setting.
        set_up_thread = partial(torch.set_num_threads, settings.threads)
        self._threads = ThreadPoolExecutor(THREADS, "requests", initializer=set_up_thread)
        self._metrics = InferenceMetrics(
            models=lambda: len(self._repository),
            pending=lambda: sum(batcher.pending for batcher in self._batchers),
        )
        batcher = partial(
            Batcher,
            max_wait=settings.max_wait_seconds,
            max_pending_rows=settings.max_pending,
            out_of_memory=OUT_OF_MEMORY,
            release_memory=torch.cuda.empty_cache,
            set_up_thread=set_up_thread,
            observe=self._metrics.batch,
        )
        # The second one has what takes seconds, by language models, so that nothing else waits for it.
        self._batchers = batcher(max_rows=settings.max_batch), batcher(max_rows=GROUP)
        store = ArtifactStore(settings.store_url)
        folder = self._stack.enter_context(scratch.folder(settings.work, "inference"))
        self._readers = Readers(store, folder, self._device, OUT_OF_MEMORY)
        self._repository = ModelRepository(
            store,
            {name: partial(load, device=self._device) for name, load in LOADERS.items()},
            scratch=folder,
            max_models=settings.max_models,
            max_bytes=settings.max_model_bytes,
            out_of_memory=OUT_OF_MEMORY,
            release_memory=torch.cuda.empty_cache,
        )
        self._boundary = Boundary(self._metrics)
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self._refreshing: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Serve. Returns the address, ``host:port``; raises :class:`Conflict` when the port is taken."""
        limit = self._settings.max_message_bytes
        fast, slow = self._batchers
        dataplane = Dataplane(self._repository, fast, self._threads, limit - 64 * 1024)
        options = {
            **dict(CHANNEL_OPTIONS),
            "grpc.max_receive_message_length": limit,
            "grpc.max_send_message_length": limit,
            # Otherwise a second server on the same port would silently take half of the calls.
            "grpc.so_reuseport": 0,
        }
        server = grpc.aio.server(
            interceptors=[self._boundary], options=list(options.items()), maximum_concurrent_rpcs=MAX_CALLS
        )
        inference_pb2_grpc.add_CodecServiceServicer_to_server(CodecServicer(dataplane), server)
        inference_pb2_grpc.add_SteeringServiceServicer_to_server(SteeringServicer(dataplane), server)
        embedding_pb2_grpc.add_EmbeddingServiceServicer_to_server(
            EmbeddingServicer(dataplane, slow, self._readers), server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection([*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
        host = f"[{self._settings.host}]" if ":" in self._settings.host else self._settings.host
        try:
            port = server.add_insecure_port(f"{host}:{self._settings.port}")
        except RuntimeError:
            self._stack.close()
            raise Conflict(
                f"cannot listen on {host}:{self._settings.port}: the port is taken, or this machine does not have the "
                "address; set ETHOGRAM_PORT (0: any free port) or ETHOGRAM_HOST"
            ) from None
        try:
            self._stack.enter_context(serve_metrics(self._metrics.registry, self._settings))
        except Conflict:
            self._stack.close()
            raise
        for batcher in self._batchers:
            batcher.start()
        await server.start()
        self._server = server
        self._refreshing = asyncio.create_task(self._repository.keep_fresh(self._settings.refresh_seconds))
        for service in ("", *SERVICES):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        log.info("serving", extra={"address": f"{host}:{port}", "device": self._device})
        return f"{host}:{port}"

    async def stop(self) -> None:
        """Tell the watchers of the health service, let running calls finish within the grace period, and end."""
        assert self._server is not None and self._refreshing is not None
        await self._health.enter_graceful_shutdown()
        stopping = asyncio.create_task(self._server.stop(self._settings.grace_seconds))
        # Watches of the health service never end by themselves; they must not use up the grace period.
        idle = asyncio.create_task(self._boundary.idle.wait())
        await asyncio.wait([stopping, idle], return_when=asyncio.FIRST_COMPLETED)
        idle.cancel()
        await self._server.stop(0)
        await stopping
        self._refreshing.cancel()
        await asyncio.gather(self._refreshing, return_exceptions=True)
        for batcher in self._batchers:
            await batcher.stop()
        await asyncio.to_thread(self._threads.shutdown)
        self._stack.close()
        log.info("stopped")
