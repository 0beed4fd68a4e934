"""A JSON Schema as a flat list of fields, for people."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

_BOUNDS = {
    "minimum": ">=",
    "maximum": "<=",
    "exclusiveMinimum": ">",
    "exclusiveMaximum": "<",
    "minLength": "length >=",
    "maxLength": "length <=",
    "pattern": "matches",
}


class Field(NamedTuple):
    """One field of a spec."""

    path: str
    type: str
    default: str
    meaning: str


def fields(schema: dict[str, Any]) -> list[Field]:
    """Every field of ``schema`` at any depth, nested ones by their dotted path; N is an index into a list."""
    return list(_fields(schema, schema.get("$defs", {}), "", {}))


def _fields(
    schema: dict[str, Any], definitions: dict[str, Any], prefix: str, defaults: dict[str, Any]
) -> Iterator[Field]:
    """``defaults``: values of the fields where all of ``schema`` is left out."""
    required = set(schema.get("required", ()))
    for name, field in schema.get("properties", {}).items():
        path = f"{prefix}{name}"
        value = defaults.get(name, field.get("default"))
        # A $ref's own description belongs to the field, the target's to its type.
        meaning = " ".join(field.get("description", "").replace("``", "").split())
        missing = name in required and name not in defaults
        default = "(required)" if missing else "" if isinstance(value, dict) else json.dumps(value)
        yield Field(path, _type(field, definitions), default, meaning)
        for inner, end in ((field, ""), *((one, "") for one in field.get("anyOf", ())), (field.get("items", {}), ".N")):
            target = _resolve(inner, definitions)
            if "properties" in target:
                yield from _fields(target, definitions, f"{path}{end}.", value if isinstance(value, dict) else {})


def _resolve(field: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    return definitions.get(field["$ref"].rpartition("/")[2], {}) if "$ref" in field else field


def _type(field: dict[str, Any], definitions: dict[str, Any]) -> str:
    field = _resolve(field, definitions)
    if "anyOf" in field:
        return " or ".join(_type(option, definitions) for option in field["anyOf"])
    if "enum" in field:
        return " | ".join(map(str, field["enum"]))
    if "const" in field:
        return str(field["const"])
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}), definitions)}"
    if "properties" in field:
        return "mapping"
    bounds = [f"{sign} {field[key]}" for key, sign in _BOUNDS.items() if key in field]
    return ", ".join([str(field.get("type", "any")), *bounds])
