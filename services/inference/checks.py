"""Checks of what a request carries against the model that it names, each error naming its field."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ethogram.errors import InvalidInput, Violation
from services.crossmodal.steering import MODES, OPERATIONS, Mode
from services.inference.batcher import Arrays

MAX_STRENGTH = 100.0


def networks(arrays: Arrays, shapes: Mapping[str, tuple[int, ...]], field: str = "networks") -> Arrays:
    """The networks as float32 in the model's order of parameters, or :class:`InvalidInput`."""
    path = f"{field}.parameters"
    missing = [name for name in shapes if name not in arrays]
    extra = [name for name in arrays if name not in shapes]
    if missing or extra:
        known = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        violations = [Violation(f"{path}.{name}", "missing") for name in missing]
        violations += [Violation(f"{path}.{name}", "the model has no such parameter") for name in extra]
        first = violations[0]
        raise InvalidInput(f"{first.field}: {first.description}; a network of this model has {known}", violations)
    checked = {name: _array(arrays[name], shape, f"{path}.{name}") for name, shape in shapes.items()}
    rows = {name: len(array) for name, array in checked.items()}
    first_name = next(iter(rows))
    for name, count in rows.items():
        if count != rows[first_name]:
            raise InvalidInput.field(f"{path}.{name}", f"a batch of {count}, but {first_name} has {rows[first_name]}")
    return checked


def rows(array: NDArray[Any], shape: tuple[int, ...], field: str) -> NDArray[np.float32]:
    """A batch of ``shape`` as float32, or :class:`InvalidInput`."""
    return _array(array, shape, field)


def edits(asked: Sequence[tuple[str, str]], behaviors: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """The edits ``(operation, behaviour)``, or :class:`InvalidInput`."""
    known = list(behaviors)
    if not asked:
        raise InvalidInput.field("edits", "empty; give at least one")
    seen: dict[str, int] = {}
    for i, (operation, behavior) in enumerate(asked):
        if operation not in OPERATIONS:
            raise InvalidInput.field(f"edits.{i}.operation", "must be add or remove")
        if behavior not in known:
            raise InvalidInput.field(f"edits.{i}.behavior", f"unknown; this model has {', '.join(known)}")
        if behavior in seen:
            raise InvalidInput.field(f"edits.{i}.behavior", f"{behavior} is in edits.{seen[behavior]} already")
        seen[behavior] = i
    return tuple((operation, behavior) for operation, behavior in asked)


def mode(asked: str) -> Mode:
    """The steering mode, or :class:`InvalidInput`."""
    if asked not in MODES:
        raise InvalidInput.field("mode", f"must be one of {', '.join(MODES)}")
    return asked


def strength(asked: float) -> float:
    """The steering strength, or :class:`InvalidInput`."""
    if not math.isfinite(asked) or abs(asked) > MAX_STRENGTH:
        raise InvalidInput.field("strength", f"must be a number from {-MAX_STRENGTH:g} to {MAX_STRENGTH:g}")
    return asked


def result(arrays: Arrays, field: str) -> Arrays:
    """``arrays`` if all are finite: weights of 1e38 are valid numbers, and what comes of them is not."""
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise InvalidInput.field(field, "values so large that the result is not finite")
    return arrays


def _array(array: NDArray[Any], shape: tuple[int, ...], field: str) -> NDArray[np.float32]:
    if array.dtype.kind != "f":
        raise InvalidInput.field(field, f"{array.dtype.name} elements; send float32, float64 or float16")
    if array.shape[1:] != shape or array.ndim != len(shape) + 1:
        expected = ", ".join(["batch", *map(str, shape)])
        raise InvalidInput.field(field, f"shape {list(array.shape)}, but this model takes [{expected}]")
    if not len(array):
        raise InvalidInput.field(field, "an empty batch; send at least one")
    with np.errstate(over="ignore"):
        single = array.astype(np.float32, copy=False)
    if not np.isfinite(single).all():
        raise InvalidInput.field(field, "holds NaN, infinity or a number that float32 cannot hold")
    return single
