"""Import contracts in which ``services.SYSTEM`` stands for every system of the table of kinds."""

from __future__ import annotations

from typing import Any

from importlinter.contracts.forbidden import ForbiddenContract
from importlinter.contracts.independence import IndependenceContract

from ethogram.specs.kinds import KINDS

PLACEHOLDER = "services.SYSTEM"
SYSTEMS = sorted({f"services.{kind.system}" for kind in KINDS.values()})


def expand(options: dict[str, Any]) -> dict[str, Any]:
    """``options`` of a contract, with the systems in place of the placeholder."""
    expanded = dict(options)
    for name, value in options.items():
        if isinstance(value, list) and PLACEHOLDER in value:
            expanded[name] = [module for module in value if module != PLACEHOLDER] + SYSTEMS
    return expanded


class SystemsIndependence(IndependenceContract):
    """``independence``, of the systems."""

    def __init__(self, name: str, session_options: dict[str, Any], contract_options: dict[str, Any]) -> None:
        super().__init__(name, session_options, expand(contract_options))


class SystemsForbidden(ForbiddenContract):
    """``forbidden``, from or to the systems."""

    def __init__(self, name: str, session_options: dict[str, Any], contract_options: dict[str, Any]) -> None:
        super().__init__(name, session_options, expand(contract_options))
