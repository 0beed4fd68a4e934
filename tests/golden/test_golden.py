"""Results stay what they were, to the bit, and what an earlier version wrote still loads with the same results."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from ethogram.specs.kinds import KINDS
from tests.golden import record

SPECS = json.loads((record.GOLDEN.parent / "artifacts" / "specs.json").read_text())


def leaves(value: Any) -> Iterator[str]:
    """The scalars of a JSON value, wherever they are in it."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from leaves(part)
    else:
        yield json.dumps(value)


@pytest.mark.timeout(600)
def test_results_are_those_recorded() -> None:
    found = record.computed()
    assert record.unequal(found) == []
    # Nothing is compared in vain.
    golden = json.loads(record.GOLDEN.read_text())
    case, name = "policy pomo", "policy/policy.safetensors"
    golden["cases"][case]["digests"][name] = "0" * 24
    golden["cases"][case]["numbers"][f"{name} norm"] *= 1.001
    assert len(record.unequal(found, golden)) == 1 + (golden["fingerprint"] == record.fingerprint())


@pytest.mark.parametrize("case", SPECS, ids=lambda case: str(case["kind"]))
def test_specs_of_an_earlier_version_load(case: dict[str, Any]) -> None:
    written = json.dumps(case["spec"])
    spec = KINDS[case["kind"]].spec.model_validate_json(written)
    again = spec.model_dump(mode="json")
    assert not Counter(leaves(case["spec"])) - Counter(leaves(again)), "a value is lost"
    assert KINDS[case["kind"]].spec.model_validate(again) == spec
