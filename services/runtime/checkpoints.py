"""States as tensors by dotted name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor


def part(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` as the part ``name`` of a state: with ``name.`` before each key."""
    return {f"{name}.{key}": value for key, value in tensors.items()}


def parts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The parts of a state, by name."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        part, _, key = name.partition(".")
        parts.setdefault(part, {})[key] = value
    return parts


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Give the file ``source``, which is never written again, a second name, or copy it to another disk."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
