"""Pairs: their names, what they are like, and their form as files; and the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ethogram.cli.output import execute
from ethogram.errors import InvalidInput
from services.clt.__main__ import app
from services.clt.activations.collect import ROOT, collect
from services.clt.activations.loader import everything
from services.clt.activations.pairs import export, inspect, pair_name, pairs_of
from services.clt.activations.sources import CHUNK
from services.clt.activations.store import TRAIN, VALIDATION, ActivationStore
from services.clt.policy.tsp import instances
from services.runtime.run import Run
from services.runtime.seeds import generator
from tests.clt.test_activations_hooks import small_policy
from tests.clt.test_activations_store import small_spec

PAIR = "encoder_layer_0->encoder_layer_1"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    pairs = [PAIR, "encoder_layer_1_pre_mlp->decoder_input", "encoder_layer_1->encoder_output"]
    spec = small_spec(hooks=[], pairs=pairs, dtype="float32")
    return collect(spec, tmp_path_factory.mktemp("store"), Run(), small_policy())


def test_names_of_pairs() -> None:
    assert pair_name("encoder_layer_0", "encoder_layer_2") == "clt_L0_to_L2"
    assert (
        pair_name("encoder_layer_0_pre_mlp", "encoder_layer_0_mlp")
        == "clt_encoder_layer_0_pre_mlp_to_encoder_layer_0_mlp"
    )
    assert pair_name("model.layers.0.mlp:input", "a/b") == "clt_model.layers.0.mlp-input_to_a-b"


def test_pairs_are_those_of_the_store_or_those_that_are_named(store: ActivationStore) -> None:
    assert pair_name(*pairs_of(store)[0]) == "clt_L0_to_L1"
    assert pairs_of(store, ["encoder_layer_0 -> encoder_output"]) == [("encoder_layer_0", "encoder_output")]
    with pytest.raises(InvalidInput, match=r"--pair: the source encoder_output comes after"):
        pairs_of(store, ["encoder_output->encoder_layer_0"])
    with pytest.raises(InvalidInput, match="--pair: there is no hook point encoder_layer_9"):
        pairs_of(store, ["encoder_layer_0->encoder_layer_9"])


def test_inspection_tells_what_pairs_are_like(store: ActivationStore) -> None:
    first, second, same = inspect(store, pairs_of(store))
    json.dumps([first, second, same], allow_nan=False)
    assert second["target"]["width"] == 48 and second["rows"][VALIDATION] == 17 * 6
    train, held = (
        [rows.double().numpy() for rows in everything(store, PAIR.split("->"), split)] for split in (TRAIN, VALIDATION)
    )
    ones = [np.c_[part[0], np.ones(len(part[0]))] for part in (train, held)]
    rest = held[1] - ones[1] @ np.linalg.lstsq(ones[0], train[1])[0]
    explained = 1 - (rest**2).sum() / ((held[1] - held[1].mean(0)) ** 2).sum()
    assert first["linear_r2"] == pytest.approx(explained, abs=1e-3)
    assert first["linear_r2"] < same["linear_r2"] == pytest.approx(1, abs=1e-4)
    assert same["top_correlations"][0]["value"] == pytest.approx(1, abs=1e-4)
    assert same["source"]["norm_mean"] == same["target"]["norm_mean"] > 0
    assert first["source"]["zeros"] == 0 and first["mean_correlation"] < same["mean_correlation"] + 0.5


def test_export_has_the_rows_in_order_and_plain_tensors(store: ActivationStore, tmp_path: Path) -> None:
    export(store, pairs_of(store), tmp_path, 30)
    folder = tmp_path / "clt_L0_to_L1"
    assert {file.name for file in folder.iterdir()} == {"sources.pt", "targets.pt", "metadata.json"}
    source, target = (torch.load(folder / name, weights_only=True) for name in ("sources.pt", "targets.pt"))
    policy = small_policy()
    stream = policy.encoder.embed(instances(CHUNK, 6, generator(3, "instances", 0))[:30])
    for rows, layer in zip((source, target), policy.encoder.layers, strict=True):
        stream = layer(stream)
        torch.testing.assert_close(rows, stream.flatten(0, 1), rtol=1e-4, atol=1e-5)
    about = json.loads((folder / "metadata.json").read_text())
    assert about["source"]["name"] == "source_encoder_layer_0" and about["target"]["hook"] == "encoder_layer_1"
    assert about["samples"] == 180 and about["source"]["shape"] == [180, 16]
    assert about["policy"]["digest"] == policy.digest
    torch.testing.assert_close(torch.tensor(about["target"]["mean"]), target.mean(0))
    assert 0 < len(about["validation_instances"]) < 17
    assert ActivationStore.open(tmp_path).digest == store.digest
    with pytest.raises(InvalidInput, match="has 100 whole instances"):
        export(store, pairs_of(store), tmp_path / "more", 101)


def test_an_export_of_a_part_has_whole_instances_alone(store: ActivationStore, tmp_path: Path) -> None:
    splits = store.manifest.splits
    part = ActivationStore(
        store.folder, store.manifest.model_copy(update={"splits": {**splits, "train": splits["train"][:6]}})
    )
    about = export(part, pairs_of(part)[:1], tmp_path)[0]
    assert 17 + 20 <= about["instances"] < 100
    assert bool(torch.load(tmp_path / "clt_L0_to_L1" / "targets.pt", weights_only=True).isfinite().all())


def run_command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        execute(app, "clt", list(arguments))
    return int(left.value.code or 0)


def test_commands_record_inspect_and_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ROOT, raising=False)
    small_policy().save(tmp_path / "run" / "policy")
    out, common = str(tmp_path / "out"), ["activations", str(tmp_path / "run")]
    command = [*common, "-o", out, "--pair", PAIR, "--instances", "50", "--set", "shard_rows=60", "--json"]
    command += ["--device", "cpu"]

    def answer() -> Any:
        return json.loads(capsys.readouterr().out)

    assert run_command(*command) == 0
    first = answer()
    assert first["figures"]["instances"] == 50 and list(first["figures"]["hooks"]) == PAIR.split("->")
    assert run_command(*command) == 0
    assert answer() == first
    assert run_command(*common, "-o", out, "--layer-pairs", PAIR, "--num-instances-per-pair", "51") == 2
    assert "another spec" in capsys.readouterr().err
    assert run_command("inspect-pairs", out, "--json") == 0
    assert answer()[0]["pair"] == "clt_L0_to_L1"
    assert run_command("inspect-pairs", f"{out}/activations") == 0
    assert PAIR.split("->", maxsplit=1)[0] in capsys.readouterr().out
    assert run_command("export-pairs", out, "-o", str(tmp_path / "pairs"), "--num_instances_per_pair", "7") == 0
    assert len(torch.load(tmp_path / "pairs" / "clt_L0_to_L1" / "sources.pt", weights_only=True)) == 42
    assert run_command(*common, "-o", str(tmp_path / "other"), "--pair", "encoder_layer_1->encoder_layer_0") == 2
    assert "spec.pairs.0" in capsys.readouterr().err
