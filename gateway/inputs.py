"""Checks and types that several routes share."""

from __future__ import annotations

import re
from typing import Annotated, Generic, TypeVar

import anyio.to_thread
from fastapi import Header, Query, Request
from pydantic import AfterValidator, BaseModel, Field

from ethogram.errors import InvalidInput, NotFound
from services.jobs import text

T = TypeVar("T")

_ID = re.compile(r"[A-Za-z0-9_.-]{1,128}")


def _known_form(value: str) -> str:
    if not _ID.fullmatch(value):
        raise NotFound(f"there is nothing named {value[:80]!r}")
    return value


Id = Annotated[str, AfterValidator(_known_form)]
"""An id or name in a path; one of another form is unknown too."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,79}$", examples=["zoo"])]
"""A name that the user gives to an artifact, a model, a type or a version."""
Limit = Annotated[int, Query(ge=1, le=1000, description="Most items of the page.")]
Cursor = Annotated[str | None, Query(description="`next_cursor` of the page before.")]
IdempotencyKey = Annotated[
    str | None,
    Header(
        pattern=r"^[!-~]{1,255}$",
        description="A request sent again with the same key makes nothing new; with another body it is refused.",
    ),
]


def _check(body: object) -> None:
    for key, value in body.items() if isinstance(body, dict) else [("(root)", body)]:
        text.check(key, "(root)")
        text.check(value, key)


class Page(BaseModel, Generic[T]):
    """A part of a list."""

    items: list[T]
    next_cursor: str | None = None
    """Where the next page begins; null on the last."""


async def storable(request: Request) -> None:
    """Refuse NUL and lone surrogates: they pass validation, and databases cannot store them."""
    for name, value in [*request.path_params.items(), *request.query_params.multi_items()]:
        text.check(value, name)
    if request.scope["route"].body_field is None:
        # An upload is read by its route, piece by piece.
        return
    try:
        # The framework has read the body already, and keeps it.
        body = await request.json()
        # A large body takes a while, in which others are served.
        await anyio.to_thread.run_sync(_check, body)
    except ValueError:
        # No JSON: the framework says so.
        return
    except RecursionError:
        raise InvalidInput.field("(root)", "the body is nested too deeply") from None
