"""Published models: names and versions that point to artifacts."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from ethogram.errors import NotFound
from gateway.inputs import Id, Name, Page
from gateway.services import TENANT, Parts
from services.artifacts.manifest import ModelPointer

router = APIRouter(prefix="/v1", tags=["models"])


class Publication(BaseModel):
    """A model to publish."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Name = Field(examples=["my-codec"])
    artifact: str = Field(pattern=r"^[0-9a-f]{64}$", description="Id of an artifact.")
    version: Name | None = Field(None, description="Default: the next number.", examples=["1"])


@router.post("/models", status_code=201)
def publish(publication: Publication, services: Parts) -> ModelPointer:
    """Publish an artifact as a model. A version is never replaced; inference serves it within seconds."""
    # The store keeps a deleted artifact for some time.
    services.registry.artifact(publication.artifact)
    model = services.store.publish(TENANT, publication.name, publication.artifact, publication.version)
    try:
        services.registry.artifact(publication.artifact)
    except NotFound:
        # It was deleted in between, by a request that did not see the model.
        services.store.retire(TENANT, model.name, model.version)
        services.store.withdraw(model.artifact)
        raise
    return model


@router.get("/models")
def list_models(services: Parts) -> Page[ModelPointer]:
    """All published models, all versions."""
    return Page(items=services.store.models(TENANT))


@router.get("/models/{name}")
def get_model(
    name: Id, services: Parts, version: Annotated[str | None, Query(description="Default: the latest.")] = None
) -> ModelPointer:
    """One published model."""
    return services.store.model(TENANT, name, version)


@router.post("/models/{name}/{version}/retire")
def retire(name: Id, version: Id, services: Parts) -> ModelPointer:
    """Retire a version: it is served only to requests that name it. Retiring twice has no effect."""
    return services.store.retire(TENANT, name, version)
