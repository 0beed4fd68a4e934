"""What all services read from a request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from ethogram.errors import InvalidInput
from ethogram.v1 import inference_pb2 as pb
from services.inference.repository import Reference


def reference(model: pb.ModelRef) -> Reference:
    """The model that a request names, or :class:`InvalidInput`."""
    if not model.name:
        raise InvalidInput.field("model.name", "missing; name a published model")
    return Reference(model.tenant or "default", model.name, model.version or None)


def required(request: Message, field: str) -> Any:
    """A message field that must be set, or :class:`InvalidInput`."""
    if not request.HasField(field):
        raise InvalidInput.field(field, "missing")
    return getattr(request, field)


def check_known(message: Message, path: str = "") -> None:
    """Refuse fields that this version does not know; protobuf itself would keep them in silence."""
    if len(UnknownFieldSet(message)):
        number = UnknownFieldSet(message)[0].field_number
        raise InvalidInput.field(path or "(root)", f"unknown protobuf field number {number}; is the client newer?")
    for name, child in _messages(message):
        check_known(child, f"{path}.{name}" if path else name)


def _messages(message: Message) -> Iterator[tuple[str, Message]]:
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        if field.message_type.GetOptions().map_entry:
            for key, item in value.items():
                if isinstance(item, Message):
                    yield f"{field.name}.{key}", item
        elif field.is_repeated:
            for i, item in enumerate(value):
                yield f"{field.name}.{i}", item
        else:
            yield field.name, value
