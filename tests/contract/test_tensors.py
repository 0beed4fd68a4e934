"""Arrays survive the wire; wrong lengths, types and values are refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from ethogram.errors import InvalidInput
from ethogram.v1 import common_pb2 as pb
from ethogram.wire import from_tensor, to_tensor

DTYPES = ["<f4", "<f8", "<f2", ">f4", "<i8", "<i4", "u1", "?"]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(hnp.arrays(st.sampled_from(DTYPES).map(np.dtype), hnp.array_shapes(min_dims=0, min_side=0)))
def test_round_trip(array: NDArray[Any]) -> None:
    again = from_tensor(pb.Tensor.FromString(to_tensor(array).SerializeToString()), "x")
    assert again.shape == array.shape
    assert again.dtype == array.dtype.newbyteorder("<")
    np.testing.assert_array_equal(again, array)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_element_type(dtype: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtype)
    np.testing.assert_array_equal(from_tensor(to_tensor(array), "x"), array)


@pytest.mark.parametrize(
    ("tensor", "field"),
    [
        (pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=[2, 3], data=b"\0" * 23), "x.data"),
        (pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=[2**40, 2**40], data=b""), "x.data"),
        (pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=[-1], data=b""), "x.shape"),
        (pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=[1] * 40, data=b"\0" * 4), "x.shape"),
        (pb.Tensor(shape=[1], data=b"\0" * 4), "x.dtype"),
    ],
)
def test_bad_tensors_are_refused_by_name(tensor: pb.Tensor, field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        from_tensor(tensor, "x")
    assert caught.value.violations[0].field == field


def test_an_array_without_a_wire_form_is_a_programming_error() -> None:
    with pytest.raises(TypeError):
        to_tensor(np.array([1 + 2j]))
