"""Networks as the client takes them: dictionaries of arrays, from a safetensors file or a framework's state dict.

Numbers are float32, float64, float16 or bfloat16. NumPy has no bfloat16: it becomes float32, which holds the same
numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save as serialized

from ethogram.errors import InvalidInput

Networks = Mapping[str, NDArray[Any]]
"""Parameter name to array. A batch has the batch as its first axis; one network has none."""

_NUMBER = re.compile(r"(\d+)")
_STORED = {
    **{f"F{bits}": f"<f{bits // 8}" for bits in (16, 32, 64)},
    **{f"{sign}{bits}": f"<{sign.lower()}{bits // 8}" for sign in "IU" for bits in (8, 16, 32, 64)},
    "BOOL": "bool",
    "C64": "<c8",
    # As its bits.
    "BF16": "<u2",
}
"""NumPy's element types of those of safetensors files."""
_TAKEN = "send a dense array of float32, float64, float16 or bfloat16"


def load(path: str | Path) -> dict[str, NDArray[Any]]:
    """The tensors of a safetensors file. Raises :class:`InvalidInput` that names the file when it is none, and the
    tensor whose elements are of no type that can be taken."""
    try:
        tensors = deserialize(Path(path).read_bytes())  # type: ignore[no-untyped-call]
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise InvalidInput(f"{path} is no safetensors file ({error})") from None
    arrays = {}
    for name, tensor in tensors:
        if tensor["dtype"] not in _STORED:
            raise InvalidInput(f"{path}: {name} has {tensor['dtype']} elements; {_TAKEN}")
        flat = np.frombuffer(tensor["data"], _STORED[tensor["dtype"]])
        # A bfloat16 is the higher half of a float32.
        flat = (flat.astype("<u4") << 16).view("<f4") if tensor["dtype"] == "BF16" else flat.copy()
        arrays[name] = flat.reshape(tensor["shape"])
    return arrays


def floats(value: Any, field: str) -> NDArray[Any]:
    """``value``, an array, nested lists or a tensor of a framework on any device, as an array of floats. Raises
    :class:`InvalidInput` of ``field`` for what is none or cannot be sent: float8, integers, sparse tensors."""
    kind = str(getattr(value, "dtype", type(value).__name__)).removeprefix("torch.")
    try:
        # A tensor of PyTorch, which may require a gradient or be on a GPU.
        value = value.detach().cpu() if hasattr(value, "detach") else value
        value = value.float() if kind == "bfloat16" and hasattr(value, "float") else value
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        why = str(error).strip().partition("\n")[0]
        raise InvalidInput.field(field, f"{kind} elements ({why}); {_TAKEN}") from None
    if array.dtype.name == "bfloat16":
        array = array.astype(np.float32)
    if array.dtype.name not in ("float32", "float64", "float16"):
        raise InvalidInput.field(field, f"{array.dtype.name} elements; {_TAKEN}")
    return array


def save(path: str | Path, networks: Networks) -> None:
    """Write ``networks`` as a safetensors file; missing folders are created. Raises ``OSError`` naming the file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # The library's function creates files that only their owner can read.
    Path(path).write_bytes(serialized({name: np.ascontiguousarray(array) for name, array in networks.items()}))


def is_single(networks: Networks) -> bool:
    """Whether this is one network, without a batch axis: its weights are matrices, a batch of them has three axes."""
    return max((np.ndim(array) for array in networks.values()), default=0) == 2


def layer_names(networks: Networks) -> dict[str, str]:
    """The platform's name (``layers.0.weight``, ...) of each parameter.

    A state dict whose layers differ only in their numbers, such as ``net.0.weight, net.0.bias, net.2.weight, ...`` of
    ``torch.nn.Sequential``, is numbered in that order. Any other keeps its names: the order would be a guess.
    """
    layers = {name.rpartition(".")[0] for name in networks}
    whole = all(f"{layer}.weight" in networks and f"{layer}.bias" in networks for layer in layers)
    forms = {_NUMBER.sub("#", layer) for layer in layers}
    if not whole or len(forms) != 1 or len(networks) != 2 * len(layers):
        return {name: name for name in networks}
    order = sorted(layers, key=_numbers)
    place = {layer: f"layers.{i}" for i, layer in enumerate(order)}
    return {name: f"{place[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}" for name in networks}


def in_order(names: Iterable[str]) -> list[str]:
    """Parameter names layer after layer, a layer's weight before its bias; a protobuf map keeps no order."""
    return sorted(names, key=lambda name: (_numbers(name), name.endswith("bias"), name))


def _numbers(name: str) -> list[int]:
    return [int(number) for number in _NUMBER.findall(name)]
