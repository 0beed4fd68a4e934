"""Schemas of tables: the default one, a user's own in YAML, and what is wrong with one."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from ruamel.yaml import YAML

from ethogram.errors import MAX_DESCRIPTION, InvalidInput
from ethogram.specs.resource import MAX_LABELS, DimensionSpec, SchemaSpec
from services.resource.recommend import prices
from services.resource.schema import Schema, default_schema
from tests.resource.conftest import SCHEMA, TOOLS

YAML_SCHEMA = """
tool_column: job
repeated: true
dimensions:
  - {name: nodes, column: instance_count, levels: [2, 4, 8], price: 0.25}
  - {name: memory, unit: GB, low: 0.5, high: 64, decimals: 1}
  - {name: machine, labels: [c4.large, c4.xlarge]}
  - {name: runtime, column: gross_runtime, unit: s, measured: true}
templates:
  - {name: only, text: "{tool} on {nodes} x {machine} with {memory} GB: {runtime} s"}
"""


def changed(change: dict[str, Any], index: int = 1) -> dict[str, Any]:
    """The small schema with a change of one dimension."""
    given = deepcopy(SCHEMA)
    given["dimensions"][index] |= change
    return given


def test_the_default_is_the_table_of_the_seven_tools() -> None:
    schema = Schema(default_schema(), TOOLS)
    assert schema.names == (
        "tool", "input_size", "cpu_cores", "memory_gb", "gpu_sm", "gpu_memory_gb", "latency_ms"
    )  # fmt: skip
    assert [template.name for template in schema.templates] == ["standard", "reordered", "concise", "list", "sentence"]
    assert [dimension.name for dimension in schema.dimensions if dimension.measured] == ["latency_ms"]
    assert [dimension.name for dimension in schema.dimensions if not dimension.number] == ["tool", "input_size"]


def test_a_schema_of_ones_own_is_yaml_alone() -> None:
    schema = Schema(SchemaSpec.model_validate(YAML(typ="safe").load(YAML_SCHEMA)), ("sort", "grep"))
    assert schema.names == ("tool", "nodes", "memory", "machine", "runtime")
    assert schema.dimensions[0].column == "job" and schema.dimensions[0].labels == ["sort", "grep"]
    (template,) = schema.templates
    text = template.write([1, 4, 7.5, 1, 300])
    assert text == "grep on 4 x c4.xlarge with 7.5 GB: 300 s"
    assert template.read(text) == [1, 4, 7.5, 1, 300]
    assert prices(schema, torch.tensor([[1, 8, 64, 0, 9.0]], dtype=torch.float64)).tolist() == [2.0]


def test_a_digest_depends_on_all_of_a_schema() -> None:
    digests = {Schema(SchemaSpec.model_validate(given), TOOLS).digest for given in (SCHEMA, changed({"price": 2.0}))}
    assert len(digests | {Schema(SchemaSpec.model_validate(SCHEMA), TOOLS[::-1]).digest}) == 3
    assert Schema(SchemaSpec.model_validate(SCHEMA), TOOLS).digest in digests


def test_an_unknown_dimension_is_refused_with_those_that_there_are() -> None:
    schema = Schema(SchemaSpec.model_validate(SCHEMA), TOOLS)
    assert schema.index("cores") == 2
    with pytest.raises(InvalidInput, match="given: there is no 'gpus'; there are tool, size, cores, latency_ms"):
        schema.index("gpus", "given")


def test_a_suggestion_comes_before_names_that_may_be_cut_off() -> None:
    names = [f"dimension_with_a_long_name_{chr(97 + index)}" for index in range(20)]
    text = "{tool} " + " ".join(f"{{{name}}}" for name in names)
    given = {"dimensions": [{"name": name} for name in names], "templates": [{"name": "only", "text": text}]}
    said = Schema(SchemaSpec.model_validate(given), TOOLS).no_field("dimension_with_long_name_b")
    assert said.startswith("there is no such field; did you mean dimension_with_a_long_name_")
    assert len(said) > MAX_DESCRIPTION and "? There are tool, dimension_with" in said[:MAX_DESCRIPTION]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": [], "low": 5, "high": 4}, "high: the range from 5 to 4 is empty"),
        ({"levels": [2, 4], "low": 3}, "levels: 2 is outside the declared range"),
        ({"levels": [2, 4], "high": 3}, "levels: 4 is outside the declared range"),
        ({"levels": [2, -4]}, "levels: -4 is not from 0"),
        ({"levels": [2, 2]}, "levels: one of them is there twice"),
        ({"levels": [2, 2.5]}, r"levels: 2\.5 has more decimals than descriptions, 0; set decimals"),
        ({"levels": [1, float("nan")]}, "levels"),
        ({"levels": [], "low": float("inf")}, "low"),
        ({"levels": [], "low": -1}, "low"),
        ({"labels": ["a", "b"]}, "labels: a category has no levels, low, high or price"),
        ({"levels": [], "price": 0, "labels": ["a", "a"]}, "labels: one of them is there twice"),
        ({"levels": [], "price": 0, "labels": ["a", " b"]}, "labels"),
        ({"levels": [], "price": 0, "labels": ["a\nb"]}, "labels"),
        ({"levels": [], "price": 0, "labels": [f"a{i}" for i in range(MAX_LABELS + 1)]}, "labels"),
        ({"name": "tool"}, "name: tool is the name of the tool's own column"),
        ({"name": "tool_name"}, "name: tool_name is the name of the tool's own column"),
        ({"measured": True}, "price: what is measured is not chosen, and has no price"),
        ({"name": "Cores"}, "name"),
        ({"name": "size"}, "dimensions: two of them have the name size"),
        ({"column": "size"}, "dimensions: two of them have the column size"),
        ({"column": "tool"}, "dimensions: two of them have the column tool"),
        ({"decimals": 4}, "decimals"),
        ({"levls": [2]}, "levls"),
    ],
)
def test_what_is_wrong_with_a_dimension_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SchemaSpec.model_validate(changed(change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dimensions": []}, "dimensions: there must be at least one"),
        ({"templates": []}, "templates: there must be at least one"),
        ({"templates": SCHEMA["templates"] * 2}, "templates: two of them have the name plain"),
    ],
)
def test_what_is_wrong_with_a_schema_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SchemaSpec.model_validate(SCHEMA | change)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{tool} {size} {cores} {latency_ms} {gpus}", "names the unknown field gpus; there are tool, size, cores"),
        ("{tool} {size} {cores}", "must name latency_ms once, so that it can be read back, not 0 times"),
        ("{tool} {size} {cores} {latency_ms} {cores}", "must name cores once, so that it can be read back, not 2"),
        ("{tool}{size} {cores} {latency_ms}", "cannot be read back: nothing stands between tool and size"),
        ("{tool} {size} 1{cores} {latency_ms}", "cannot be read back: a digit stands beside the number cores"),
        ("{tool} {size} {cores}0 {latency_ms}", "cannot be read back: a digit stands beside the number cores"),
    ],
)
def test_a_template_that_cannot_be_read_back_is_refused(text: str, message: str) -> None:
    templates = [SCHEMA["templates"][0], {"name": "mine", "text": text}]
    with pytest.raises(InvalidInput, match=f"mine {message}") as caught:
        Schema(SchemaSpec.model_validate(SCHEMA | {"templates": templates}), TOOLS)
    assert caught.value.violations[0].field == "spec.table.templates.1.text"


def test_a_range_of_one_number_is_no_empty_one() -> None:
    assert DimensionSpec(name="gpus", low=1, high=1).high == 1
