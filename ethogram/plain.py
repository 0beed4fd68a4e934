"""Values that JSON can carry: what a YAML file, ``--set`` or a caller's dictionary must come down to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ethogram.errors import InvalidInput

_MAX_DEPTH = 64


def python_value(value: Any, depth: int = 2) -> Any:
    """``value`` with NumPy's and torch's numbers and arrays as Python's, also those in dictionaries and lists, at most
    ``depth`` of them deep."""
    if depth and isinstance(value, dict):
        return {key: python_value(item, depth - 1) for key, item in value.items()}
    if depth and isinstance(value, list):
        return [python_value(item, depth - 1) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def plain(value: object, path: str, depth: int = 0) -> Any:
    """``value`` as dictionaries with string keys, lists, strings, finite numbers, booleans and None.

    NumPy's and torch's numbers and arrays are taken as Python's.

    Raises :class:`InvalidInput` that names the place below ``path`` that is none of these.
    """
    if depth > _MAX_DEPTH:
        raise InvalidInput.field(path, f"nested deeper than {_MAX_DEPTH} levels")
    if hasattr(value, "tolist"):
        value = value.tolist()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidInput.field(path, f"{value} is not a finite number")
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise InvalidInput.field(path, f"the key {key!r} must be a string; put it in quotes")
        return {key: plain(item, f"{path}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{path}.{index}", depth + 1) for index, item in enumerate(value)]
    raise InvalidInput.field(
        path,
        f"a {type(value).__name__} is not a JSON value; give a number, a string, a list or a mapping "
        "(in YAML, quotes make it a string)",
    )
