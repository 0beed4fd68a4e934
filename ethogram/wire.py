"""What requests carry: NumPy arrays (dtype, shape and raw little-endian bytes), and steering."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ethogram.errors import InvalidInput
from ethogram.specs.edits import DIRECTIONS, MODES, OPERATIONS, Steering
from ethogram.v1 import common_pb2
from ethogram.v1 import inference_pb2 as pb

_DTYPES: dict[int, np.dtype[Any]] = {
    common_pb2.DataType.Value(f"DATA_TYPE_{name.upper()}"): np.dtype(name).newbyteorder("<")
    for name in ("float32", "float64", "float16", "int64", "int32", "uint8", "bool")
}
_NUMBERS = {dtype: number for number, dtype in _DTYPES.items()}
_MAX_AXES = 16
_OPERATIONS = {name: pb.EditOperation.Value(f"EDIT_OPERATION_{name.upper()}") for name in OPERATIONS}
_MODES = {name: pb.EditMode.Value(f"EDIT_MODE_{name.upper()}") for name in MODES}
_DIRECTIONS = {name: pb.Direction.Value(f"DIRECTION_{name.upper()}") for name in DIRECTIONS}


def to_tensor(array: NDArray[Any]) -> common_pb2.Tensor:
    """``array`` as a message. Raises ``TypeError`` for an unsupported element type (complex, object, ...)."""
    dtype = np.dtype(array.dtype).newbyteorder("<")
    number = _NUMBERS.get(dtype)
    if number is None:
        raise TypeError(f"dtype {array.dtype} cannot be sent")
    data = np.ascontiguousarray(array, dtype=dtype).tobytes()
    return common_pb2.Tensor(dtype=number, shape=array.shape, data=data)  # type: ignore[arg-type]


def from_tensor(tensor: common_pb2.Tensor, field: str) -> NDArray[Any]:
    """The array that ``tensor`` carries, a read-only view of a copy of its bytes.

    The byte length is checked against ``shape`` x element size before anything is allocated. NaN and infinities are
    for whoever uses the numbers to check. Raises :class:`InvalidInput` naming ``field``.
    """
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        raise InvalidInput.field(f"{field}.dtype", f"{tensor.dtype} is not an element type; use {sorted(_DTYPES)}")
    shape = tuple(tensor.shape)
    if len(shape) > _MAX_AXES or any(length < 0 for length in shape):
        raise InvalidInput.field(f"{field}.shape", f"needs at most {_MAX_AXES} axes, none negative")
    # Each access to a bytes field of a message copies it.
    data, expected = tensor.data, math.prod(shape) * dtype.itemsize
    if expected != len(data):
        raise InvalidInput.field(
            f"{field}.data", f"{len(data)} bytes, but shape {list(shape)} of {dtype.name} needs {expected}"
        )
    # NumPy bounds the other axes even if one is empty.
    if math.prod(max(length, 1) for length in shape) * dtype.itemsize >= 2**63:
        raise InvalidInput.field(f"{field}.shape", "is larger than any array can be")
    return np.frombuffer(data, dtype=dtype).reshape(shape)


def fields_of(steering: Steering) -> dict[str, Any]:
    """The fields of a ``SteerRequest`` or an ``EvaluateRequest`` that carry ``steering``."""
    edits, mode, strength, direction = steering
    wire = [pb.Edit(operation=_OPERATIONS[o], behavior=behavior, by=by or "") for o, behavior, by in edits]
    how = {"auto_strength": True} if strength == "auto" else {"strength": strength}
    return {"edits": wire, "mode": _MODES[mode], "direction": _DIRECTIONS[direction], **how}


def steering_of(request: pb.SteerRequest | pb.EvaluateRequest) -> Steering:
    """What :func:`fields_of` wrote, or :class:`InvalidInput` naming the field that is wrong."""
    if request.auto_strength and request.HasField("strength"):
        raise InvalidInput.field("strength", "is chosen for each network with auto_strength; leave one of them out")
    operations, modes, directions = ({v: name for name, v in t.items()} for t in (_OPERATIONS, _MODES, _DIRECTIONS))
    return Steering.of(
        [
            (operations.get(edit.operation, ""), edit.behavior, *([edit.by] if edit.by else []))
            for edit in request.edits
        ],
        modes.get(request.mode, "") if request.mode else "residual",
        "auto" if request.auto_strength else request.strength if request.HasField("strength") else 1.0,
        directions.get(request.direction, "") if request.direction else "learned",
    )
