"""Files of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_tensors(file: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, with ``about`` in its header, that others may read as they may any new file: by itself
    ``save_file`` makes it its owner's alone, and runs are kept on disks that people share."""
    file.touch()
    mode = file.stat().st_mode
    named = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, file, dict(about) if about is not None else None)
    file.chmod(mode)
