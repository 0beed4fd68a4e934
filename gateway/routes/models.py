"""Routes of published models: names and versions that point to artifacts."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from ethogram.errors import NotFound
from gateway.inputs import Id, Name, Page
from gateway.services import TENANT, ServicesDependency
from services.artifacts.store import ModelPointer

router = APIRouter(prefix="/v1", tags=["models"])


class Publication(BaseModel):
    """A model to publish."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Name = Field(examples=["my-codec"])
    artifact: str = Field(pattern=r"^[0-9a-f]{64}$", description="Id of an artifact.")
    version: Name | None = Field(None, description="Default: the next number.", examples=["1"])


@router.post("/models", status_code=201)
def publish(publication: Publication, services: ServicesDependency) -> ModelPointer:
    """Publish an artifact as a model, which inference serves within seconds. A version is never replaced."""
    # Check the registry, since the store keeps a deleted artifact for some time.
    services.registry.artifact(publication.artifact)
    made = services.store.publish(TENANT, publication.name, publication.artifact, publication.version)
    try:
        services.registry.artifact(publication.artifact)
    except NotFound:
        # It was deleted meanwhile, by a request that did not see the model.
        services.store.retire(TENANT, made.name, made.version)
        services.store.withdraw(made.artifact)
        raise
    return made


@router.get("/models")
def list_models(services: ServicesDependency) -> Page[ModelPointer]:
    """All published models, all versions."""
    return Page(items=services.store.models(TENANT))


@router.get("/models/{name}")
def get_model(
    name: Id,
    services: ServicesDependency,
    version: Annotated[str | None, Query(description="Default: the latest.")] = None,
) -> ModelPointer:
    """One version of a published model."""
    return services.store.model(TENANT, name, version)


@router.post("/models/{name}/{version}/retire")
def retire(name: Id, version: Id, services: ServicesDependency) -> ModelPointer:
    """Retire a version: it is served only to requests that name it. Retiring it twice changes nothing."""
    return services.store.retire(TENANT, name, version)
