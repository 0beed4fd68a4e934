"""The gRPC service of encoders of configurations: messages to arrays and back, nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ethogram.errors import InvalidInput
from ethogram.v1 import embedding_pb2 as pb
from ethogram.v1 import embedding_pb2_grpc
from ethogram.wire import from_tensor, to_tensor
from services.inference.batcher import Arrays, Batcher
from services.inference.dataplane import Dataplane, Request
from services.inference.messages import reference, required
from services.inference.repository import Served
from services.inference.resource.served import (
    CONFIGURATIONS,
    EMBEDDINGS,
    OUTSIDE,
    TEXT_BYTES,
    TEXTS,
    VALUES,
    Readers,
    ServedResource,
    named_columns,
)
from services.inference.servicer import Servicer, calls, model_of
from services.resource.codec import Column

CONFIDENCE = 0.9
"""Confidence of a recommendation where a request has none."""


async def _list_fields(dataplane: Dataplane, request: pb.ListFieldsRequest) -> pb.ListFieldsResponse:
    served = await dataplane.repository.get(reference(request.model), ServedResource)
    codec = served.model.codec
    fields = [
        pb.ResourceField(
            name=dimension.name,
            column=dimension.column or dimension.name,
            unit=dimension.unit,
            labels=dimension.labels,
            low=dimension.low or 0.0,
            high=dimension.high or 0.0,
            decimals=dimension.decimals,
            price=dimension.price,
            measured=dimension.measured,
        )
        for dimension in codec.schema.dimensions
    ]
    templates = [template.name for template in codec.schema.templates]
    return pb.ListFieldsResponse(fields=fields, templates=templates, size=codec.size, model=model_of(served))


async def _embed(dataplane: Dataplane, request: pb.EmbedResourcesRequest) -> pb.EmbedResourcesResponse:
    rows: pb.ResourceRows = required(request, CONFIGURATIONS)

    def answer(arrays: Arrays, served: Served[ServedResource]) -> pb.EmbedResourcesResponse:
        return pb.EmbedResourcesResponse(
            embeddings=to_tensor(arrays[EMBEDDINGS]), outside=_outside(arrays, served), model=model_of(served)
        )

    def check(resource: ServedResource) -> Request:
        return resource.check_rows(*_read(rows))

    return await dataplane.run(reference(request.model), ServedResource, check, ServedResource.embed, answer)


async def _describe(dataplane: Dataplane, readers: Readers, request: pb.DescribeRequest) -> pb.DescribeResponse:
    method: Callable[..., Arrays]
    match request.WhichOneof("input"):
        case "configurations":
            method = ServedResource.describe
        case "embeddings":
            method = ServedResource.describe_embeddings
        case _:
            raise InvalidInput.field("input", "missing; set configurations or embeddings")

    def check(resource: ServedResource) -> Request:
        if request.HasField("configurations"):
            checked = resource.check_rows(*_read(request.configurations), answer_bytes=TEXT_BYTES)
        else:
            checked = resource.check_embeddings(from_tensor(request.embeddings, EMBEDDINGS))
        return checked._replace(options=resource.check_template(request.template))

    def answer(arrays: Arrays, served: Served[ServedResource]) -> pb.DescribeResponse:
        schema = served.model.schema
        (template,) = [template for template in schema.templates if template.name == request.template] or [
            schema.templates[0]
        ]
        found = [template.read(text) for text in arrays[TEXTS]]
        readable = np.array([row is not None for row in found])
        values = np.array([row or [0.0] * len(schema.dimensions) for row in found])
        return pb.DescribeResponse(
            texts=arrays[TEXTS].tolist(),
            readable=readable.tolist(),
            configurations=_rows(named_columns(served, values), ~readable),
            outside=_outside(arrays, served),
            model=model_of(served),
        )

    async def prepare(served: Served[ServedResource]) -> None:
        await served.model.prepare_describe(readers, served.pointer.artifact)

    model = reference(request.model)
    return await dataplane.run(model, ServedResource, check, method, answer, prepare=prepare)


async def _recommend(dataplane: Dataplane, request: pb.RecommendRequest) -> pb.RecommendResponse:
    rows: pb.ResourceRows = required(request, CONFIGURATIONS)
    confidence = request.confidence if request.HasField("confidence") else CONFIDENCE

    def check(resource: ServedResource) -> Request:
        columns, _ = _read(rows)
        return resource.check_requirements(columns, list(request.bounds), confidence, request.dimension)

    def answer(arrays: Arrays, served: Served[ServedResource]) -> pb.RecommendResponse:
        columns = named_columns(served, arrays[VALUES])
        chosen = {field.name for field in served.model.schema.dimensions if not field.measured}
        dimension = served.model.dimension(request.dimension)
        used, left_out = served.model.measurements(dimension)
        return pb.RecommendResponse(
            configurations=_rows({name: column for name, column in columns.items() if name in chosen}),
            price=to_tensor(arrays["price"]),
            predicted=to_tensor(arrays["predicted"]),
            upper=to_tensor(arrays["upper"]),
            fits=arrays["fits"].tolist(),
            dimension=dimension,
            measurements=used,
            measurements_left_out=left_out,
            outside=_outside(arrays, served),
            model=model_of(served),
        )

    async def prepare(served: Served[ServedResource]) -> None:
        await served.model.prepare_recommend(request.dimension)

    model = reference(request.model)
    return await dataplane.run(model, ServedResource, check, ServedResource.recommend, answer, prepare=prepare)


class EmbeddingServicer(Servicer, embedding_pb2_grpc.EmbeddingServiceServicer):
    """ListFields; EmbedResources, Describe and Recommend, as single calls and as streams."""

    def __init__(self, dataplane: Dataplane, slow: Batcher, readers: Readers) -> None:
        """``slow`` runs descriptions and recommendations, so that embeddings do not wait for them."""
        super().__init__(dataplane)
        self.slow, self.readers = dataplane._replace(batcher=slow), readers

    ListFields = calls(_list_fields)[0]
    EmbedResources, EmbedResourcesStream = calls(_embed)
    Describe, DescribeStream = calls(_describe, "slow", "readers")
    Recommend, RecommendStream = calls(_recommend, "slow")


def _read(rows: pb.ResourceRows) -> tuple[dict[str, Column], int]:
    """Columns by name, and how many rows there are: as many as the longest has."""
    columns = {}
    for name, column in rows.columns.items():
        if column.numbers and column.labels:
            raise InvalidInput.field(f"{CONFIGURATIONS}.{name}", "has numbers and labels; a field has one of them")
        values: Any = list(column.labels) if column.labels else np.array(column.numbers, np.float64)
        columns[name] = Column(values, np.array(column.unknown, np.bool_) if column.unknown else None)
    return columns, max((len(column.values) for column in columns.values()), default=0)


def _rows(columns: Mapping[str, Any], unknown: Any = None) -> pb.ResourceRows:
    """Columns as a message; ``unknown``: which rows are."""
    hidden = [] if unknown is None or not unknown.any() else unknown.tolist()
    return pb.ResourceRows(
        columns={
            name: pb.ResourceColumn(labels=column, unknown=hidden)
            if isinstance(column[0], str)
            else pb.ResourceColumn(numbers=column, unknown=hidden)
            for name, column in columns.items()
        }
    )


def _outside(arrays: Arrays, served: Served[ServedResource]) -> list[pb.OutsideRange]:
    """The rows of which numbers are outside the range of training."""
    fields: dict[int, list[str]] = {}
    for row, field in np.argwhere(arrays[OUTSIDE]).tolist() if OUTSIDE in arrays else ():
        fields.setdefault(row, []).append(served.model.schema.names[field])
    return [pb.OutsideRange(row=row, fields=names) for row, names in fields.items()]
