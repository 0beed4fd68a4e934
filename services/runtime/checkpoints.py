"""Files of a checkpoint: tensors by dotted name in a safetensors file, and JSON beside it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ethogram.errors import InvalidInput
from services.runtime.tensors import write_tensors

STATE, ABOUT = "state.safetensors", "state.json"

Named = Mapping[str, Tensor]


def part(name: str, tensors: Named) -> dict[str, Tensor]:
    """``tensors`` as the part ``name`` of a state: with ``name.`` before each key."""
    return {f"{name}.{key}": value for key, value in tensors.items()}


def parts(tensors: Named) -> dict[str, dict[str, Tensor]]:
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


def write(folder: Path, tensors: Named, about: Mapping[str, Any]) -> None:
    """Write a state into ``folder``, without pickle."""
    write_tensors(folder / STATE, tensors)
    (folder / ABOUT).write_text(json.dumps(about))


@contextmanager
def reading(folder: Path, device: str) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
    """Read what :func:`write` wrote: ``about``, and the tensors on ``device``.

    Errors inside the block from files that are truncated, changed or missing become :class:`InvalidInput`.
    """
    try:
        # Copies are aligned in memory, which a file's tensors need not be; MKL rounds differently where they are not.
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / STATE, device=device).items()}
        yield json.loads((folder / ABOUT).read_text()), tensors
    except (FileNotFoundError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise InvalidInput.field("checkpoint", f"cannot be read ({type(error).__name__}); start afresh") from None
