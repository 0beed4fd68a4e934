"""Descriptions: written from a template, and read back into the same values."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ethogram.specs.resource import FINEST, MOST, SchemaSpec
from services.resource.schema import Schema, default_schema
from services.resource.texts import EDGES, LABEL_END, OPTIONS, MalformedTemplate, Template, edge, number_text, option
from tests.resource.conftest import SCHEMA, TOOLS

DEFAULT = Schema(default_schema(), ("image_classification", "image_generation", "object detection v2"))
LITERALS = st.text(" :,;abcxyz_-/[]()<>%.é", min_size=1, max_size=6)
LABEL = st.from_regex(r"[a-z0-9][a-z0-9 ._-]{0,6}[a-z0-9]", fullmatch=True)


@st.composite
def schemas(draw: st.DrawFn) -> Schema | None:
    """A schema with a template of any order and any text between, or None where that is refused."""
    dimensions = []
    for index in range(draw(st.integers(1, 4))):
        number = draw(st.booleans())
        values = {"decimals": draw(st.integers(0, FINEST))} if number else {"labels": draw(labels())}
        dimensions.append({"name": f"d{index}", **values})
    names = draw(st.permutations(["tool", *(str(dimension["name"]) for dimension in dimensions)]))
    text = draw(LITERALS) + "".join(f"{{{name}}}{draw(LITERALS)}" for name in names)
    spec = {"dimensions": dimensions, "templates": [{"name": "any", "text": text}]}
    try:
        return Schema(SchemaSpec.model_validate(spec), tuple(draw(labels())))
    except Exception as error:
        assert "cannot be read back" in str(error)
        return None


def labels() -> st.SearchStrategy[list[str]]:
    return st.lists(LABEL, min_size=1, max_size=4, unique=True)


def a_value(schema: Schema, index: int) -> st.SearchStrategy[float]:
    """A value of a field: the index of a label, or a number with the decimals that descriptions have."""
    dimension = schema.dimensions[index]
    if dimension.labels:
        return st.integers(0, len(dimension.labels) - 1).map(float)
    scale = 10**dimension.decimals
    return st.integers(0, MOST * scale).map(lambda number: number / scale)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(schemas(), st.data())
def test_every_description_can_be_read_back(schema: Schema | None, data: st.DataObject) -> None:
    if schema is None:
        return
    (template,) = schema.templates
    values = [data.draw(a_value(schema, index)) for index in range(len(schema.dimensions))]
    text = template.write(values)
    assert template.read(text) == values
    assert "".join(part for part, _ in template.parts(values)) == text
    assert len(text) <= sum(len(part) for part, _ in template.longest())
    marked = [part for part, _ in template.parts(values, marked=True)]
    marks = {option(index) for index in range(OPTIONS)}
    edges = {edge(index): index for index in range(EDGES)}
    hidden = {LABEL_END, *marks, *edges}
    assert [part for part in marked if part not in hidden] == [part for part, _ in template.parts(values)]
    # Each value stands between two marks that no other has.
    found = [edges[part] for part in marked if part in edges]
    assert found == [*range(2 * len(schema.dimensions))]
    inside = False
    for part, is_value in template.parts(values, marked=True):
        inside = not inside if part in edges else inside
        assert part in edges or is_value is inside
    # Behind its mark stands what the legend has there.
    legend = template.legend
    for index, part in enumerate(marked):
        if part in marks:
            start = legend.index(part)
            assert marked[index : index + 3] == legend[start : start + 3]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_every_description_of_the_default_table_can_be_read_back(data: st.DataObject) -> None:
    values = [data.draw(a_value(DEFAULT, index)) for index in range(len(DEFAULT.dimensions))]
    texts = {template.write(values) for template in DEFAULT.templates}
    assert len(texts) == 5
    for template in DEFAULT.templates:
        assert template.read(template.write(values)) == values


def test_the_five_forms() -> None:
    texts = [template.write([0, 1, 4, 8, 40, 2, 1234]) for template in DEFAULT.templates]
    assert texts[0] == (
        "image_classification on medium input: 4 CPU cores, 8 GB of memory, 40 GPU SMs and 2 GB of GPU memory take "
        "1234 ms."
    )
    assert texts[2] == "image_classification medium cpu 4 mem 8 sm 40 gmem 2 ms 1234"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "detect",
        "detect small c 4 ms 10.",
        "detect small c 4 ms ",
        "detect small c four ms 10",
        "detect small c -4 ms 10",
        "detect huge c 4 ms 10",
        "fly small c 4 ms 10",
        "detect small c 4 ms 1\n0",
        "detect small c 4 ms 1e3",
        " detect small c 4 ms 10",
    ],
)
def test_a_text_that_is_no_description_is_not_read(text: str) -> None:
    template = Schema(SchemaSpec.model_validate(SCHEMA), TOOLS).templates[0]
    assert template.read("detect small c 4 ms 10") == [0, 0, 4, 10]
    assert template.read(text) is None


def test_numbers_are_rounded_as_they_are_written() -> None:
    assert [number_text(value, 0) for value in (0.4, 0.5, 1.5, 2.5, 9.6)] == ["0", "0", "2", "2", "10"]
    assert number_text(0.125, 2) == "0.12" and number_text(7, 3) == "7.000"


def test_a_label_that_begins_another_is_read_whole() -> None:
    labels = (("a", "a b", "a b c"), (), ("b", "c"))
    template = Template("x", "{tool} is {n}, {kind}", ("tool", "n", "kind"), labels, (0, 0, 0), (0.0, 9.0, 0.0))
    for index in range(3):
        assert template.read(template.write([index, 3, 1])) == [index, 3, 1]


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        # "a b c": is it "a" and "b c", or "a b" and "c"?
        ("{tool} {kind} {n}", (("a", "a b"), ("c", "b c"), ())),
        # "a 1 2 3": is the number 1 and the label "2 3", or part of "a 1"?
        ("{tool} {n} {kind}", (("a", "a 1"), ("2 3", "3"), ())),
        ("{tool}. {kind}: {n}", (("x", "x. y"), ("z", "y. z"), ())),
    ],
)
def test_a_template_whose_labels_run_into_each_other_is_refused(text: str, labels: tuple[tuple[str, ...], ...]) -> None:
    dimensions = [{"name": "kind", "labels": list(labels[1])}, {"name": "n"}]
    spec = SchemaSpec.model_validate({"dimensions": dimensions, "templates": [{"name": "t", "text": text}]})
    with pytest.raises(Exception, match=r"templates\.0\.text: t cannot be read back: .* is two descriptions at once"):
        Schema(spec, labels[0])


def test_parts_say_which_of_them_are_values() -> None:
    template = Schema(SchemaSpec.model_validate(SCHEMA), TOOLS).templates[1]
    assert template.parts([1, 1, 8, 250]) == [
        ("250", True),
        (" ms: ", False),
        ("8", True),
        (" cores, ", False),
        ("large", True),
        (" ", False),
        ("translate", True),
        (".", False),
    ]


def test_a_template_of_other_fields_is_malformed() -> None:
    with pytest.raises(MalformedTemplate, match="unknown field b; there are a"):
        Template("x", "{b}", ("a",), ((),), (0,), (1.0,))
    assert math.isclose(Template("x", "{a}", ("a",), ((),), (2,), (1.0,)).read("1.25")[0], 1.25)  # type: ignore[index]
