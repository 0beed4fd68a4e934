"""The choice of a device, and what it can do."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, NamedTuple

from ethogram.errors import InvalidInput

if TYPE_CHECKING:
    from torch import Tensor

# Each of them: other programs set some, and then nothing was started together.
_TORCHRUN = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Launch(NamedTuple):
    """This process's place among those that torchrun started."""

    size: int = 1
    rank: int = 0
    local_rank: int = 0
    """Among those on this machine."""


def launch() -> Launch:
    """What torchrun says in the environment; without all of its variables, one process. Raises :class:`InvalidInput`,
    of the variable, for a value that torchrun does not set."""
    if missing_torchrun_variables():
        return Launch()
    size, rank, local_rank = (_count(name) for name in _TORCHRUN[:3])
    if rank >= size:
        raise InvalidInput.field("RANK", f"{rank} is not below WORLD_SIZE, {size}; start the processes with torchrun")
    return Launch(size, rank, local_rank)


def missing_torchrun_variables() -> list[str]:
    """Those of torchrun's variables that are not set."""
    return [name for name in _TORCHRUN if not os.environ.get(name)]


def _count(name: str) -> int:
    text = os.environ[name]
    if not (text.isascii() and text.isdecimal()) or (name == "WORLD_SIZE" and int(text) == 0):
        raise InvalidInput.field(name, f"{text!r} is not a number of torchrun's; unset it, or use torchrun")
    return int(text)


def chosen_device(device: str | None, field: str = "--device") -> str:
    """``device``, by default a GPU if there is one. Raises :class:`InvalidInput`, of ``field``, for one that does not
    exist or that this machine cannot compute on."""
    if device is not None and re.fullmatch(r"cpu|mps|cuda(:\d+)?", device) is None:
        raise InvalidInput.field(field, f"{device} is none of cpu, cuda, cuda:0, ..., mps")
    if device == "mps":
        # What PyTorch lacks there (torch.linalg.qr) goes to the CPU. It reads this when it is imported.
        os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # Each process of torchrun has a GPU of its own.
        torch.zeros(1, device=f"cuda:{launch().local_rank}" if device == "cuda" else device)
    except (AssertionError, RuntimeError) as error:
        why = str(error).strip().partition("\n")[0]
        raise InvalidInput.field(field, f"{device} cannot be used on this machine ({why})") from None
    return device


def uses_bfloat16(precision: str, device: str) -> bool:
    """Whether matrix products are in bfloat16. ``precision``: ``float32``, ``bfloat16``, or ``auto``: bfloat16 on
    devices with hardware for it."""
    import torch

    if precision != "auto":
        return precision == "bfloat16"
    if torch.device(device).type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_amx_tile_supported())


def double(tensor: Tensor) -> Tensor:
    """``tensor`` in float64: on its device, or on the CPU if that is an Apple GPU, which has no float64."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
