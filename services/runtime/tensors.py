"""Files of tensors."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
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


def write_durably(file: Path, parts: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write ``file`` in one step, so that a crash leaves all of it or nothing; its size in bytes and its SHA-256."""
    fresh, sha256, size = file.with_name(f"{file.name}.new"), hashlib.sha256(), 0
    try:
        with fresh.open("wb") as target:
            for part in parts:
                target.write(part)
                sha256.update(part)
            target.flush()
            os.fsync(target.fileno())
            size = target.tell()
        fresh.replace(file)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    return size, sha256.hexdigest()
