"""Checkpoints of trainings: tensors by dotted name in a safetensors file, and a JSON file of what they are of."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ethogram.errors import InvalidInput
from services.runtime.tensors import write_tensors

STATE, ABOUT = "state.safetensors", "state.json"

Named = Mapping[str, Tensor]


def part(name: str, tensors: Named) -> dict[str, Tensor]:
    """``tensors`` as the part ``name`` of a state."""
    return {f"{name}.{key}": value for key, value in tensors.items()}


def parts(tensors: Named) -> dict[str, dict[str, Tensor]]:
    """The parts of a state, by name; a tensor that is of none is its own, under the empty key."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        first, _, rest = name.partition(".")
        found.setdefault(first, {})[rest] = value
    return found


def moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimiser remembers of each parameter, ``<parameter>.<what>``."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{key}": value for i, entry in state.items() for key, value in entry.items()}


def set_moments(optimizer: torch.optim.Optimizer, tensors: Named) -> None:
    """The inverse of :func:`moments`."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def write(folder: Path, tensors: Named, about: Mapping[str, Any]) -> None:
    """Write a state into ``folder``, without pickle."""
    write_tensors(folder / STATE, tensors)
    (folder / ABOUT).write_text(json.dumps(about))


@contextmanager
def reading(folder: Path, device: str) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
    """What :func:`write` wrote, to go on from inside the block: ``about``, and the tensors on ``device``.

    What the block raises because the files are cut off, changed or missing becomes :class:`InvalidInput`.
    """
    try:
        yield json.loads((folder / ABOUT).read_text()), load_file(folder / STATE, device=device)
    except (FileNotFoundError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise InvalidInput.field("checkpoint", f"cannot be read ({type(error).__name__}); start afresh") from None


def same(asked: Mapping[str, tuple[object, object]]) -> None:
    """Raise :class:`InvalidInput` unless what a checkpoint was written by is what goes on with it. ``asked``: for each
    trait what to say and do where it is another, and the trait then and now."""
    for what, (was, now) in asked.items():
        if was != now:
            raise InvalidInput.field("checkpoint", f"was written by a run {what}")


def last_good(step: int | None) -> str:
    """What there is to go on from when a training fails; ``step``: of the last checkpoint."""
    return "there is no checkpoint" if step is None else f"the last good checkpoint is of step {step}"
