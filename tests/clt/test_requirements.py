"""Every option that docs/requirements.md names in the documents' spelling is taken by a command, and has effect."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ethogram.cli.output import execute
from ethogram.specs.base import ArtifactRef
from ethogram.specs.clt import ActivationsSpec
from services.clt.__main__ import app
from services.clt.activations.collect import collect
from services.runtime.run import Run
from tests.clt.conftest import small_policy

PAGE = Path(__file__).parents[2] / "docs" / "requirements.md"
SOURCE, TARGET = "encoder_layer_0_pre_mlp", "encoder_layer_0_mlp"
PAIR = f"{SOURCE}->{TARGET}"
RECORD = ["activations", "{policy}"]
TRAIN = ["train", "{store}", "--pair", PAIR]
# A command without the option, the option's value, and what it makes of the spec.
TRIED: dict[str, tuple[list[str], str, dict[str, Any]]] = {
    "--layer_pairs": (
        RECORD,
        f"{PAIR},encoder_layer_0->encoder_layer_1",
        {"pairs.1": "encoder_layer_0->encoder_layer_1"},
    ),
    "--num_instances_per_pair": (RECORD, "40", {"instances": 40}),
    "--run_dir": (["train", "--pair", PAIR], "{store}", {"activations.artifact": "activations"}),
    "--pair": (["train", "{store}"], PAIR, {"sources.0": SOURCE, "targets.0": TARGET}),
    "--expansion_factor": (TRAIN, "4", {"model.expansion": 4.0}),
    "--k_ratio": (TRAIN, "0.25", {"model.k_ratio": 0.25}),
    "--lr": (TRAIN, "0.01", {"training.learning_rate": 0.01}),
    "--num_epochs": (TRAIN, "0.5", {"training.epochs": 0.5}),
    "--save_freq": (TRAIN, "0.25", {"training.snapshot_epochs": 0.25}),
    "--wandb_project": (TRAIN, "mine", {"wandb.project": "mine"}),
    "--wandb_run_name": ([*TRAIN, "--wandb-project", "mine"], "first", {"wandb.name": "first"}),
    "--wandb_mode": ([*TRAIN, "--wandb-project", "mine"], "disabled", {"wandb.mode": "disabled"}),
}


def named(section: str = "Cross-layer transcoders") -> list[str]:
    """Options in the first column of the rows that are done, in a section of the page."""
    lines = PAGE.read_text().partition(f"## {section}\n")[2].partition("\n## ")[0].splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    return [name for row in rows if row[-1].strip() == "done" for name in re.findall(r"`(--[a-z0-9_]+)`", row[0])]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    run, policy = tmp_path_factory.mktemp("run"), small_policy()
    policy.save(run / "policy")
    spec = ActivationsSpec(policy=ArtifactRef(artifact="x"), instances=100, validation=0.2, shard_rows=350)
    collect(spec, run / "activations", Run(), policy)
    return {"policy": str(run / "policy"), "store": str(run)}


def value_at(spec: Any, path: str) -> Any:
    for part in path.split("."):
        spec = spec[int(part)] if isinstance(spec, list) else spec[part]
    return spec


def test_every_option_is_tried() -> None:
    assert sorted(named()) == sorted(TRIED)


@pytest.mark.parametrize("dashes", [False, True])
@pytest.mark.parametrize("option", TRIED)
def test_each_spelling_works(option: str, dashes: bool, places: Mapping[str, str], tmp_path: Path) -> None:
    command, value, wanted = TRIED[option]
    spelled = f"--{option[2:].replace('_', '-')}" if dashes else option
    out, short = tmp_path / "out", ["--device", "cpu"]
    if command[0] == "train":
        short += ["--set", "training.batch_size=64"]
        short += [] if option == "--num_epochs" else ["--steps", "4"]
    elif option != "--num_instances_per_pair":
        short += ["--instances", "40"]
    arguments = [part.format(**places) for part in [*command, spelled, value]]
    with pytest.raises(SystemExit) as left:
        execute(app, "clt", [*arguments, *short, "-o", str(out)])
    assert not left.value.code
    spec = json.loads((out / "spec.json").read_text())
    assert {path: value_at(spec, path) for path in wanted} == wanted
    if option == "--save_freq":
        # 560 training rows: a quarter of them are two batches.
        assert sorted(path.name for path in out.glob("snapshot-*")) == ["snapshot-2", "snapshot-4"]


def test_a_folder_is_named_once(places: Mapping[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["train"], ["sae"], ["sweep"], ["inspect-pairs"], ["export-pairs"]):
        out = [] if command == ["inspect-pairs"] else ["-o", str(tmp_path / "out")]
        for given, says in (
            ([], "STORE: is missing; name a folder"),
            ([places["store"], "--run_dir", places["store"]], "--run-dir: means the same as STORE; give one of them"),
        ):
            with pytest.raises(SystemExit) as left:
                execute(app, "clt", [*command, *given, *out])
            assert left.value.code == 2 and says in " ".join(capsys.readouterr().err.split())
