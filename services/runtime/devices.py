"""Devices that a user names."""

from __future__ import annotations

import re

from ethogram.errors import InvalidInput


def check_device(device: str, field: str = "--device") -> None:
    """Raise :class:`InvalidInput` for a ``device`` that is none, or that this machine cannot compute on."""
    import torch

    if device not in ("cpu", "mps") and re.fullmatch(r"cuda(:\d+)?", device) is None:
        raise InvalidInput.field(field, f"{device} is none of cpu, cuda, cuda:0, ..., mps")
    try:
        torch.zeros(1, device=device)
    except (AssertionError, RuntimeError) as error:
        why = str(error).strip().partition("\n")[0]
        raise InvalidInput.field(field, f"{device} cannot be used on this machine ({why})") from None
