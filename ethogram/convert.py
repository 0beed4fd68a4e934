"""Convert specs to protobuf messages and back, by descriptor.

A spec's field and its message's field share their name. Scalars are ``optional`` in protobuf, so that ``0``, ``False``
and ``""`` survive; ``None`` is an unset field; a ``Literal`` of strings is an enum whose members carry the enum's name
as prefix (``Init.shared`` is ``INIT_SHARED``). A number or a range is one of two fields, ``rate`` and ``rate_range``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet
from pydantic import BaseModel, ValidationError

from ethogram.errors import InvalidInput

# The classes of descriptors depend on protobuf's implementation, so they have no static type here.
Field = Any
Descriptor = Any
M = TypeVar("M", bound=Message)
S = TypeVar("S", bound=BaseModel)
RANGE = "_range"
"""End of the name of the field that carries a range where a spec takes a number or a range."""


def to_proto(spec: BaseModel, message_type: type[M]) -> M:
    """The message that carries ``spec``."""
    return message_type(**_message_fields(spec.model_dump(), message_type.DESCRIPTOR))


def from_proto(message: Message, spec_type: type[S], path: str = "spec") -> S:
    """The validated spec that ``message`` carries.

    Raises :class:`InvalidInput` with the path of each wrong field. Unknown fields and enum members, which protobuf
    itself keeps silently, are errors too.
    """
    try:
        return spec_type.model_validate(_spec_fields(message, path))
    except ValidationError as error:
        raise InvalidInput.from_pydantic(error, path, spec_type) from None


def _message_fields(values: Mapping[str, Any], descriptor: Descriptor) -> dict[str, Any]:
    fields = descriptor.fields_by_name
    if missing := values.keys() - fields.keys():
        raise TypeError(f"{descriptor.full_name} has no field for {sorted(missing)}")
    return {
        field.name: _each_item(field, value, field.name, _to_wire)
        for field, value in ((_carrier(fields, name, value), value) for name, value in values.items())
        if value is not None
    }


def _carrier(fields: Mapping[str, Field], name: str, value: Any) -> Field:
    """The field that carries ``value`` of the spec's field ``name``."""
    as_range = isinstance(value, Mapping) and fields[name].message_type is None
    return fields[name + RANGE if as_range else name]


def _to_wire(field: Field, value: Any, _: str) -> Any:
    if field.message_type is not None:
        return _message_fields(value, field.message_type)
    return enum_prefix(field.enum_type.name) + value.upper() if field.enum_type is not None else value


def _spec_fields(message: Message, path: str) -> dict[str, Any]:
    unknown: Any = UnknownFieldSet(message)
    if len(unknown):
        numbers = sorted({field.field_number for field in unknown})
        raise InvalidInput.field(
            path, f"unknown protobuf field number {numbers[0]}; is the client newer than the server?"
        )
    values: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        if not field.is_repeated and not message.HasField(field.name):
            continue
        number = field.name.removesuffix(RANGE)
        name = number if number in message.DESCRIPTOR.fields_by_name else field.name
        if name in values:
            raise InvalidInput.field(f"{path}.{name}", f"is given twice, as {name} and as {field.name}")
        values[name] = _each_item(field, getattr(message, field.name), f"{path}.{name}", _from_wire)
    return values


def _from_wire(field: Field, value: Any, path: str) -> Any:
    if field.message_type is not None:
        return _spec_fields(value, path)
    if field.enum_type is None:
        return value
    member = field.enum_type.values_by_number.get(value)
    if member is None or value == 0:
        raise InvalidInput.field(path, f"{value} is not a member of {field.enum_type.name}")
    return str(member.name).removeprefix(enum_prefix(field.enum_type.name)).lower()


def _each_item(field: Field, value: Any, path: str, convert: Callable[[Field, Any, str], Any]) -> Any:
    """Convert the ``value`` of ``field``: each item of a list or map, or the value itself."""
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        item_field = field.message_type.fields_by_name["value"]
        return {key: convert(item_field, item, f"{path}.{key}") for key, item in value.items()}
    if field.is_repeated:
        return [convert(field, item, f"{path}.{i}") for i, item in enumerate(value)]
    return convert(field, value, path)


def enum_prefix(name: str) -> str:
    """Prefix of the members of enum ``name``: ``INPUT_ENCODING_`` for ``InputEncoding``."""
    words = "".join(f"_{letter}" if letter.isupper() else letter for letter in name)
    return words.lstrip("_").upper() + "_"
