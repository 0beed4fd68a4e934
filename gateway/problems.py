"""Errors as ``application/problem+json`` (RFC 9457), in one place for all routes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from ethogram.errors import (
    MAX_VIOLATIONS,
    EthogramError,
    InvalidInput,
    NotFound,
    TooLarge,
    Unavailable,
    advice,
    did_you_mean,
    printable,
)
from ethogram.specs.kinds import KINDS
from gateway.submissions import SubmissionBase

MEDIA_TYPE = "application/problem+json"


class ViolationOut(BaseModel):
    """One field that is wrong."""

    field: str = Field(examples=["spec.training.steps"])
    description: str


class Problem(BaseModel):
    """The body of every error response."""

    type: str = Field(examples=["about:blank"])
    title: str = Field(examples=["Unprocessable Entity"])
    status: int = Field(examples=[422])
    detail: str = Field(examples=["spec.training.steps: must be greater than or equal to 1"])
    reason: str = Field(examples=["INVALID_INPUT"])
    violations: list[ViolationOut] = []
    request_id: str


def problem(error: EthogramError, request_id: str, *, status: int = 0, reason: str = "") -> Response:
    """The response for ``error``."""
    status = status or error.http_status
    body = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": printable(error.message),
        "reason": reason or error.reason,
        "violations": [
            {"field": printable(v.field), "description": printable(v.description)} for v in error.violations
        ],
        "request_id": request_id,
    }
    headers = {"Retry-After": "1"} if status == HTTPStatus.SERVICE_UNAVAILABLE else {}
    return Response(json.dumps(body), status, headers, MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Answer every error of ``app`` with a problem; unexpected exceptions are left to the request context."""

    async def answer(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            return _http_problem(request, error)
        if isinstance(error, RequestValidationError):
            error = invalid_request(error.errors(), error.body)
        assert isinstance(error, EthogramError)
        return problem(error, request_id_of(request))

    for kind in (EthogramError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, answer)


def request_id_of(request: Request) -> str:
    """The id that the request context gave to ``request``."""
    request_id: str = request.scope["state"]["request_id"]
    return request_id


def _http_problem(request: Request, error: HTTPException) -> Response:
    request_id, status, detail = request_id_of(request), error.status_code, str(error.detail)
    known = {
        HTTPStatus.NOT_FOUND: NotFound(f"there is nothing at {request.url.path}; /docs lists what there is"),
        # The framework's status for a body that it cannot parse: not UTF-8, too deep, too long integers.
        HTTPStatus.BAD_REQUEST: InvalidInput.field("(root)", "the body cannot be read as JSON"),
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE: TooLarge(detail),
        HTTPStatus.SERVICE_UNAVAILABLE: Unavailable(detail),
    }
    if status in known:
        answer = problem(known[HTTPStatus(status)], request_id)
    else:
        name = HTTPStatus(status).name
        answer = problem(EthogramError(f"{request.method}: {detail}"), request_id, status=status, reason=name)
    answer.headers.update(error.headers or {})
    return answer


def invalid_request(details: Sequence[Any], body: Any) -> InvalidInput:
    """The framework's errors, with paths as the user wrote them: ``spec.training.steps``.

    The framework's own paths begin with ``body``, ``query``, ... and include the tag of the union of kinds.
    """
    errors = []
    for detail in details[:MAX_VIOLATIONS]:
        where, *path = detail["loc"]
        message, more_to_say = str(detail["msg"]), _advice(detail)
        if where == "body":
            path = _without_kind(path, body)
        if detail["type"] == "json_invalid":
            path, message = [], f"the body is not JSON: {detail['ctx']['error']} at character {detail['loc'][-1]}"
        elif detail["type"] in ("union_tag_invalid", "union_tag_not_found"):
            tag = str((detail.get("ctx") or {}).get("tag", ""))
            given = "missing" if detail["type"] == "union_tag_not_found" else "unknown kind"
            path, message = [*path, "kind"], f"{given}; there are: {', '.join(KINDS)}{did_you_mean(tag, KINDS)}"
        elif detail["type"] in ("model_attributes_type", "model_type") and not path:
            message = "the body must be a JSON object, sent with Content-Type: application/json"
        errors.append({"type": detail["type"], "loc": path, "msg": message, "advice": more_to_say})
    return InvalidInput.from_details(errors, more=len(details) - len(errors))


def _advice(detail: Mapping[str, Any]) -> str:
    """See :func:`ethogram.errors.advice`."""
    path = detail["loc"][3:] if detail["loc"][1:2] == ("jobs",) else detail["loc"][1:]
    if detail["loc"][0] != "body" or path[:1] == () or path[0] not in KINDS:
        return ""
    if path[1:2] == ("spec",) and path[2:]:
        return advice(KINDS[path[0]].spec, {**detail, "loc": path[2:]})
    return advice(SubmissionBase, {**detail, "loc": path[1:]})


def _without_kind(path: list[str | int], body: Any) -> list[str | int]:
    """``path`` without the kind that the union of kinds inserts: ``KIND.spec...`` or ``jobs.NAME.KIND.spec...``."""
    at = 2 if path[:1] == ["jobs"] else 0
    inserted = len(path) > at and path[at] in KINDS
    if inserted and (at or (isinstance(body, Mapping) and body.get("kind") == path[0])):
        return [*path[:at], *path[at + 1 :]]
    return path
