"""Reading the folders of policies and sparse models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ethogram.errors import InvalidInput


@contextmanager
def loading(folder: Path, field: str, what: str) -> Iterator[None]:
    """What the block raises because ``folder`` is not ``what`` it should be becomes :class:`InvalidInput` of
    ``field``."""
    try:
        yield
    except FileNotFoundError as error:
        raise InvalidInput.field(field, f"{error.filename} is missing, so {folder} is no {what}") from None
    # What parsers, pydantic (a ValueError) and torch raise for files that are cut off or changed.
    except (ValueError, LookupError, TypeError, RuntimeError, SafetensorError) as error:
        text = f"{folder} is no {what} that can be read: {str(error).splitlines()[0]}"
        raise InvalidInput.field(field, text) from None
