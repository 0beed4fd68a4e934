"""GenerationService: the thin servicer. The science is imported when a job runs."""

from __future__ import annotations

from collections.abc import Iterator

import grpc

from ethogram.specs.generation import GenerationSpec
from ethogram.v1 import generation_pb2, generation_pb2_grpc, jobs_pb2
from services.runtime.servicer import stream_job


class GenerationServicer(generation_pb2_grpc.GenerationServiceServicer):
    """Runs generation jobs."""

    def Run(
        self, request: generation_pb2.RunGenerationRequest, context: grpc.ServicerContext
    ) -> Iterator[jobs_pb2.JobEvent]:
        """Make a zoo; see :func:`services.generation.job.run`."""
        return stream_job(request, context, GenerationSpec, "services.generation.job:run")


def add_to_server(server: grpc.Server) -> None:
    """Serve it on ``server``."""
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(GenerationServicer(), server)
