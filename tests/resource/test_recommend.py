"""Recommendations: the cheapest configuration below a bound."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ethogram.errors import InvalidInput
from services.language.models import LanguageModel
from services.resource.codec import ResourceCodec
from services.resource.data import Table
from services.resource.recommend import Recommender
from tests.resource.made import formula_table, untrained


@pytest.fixture(scope="module")
def table() -> Table:
    return formula_table()


@pytest.fixture(scope="module")
def codec(table: Table, language: LanguageModel) -> ResourceCodec:
    return untrained(table, language)


@pytest.fixture(scope="module")
def recommender(table: Table, codec: ResourceCodec) -> Recommender:
    return Recommender(codec, table)


def price(row: list[float]) -> float:
    return row[2] + 0.125 * row[3]


def latency(table: Table, chosen: dict[str, Any]) -> float:
    """What was measured of a configuration."""
    schema = table.schema
    size = schema.dimensions[1].labels.index(chosen["size"])
    wanted = [schema.tools.index(chosen["tool"]), size, chosen["cores"], chosen["memory_gb"]]
    return float(next(row[4] for row in table.values.tolist() if row[:4] == wanted))


def test_nothing_cheaper_stays_below_the_bound(table: Table, recommender: Recommender) -> None:
    for bound in (350.0, 500.0, 900.0):
        found = recommender.recommend({"tool": "detect", "size": "large"}, bound, 0.9)
        assert found.fits and found.upper <= bound and found.predicted < found.upper
        assert set(found.configuration) == {"tool", "size", "cores", "memory_gb"}
        assert (found.configuration["tool"], found.configuration["size"]) == ("detect", "large")
        assert found.price == found.configuration["cores"] + 0.125 * found.configuration["memory_gb"]
        # With the noise a bound may be missed, by no more than the noise.
        assert latency(table, found.configuration) <= 1.1 * bound
        fitting = [row for row in table.values.tolist() if row[0] == 0 and row[1] == 2 and row[4] < bound / 1.3]
        assert not fitting or found.price <= min(map(price, fitting))


def test_nothing_fits_and_what_comes_closest(recommender: Recommender) -> None:
    found = recommender.recommend({"tool": "translate"}, 5.0)
    assert not found.fits and found.upper > 5
    # The fastest there is.
    assert found.configuration == {"tool": "translate", "size": "small", "cores": 16, "memory_gb": 32.0}
    loose = recommender.recommend({"tool": "translate"}, 1e6)
    assert loose.fits and loose.configuration["cores"] == 2 and loose.configuration["memory_gb"] == 4.0


def test_of_several_that_cost_the_same_the_fastest(recommender: Recommender) -> None:
    # Any size has the same price.
    assert recommender.recommend({"tool": "detect"}, 1e6).configuration["size"] == "small"


def test_where_only_a_part_was_measured(table: Table, codec: ResourceCodec) -> None:
    rows = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))[:32]
    partly = Recommender(codec, table.at(rows))
    broken = found = 0
    for tool, base in (("detect", 300.0), ("translate", 900.0)):
        for size in ("small", "medium", "large"):
            for share in (0.5, 0.8, 1.2, 2.0):
                answer = partly.recommend({"tool": tool, "size": size}, base * share, 0.9)
                found += answer.fits
                broken += answer.fits and latency(table, answer.configuration) > base * share
    assert found >= 8 and broken <= 0.2 * found
    assert len(partly.candidates) == len(table)


@pytest.mark.parametrize(
    ("given", "bound", "confidence", "field", "says"),
    [
        ({}, 100.0, 0.9, "given.tool", "is missing"),
        ({"tool": "swim"}, 100.0, 0.9, "given.tool", "swim"),
        ({"tool": "unknown"}, 100.0, 0.9, "given.tool", "must be known"),
        ({"tool": "detect", "cores": 3.0}, 100.0, 0.9, "given.cores", "no configuration has 3; there are 2, 4, 8, 16"),
        ({"tool": "detect", "cores": 1e6}, 100.0, 0.9, "given.cores", "no configuration has 1000000; there are 2, 4"),
        ({"tool": "detect", "latency_ms": 3.0}, 100.0, 0.9, "given.latency_ms", "is measured"),
        ({"tool": "detect", "cores": 10**400}, 100.0, 0.9, "given.cores", r"from 0 to 9999999, not 1[0]{39}\.\.\.$"),
        ({"tool": "detect", "cores": -(10**5000)}, 100.0, 0.9, "given.cores", "not a number of thousands of digits"),
        ({"tool": "detect", "gpus": 3.0}, 100.0, 0.9, "given.gpus", "there is no such field"),
        ({"tool": "detect"}, 0.0, 0.9, "bound", "above 0"),
        ({"tool": "detect"}, float("nan"), 0.9, "bound", "above 0"),
        ({"tool": "detect"}, float("inf"), 0.9, "bound", "above 0"),
        ({"tool": "detect"}, 100.0, 1.0, "confidence", "between 0 and 1"),
        ({"tool": "detect"}, 100.0, 0.0, "confidence", "between 0 and 1"),
        ({"tool": "detect"}, 100.0, 0.9999, "confidence", "measurements"),
    ],
)
def test_what_cannot_be_recommended(
    recommender: Recommender, *, given: dict[str, Any], bound: float, confidence: float, field: str, says: str
) -> None:
    with pytest.raises(InvalidInput, match=says) as caught:
        recommender.recommend(given, bound, confidence)
    assert caught.value.violations[0].field == field


def test_labels_that_no_configuration_has_are_named(language: LanguageModel) -> None:
    """Of a grid that is too large, only the configurations of the table can be recommended."""
    table = formula_table()
    small = table.at((table.values[:, 1] < 2).nonzero().flatten())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("services.resource.recommend.MOST_CONFIGURATIONS", 10)
        recommender = Recommender(untrained(small, language), small)
    with pytest.raises(InvalidInput, match=r"size: no configuration has large; there are small, medium"):
        recommender.recommend({"tool": "detect", "size": "large"}, 100.0)
    values = torch.tensor([0.0, 2, 0, 0, 0], dtype=torch.float64)
    unknown = torch.tensor([False, False, True, True, True])
    with pytest.raises(InvalidInput) as caught:
        recommender.choose(values, unknown, 100.0, field="configurations", row=3)
    assert caught.value.violations[0].field == "configurations.size.3"


def test_a_tool_without_measurements_and_a_dimension_without_a_bound(table: Table, codec: ResourceCodec) -> None:
    one = table.at((table.tools == 1).nonzero().flatten())
    with pytest.raises(InvalidInput, match="there are no measurements of detect"):
        Recommender(codec, one).recommend({"tool": "detect"}, 100.0)
    values, unknown = codec.vectors([{"tool": "translate"}, {"tool": "detect"}])
    with pytest.raises(InvalidInput) as caught:
        Recommender(codec, one).choose(values[1], unknown[1], 100.0, field="configurations", row=1)
    assert caught.value.violations[0].field == "configurations.tool.1"
    for name in ("size", "cores", "tool"):
        with pytest.raises(InvalidInput, match="is not a measured number"):
            Recommender(codec, table, name)


def test_decimals_that_descriptions_do_not_have_are_refused(table: Table, codec: ResourceCodec) -> None:
    """As in a table: of what is measured they are rounded."""
    with pytest.raises(InvalidInput, match=r"given\.cores: 2\.5 has more decimals than its descriptions, which have 0"):
        codec.vector({"tool": "detect", "cores": 2.5})
    values, _ = codec.vector({"tool": "detect", "cores": 2.0, "latency_ms": 99.5})
    assert values.tolist() == [0, 0, 2, 0, 99.5]
