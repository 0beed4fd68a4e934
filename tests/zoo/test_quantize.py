"""Rounding of weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.zoo.quantize import rounded
from services.zoo.subjects import Architecture, init

WIDE = Architecture(5, 4, "one_hot", (9, 9), "relu")
PARAMS = init(WIDE, torch.arange(4), torch.tensor([9, 3, 5, 9]))


@pytest.mark.parametrize(("kind", "levels"), [("int8", 127), ("int4", 7)])
def test_integers_are_symmetric_and_as_near_as_they_can_be(kind: str, levels: int) -> None:
    for name, tensor in rounded(PARAMS, quantization=kind).items():
        for before, after in zip(PARAMS[name], tensor, strict=True):
            scale = before.abs().max() / levels
            codes = after / scale
            torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
            assert float((after - before).abs().max()) <= float(scale) / 2 * 1.001
            torch.testing.assert_close(after.abs().max(), before.abs().max())


@pytest.mark.parametrize("kind", ["ternary", "binary"])
def test_few_levels(kind: str) -> None:
    for name, tensor in rounded(PARAMS, quantization=kind).items():
        if name.endswith("bias"):
            continue
        for before, after in zip(PARAMS[name], tensor, strict=True):
            size = before.abs()
            kept = size > (0.2 * size.max() if kind == "ternary" else 0)
            expected = before.sign() * kept * size[kept].mean()
            torch.testing.assert_close(after, expected)


@pytest.mark.parametrize("kind", ["int8", "int4", "ternary", "binary"])
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_padding_stays_and_rounding_twice_is_rounding_once(kind: str, precision: str) -> None:
    once = rounded(PARAMS, precision, kind)
    for name, tensor in once.items():
        assert not tensor[PARAMS[name] == 0].any()
        assert tensor.dtype is torch.float32
        assert torch.equal(tensor.to(getattr(torch, precision)).float(), tensor)
    if precision == "float32":
        for name, tensor in rounded(once, precision, kind).items():
            torch.testing.assert_close(tensor, once[name], rtol=1e-5, atol=1e-7)


@given(
    st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False),
    st.sampled_from(["int8", "int4", "ternary", "binary"]),
)
@settings(deadline=None)
def test_any_magnitude(value: float, kind: str) -> None:
    found = rounded({"layers.0.weight": torch.full((1, 2, 3), value)}, quantization=kind)["layers.0.weight"]
    torch.testing.assert_close(found, torch.full((1, 2, 3), value), rtol=1e-5, atol=1e-30)


def test_nothing_to_do() -> None:
    assert rounded(PARAMS) is PARAMS
