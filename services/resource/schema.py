"""The fields of a table of configurations: the tool, and the dimensions of a schema."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ruamel.yaml import YAML

from ethogram.errors import InvalidInput, alternatives, did_you_mean
from ethogram.specs.resource import MOST, DimensionSpec, SchemaSpec
from services.resource.readings import read_two_ways
from services.resource.texts import OPTIONS, MalformedTemplate, Template

TOOL = "tool"
_DEFAULT = Path(__file__).with_name("default_schema.yaml")


@dataclass(frozen=True)
class Schema:
    """What a vector holds: first the tool, then the dimensions. Categories are the indices of their labels.

    Raises :class:`InvalidInput` for a template that names an unknown field or cannot be read back.
    """

    spec: SchemaSpec
    tools: tuple[str, ...]
    inferred: frozenset[str] = frozenset()
    """Ends of ranges that were not declared but are of the rows, e.g. ``latency_ms.high``."""

    def __post_init__(self) -> None:
        assert len(self.templates) == len(self.spec.templates)

    @cached_property
    def dimensions(self) -> tuple[DimensionSpec, ...]:
        """The tool as a category, and the dimensions of the spec."""
        tool = DimensionSpec.model_construct(
            **DimensionSpec(name="as_tool", labels=["none"]).model_dump()
            | {"name": TOOL, "column": self.spec.tool_column, "labels": list(self.tools)}
        )
        return (tool, *self.spec.dimensions)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(dimension.name for dimension in self.dimensions)

    @cached_property
    def templates(self) -> tuple[Template, ...]:
        """The forms of description."""
        labels = tuple(tuple(dimension.labels) for dimension in self.dimensions)
        decimals = tuple(dimension.decimals for dimension in self.dimensions)
        highest = tuple(min(2 * (dimension.high or 0.0), float(MOST)) for dimension in self.dimensions)
        templates = []
        for index, template in enumerate(self.spec.templates):
            try:
                made = Template(template.name, template.text, self.names, labels, decimals, highest)
                if (text := read_two_ways(made)) is not None:
                    raise MalformedTemplate(f"cannot be read back: {text!r} is two descriptions at once")
            except MalformedTemplate as error:
                raise InvalidInput.field(f"spec.table.templates.{index}.text", f"{template.name} {error}") from None
            templates.append(made)
        return tuple(templates)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that vectors and descriptions depend on."""
        content = [self.spec.model_dump(mode="json"), self.tools]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def check_labels(self, language_model: str) -> None:
        """Raise :class:`InvalidInput` for more labels, tools among them, than a ``language_model`` that was trained to
        read vectors has marks of."""
        labels = sum(len(dimension.labels) for dimension in self.dimensions)
        if labels > OPTIONS:
            text = f"has {labels} labels, tools among them, and {language_model} has marks of {OPTIONS}"
            raise InvalidInput.field("spec.table", f"{text}; name another language model in llm_model")

    def index(self, name: str, field: str = "dimension") -> int:
        """Position of a dimension in the vectors. Raises :class:`InvalidInput` of ``field``."""
        if name not in self.names:
            raise InvalidInput.field(field, f"there is no {name!r}{self._alternatives(name)}")
        return self.names.index(name)

    def no_field(self, name: str) -> str:
        """What is wrong with the ``name`` of a field that this schema does not have."""
        return f"there is no such field{self._alternatives(name)}"

    def _alternatives(self, name: str) -> str:
        """Which field a wrong ``name`` may stand for, by its own name or its column's, and the names of all."""
        columns = {field.column: field.name for field in self.dimensions}
        like = f"; did you mean {columns[name]}?" if name in columns else did_you_mean(name, self.names)
        return alternatives(self.names, like)


def step(dimension: DimensionSpec) -> float:
    """What the last decimal of a number counts. Logarithms are of 1 + a number in these steps, and so are the same in
    seconds with three decimals as in milliseconds."""
    return 10.0**-dimension.decimals


def default_schema() -> SchemaSpec:
    """The schema of the generator's seven tools."""
    return SchemaSpec.model_validate(YAML(typ="safe").load(_DEFAULT.read_text(encoding="utf-8")))
