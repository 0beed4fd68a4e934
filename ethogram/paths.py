"""Paths that users give, on the command line or in the environment."""

from __future__ import annotations

from pathlib import Path

from ethogram.errors import InvalidInput


def user_path(path: str | Path, field: str) -> Path:
    """``path`` with the home folder in place of ``~``. Raises :class:`InvalidInput` of ``field``, the option or
    variable that gave it, where there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        text = f"{path} begins with ~, but there is no such home folder here; write the whole path"
        raise InvalidInput.field(field, text) from None
