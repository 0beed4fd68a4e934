"""CltService: the thin servicer. The science is imported when a job runs."""

from __future__ import annotations

from collections.abc import Iterator

import grpc

from ethogram.specs.clt import ActivationsSpec, CltSpec, PolicySpec, SaeSpec, SweepSpec
from ethogram.v1 import clt_pb2, clt_pb2_grpc, jobs_pb2
from services.runtime.servicer import stream_job


class CltServicer(clt_pb2_grpc.CltServiceServicer):
    """Runs the jobs of policies, activations and sparse models."""

    def RunPolicy(
        self, request: clt_pb2.RunPolicyRequest, context: grpc.ServicerContext
    ) -> Iterator[jobs_pb2.JobEvent]:
        """Train a policy; see :func:`services.clt.policy.job.run`."""
        return stream_job(request, context, PolicySpec, "services.clt.policy.job:run")

    def RunActivations(
        self, request: clt_pb2.RunActivationsRequest, context: grpc.ServicerContext
    ) -> Iterator[jobs_pb2.JobEvent]:
        """Record activations; see :func:`services.clt.activations.job.run`."""
        return stream_job(request, context, ActivationsSpec, "services.clt.activations.job:run")

    def RunSae(self, request: clt_pb2.RunSaeRequest, context: grpc.ServicerContext) -> Iterator[jobs_pb2.JobEvent]:
        """Train an autoencoder; see :func:`services.clt.sparse.job.run`."""
        return stream_job(request, context, SaeSpec, "services.clt.sparse.job:run")

    def RunClt(self, request: clt_pb2.RunCltRequest, context: grpc.ServicerContext) -> Iterator[jobs_pb2.JobEvent]:
        """Train transcoders; see :func:`services.clt.sparse.job.run`."""
        return stream_job(request, context, CltSpec, "services.clt.sparse.job:run")

    def RunSweep(self, request: clt_pb2.RunSweepRequest, context: grpc.ServicerContext) -> Iterator[jobs_pb2.JobEvent]:
        """Train transcoders over pairs and a grid; see :func:`services.clt.sparse.sweep.run`."""
        return stream_job(request, context, SweepSpec, "services.clt.sparse.sweep:run")


def add_to_server(server: grpc.Server) -> None:
    """Serve it on ``server``."""
    clt_pb2_grpc.add_CltServiceServicer_to_server(CltServicer(), server)
