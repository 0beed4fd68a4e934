"""Steering as the fields of a request, and back."""

from __future__ import annotations

from typing import Any

from ethogram.errors import InvalidInput
from ethogram.specs.edits import DIRECTIONS, MODES, OPERATIONS, Steering
from ethogram.v1 import inference_pb2 as pb

_OPERATIONS = {name: pb.EditOperation.Value(f"EDIT_OPERATION_{name.upper()}") for name in OPERATIONS}
_MODES = {name: pb.EditMode.Value(f"EDIT_MODE_{name.upper()}") for name in MODES}
_DIRECTIONS = {name: pb.Direction.Value(f"DIRECTION_{name.upper()}") for name in DIRECTIONS}


def fields_of(steering: Steering) -> dict[str, Any]:
    """The fields of a ``SteerRequest`` or an ``EvaluateRequest`` that carry ``steering``."""
    edits, mode, strength, direction = steering
    wire = [pb.Edit(operation=_OPERATIONS[o], behavior=behavior, by=by or "") for o, behavior, by in edits]
    how = {"auto_strength": True} if strength == "auto" else {"strength": strength}
    return {"edits": wire, "mode": _MODES[mode], "direction": _DIRECTIONS[direction], **how}


def steering_of(request: pb.SteerRequest | pb.EvaluateRequest) -> Steering:
    """What :func:`fields_of` wrote, or :class:`InvalidInput` naming the field that is wrong."""
    if request.auto_strength and request.HasField("strength"):
        raise InvalidInput.field("strength", "is chosen for each network with auto_strength; leave one of them out")
    operations, modes, directions = ({v: name for name, v in t.items()} for t in (_OPERATIONS, _MODES, _DIRECTIONS))
    return Steering.of(
        [
            (operations.get(edit.operation, ""), edit.behavior, *([edit.by] if edit.by else []))
            for edit in request.edits
        ],
        modes.get(request.mode, "") if request.mode else "residual",
        "auto" if request.auto_strength else request.strength if request.HasField("strength") else 1.0,
        directions.get(request.direction, "") if request.direction else "learned",
    )
