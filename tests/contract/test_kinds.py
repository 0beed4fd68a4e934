"""What the table of kinds declares is so."""

from __future__ import annotations

import inspect
import tomllib
import typing
from pathlib import Path
from typing import Any

import pytest

from ethogram.specs.base import ArtifactRef, Spec
from ethogram.specs.kinds import KINDS, Kind
from scripts.contracts import PLACEHOLDER, SYSTEMS, expand
from scripts.protos import from_kinds
from services.kinds import request_type

ROOT = Path(__file__).parents[2]
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))


def artifact_paths(spec: type[Spec], prefix: str = "") -> set[str]:
    """Paths of all fields that name an artifact."""
    paths = set()
    for name, info in spec.model_fields.items():
        for part in (info.annotation, *typing.get_args(info.annotation)):
            if part is ArtifactRef:
                paths.add(prefix + name)
            elif isinstance(part, type) and issubclass(part, Spec):
                paths |= artifact_paths(part, f"{prefix}{name}.")
    return paths


@every_kind
def test_job_rpc_and_spec_exist(kind: Kind) -> None:
    parameters = list(inspect.signature(kind.load_job()).parameters)
    assert parameters[:2] == ["spec", "run"] and parameters[2:] in ([], ["world"])
    request: Any = request_type(kind)
    assert list(request.DESCRIPTOR.fields_by_name) == ["context", "spec"]
    assert request.DESCRIPTOR.fields_by_name["spec"].message_type.name == kind.spec.__name__
    kind.spec.model_validate(kind.example)


@every_kind
def test_inputs_are_the_artifacts_that_the_spec_may_name(kind: Kind) -> None:
    # An autoencoder has no other model's dictionary, which its spec refuses.
    refused = {"model.dictionary"} if kind.name == "sae" else set()
    assert set(kind.inputs) == artifact_paths(kind.spec) - refused


def test_systems_are_in_the_import_contracts() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    named = [contract["name"] for contract in contracts if PLACEHOLDER in str(contract)]
    assert {"No system imports another system", "The runtime imports no system"} < set(named)
    assert all(contract["type"].startswith("systems_") for contract in contracts if contract["name"] in named)
    assert set(SYSTEMS) == {f"services.{kind.system}" for kind in KINDS.values()}
    assert expand({"name": "x", "modules": ["a", PLACEHOLDER]}) == {"name": "x", "modules": ["a", *SYSTEMS]}


def test_the_table_in_the_documents_is_fresh() -> None:
    for path, text in from_kinds().items():
        assert path.read_text() == text
