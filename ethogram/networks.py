"""Networks as the client takes them: dictionaries of arrays, from a safetensors file or a framework's state dict."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as serialized

from ethogram.errors import InvalidInput

Networks = Mapping[str, NDArray[Any]]
"""Parameter name to array. A batch has the batch as its first axis; one network has none."""

_NUMBER = re.compile(r"(\d+)")


def load(path: str | Path) -> dict[str, NDArray[Any]]:
    """The tensors of a safetensors file. Raises :class:`InvalidInput` naming the file when it is none."""
    try:
        return dict(load_file(path))
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror or error}") from None
    except (SafetensorError, TypeError, ValueError, KeyError) as error:
        raise InvalidInput(f"{path} is no safetensors file of numbers ({error})") from None


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
