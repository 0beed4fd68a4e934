"""Files of networks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ethogram.networks import load, save


def test_saved_networks_load_and_folders_are_made(tmp_path: Path) -> None:
    weight = np.arange(6, dtype=np.float32).reshape(3, 2)
    save(tmp_path / "a" / "b.safetensors", {"transposed": weight.T, "weight": weight})
    found = load(tmp_path / "a" / "b.safetensors")
    assert np.array_equal(found["transposed"], weight.T) and np.array_equal(found["weight"], weight)


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught:
        save(tmp_path, {"weight": np.zeros(3)})
    assert caught.value.filename == str(tmp_path)
    assert "directory" in str(caught.value.strerror)
