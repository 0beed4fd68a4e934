"""Tables of measurements and registries of tools: what is read, and every way in which they can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from ethogram.errors import InvalidInput
from ethogram.specs.resource import MAX_LABELS, SchemaSpec
from services.resource.data import Table, read_measurements, read_tools
from tests.resource.conftest import COLUMNS, SCHEMA, TOOLS, rows, small_table, write_registry, write_rows

SPEC = SchemaSpec.model_validate(SCHEMA)


def test_a_table_is_read_as_vectors(table: Table) -> None:
    assert table.values.dtype == torch.float64 and table.values.shape == (16, 4)
    assert table.values[0].tolist() == [0, 0, 1, 100] and table.values[15].tolist() == [1, 1, 8, 205]
    assert table.tools.tolist() == [0] * 8 + [1] * 8
    assert table.schema.tools == TOOLS and len(table) == 16
    assert table.configurations.tolist() == list(range(16))
    assert table.at(torch.tensor([3, 15])).values[:, 3].tolist() == [121, 205]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_other_forms_give_the_same_table(suffix: str, table: Table, tmp_path: Path) -> None:
    file = tmp_path / f"profiling{suffix}"
    if suffix == ".jsonl":
        file.write_text("\n".join(map(json.dumps, rows())))
    else:
        parquet.write_table(pa.Table.from_pylist(rows()), file)
    read = read_measurements(file, SPEC, TOOLS)
    assert read.digest == table.digest and torch.equal(read.values, table.values)


def test_the_order_of_columns_is_no_matter_and_that_of_tools_is_the_registrys(table: Table, tmp_path: Path) -> None:
    turned = [{name: row[name] for name in reversed(COLUMNS)} for row in rows()]
    file = write_rows(tmp_path / "profiling.csv", turned)
    assert torch.equal(read_measurements(file, SPEC, TOOLS).values, table.values)
    other = read_measurements(file, SPEC, TOOLS[::-1])
    assert other.tools.tolist() == [1] * 8 + [0] * 8 and other.digest != table.digest
    # Without a registry they come in the order of their first rows.
    write_rows(file, turned[::-1])
    assert read_measurements(file, SPEC).schema.tools == TOOLS[::-1]


def test_a_range_is_as_declared_else_of_the_levels_else_of_the_rows(tables: Path) -> None:
    dimensions = [SCHEMA["dimensions"][0], {"name": "cores", "column": "cpu"}, {"name": "latency_ms", "high": 500}]
    schema = small_table(tables, dimensions=dimensions).schema
    assert [(dimension.low, dimension.high) for dimension in schema.dimensions[2:]] == [(1, 8), (100, 500)]
    assert [(d.low, d.high) for d in small_table(tables).schema.dimensions[2:]] == [(1, 8), (1, 999)]


def test_ends_of_ranges_that_nobody_declared_are_known_and_may_be_of_some_rows(tables: Path) -> None:
    dimensions = [SCHEMA["dimensions"][0], {"name": "cores", "column": "cpu"}, {"name": "latency_ms", "high": 500}]
    table = small_table(tables, dimensions=dimensions)
    assert table.schema.inferred == {"cores.low", "cores.high", "latency_ms.low"}
    assert small_table(tables).schema.inferred == frozenset()
    within = table.within(torch.tensor([5, 6]))
    assert [(each.low, each.high) for each in within.schema.dimensions[2:]] == [(2, 4), (135, 500)]
    assert torch.equal(within.values, table.values) and within.schema.inferred == table.schema.inferred
    assert within.digest != table.digest and table.within(torch.arange(16)).digest == table.digest


def test_a_range_that_nobody_declared_refuses_nothing(tables: Path, tmp_path: Path) -> None:
    dimensions = [SCHEMA["dimensions"][0], {"name": "cores", "column": "cpu"}, {"name": "latency_ms", "high": 500}]
    schema = small_table(tables, dimensions=dimensions).schema
    given = rows()
    given[3] |= {"cpu": 64, "latency_ms": 7}
    file = write_rows(tmp_path / "more.csv", given)
    read = read_measurements(file, schema.spec, TOOLS, inferred=schema.inferred)
    # The ranges stay those of training.
    assert read.schema.digest == schema.digest and read.values[3].tolist() == [0, 0, 64, 7]
    given[4]["latency_ms"] = 501
    with pytest.raises(InvalidInput, match="501 is outside the declared range, from 0 to 500"):
        read_measurements(write_rows(file, given), schema.spec, TOOLS, inferred=schema.inferred)


def test_a_number_that_never_varies_has_a_range_that_can_be_read_again(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "profiling.csv", [{**row, "cpu": 4, "latency_ms": i} for i, row in enumerate(rows())])
    dimensions = [SCHEMA["dimensions"][0], {"name": "cores", "column": "cpu"}, {"name": "latency_ms"}]
    spec = SchemaSpec.model_validate(SCHEMA | {"dimensions": dimensions, "repeated": True})
    read = read_measurements(file, spec).schema.spec
    assert SchemaSpec.model_validate(read.model_dump(mode="json")) == read


def test_repeated_measurements_stay_and_are_held_out_together(tmp_path: Path) -> None:
    twice = [row | {"latency_ms": row["latency_ms"] + extra} for row in rows() for extra in (0, 1, 0)]
    file = write_rows(tmp_path / "profiling.csv", twice)
    table = read_measurements(file, SchemaSpec.model_validate(SCHEMA | {"repeated": True}), TOOLS)
    assert len(table) == 48 and int(table.configurations.max()) == 15
    trained, held_out = table.hold_out(0.25, 3)
    assert len(held_out) == 12 and len(trained) == 36
    assert not set(table.configurations[trained].tolist()) & set(table.configurations[held_out].tolist())
    assert sorted([*trained.tolist(), *held_out.tolist()]) == list(range(48))


def test_rounding_errors_are_no_decimals(table: Table, tmp_path: Path) -> None:
    given = [row | {"cpu": row["cpu"] * (1 + 2e-16)} for row in rows()]
    assert given[1]["cpu"] != 2
    read = read_measurements(write_rows(tmp_path / "profiling.csv", given), SPEC, TOOLS)
    assert torch.equal(read.values, table.values) and not read.warnings()


def test_what_is_held_out_follows_from_the_seed(table: Table) -> None:
    first, again, other = (table.hold_out(0.25, seed)[1].tolist() for seed in (0, 0, 1))
    assert first == again != other and len(first) == 4


def test_more_decimals_than_descriptions_have(tmp_path: Path) -> None:
    """Those of measured numbers are rounded in descriptions, and counted; others would be another configuration."""
    given = [row | {"latency_ms": row["latency_ms"] + 0.25 * (number < 3)} for number, row in enumerate(rows())]
    table = read_measurements(write_rows(tmp_path / "profiling.csv", given), SPEC, TOOLS)
    assert table.values[:4, 3].tolist() == [100.25, 107.25, 114.25, 121]
    says = "latency_ms: descriptions round 3 of 16 numbers to 0 decimals; set its decimals for more"
    assert table.warnings() == [says]
    finer = [*SCHEMA["dimensions"][:2], SCHEMA["dimensions"][2] | {"decimals": 2}]
    spec = SchemaSpec.model_validate(SCHEMA | {"dimensions": finer})
    assert read_measurements(tmp_path / "profiling.csv", spec, TOOLS).warnings() == []


Change = Callable[[list[dict[str, Any]]], Any]


def cell(row: int, column: str, value: Any) -> Change:
    """Set a value of the ``row``-th line of the file; the header is line 1."""
    return lambda rows: rows[row - 2].update({column: value})


def without(column: str) -> Change:
    return lambda rows: [row.pop(column) for row in rows]


def added(column: str) -> Change:
    return lambda rows: [row.update({column: 1}) for row in rows]


def only(tool: str) -> Change:
    return lambda rows: rows.__setitem__(slice(None), [row for row in rows if row["tool"] == tool])


@pytest.mark.parametrize(
    ("change", "field", "text"),
    [
        (without("cpu"), "profiling.csv.cpu", "is missing; there are tool, size, latency_ms"),
        (without("tool"), "profiling.csv.tool", "is missing"),
        (added("gpus"), "profiling.csv.gpus", "is no column of this table, which has tool, size, cpu, latency_ms"),
        (cell(5, "latency_ms", "nan"), "profiling.csv:5.latency_ms", "finite number, not 'nan'"),
        (cell(5, "latency_ms", "inf"), "profiling.csv:5.latency_ms", "finite number, not 'inf'"),
        (cell(5, "latency_ms", "1e999"), "profiling.csv:5.latency_ms", "finite number"),
        (cell(5, "cpu", -4), "profiling.csv:5.cpu", "greater than or equal to 0, not '-4'"),
        (cell(5, "cpu", "four"), "profiling.csv:5.cpu", "as a number, not 'four'"),
        (cell(5, "cpu", ""), "profiling.csv:5.cpu", "is missing"),
        (cell(5, "latency_ms", 1e8), "profiling.csv:5.latency_ms", "less than or equal to 9999999"),
        (cell(5, "latency_ms", 1000), "profiling.csv:5.latency_ms", "1000 is outside the declared range, from 1"),
        (cell(5, "cpu", 4.5), "profiling.csv:5.cpu", "4.5 has more decimals than descriptions, 0; set decimals"),
        (cell(5, "cpu", 9), "profiling.csv:5.cpu", "9 is outside the declared range, from 1 to 8"),
        (cell(5, "size", "huge"), "profiling.csv:5.size", "'small' or 'large', not 'huge'"),
        (cell(5, "size", ""), "profiling.csv:5.size", "is missing"),
        (cell(5, "tool", "fly"), "profiling.csv:5.tool", "'detect' or 'translate', not 'fly'"),
        (cell(5, "cpu", 4), "profiling.csv:5", "has the configuration of row 4 again; remove one, or set"),
        (only("detect"), "profiling", "has no row of the tool translate; measure it, or leave it out of the registry"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_table_is_named(change: Change, field: str, text: str, tmp_path: Path) -> None:
    given = rows()
    change(given)
    file = write_rows(tmp_path / "profiling.csv", given)
    with pytest.raises(InvalidInput) as caught:
        read_measurements(file, SPEC, TOOLS)
    violation = caught.value.violations[0]
    assert violation.field == field and text in violation.description
    assert "profiling.csv" in str(caught.value)


@pytest.mark.parametrize("value", [True, "4", [4], {"a": 4}, "", float("nan")])
def test_what_is_no_number_in_json_is_none(value: Any, tmp_path: Path) -> None:
    """Other forms than CSV have types: text and truth values are no numbers there."""
    given = rows()
    cell(5, "cpu", value)(given)
    (tmp_path / "profiling.jsonl").write_text("\n".join(map(json.dumps, given)))
    with pytest.raises(InvalidInput) as caught:
        read_measurements(tmp_path / "profiling.jsonl", SPEC, TOOLS)
    assert caught.value.violations[0].field == "profiling.jsonl:4.cpu"


def test_every_wrong_value_of_a_table_is_named(tmp_path: Path) -> None:
    given = rows()
    for change in (cell(3, "cpu", "x"), cell(5, "size", "y"), cell(5, "latency_ms", -1)):
        change(given)
    with pytest.raises(InvalidInput, match="and 2 more") as caught:
        read_measurements(write_rows(tmp_path / "profiling.csv", given), SPEC, TOOLS)
    assert [violation.field.partition(":")[2] for violation in caught.value.violations] == [
        "3.cpu",
        "5.size",
        "5.latency_ms",
    ]


@pytest.mark.parametrize("content", ["", "tool,size,cpu,latency_ms\n"])
def test_a_table_without_rows_is_refused(content: str, tmp_path: Path) -> None:
    file = tmp_path / "profiling.csv"
    file.write_text(content)
    with pytest.raises(InvalidInput, match=r"profiling\.csv"):
        read_measurements(file, SPEC, TOOLS)


def test_a_table_of_too_many_tools_is_refused(tmp_path: Path) -> None:
    many = [rows()[0] | {"tool": f"tool{number}"} for number in range(MAX_LABELS + 1)]
    with pytest.raises(InvalidInput, match=f"has {MAX_LABELS + 1} tools; at most {MAX_LABELS} are possible"):
        read_measurements(write_rows(tmp_path / "profiling.csv", many), SPEC)


def test_a_tool_whose_name_cannot_stand_in_a_text_is_refused(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "profiling.csv", [row | {"tool": "a {b}"} for row in rows()[:4]])
    with pytest.raises(InvalidInput, match=r"profiling\.csv:2\.tool"):
        read_measurements(file, SPEC)


def test_a_registry_is_read_in_its_order(tmp_path: Path) -> None:
    assert read_tools(write_registry(tmp_path / "tools.json", ["b", "a"])) == ("b", "a")
    # With a byte order mark, as editors write it.
    (tmp_path / "tools.json").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "tools.json").read_bytes())
    assert read_tools(tmp_path / "tools.json") == ("b", "a")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"name": "a"}, {"name": "b"}, {"name": "a"}], "two tools have the name a"),
        ([{"name": "a"}, {"description": "b"}], "tool 1 has no name"),
        ([{"name": " "}], "tool 0 has no name"),
        ([{"name": 3}], "tool 0 has no name"),
        (["a"], "tool 0 has no name"),
        ([{"name": "a\nb"}], r"tool 0: 'a\\nb' cannot stand in a text"),
        ([], "is not a list of tools"),
        ({"name": "a"}, "is not a list of tools"),
        ([{"name": f"t{number}"} for number in range(MAX_LABELS + 1)], "at most 64 are possible"),
    ],
)
def test_what_is_wrong_with_a_registry_is_named(content: Any, text: str, tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_text(json.dumps(content))
    with pytest.raises(InvalidInput, match=rf"tools\.json.*{text}") as caught:
        read_tools(tmp_path / "tools.json")
    assert caught.value.violations[0].field == "tools"


@pytest.mark.parametrize("content", ["[", None])
def test_a_registry_that_cannot_be_read_is_named(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "tools.json").write_text(content)
    with pytest.raises(InvalidInput, match=r"tools\.json") as caught:
        read_tools(tmp_path / "tools.json")
    assert caught.value.violations[0].field == "tools"
