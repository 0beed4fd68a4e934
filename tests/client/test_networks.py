"""Files of networks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ethogram.cli.networks import _written
from ethogram.cli.output import result
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


def test_many_strengths_are_summarised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = {"target": 0.9, "local": 0.0, "nothing_to_change": 1, "strength": [0.0, 1.0, 1.25, 2.0]}
    networks = {"weight": np.zeros((4, 3))}
    _written(tmp_path / "out.safetensors", networks, **more).show()
    said = "".join(capsys.readouterr())
    assert "strength: 0 to 2, median 1.125, 0 for 1 of 4 networks" in said
    _written(tmp_path / "out.safetensors", networks, **more | {"strength": 1.0}).show()
    assert "strength: 1.0" in "".join(capsys.readouterr())
    answer = _written(tmp_path / "out.safetensors", networks, **more)
    result(answer.value, True, answer.show)
    assert json.loads(capsys.readouterr().out)["strength"] == more["strength"]
