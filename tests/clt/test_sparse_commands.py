"""The commands of sparse models, as typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ethogram.cli.output import execute
from ethogram.specs.base import ArtifactRef
from ethogram.specs.clt import ActivationsSpec
from services.clt.__main__ import app
from services.clt.activations.collect import collect
from services.clt.sparse.model import SparseModel
from services.runtime.run import Run
from tests.clt.conftest import small_policy

PAIR = "encoder_layer_0_pre_mlp->encoder_layer_0_mlp"
SHORT = ["--set", "training.batch_size=64", "--steps", "10", "--device", "cpu"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run") / "activations"
    spec = ActivationsSpec(policy=ArtifactRef(artifact="x"), instances=100, validation=0.2, shard_rows=350)
    collect(spec, folder, Run(), small_policy())
    return str(folder.parent)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        execute(app, "clt", list(arguments))
    return int(left.value.code or 0)


def test_an_autoencoder_a_tied_pair_and_a_sweep(store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def answer() -> Any:
        return json.loads(capsys.readouterr().out)

    def recorded(folder: str) -> set[str]:
        return {name for line in Path(folder, "metrics.jsonl").read_text().splitlines() for name in json.loads(line)}

    sae = str(tmp_path / "sae")
    assert run("sae", store, "--hook", "encoder_layer_0_mlp", "--k-ratio", "0.1", *SHORT, "-o", sae, "--json") == 0
    # No feature can be dead after so few rows.
    assert {"fvu", "l0"} <= (figures := answer()["figures"]).keys() and "dead" not in figures
    assert "validation_fvu" in recorded(sae) and "dead" not in recorded(sae)
    counted, soon = str(tmp_path / "counted"), ("--set", "training.dead_after=20")
    assert run("sae", store, "--hook", "encoder_layer_0_mlp", *SHORT, *soon, "-o", counted, "--json") == 0
    assert 0 <= answer()["figures"]["dead"] <= 1 and "dead" in recorded(counted)
    assert SparseModel.load(tmp_path / "sae" / "model").k == [13]
    assert (tmp_path / "sae" / "report" / "report.html").exists() and (tmp_path / "sae" / "metrics.jsonl").exists()
    assert run("sae", store, "--hook", "encoder_layer_0_mlp", *SHORT, "-o", sae) == 2
    assert "holds a finished run" in capsys.readouterr().err

    tied = str(tmp_path / "tied")
    assert run("train", store, "--pair", PAIR, "--dictionary", sae, "--k", "4", *SHORT, "-o", tied) == 0
    assert "fvu" in capsys.readouterr().out
    assert SparseModel.load(tmp_path / "tied" / "model").features == [128]

    every = ["sweep", store, "--kind", "cross_layer", "--grid", "model.k=2,4", "--lr", "1e-2", *SHORT]
    assert run(*every, "-o", str(tmp_path / "sweep"), "--json") == 0
    assert list(answer()["runs"]) == ["clt_cross_layer-k_2", "clt_cross_layer-k_4"]
    assert SparseModel.load(tmp_path / "sweep" / "models" / "clt_cross_layer-k_4" / "model").k == [4, 4]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--pair", "a-b"], "--pair: a-b is not of the form SOURCE->TARGET"),
        (["train", "--pair", "mlp"], "--pair: mlp is a set of pairs, and this trains one"),
        (["train", "--layer_pairs", "a-b"], "--pair: a-b is not of the form SOURCE->TARGET"),
        (["train", "--pair", "encoder_layer_0_mpl->encoder_layer_0_mlp"], "spec.sources.0: the store has no"),
        (["train", "--kind", "all"], "kind"),
        (["sae", "--hook", "encoder_layer_0_mlp", "--k", "129"], "spec.model.k: 129 is more than the 128"),
        (["sae", "--hook", "encoder_layer_0_mlp", "--k", "4", "--k-ratio", "0.1"], "k_ratio: means the same as k"),
        (["train", "--pair", PAIR, "--kind", "per_layer"], "--pair: is for --kind pair"),
        (["train"], "name them, or use kind per_layer or cross_layer"),
        (["sweep", "--grid", "model.k"], "--grid: model.k is not of the form"),
        (["sweep", "--grid", "model.kk=1"], "spec.grid.0.option: there is no option model.kk"),
        (["sweep", "--grid", "model.k=x"], "spec.grid"),
    ],
)
def test_what_is_wrong_is_said_and_leaves_nothing(
    store: str, arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *more = arguments
    assert run(command, store, *more, *SHORT, "-o", str(tmp_path / "out")) == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_policy_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("activations", str(tmp_path / "nothing"), "-o", str(tmp_path / "out")) == 2
    assert "POLICY: there is no folder" in " ".join(capsys.readouterr().err.split())
