"""The arena's jobs, as their processes serve them; the points of a job's process are here.

A job's process does not see its worker's environment: the folder of faults lies beside the store.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import grpc

from benchmarks._chaos import points
from ethogram.specs.crossmodal import CrossmodalSpec
from ethogram.specs.generation import GenerationSpec
from ethogram.v1 import crossmodal_pb2, crossmodal_pb2_grpc, generation_pb2, generation_pb2_grpc, jobs_pb2
from services.artifacts.backends import LocalBackend
from services.runtime.servicer import stream_job


def _arm(context: jobs_pb2.RunContext) -> None:
    folder = Path(context.store).parent / "faults"
    write = LocalBackend.write

    def wrapped(self: LocalBackend, path: str, data: bytes) -> None:
        # The blobs are there, the manifest is not.
        if path.startswith("manifests/") and points.take(folder, "in the middle of an upload"):
            points.die()
        if points.take(folder, "child hangs"):
            time.sleep(3600)
        write(self, path, data)

    LocalBackend.write = wrapped  # type: ignore[method-assign]
    points.full_store(folder, "child: store full")


class _Generation(generation_pb2_grpc.GenerationServiceServicer):
    def Run(
        self, request: generation_pb2.RunGenerationRequest, context: grpc.ServicerContext
    ) -> Iterator[jobs_pb2.JobEvent]:
        _arm(request.context)
        return stream_job(request, context, GenerationSpec, "benchmarks._chaos.science:work")


class _Crossmodal(crossmodal_pb2_grpc.CrossmodalTrainingServiceServicer):
    def Run(
        self, request: crossmodal_pb2.RunCrossmodalRequest, context: grpc.ServicerContext
    ) -> Iterator[jobs_pb2.JobEvent]:
        _arm(request.context)
        return stream_job(request, context, CrossmodalSpec, "benchmarks._chaos.science:consume")


def generation(server: grpc.Server) -> None:
    """Jobs that count, and parents of such."""
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(_Generation(), server)


def crossmodal(server: grpc.Server) -> None:
    """Jobs that use what another made."""
    crossmodal_pb2_grpc.add_CrossmodalTrainingServiceServicer_to_server(_Crossmodal(), server)
