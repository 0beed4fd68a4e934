"""gRPC servicer of crossmodal jobs."""

from __future__ import annotations

from collections.abc import Iterator

import grpc

from ethogram.specs.crossmodal import CrossmodalSpec
from ethogram.v1 import crossmodal_pb2, crossmodal_pb2_grpc, jobs_pb2
from services.runtime.servicer import stream_job


class CrossmodalTrainingServicer(crossmodal_pb2_grpc.CrossmodalTrainingServiceServicer):
    """Trains and evaluates a codec and streams how it goes."""

    def Run(
        self, request: crossmodal_pb2.RunCrossmodalRequest, context: grpc.ServicerContext
    ) -> Iterator[jobs_pb2.JobEvent]:
        return stream_job(request, context, CrossmodalSpec, "services.crossmodal.job:run")


def add_to_server(server: grpc.Server) -> None:
    """Register the servicer."""
    crossmodal_pb2_grpc.add_CrossmodalTrainingServiceServicer_to_server(CrossmodalTrainingServicer(), server)
