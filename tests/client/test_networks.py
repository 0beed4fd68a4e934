"""Files of networks."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ethogram.cli.networks import _written
from ethogram.cli.output import result
from ethogram.errors import InvalidInput
from ethogram.networks import load, save


def test_saved_networks_load_and_folders_are_made(tmp_path: Path) -> None:
    weight = np.arange(6, dtype=np.float32).reshape(3, 2)
    save(tmp_path / "a" / "b.safetensors", {"transposed": weight.T, "weight": weight})
    found = load(tmp_path / "a" / "b.safetensors")
    assert np.array_equal(found["transposed"], weight.T) and np.array_equal(found["weight"], weight)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "int64", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(3, 5), (), (0, 4)])
def test_every_type_of_numbers_is_read_as_it_was_written(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    tensor = (9 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(getattr(torch, dtype))
    save_file({"w": tensor}, tmp_path / "a.safetensors")
    found = load(tmp_path / "a.safetensors")["w"]
    exact = tensor.float() if dtype == "bfloat16" else tensor
    assert found.dtype == exact.numpy().dtype
    np.testing.assert_array_equal(found, exact.numpy())


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"])
def test_a_file_of_float8_is_refused_with_the_tensors_name(tmp_path: Path, dtype: str) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"b": torch.ones(3), "w": torch.ones(3).to(getattr(torch, dtype))}, file)
    with pytest.raises(InvalidInput, match=r"a.safetensors: w has F8_\w+ elements; send .*bfloat16"):
        load(file)


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"no tensors", b"\xff" * 99, pickle.dumps({"w": [1.0]})])
def test_a_file_of_anything_else_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(InvalidInput, match=r"a\.pt is no safetensors file"):
        load(tmp_path / "a.pt")


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught:
        save(tmp_path, {"weight": np.zeros(3)})
    assert caught.value.filename == str(tmp_path)
    assert "directory" in str(caught.value.strerror)


def test_many_strengths_are_summarised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = {"target": 0.9, "local": 0.0, "kept": 1.0, "nothing_to_change": 1, "strength": [0.0, 1.0, 1.25, 2.0]}
    networks = {"weight": np.zeros((4, 3))}
    _written(tmp_path / "out.safetensors", networks, **more).show()
    said = "".join(capsys.readouterr())
    assert "strength: 0 to 2, median 1.125, 0 for 1 of 4 networks" in said
    _written(tmp_path / "out.safetensors", networks, **more | {"strength": 1.0}).show()
    assert "strength: 1.0" in "".join(capsys.readouterr())
    answer = _written(tmp_path / "out.safetensors", networks, **more)
    result(answer.value, True, answer.show)
    assert json.loads(capsys.readouterr().out)["strength"] == more["strength"]
