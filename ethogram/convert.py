"""Convert specs to protobuf messages and back, by descriptor.

A spec's field and its message's field share their name. Scalars are ``optional`` in protobuf, so that ``0``, ``False``
and ``""`` survive; ``None`` is an unset field; a ``Literal`` of strings is an enum whose members carry the enum's name
as prefix (``Init.shared`` is ``INIT_SHARED``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet
from pydantic import BaseModel, ValidationError

from ethogram.errors import InvalidInput

# The class of a descriptor depends on protobuf's implementation, so it has no static type here.
Field = Any
Enum = Any
M = TypeVar("M", bound=Message)
S = TypeVar("S", bound=BaseModel)


def to_proto(spec: BaseModel, message_type: type[M]) -> M:
    """The message that carries ``spec``."""
    message = message_type()
    _fill(message, spec.model_dump())
    return message


def from_proto(message: Message, spec_type: type[S], path: str = "spec") -> S:
    """The validated spec that ``message`` carries.

    Raises :class:`InvalidInput` with the path of each wrong field. Unknown fields and enum members, which protobuf
    itself keeps silently, are errors too.
    """
    try:
        return spec_type.model_validate(_read(message, path))
    except ValidationError as error:
        raise InvalidInput.from_pydantic(error, path) from None


def _fill(message: Message, values: Mapping[str, Any]) -> None:
    for field in message.DESCRIPTOR.fields:
        value = values.get(field.name)
        if value is None:
            continue
        target = getattr(message, field.name)
        if _is_map(field):
            value_field = _value_field(field)
            for key, item in value.items():
                if value_field.message_type is not None:
                    _fill(target[key], item)
                else:
                    target[key] = _scalar(value_field, item)
        elif field.is_repeated:
            for item in value:
                if field.message_type is not None:
                    _fill(target.add(), item)
                else:
                    target.append(_scalar(field, item))
        elif field.message_type is not None:
            # An empty sub-message must still be present: absent means "the default".
            target.SetInParent()
            _fill(target, value)
        else:
            setattr(message, field.name, _scalar(field, value))
    missing = set(values) - {field.name for field in message.DESCRIPTOR.fields}
    if missing:
        raise TypeError(f"{message.DESCRIPTOR.full_name} has no field for {sorted(missing)}")


def _read(message: Message, path: str) -> dict[str, Any]:
    unknown: Any = UnknownFieldSet(message)
    if len(unknown):
        numbers = sorted({field.field_number for field in unknown})
        raise InvalidInput.field(
            path, f"unknown protobuf field number {numbers[0]}; is the client newer than the server?"
        )
    values: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        here = f"{path}.{field.name}"
        if _is_map(field):
            value_field = _value_field(field)
            values[field.name] = {
                key: _item(value_field, item, f"{here}.{key}") for key, item in getattr(message, field.name).items()
            }
        elif field.is_repeated:
            items = getattr(message, field.name)
            values[field.name] = [_item(field, item, f"{here}.{i}") for i, item in enumerate(items)]
        elif message.HasField(field.name):
            values[field.name] = _item(field, getattr(message, field.name), here)
    return values


def _item(field: Field, value: Any, path: str) -> Any:
    if field.message_type is not None:
        return _read(value, path)
    if field.enum_type is not None:
        return _member_to_name(field.enum_type, value, path)
    return value


def _scalar(field: Field, value: Any) -> Any:
    enum = field.enum_type
    return enum.values_by_name[enum_prefix(enum.name) + value.upper()].number if enum else value


def _member_to_name(enum: Enum, number: int, path: str) -> str:
    member = enum.values_by_number.get(number)
    if member is None or number == 0:
        raise InvalidInput.field(path, f"{number} is not a member of {enum.name}")
    return str(member.name).removeprefix(enum_prefix(enum.name)).lower()


def enum_prefix(name: str) -> str:
    """Prefix of the members of enum ``name``: ``INPUT_ENCODING_`` for ``InputEncoding``."""
    words = "".join(f"_{letter}" if letter.isupper() else letter for letter in name)
    return words.lstrip("_").upper() + "_"


def _value_field(field: Field) -> Field:
    """The field of a map's values."""
    return field.message_type.fields_by_name["value"]


def _is_map(field: Field) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry
