"""Edits of networks' behaviours, as client, server and codec share them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast, get_args

from ethogram.errors import InvalidInput

Operation = Literal["add", "remove", "replace"]
Mode = Literal["residual", "direct"]
Direction = Literal["learned", "mean_difference", "classifier_normal"]
Strength = float | Literal["auto"]

OPERATIONS: tuple[Operation, ...] = get_args(Operation)
MODES: tuple[Mode, ...] = get_args(Mode)
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
MAX_STRENGTH = 100.0
"""Far beyond what a model was trained for, and far below what overflows."""
LOOKUPS = ("same_label", "nearest_train", "centroid")
"""Ways to an edit that look a network up and change none."""
MIN_AVAILABLE = 0.5
"""Share of the edits for which a lookup must have a network to be compared with them."""


class Behavior(NamedTuple):
    """One behaviour that a model can steer."""

    name: str
    description: str
    positives: int
    """Networks of the training zoo that have it."""


class Edit(NamedTuple):
    """One change of a network's behaviour."""

    operation: Operation
    behavior: str
    """Name of the behaviour, e.g. ``starts_with(A)``."""
    by: str | None = None
    """The new behaviour of a replacement."""

    @property
    def signs(self) -> dict[str, float]:
        """Behaviour to 1 if the edit adds it, -1 if it removes it."""
        if self.by is not None:
            return {self.behavior: -1.0, self.by: 1.0}
        return {self.behavior: 1.0 if self.operation == "add" else -1.0}

    @property
    def label(self) -> str:
        """The behaviour, or ``old -> new`` for a replacement."""
        return self.behavior if self.by is None else f"{self.behavior} -> {self.by}"

    def __str__(self) -> str:
        return f"{self.operation} {self.behavior}" + ("" if self.by is None else f" by {self.by}")


EditLike = Edit | tuple[str, ...]
"""An :class:`Edit`, ``("add", behavior)``, ``("remove", behavior)`` or ``("replace", behavior, by)``."""


class Steering(NamedTuple):
    """Edits, and how they are applied to networks."""

    edits: tuple[Edit, ...]
    mode: Mode
    strength: Strength
    direction: Direction

    @classmethod
    def of(
        cls, edits: Sequence[EditLike], mode: str = "residual", strength: float | str = 1.0, direction: str = "learned"
    ) -> Steering:
        """Check edits and options, except whether a model has the behaviours.

        Raises :class:`InvalidInput` naming the wrong field of a request.
        """
        for field, value, allowed in (("mode", mode, MODES), ("direction", direction, DIRECTIONS)):
            if value not in allowed:
                raise InvalidInput.field(field, f"must be one of {', '.join(allowed)}")
        if strength != "auto" and (
            isinstance(strength, str) or not math.isfinite(strength) or abs(strength) > MAX_STRENGTH
        ):
            raise InvalidInput.field("strength", f"must be auto or a number from {-MAX_STRENGTH:g} to {MAX_STRENGTH:g}")
        if not edits:
            raise InvalidInput.field("edits", "empty; give at least one")
        checked = []
        for i, edit in enumerate(edits):
            if len(edit) not in (2, 3):
                raise InvalidInput.field(f"edits.{i}", "must be (operation, behavior) or (replace, behavior, by)")
            operation, behavior, by = (*edit, None)[:3]
            if operation not in OPERATIONS:
                raise InvalidInput.field(f"edits.{i}.operation", f"must be {' or '.join(OPERATIONS)}")
            if (by is not None) != (operation == "replace"):
                raise InvalidInput.field(f"edits.{i}.by", "required for replace, and not allowed for other operations")
            checked.append(Edit(operation, str(behavior), by))
        return cls(
            tuple(checked),
            cast(Mode, mode),
            "auto" if strength == "auto" else float(strength),
            cast(Direction, direction),
        )


def comparable_lookups(evaluation: Mapping[str, Any]) -> dict[tuple[str, str, str], float]:
    """Share of the edits that pass by each lookup, by operation, pattern and lookup; of those lookups that have a
    network for enough of the edits (:data:`MIN_AVAILABLE`)."""
    edits = {(row["operation"], row["pattern"]): row["edits"] for row in evaluation["steering"]}
    return {
        (row["operation"], row["pattern"], row["variant"]): row["all_gate"]
        for row in evaluation["others"]
        if row["variant"] in LOOKUPS and row["edits"] >= MIN_AVAILABLE * edits[row["operation"], row["pattern"]]
    }
