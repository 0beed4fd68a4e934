"""The reference of a spec's fields."""

from __future__ import annotations

from typing import get_args, get_origin

import pytest
from pydantic import BaseModel

from ethogram.cli.main import run
from ethogram.schema import Field, fields
from ethogram.specs.base import Spec
from ethogram.specs.generation import BUILT_IN
from ethogram.specs.kinds import KINDS, Kind


def paths(spec: type[BaseModel], prefix: str = "") -> set[str]:
    """Of every field at any depth, from the classes; the schema is read by the code under test."""
    found = set()
    for name, info in spec.model_fields.items():
        found.add(prefix + name)
        many = "N." if get_origin(info.annotation) is list else ""
        for nested in nested_specs(info.annotation):
            found |= paths(nested, f"{prefix}{name}.{many}")
    return found


def nested_specs(annotation: object) -> list[type[Spec]]:
    """The specs in an annotation such as ``list[PatternSpec] | None``."""
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return [annotation]
    return [spec for argument in get_args(annotation) for spec in nested_specs(argument)]


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_every_field_is_listed_with_its_meaning(kind: Kind) -> None:
    found = fields(kind.spec.model_json_schema())
    assert {field.path for field in found} == paths(kind.spec)
    assert all(field.type and field.meaning and "`" not in field.meaning for field in found)


def test_ranges_and_optional_parts_have_bounds_and_defaults() -> None:
    found = {field.path: field for field in fields(KINDS["generation"].spec.model_json_schema())}
    assert found["subject.neurons.max"] == Field("subject.neurons.max", "integer, >= 1, <= 512", "16", "Maximum.")
    assert found["staged.learning_rate.min"].default == "0.001"
    assert found["staged.corruption_rate"].default == "0.3"
    assert found["hub.repo"].default == "(required)"
    assert all(name in found["patterns.N.name"].meaning for name in BUILT_IN)


def test_no_platform_is_needed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ETHOGRAM_URL", "http://127.0.0.1:1")
    with pytest.raises(SystemExit) as left:
        run(["kinds", "generation"])
    assert left.value.code == 0
    assert "format.tokenizer" in capsys.readouterr().out
