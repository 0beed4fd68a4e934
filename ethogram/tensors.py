"""NumPy arrays as messages: dtype, shape and raw little-endian bytes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ethogram.errors import InvalidInput
from ethogram.v1 import common_pb2 as pb

_DTYPES: dict[int, np.dtype[Any]] = {
    pb.DataType.Value(f"DATA_TYPE_{name.upper()}"): np.dtype(name).newbyteorder("<")
    for name in ("float32", "float64", "float16", "int64", "int32", "uint8", "bool")
}
_NUMBERS = {dtype: number for number, dtype in _DTYPES.items()}
_MAX_AXES = 16


def to_tensor(array: NDArray[Any]) -> pb.Tensor:
    """``array`` as a message. Raises ``TypeError`` for an unsupported element type (complex, object, ...)."""
    dtype = np.dtype(array.dtype).newbyteorder("<")
    number = _NUMBERS.get(dtype)
    if number is None:
        raise TypeError(f"dtype {array.dtype} cannot be sent")
    data = np.ascontiguousarray(array, dtype=dtype).tobytes()
    return pb.Tensor(dtype=number, shape=array.shape, data=data)  # type: ignore[arg-type]


def from_tensor(tensor: pb.Tensor, field: str, *, finite: bool = True) -> NDArray[Any]:
    """The array that ``tensor`` carries, a read-only view of a copy of its bytes.

    The byte length is checked against ``shape`` x element size before anything is allocated.
    Raises :class:`InvalidInput` naming ``field``, also for NaN and infinities unless ``finite`` is False.
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
    array = np.frombuffer(data, dtype=dtype).reshape(shape)
    if finite and dtype.kind == "f" and not np.isfinite(array).all():
        raise InvalidInput.field(f"{field}.data", "holds NaN or infinity")
    return array
