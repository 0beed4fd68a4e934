"""The one table of job kinds. REST, the CLI, the supervisor, the child and the parity test derive from it.

Importing this module loads no science: a servicer is named, and imported by the child that runs it.
"""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf.message import Message

from ethogram.specs import kinds
from ethogram.specs.base import ArtifactRef, Spec
from ethogram.v1 import clt_pb2, crossmodal_pb2, generation_pb2


@dataclass(frozen=True, kw_only=True)
class Kind(kinds.Kind):
    """One kind of job, and who runs it."""

    request: type[Message]
    """Its request message, with fields ``context`` and ``spec``."""
    servicer: str
    """``module:function`` that adds its servicer to a gRPC server, given ``(server)``."""

    @property
    def spec_message(self) -> type[Message]:
        """Message class of the spec."""
        message: type[Message] = type(self.request().spec)  # type: ignore[attr-defined]
        return message


KINDS: dict[str, Kind] = {
    name: Kind(**vars(kind), request=request, servicer=f"services.{kind.system}.service:add_to_server")
    for (name, kind), request in zip(
        kinds.KINDS.items(),
        (
            generation_pb2.RunGenerationRequest,
            crossmodal_pb2.RunCrossmodalRequest,
            clt_pb2.RunPolicyRequest,
            clt_pb2.RunActivationsRequest,
            clt_pb2.RunSaeRequest,
            clt_pb2.RunCltRequest,
            clt_pb2.RunSweepRequest,
        ),
        strict=True,
    )
}


def input_refs(spec: Spec, path: str = "") -> dict[str, ArtifactRef]:
    """Every artifact that ``spec`` names, by its dotted path."""
    found: dict[str, ArtifactRef] = {}
    for name in type(spec).model_fields:
        value, here = getattr(spec, name), f"{path}.{name}" if path else name
        items = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
        for key, item in [(here, value), *((f"{here}.{key}", item) for key, item in items)]:
            if isinstance(item, ArtifactRef):
                found[key] = item
            elif isinstance(item, Spec):
                found |= input_refs(item, key)
    return found
