"""Parameter types and checks that several routes share."""

from __future__ import annotations

import re
from typing import Annotated, Generic, TypeVar

import anyio.to_thread
from fastapi import Header, Query, Request
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field

from ethogram.errors import InvalidInput, NotFound
from services.jobs import text

T = TypeVar("T")

_ID = re.compile(r"[A-Za-z0-9_.-]{1,128}")


def _check_id(value: str) -> str:
    if not _ID.fullmatch(value):
        raise NotFound(f"there is nothing named {value[:80]!r}")
    return value


def explained(pattern: str, rule: str) -> BeforeValidator:
    """Beside a ``pattern`` of a text: what it says, for people."""

    def check(value: object) -> object:
        if isinstance(value, str) and not re.fullmatch(pattern, value):
            raise ValueError(rule)
        return value

    return BeforeValidator(check)


Id = Annotated[str, AfterValidator(_check_id)]
"""An id or name in a path; an ill-formed one is answered with 404."""
_NAME = r"^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,79}$"
Name = Annotated[
    str,
    Field(pattern=_NAME, examples=["zoo"]),
    explained(_NAME, "must be 1 to 80 letters, digits, '_', '-' or '.', and not begin with '.'"),
]
"""A name that the user chooses for an artifact, a model, a type or a version."""
Limit = Annotated[int, Query(ge=1, le=1000, description="Most items of the page.")]
Cursor = Annotated[str | None, Query(description="`next_cursor` of the previous page.")]
IdempotencyKey = Annotated[
    str | None,
    Header(
        pattern=r"^[!-~]{1,255}$",
        description="A repeated request with the same key returns the first result; with another body it is refused.",
    ),
]


def _check(body: object) -> None:
    for key, value in body.items() if isinstance(body, dict) else [("(root)", body)]:
        text.check(key, "(root)")
        text.check(value, key)


class Page(BaseModel, Generic[T]):
    """One page of a list."""

    items: list[T]
    next_cursor: str | None = None
    """Pass as `cursor` for the next page; null on the last."""


async def storable(request: Request) -> None:
    """Refuse NUL and lone surrogates, which pass validation but cannot be stored in a database."""
    for name, value in [*request.path_params.items(), *request.query_params.multi_items()]:
        text.check(value, name)
    if request.scope["route"].body_field is None:
        # The route itself reads an upload, in chunks.
        return
    try:
        # The framework has already read the body and caches it.
        body = await request.json()
        # In a thread, since a large body takes a while.
        await anyio.to_thread.run_sync(_check, body)
    except ValueError:
        # Not JSON; the framework answers that.
        return
    except RecursionError:
        raise InvalidInput.field("(root)", "the body is nested too deeply") from None
