"""The choice of a device, and what it can do."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from ethogram.errors import InvalidInput

if TYPE_CHECKING:
    from torch import Tensor


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
        torch.zeros(1, device=f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device)
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
