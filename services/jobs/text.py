"""JSON values that every database can store: no NUL, no lone surrogates, no NaN, no infinity."""

from __future__ import annotations

import math
from typing import Any

from ethogram.errors import InvalidInput, printable

MAX_TEXT = 16_000
"""Longest text of an event, in characters, so that event rows stay small."""


def check(value: Any, path: str) -> None:
    """Raise :class:`InvalidInput`, with its path below ``path``, for what cannot be stored in a user's value."""
    if isinstance(value, str):
        if "\0" in value:
            raise InvalidInput.field(path, "contains a NUL character")
        if value != printable(value):
            raise InvalidInput.field(path, "contains a lone surrogate, which is not text")
    elif isinstance(value, float) and not math.isfinite(value):
        raise InvalidInput.field(path, "is not a finite number")
    elif isinstance(value, dict):
        for key, item in value.items():
            check(key, f"{path} (a key)")
            check(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            check(item, f"{path}.{index}")


def storable(value: str) -> bool:
    """Whether a database can store ``value``; an id that it cannot store is the id of nothing."""
    return "\0" not in value and value == printable(value)


def clean(value: Any, longest: int | None = None) -> Any:
    """Make a running job's output storable: a stray character in a log line must not fail the job."""
    if isinstance(value, str):
        text = printable(value.replace("\0", "\ufffd"))
        return text if longest is None or len(text) <= longest else text[:longest] + " …"
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {clean(str(key), longest): clean(item, longest) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item, longest) for item in value]
    return value
