"""Parts of a request that all services read."""

from __future__ import annotations

from collections.abc import Iterable
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
    """Raise :class:`InvalidInput` for fields that this version does not know; protobuf itself silently keeps them."""
    if len(UnknownFieldSet(message)):
        number = UnknownFieldSet(message)[0].field_number
        raise InvalidInput.field(path or "(root)", f"unknown protobuf field number {number}; is the client newer?")
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        children: Iterable[tuple[Any, Any]] = [("", value)]
        if field.message_type.GetOptions().map_entry:
            children = value.items()
        elif field.is_repeated:
            children = enumerate(value)
        for key, child in children:
            if isinstance(child, Message):
                check_known(child, ".".join(filter(None, (path, field.name, str(key)))))
