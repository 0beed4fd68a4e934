"""Servicers of the test jobs, as each system has one in its ``service.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import grpc

from ethogram.specs.generation import GenerationSpec
from ethogram.v1 import generation_pb2, generation_pb2_grpc, jobs_pb2
from services.runtime.servicer import stream_job


def _adds(function: str) -> Callable[[grpc.Server], None]:
    class Servicer(generation_pb2_grpc.GenerationServiceServicer):
        def Run(
            self, request: generation_pb2.RunGenerationRequest, context: grpc.ServicerContext
        ) -> Iterator[jobs_pb2.JobEvent]:
            return stream_job(request, context, GenerationSpec, f"tests.workers.science:{function}")

    def add_to_server(server: grpc.Server) -> None:
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(Servicer(), server)

    return add_to_server


count = _adds("count")
refuse = _adds("refuse")
fail = _adds("fail")
die = _adds("die")
hang = _adds("hang")
pile = _adds("pile")
look_around = _adds("look_around")
silent = _adds("silent")
gather = _adds("gather")


def broken(server: grpc.Server) -> None:
    """A system that cannot be loaded."""
    raise ImportError("no module named tensorflow")
