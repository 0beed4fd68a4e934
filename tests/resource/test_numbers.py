"""Features of numbers: what each form is, and that what is unknown leaves no trace."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ethogram.specs.resource import DimensionSpec
from services.resource.data import Table
from services.resource.numbers import CHARACTERS, XVAL_RANGE, Features, Form, characters, periods
from services.resource.texts import number_text
from tests.resource.conftest import small_trainer

NUMBER = DimensionSpec(name="latency", low=0, high=499)
LABELS = DimensionSpec(name="size", labels=["a", "b", "c"])
FORMS = get_args(Form)


def features(form: Any, *dimensions: DimensionSpec, values: Any = ((10.0,), (30.0,))) -> Features:
    return Features(form, dimensions, torch.tensor(values, dtype=torch.float64))


def of(made: Features, *values: float, unknown: Any = None) -> list[float]:
    row = torch.tensor([values], dtype=torch.float64)
    hidden = torch.zeros_like(row, dtype=torch.bool) if unknown is None else torch.tensor([unknown])
    found = made(row, hidden)
    assert found.dtype == torch.float32 and found.shape == (1, made.width)
    rows: list[float] = found[0].tolist()
    return rows


@pytest.mark.parametrize(
    ("dimension", "expected"),
    [
        (NUMBER, [10.0, 100.0, 1000.0]),
        # Twice the range has a digit more.
        (DimensionSpec(name="x", low=0, high=500), [10.0, 100.0, 1000.0, 10_000.0]),
        (DimensionSpec(name="x", low=0, high=1, decimals=2), [0.1, 1.0, 10.0]),
        (DimensionSpec(name="x", low=0, high=0), [10.0]),
    ],
)
def test_there_is_a_period_for_each_digit_up_to_twice_the_range(
    dimension: DimensionSpec, expected: list[float]
) -> None:
    assert periods(dimension) == pytest.approx(expected)


def test_a_fourier_pair_says_its_digit() -> None:
    made = features("fourier", NUMBER)
    assert made.width == 2 * 3 + 1 + 1
    found = of(made, 347)
    for place, period in enumerate((10, 100, 1000)):
        angle = 2 * math.pi * 347 / period
        assert found[place] == pytest.approx(math.sin(angle), abs=1e-5)
        assert found[3 + place] == pytest.approx(math.cos(angle), abs=1e-5)
    assert found[6] == pytest.approx(math.log10(348)) and found[7] == 0
    # The pair of a digit is the same wherever the number is, and the next digit's is another.
    other = of(made, 117)
    assert found[0] == pytest.approx(other[0], abs=1e-5) and found[3] == pytest.approx(other[3], abs=1e-5)
    assert abs(found[1] - other[1]) > 0.1


def test_all_numbers_of_a_range_differ() -> None:
    values = torch.arange(500, dtype=torch.float64).unsqueeze(1)
    found = features("fourier", NUMBER)(values, torch.zeros_like(values, dtype=torch.bool))
    assert float(torch.pdist(found).min()) > 0.01


def test_the_other_forms() -> None:
    assert of(features("zscore", NUMBER), 20.0)[0] == pytest.approx(0)
    assert of(features("zscore", NUMBER), 30.0)[0] == pytest.approx(1)
    assert of(features("raw", NUMBER), 30.0) == [30, 0]
    assert of(features("xval", NUMBER), 499.0)[0] == pytest.approx(XVAL_RANGE)
    # One that never varies is no infinity, and neither is the only one.
    for values in (((10.0,), (10.0,)), ((10.0,),)):
        assert all(math.isfinite(x) for x in of(features("zscore", NUMBER, values=values), 11.0))


@pytest.mark.parametrize("form", FORMS)
def test_a_category_has_an_indicator_of_each_label(form: Form) -> None:
    assert of(features(form, LABELS, values=((0.0,), (2.0,))), 2) == [0, 0, 1, 0]


@pytest.mark.parametrize("form", FORMS)
def test_what_is_unknown_is_an_estimate_that_is_marked(form: Form) -> None:
    made = features(form, LABELS, NUMBER, values=((0.0, 10.0), (1.0, 30.0)))
    known, estimate = of(made, 1, 30), of(made, 1, 30, unknown=[True, True])
    assert known[3] == known[-1] == 0 and estimate[3] == estimate[-1] == 1
    assert estimate[:3] == known[:3] and estimate[4:-1] == known[4:-1]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fusion", ["attention", "sum"])
def test_a_masked_field_changes_nothing_of_a_vector(form: str, fusion: str, table: Table, language: Any) -> None:
    codec = small_trainer(table, language, encoder={"numbers": form, "fusion": fusion}).codec()
    values = table.values[:6].clone()
    unknown = torch.zeros_like(values, dtype=torch.bool)
    unknown[:, [1, 3]] = True
    found = codec.embed(values, unknown)
    for other in (0.0, 5000.0, math.nan):
        values[:, [1, 3]] = other
        assert torch.equal(codec.embed(values, unknown), found)
    assert not torch.equal(codec.embed(table.values[:6]), found)


@settings(deadline=None)
@given(st.integers(0, 9_999_999), st.integers(0, 3), st.integers(1, 12))
def test_characters_are_those_of_the_description(scaled: int, decimals: int, places: int) -> None:
    text = number_text(scaled / 10**decimals, decimals)
    found = characters(torch.tensor([scaled / 10**decimals], dtype=torch.float64), decimals, places)[0].tolist()
    assert "".join("0123456789. "[index] for index in found) == text[:places].ljust(places)


def test_digits_say_each_character_and_have_room_for_twice_the_range() -> None:
    made = features("digits", NUMBER)
    pairs = features("fourier", NUMBER).width - 1
    assert made.width == pairs + 3 * CHARACTERS + 1
    found = torch.tensor(of(made, 47)[pairs:-1]).reshape(3, CHARACTERS)
    assert found.argmax(1)[:2].tolist() == [4, 7] and found.sum(1).tolist() == [1, 1, 0]
