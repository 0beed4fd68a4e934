"""What the server derives from the table of kinds in :mod:`ethogram.specs.kinds`; loads no science."""

from __future__ import annotations

from importlib import import_module

from google.protobuf.message import Message

from ethogram.specs.base import ArtifactRef, Spec
from ethogram.specs.kinds import Kind


def request_type(kind: Kind) -> type[Message]:
    """Message class of the request of ``kind.rpc``."""
    module = import_module(f"ethogram.v1.{kind.system}_pb2")
    service, method = kind.rpc.removeprefix("/").split("/")
    name = module.DESCRIPTOR.services_by_name[service.rpartition(".")[2]].methods_by_name[method].input_type.name
    message: type[Message] = getattr(module, name)
    return message


def spec_message(kind: Kind) -> type[Message]:
    """Message class of the spec."""
    message: type[Message] = type(request_type(kind)().spec)  # type: ignore[attr-defined]
    return message


def input_refs(spec: Spec, path: str = "") -> dict[str, ArtifactRef]:
    """Every artifact that ``spec`` names, by its dotted path."""
    refs: dict[str, ArtifactRef] = {}
    for name in type(spec).model_fields:
        value, here = getattr(spec, name), f"{path}.{name}" if path else name
        items = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
        for key, item in [(here, value), *((f"{here}.{key}", item) for key, item in items)]:
            if isinstance(item, ArtifactRef):
                refs[key] = item
            elif isinstance(item, Spec):
                refs |= input_refs(item, key)
    return refs
