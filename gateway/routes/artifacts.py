"""Artifacts: upload, list, show, download, delete."""

from __future__ import annotations

import mimetypes
from collections.abc import AsyncIterator, Iterator
from http import HTTPStatus
from typing import Annotated, BinaryIO

import anyio.to_thread
from fastapi import APIRouter, Header, Query, Request, Response
from pydantic import BaseModel
from starlette.responses import StreamingResponse

from ethogram.errors import NotFound
from gateway.inputs import Cursor, Id, Limit, Page
from gateway.services import TENANT, Parts, Services
from gateway.uploads import Upload
from services.artifacts.manifest import Manifest
from services.jobs.records import ArtifactRow

router = APIRouter(prefix="/v1", tags=["artifacts"])

CHUNK_BYTES = 2**20
# Types that a browser may display; everything else is sent as a download.
_DISPLAYED = frozenset({"application/json", "image/png", "text/csv", "text/plain"})


class Uploaded(BaseModel):
    """A new artifact."""

    id: str
    manifest: Manifest


class ArtifactDetail(ArtifactRow):
    """One artifact with its manifest."""

    manifest: Manifest


_BINARY = {"type": "string", "format": "binary"}
_FORM = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["name", "type", "files"],
                "properties": {
                    "name": {"type": "string", "description": "Name of the artifact."},
                    "type": {"type": "string", "description": "Its type: `zoo`, `codec`, ..."},
                    "files": {
                        "type": "array",
                        "items": _BINARY,
                        "description": "Its files; the file name of a part is the path inside the artifact.",
                    },
                },
            }
        }
    },
}


@router.post("/artifacts", status_code=201, openapi_extra={"requestBody": _FORM})
async def upload(request: Request, services: Parts) -> Uploaded:
    """Store your files as an artifact that jobs can take as input."""
    receiver = await anyio.to_thread.run_sync(Upload, services.work, request.headers.get("content-type", ""))
    try:
        async for chunk in _large(request.stream()):
            await anyio.to_thread.run_sync(receiver.feed, chunk)
        return await anyio.to_thread.run_sync(_keep, receiver, services)
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(receiver.discard)


@router.get("/artifacts")
def list_artifacts(
    services: Parts,
    job: Annotated[str | None, Query(description="Only outputs of this job.")] = None,
    type: Annotated[str | None, Query(description="Only artifacts of this type.")] = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Page[ArtifactRow]:
    """Artifacts, newest first."""
    items, after = services.registry.artifacts(job=job, type=type, tenant=TENANT, limit=limit, cursor=cursor)
    return Page(items=items, next_cursor=after)


@router.get("/artifacts/{artifact_id}")
def get_artifact(artifact_id: Id, services: Parts) -> ArtifactDetail:
    """One artifact with its manifest: files, digests, lineage."""
    row = services.registry.artifact(artifact_id)
    return ArtifactDetail(**row.model_dump(), manifest=services.store.manifest(artifact_id))


@router.delete("/artifacts/{artifact_id}")
def delete_artifact(artifact_id: Id, services: Parts) -> ArtifactRow:
    """Delete an artifact that no job needs any more, with the retired models that point to it. Its space is freed
    some hours later, or once the jobs that used it are deleted too."""
    services.registry.deletable_artifact(artifact_id)
    services.store.withdraw(artifact_id)
    return services.registry.delete_artifact(artifact_id)


@router.get(
    "/artifacts/{artifact_id}/files/{path:path}",
    response_class=StreamingResponse,
    responses={
        200: {"description": "The file", "content": {"application/octet-stream": {"schema": _BINARY}}},
        304: {"description": "It is the one that `If-None-Match` names"},
    },
)
def download(
    artifact_id: Id, path: str, services: Parts, if_none_match: Annotated[str | None, Header()] = None
) -> Response:
    """One file of an artifact. Its ETag is its sha256."""
    file = services.store.manifest(artifact_id).files.get(path)
    if file is None:
        # Opening it distinguishes an invalid path from a missing file.
        services.store.open(artifact_id, path).close()
        raise NotFound(f"artifact {artifact_id} has no file {path!r}")
    kind = mimetypes.guess_type(path)[0]
    headers = {
        "ETag": f'"{file.sha256}"',
        "Cache-Control": "private, max-age=31536000, immutable",
    }
    if if_none_match is not None and file.sha256 in if_none_match:
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    return StreamingResponse(
        _chunks(services.store.open(artifact_id, path)),
        headers=headers | {"Content-Length": str(file.size)},
        media_type=kind if kind in _DISPLAYED else "application/octet-stream",
    )


def _keep(receiver: Upload, services: Services) -> Uploaded:
    fields = receiver.finish().model_dump()

    def record(id: str, manifest: Manifest) -> None:
        services.registry.add_artifact(id, size=manifest.size, tenant=TENANT, **fields)

    id, manifest = services.store.put(receiver.folder, tenant=TENANT, record=record, **fields)
    return Uploaded(id=id, manifest=manifest)


async def _large(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes in larger chunks, since each chunk costs a change of threads."""
    gathered = bytearray()
    async for piece in stream:
        gathered += piece
        if len(gathered) >= CHUNK_BYTES:
            yield bytes(gathered)
            gathered.clear()
    yield bytes(gathered)


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
