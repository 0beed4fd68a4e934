"""Positions in a list, as opaque text. Lists are ordered by a number that never changes, so pages are stable."""

from __future__ import annotations

import base64
import binascii

from ethogram.errors import InvalidInput

MAX_LIMIT = 1000


def encode(kind: str, number: int) -> str:
    """The cursor of the page after ``number`` in the list ``kind``."""
    return base64.urlsafe_b64encode(f"{kind}:{number}".encode()).decode().rstrip("=")


def decode(kind: str, cursor: str) -> int:
    """The number in a cursor of the list ``kind``. Raises :class:`InvalidInput`."""
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode()
        found, _, number = text.partition(":")
        # Only what `encode` makes: int() alone takes signs, spaces and digits of other scripts.
        if found == kind and number.isascii() and number.isdecimal() and len(number) <= 18:
            return int(number)
    except (binascii.Error, ValueError):
        pass
    raise InvalidInput.field("cursor", "is not a cursor of this list; leave it out to start from the beginning")


def check_limit(limit: int) -> int:
    """Return ``limit``. Raises :class:`InvalidInput` if it is out of range."""
    if not 1 <= limit <= MAX_LIMIT:
        raise InvalidInput.field("limit", f"must be from 1 to {MAX_LIMIT}")
    return limit
