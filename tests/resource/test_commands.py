"""The commands of the resource system, as they are typed."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ethogram.specs.resource import ResourceSpec
from services.language.models import load_language_model
from services.resource import job, language_model, predict
from services.resource.codec import ResourceCodec
from services.resource.language_model import default_folder
from services.runtime import local, trained
from services.runtime.console import ConsoleRun
from tests.conftest import Once
from tests.resource.conftest import (
    SCHEMA,
    rows,
    small_table,
    small_trainer,
    tiny_reader_spec,
    tiny_spec,
    write_language_model,
    write_registry,
    write_rows,
)
from tests.resource.made import call, make_run

CONFIGURATION = ("--tool", "detect", "--set", "size=small", "--set", "cores=4")


@pytest.fixture(scope="session")
def run(once: Once, tables: Path, language_folder: Path) -> Path:
    return once("resource-run", lambda folder: make_run(folder, tables, language_folder))


@pytest.fixture(scope="session")
def decoder(once: Once, run: Path) -> Path:
    """A run of a decoder of the export in ``run``."""
    short = ("--set", "training.steps=4", "--set", "training.batch_size=8", "--set", "evaluation=16")
    small = ("--set", "model.hidden_dim=8", "--set", "model.heads=2", "--device", "cpu")

    def make(folder: Path) -> None:
        assert call("decoder", "train", run, *short, *small, "-o", folder) == 0

    return once("resource-decoder-run", make)


def answer(capsys: pytest.CaptureFixture[str], *arguments: str | Path, code: int = 0, says: str = "") -> Any:
    """What a command prints with --json, and that it ``says`` something beside it."""
    capsys.readouterr()
    assert call(*arguments, "--json") == code
    printed = capsys.readouterr()
    assert says in printed.err
    return json.loads(printed.out)


def error(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The error of a command that is typed wrong."""
    capsys.readouterr()
    assert call(*arguments) == 2
    return " ".join(capsys.readouterr().err.split())


def test_a_run_has_what_the_document_names(run: Path, language_folder: Path) -> None:
    assert {"encoder", "export", "report", "snapshot-4", "snapshot-8", "spec.json"} <= {
        path.name for path in run.iterdir()
    }
    assert (run / "snapshot-8" / "encoder_checkpoint_epoch2.pt").is_file()
    spec = ResourceSpec.model_validate_json((run / "spec.json").read_text())
    assert spec.llm_model == str(language_folder) and spec.training.snapshot_epochs == 1
    codec = ResourceCodec.load(run / "encoder")
    assert codec.about["language_model"] == str(language_folder) and codec.about["epoch"] == 2


def test_the_flags_of_the_document_set_values_of_the_spec(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[ResourceSpec] = []
    monkeypatch.setattr(local, "run", lambda kind, spec, *rest: seen.append(spec))
    spec = tmp_path / "spec.yaml"
    spec.write_text("training: {target_loss: .5}\nwandb: {project: mine}\n")
    flags = (
        *("--tool_registry", tables / "tools.json", "--profiling_data", tables / "profiling.csv"),
        *("--llm_model", "Qwen/Qwen2.5-7B", "--num_augmented_copies", "3", "--augmentation_mode", "jitter"),
        *("--checkpoint_freq", "10", "--target_loss", "0.05", "--batch_size", "16", "--num_epochs", "50"),
        *("--lr", "2e-4", "--fp16", "--log_wandb", "--device", "cpu"),
    )
    assert call("train", "--config", spec, *flags, "--output_dir", tmp_path / "run") == 0
    (found,) = seen
    training = found.training
    assert (found.augmentation.copies, found.augmentation.mode) == (3, "jitter")
    assert (training.snapshot_epochs, training.epochs, training.batch_size) == (10, 50, 16)
    assert (training.target_loss, training.learning_rate, training.precision) == (0.05, 2e-4, "bfloat16")
    assert found.llm_model == "Qwen/Qwen2.5-7B" and found.wandb is not None and found.wandb.project == "mine"
    assert found.tools is not None and found.profiling is not None
    # With dashes, by --set, which wins, and without a file.
    assert call("train", "--num-epochs", "5", "--set", "training.epochs=6", "--log-wandb", "-o", tmp_path / "run") == 0
    assert seen[1].training.epochs == 6 and seen[1].wandb is not None and seen[1].wandb.project == "resource-encoder"
    assert call("train", "-o", tmp_path / "run") == 0
    assert seen[2] == ResourceSpec()


def test_the_help_of_train_has_defaults_and_says_where_schemas_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert call("train", "--help") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "examples/resource-table.yaml" in said and "docs/resource.md" in said
    training = ResourceSpec().training
    for default in (training.batch_size, training.learning_rate, training.target_loss):
        assert f"[default: {default}]" in said


def test_an_interrupted_run_resumes(
    run: Path, tables: Path, language_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "CHECKPOINT_SECONDS", 0.0)
    advance, trained = ConsoleRun.advance, list[int]()

    def interrupted(run: ConsoleRun, done: int) -> None:
        trained.append(done)
        if len(trained) == 7:
            raise KeyboardInterrupt
        advance(run, done)

    def watched(run: ConsoleRun, done: int) -> None:
        trained.append(done)
        advance(run, done)

    monkeypatch.setattr(ConsoleRun, "advance", interrupted)
    with pytest.raises(AssertionError):
        make_run(tmp_path / "run", tables, language_folder)
    assert trained[-1] == 6 and not (tmp_path / "run" / "result.json").exists()
    monkeypatch.setattr(ConsoleRun, "advance", watched)
    trained.clear()
    make_run(tmp_path / "run", tables, language_folder)
    assert trained[:4] == [5, 6, 7, 8]
    one, other = (ResourceCodec.load(folder / "encoder") for folder in (run, tmp_path / "run"))
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[name]), name
    results = [json.loads((folder / "result.json").read_text()) for folder in (run, tmp_path / "run")]
    assert results[0]["figures"] == results[1]["figures"]


def test_export_and_validate(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = answer(capsys, "export", run, "-o", tmp_path / "export")
    assert made["weights"] == [16, 16] and made["tools"] == {"detect": 8, "translate": 8}
    assert {"encoder_checkpoint_epoch1.pt", "encoder_checkpoint_epoch2.pt", "pretrained_encoder.pt"} <= made[
        "files"
    ].keys()
    assert answer(capsys, "validate", tmp_path / "export") == made
    assert call("validate", tmp_path / "export") == 0
    shown = capsys.readouterr()
    assert "16 x 16" in shown.out and "detect" in shown.out and made["files"]["config_weights.pt"] in shown.out
    assert answer(capsys, "validate", run)["num_configs"] == 16
    # From a snapshot, which has other weights, with the document's options.
    snapshot = ("--encoder_checkpoint", tmp_path / "export" / "encoder_checkpoint_epoch1.pt")
    more = ("--device", "cpu", "--batch_size", "3", "--output_dir", tmp_path / "early")
    assert call("export", *snapshot, *more) == 0
    early, late = (torch.load(tmp_path / name / "config_weights.pt")["weights"] for name in ("early", "export"))
    assert early.shape == late.shape and not torch.equal(early, late)
    assert "--output" in error(capsys, "export", run, "-o", tmp_path / "early")
    assert "name one encoder" in error(capsys, "export", "-o", tmp_path / "other")
    assert "name one encoder" in error(capsys, "export", run, *snapshot, "-o", tmp_path / "other")
    (tmp_path / "early" / "config_lookup.json").write_text("{}")
    assert "config_lookup.json: was changed since the export" in error(capsys, "validate", tmp_path / "early")


def test_what_does_not_belong_to_an_encoder_is_not_exported(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_language_model(tmp_path / "other", hidden=24)
    registry = write_registry(tmp_path / "tools.json", ("translate", "detect"))
    column = write_rows(tmp_path / "column.csv", [{**row, "gpu": 1} for row in rows()])
    wide = write_rows(tmp_path / "wide.csv", [{**row, "latency_ms": 5000} for row in rows()])
    for options, says in (
        (("--llm_model", other), "--llm-model: "),
        (("--llm_model", other), "has the hidden size 24, and the encoder was trained with 16"),
        (("--llm_model", run), "--llm-model: "),
        (("--tool_registry", registry), "--tool-registry: the encoder was trained with detect, translate"),
        (("--profiling_data", column), "column.csv.gpu: is no column of this table"),
        (("--profiling_data", wide), "wide.csv:2.latency_ms: 5000 is outside the declared range, from 1 to 999"),
        (("--profiling_data", tmp_path / "none.csv"), "does not exist"),
    ):
        assert says in error(capsys, "export", run, *options, "-o", tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_describe(run: Path, language_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    says = "no values can be read"
    said = answer(capsys, "describe", run, *CONFIGURATION, "--set", "latency_ms=unknown", says=says)
    assert said["template"] == "plain" and said["unknown"] == ["latency_ms"] and said["outside"] == []
    assert isinstance(said["text"], str) and said["values"] is None
    little = answer(capsys, "describe", run, "--tool", "detect")
    assert little["unknown"] == ["size", "cores", "latency_ms"] and little["text"] != said["text"]
    moved = shutil.copytree(language_folder, tmp_path / "moved")
    more = ("--template", "reordered", "--set", "latency_ms=5000", "--llm_model", moved, "--device", "cpu")
    says = "so less certain: latency_ms"
    said = answer(capsys, "describe", run / "encoder", *CONFIGURATION, *more, says=says)
    assert said["template"] == "reordered" and said["unknown"] == [] and said["outside"] == ["latency_ms"]
    # What is measured may have more decimals than descriptions, as in tables.
    assert call("describe", run, *CONFIGURATION, "--set", "latency_ms=120.5") == 0
    assert "latency_ms: descriptions round 120.5 to 120 ms" in capsys.readouterr().err
    # A prediction has no description.
    typed = ("--set", "latency_ms=120.5", "--dimension", "cores")
    assert call("predict", run, *CONFIGURATION[:4], *typed) == 0 and "round" not in capsys.readouterr().err
    assert call("describe", run, *CONFIGURATION) == 0
    assert "no values can be read" in capsys.readouterr().err


def test_what_is_said_is_read_back(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.resource.describe import Describer

    monkeypatch.setattr(Describer, "write", lambda *_: ["detect small c 4 ms 121"])
    said = answer(capsys, "describe", run, *CONFIGURATION)
    assert said["values"] == {"tool": "detect", "size": "small", "cores": 4, "latency_ms": 121}
    assert call("describe", run, *CONFIGURATION) == 0
    assert "latency_ms  121 ms" in capsys.readouterr().out


def test_the_default_language_model_is_made_once_and_kept_with_the_run(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ETHOGRAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(language_model, "_CORPUS", 10)
    monkeypatch.setattr(job, "default_folder", partial(default_folder, spec=tiny_reader_spec()))
    (tmp_path / "spec.json").write_text(json.dumps(tiny_spec(held_out=0).model_dump(mode="json", exclude_unset=True)))
    typed = ("train", "-f", tmp_path / "spec.json", "--profiling_data", tables / "profiling.csv", "--device", "cpu")
    assert call(*typed, "-o", tmp_path / "run") == 0
    assert "language-models/train: 2 of 2 steps" in capsys.readouterr().err
    assert call(*typed, "-o", tmp_path / "again") == 0
    assert "language-models" not in capsys.readouterr().err

    said = answer(capsys, "describe", tmp_path / "run", *CONFIGURATION)
    shutil.rmtree(tmp_path / "cache")
    # As on another machine, where the run was copied to.
    for encoder in ("run", "run/encoder", "run/export/pretrained_encoder.pt"):
        assert answer(capsys, "describe", tmp_path / encoder, *CONFIGURATION) == said
    kept = (tmp_path / "run" / "language_model").rename(tmp_path / "kept")
    says = "--llm-model: the default language model that the encoder was trained with is not on this machine"
    assert says in error(capsys, "describe", tmp_path / "run", *CONFIGURATION)
    assert not (tmp_path / "cache").exists()
    assert answer(capsys, "describe", tmp_path / "run", *CONFIGURATION, "--llm_model", kept) == said


def test_an_interrupted_default_language_model_is_kept_and_resumed(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ETHOGRAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(language_model, "_CORPUS", 10)
    monkeypatch.setattr(job, "default_folder", partial(default_folder, spec=tiny_reader_spec(training={"steps": 3})))
    monkeypatch.setattr(trained, "_CHECKPOINT_SECONDS", 0.0)
    advance, done = ConsoleRun.advance, list[int]()

    def interrupted(run: ConsoleRun, count: int) -> None:
        done.append(count)
        if len(done) == 4 and not resumes:
            raise KeyboardInterrupt
        advance(run, count)

    resumes = False
    monkeypatch.setattr(ConsoleRun, "advance", interrupted)
    (tmp_path / "spec.json").write_text(json.dumps(tiny_spec(held_out=0).model_dump(mode="json", exclude_unset=True)))
    typed = ("train", "-f", tmp_path / "spec.json", "--profiling_data", tables / "profiling.csv", "--device", "cpu")
    assert call(*typed, "-o", tmp_path / "run") == 130
    said = " ".join(capsys.readouterr().err.split())
    assert f"Run the same command again to resume from the last checkpoint, in {tmp_path / 'cache'}" in said
    assert "Nothing is kept" not in said and not (tmp_path / "run").exists()
    # The steps before the last checkpoint are not taken again.
    first, resumes = done[-1], True
    done.clear()
    assert call(*typed, "-o", tmp_path / "run") == 0
    assert done[0] == first - 1 > 0


def test_predict(run: Path, tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "predict", run, *CONFIGURATION, "--level", "0.8")
    assert found["dimension"] == "latency_ms" and found["level"] == 0.8 and found["measurements"] == 16
    assert found["low"] <= found["value"] <= found["high"] and found["unit"] == "ms"
    # In the table it is 114.
    assert 80 < found["value"] < 160
    same = answer(capsys, "predict", run, *CONFIGURATION, "--level", ".8", "--profiling-data", tables / "profiling.csv")
    assert same == found
    cores = answer(capsys, "predict", run, "--tool", "detect", "--set", "size=small", "--dimension", "cores", "--raw")
    assert cores["dimension"] == "cores"
    # As the column of the table is called.
    column = ("--tool", "detect", "--set", "size=small", "--set", "cpu=4", "--set", "latency_ms=unknown")
    assert call("predict", run, *column) == 0
    shown = capsys.readouterr()
    assert re.search(r"interval at 0\.9 +[\d.]+ ms to [\d.]+ ms", shown.out) and "outside" not in shown.err


def test_large_numbers_are_written_in_full_and_predictions_beyond_the_range_are_marked(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codec = ResourceCodec.load(run / "encoder")
    assert codec.table is not None
    codec.table.values[:, 3] *= 10_000
    codec.save(tmp_path / "encoder")
    found = answer(capsys, "predict", tmp_path / "encoder", *CONFIGURATION, says="so less certain: latency_ms")
    assert found["value"] > 800_000 and found["outside"] == ["latency_ms"]
    for command in (("predict", "--set", "cores=4"), ("recommend", "--latency", "3000000")):
        assert call(*command[:1], tmp_path / "encoder", "--tool", "detect", "--set", "size=small", *command[1:]) == 0
        shown = capsys.readouterr()
        assert "outside the range of training, so less certain: latency_ms\n" in shown.err
        assert re.search(r"\d{6,7} ms", shown.out) and "e+" not in shown.out
    assert call("recommend", tmp_path / "encoder", "--tool", "detect", "--latency", "2000.25") == 1
    assert "no configuration stays below 2000.25 ms" in capsys.readouterr().err


def test_recommend(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("recommend", run, "--tool", "detect", "--set", "size=small")
    found = answer(capsys, *options, "--latency", "900", "--confidence", ".9")
    assert found["fits"] and found["configuration"] == {"tool": "detect", "size": "small", "cores": 1}
    assert found["price"] == 1 and found["predicted"] < found["upper"] < 900 and found["dimension"] == "latency_ms"
    assert not answer(capsys, *options, "--bound", "2", code=1)["fits"]
    assert call(*options, "--latency", "2") == 1
    shown = capsys.readouterr()
    assert "no configuration stays below 2 ms at 0.9; this one comes closest" in shown.err and "price" in shown.out
    assert re.search(r"below, at 0\.9 +[\d.]+ ms", shown.out) and re.search(r"chosen +cores\n", shown.out)
    assert found["chosen"] == ["cores"] and found["unit"] == "ms" and "has no price" not in shown.err
    # What describes the work is chosen, too, where it is not given.
    assert call("recommend", run, "--tool", "detect", "--latency", "900") == 0
    shown = capsys.readouterr()
    assert re.search(r"chosen +size, cores\n", shown.out)
    says = "size is not given, and has no price: this is the cheapest for size=small; give --set size=..."
    assert says in " ".join(shown.err.split())
    # Of a part of the table, which has one tool alone; any level may be recommended.
    part = write_rows(tmp_path / "part.csv", [row for row in rows() if row["tool"] == "detect" and row["cpu"] != 1])
    assert call(*options, "--latency", "900", "--profiling_data", part) == 2
    says = "--profiling-data: has 6 measured configurations; a prediction takes at least 10"
    assert says in " ".join(capsys.readouterr().err.split())
    part = write_rows(tmp_path / "part.csv", [row for row in rows() if row["cpu"] != 1])
    partly = answer(capsys, *options, "--latency", "900", "--profiling_data", part)
    assert partly["configuration"]["cores"] == 1 and partly["measurements"] == 12


def test_without_prices_the_fastest_is_recommended(
    tables: Path, language_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dimensions = [{name: value for name, value in d.items() if name != "price"} for d in SCHEMA["dimensions"]]
    table = small_table(tables, dimensions=dimensions)
    small_trainer(table, load_language_model(str(language_folder))).codec().save(tmp_path / "encoder")
    assert call("recommend", tmp_path / "encoder", "--tool", "detect", "--latency", "900") == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "size and cores are not given, and no field has a price: this is the one with the lowest latency_ms" in said
    assert said.endswith("for size=small, cores=1; give --set size=... --set cores=...")
    assert call("recommend", tmp_path / "encoder", "--tool", "detect", "--set", "size=large", "--latency", "900") == 0
    assert "cores is not given, and no field has a price" in " ".join(capsys.readouterr().err.split())


def test_what_is_not_used_and_what_training_did_not_have_is_said(
    tables: Path,
    language_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a latency whose range nobody declared, measurements may be beyond those of training."""
    dimensions = [*SCHEMA["dimensions"][:2], {"name": "latency_ms", "unit": "ms", "measured": True}]
    table = small_table(tables, dimensions=dimensions)
    small_trainer(table, load_language_model(str(language_folder))).codec().save(tmp_path / "encoder")
    more = write_rows(tmp_path / "more.csv", [row | {"latency_ms": row["latency_ms"] * 2} for row in rows()])
    # Twice 100 to 205; training had no more than 205.
    options = (tmp_path / "encoder", "--tool", "detect", "--profiling_data", more)
    assert call("recommend", *options, "--latency", "900") == 0
    assert "values in the table that are outside the range of training: 15 of latency_ms" in capsys.readouterr().err
    monkeypatch.setattr(predict, "MOST_ROWS", 12)
    for command in (("predict", *options), ("recommend", *options, "--latency", "900")):
        assert answer(capsys, *command)["measurements"] == 12
        assert call(*command) == 0
        assert "predicted from 12 of the 16 measurements, drawn at random" in capsys.readouterr().err
    assert call("export", options[0], "--profiling_data", more, "-o", tmp_path / "export") == 0
    assert "15 of latency_ms" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (("describe", "--tool", "swim"), "--tool: "),
        (("describe", "--tool", "unknown"), "--tool: the tool must be known"),
        (("describe", "--tool", "detect", "--set", "cores"), "--set: cores is not of the form FIELD=VALUE"),
        (("describe", "--tool", "detect", "--set", "cores=four"), "--set cores: 'four' is not a number"),
        (("describe", "--tool", "detect", "--set", "cores=nan"), "--set cores: "),
        (("describe", "--tool", "detect", "--set", "cores=-1"), "--set cores: "),
        (("describe", "--tool", "detect", "--set", "size=huge"), "--set size: "),
        (("describe", "--tool", "detect", "--set", "gpus=1"), "--set gpus: there is no such field; there are tool, s"),
        (("describe", "--tool", "detect", "--set", "core=1"), "did you mean cores?"),
        (("describe", "--tool", "detect", "--set", "cpu=1", "--set", "cores=1"), "--set cores: is given twice"),
        (("predict", "--tool", "detect", "--set", "cores=4.4"), "--set cores: 4.4 has more decimals than its descr"),
        (("describe", "--tool", "detect", "--set", "tool=detect"), "--set tool: use --tool"),
        (("describe", "--tool", "detect", "--set", "cores=1", "--set", "cores=2"), "--set cores: is given twice"),
        (("describe", "--tool", "detect", "--template", "x"), "--template: there is no 'x'; there are plain, reord"),
        (("describe", "--tool", "detect", "--llm_model", "no/such/model"), "--llm-model: "),
        (("predict", "--tool", "detect", "--level", "1"), "--level: must be between 0 and 1, not 1"),
        (("predict", "--tool", "detect", "--dimension", "speed"), "--dimension: there is no 'speed'"),
        (("predict", "--tool", "detect", "--dimension", "size"), "--dimension: size is a category"),
        (("predict", "--tool", "detect", "--set", "latency_ms=3"), "--set latency_ms: is what is predicted"),
        (("describe", "--tool", "detect", "--set", "cpu=-1"), "--set cpu: must be a number from 0"),
        (("recommend", "--tool", "detect", "--bound", "0"), "--latency/--bound: must be a number above 0"),
        (("recommend", "--tool", "detect", "--latency", "9", "--confidence", "2"), "--confidence: must be between"),
        (
            ("recommend", "--tool", "detect", "--latency", "9", "--set", "cores=3"),
            "--set cores: no configuration has 3",
        ),
        (("recommend", "--tool", "detect", "--latency", "9", "--dimension", "cores"), "--dimension: cores is not"),
        (("recommend", "--tool", "swim", "--latency", "9"), "--tool: "),
        (("recommend", "--tool", "detect"), "--latency"),
    ],
)
def test_what_is_wrong_is_named_by_its_option(
    run: Path, typed: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *options = typed
    assert says in error(capsys, command, run, *options)


def test_folders_of_other_things(
    run: Path, decoder: Path, tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "encoder.json: is missing" in error(capsys, "describe", tables, "--tool", "detect")
    assert "ENCODER: " in error(capsys, "describe", decoder, "--tool", "detect")
    assert "ENCODER: " in error(capsys, "describe", tables / "tools.json", "--tool", "detect")
    assert "EXPORT: " in error(capsys, "validate", decoder)
    assert "export.json: is missing" in error(capsys, "validate", tables)
    assert "DECODER: " in error(capsys, "decode", run, "a text")
    assert "EXPORT" in error(capsys, "decoder", "train", tmp_path / "none", "-o", tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--tool_registry", "tools.json"), "spec.profiling: must be given: a registry (tools) of your own needs"),
        (("--set", "encoder.heads=5"), "spec.encoder.heads: the language model's hidden size, 16, does not divide"),
        (("--augmentation_mode", "some"), "spec.augmentation.mode: "),
        (("--batch_size", "0"), "spec.training.batch_size: "),
        (("--set", "epochs=3"), "spec.epochs: there is no such field"),
    ],
)
def test_a_wrong_training_leaves_nothing(
    tables: Path, language_folder: Path, tmp_path: Path, *, options: Any, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / "spec.json"
    values = tiny_spec().model_dump(mode="json", exclude_unset=True)
    files: tuple[str | Path, ...] = ("--profiling_data", tables / "profiling.csv")
    if "--tool_registry" in options:
        options, files = ("--tool_registry", tables / "tools.json"), ()
        del values["table"]
    spec.write_text(json.dumps(values))
    typed = ("train", "-f", spec, "--llm_model", language_folder, "--device", "cpu", *files, *options)
    assert says in error(capsys, *typed, "-o", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_language_model_or_table_does_not_resume(
    tables: Path,
    language_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(local, "CHECKPOINT_SECONDS", 0.0)
    advance, done = ConsoleRun.advance, list[int]()

    def interrupted(run: ConsoleRun, count: int) -> None:
        done.append(count)
        if len(done) == 5:
            raise KeyboardInterrupt
        advance(run, count)

    monkeypatch.setattr(ConsoleRun, "advance", interrupted)
    mine = shutil.copytree(language_folder, tmp_path / "mine")
    changed = shutil.copytree(tables, tmp_path / "tables")
    with pytest.raises(AssertionError):
        make_run(tmp_path / "run", changed, mine)
    monkeypatch.setattr(ConsoleRun, "advance", advance)
    shutil.rmtree(mine)
    # Weights of the same sizes, and a tokenizer with the same words.
    write_language_model(mine)
    from safetensors.torch import load_file, save_file

    weights = load_file(mine / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, mine / "model.safetensors", {"format": "pt"})
    with pytest.raises(AssertionError):
        make_run(tmp_path / "run", changed, mine)
    assert "checkpoint: was written with another language model" in capsys.readouterr().err
    write_rows(changed / "profiling.csv", [{**row, "latency_ms": row["latency_ms"] + 1} for row in rows()])
    shutil.rmtree(mine)
    shutil.copytree(language_folder, mine)
    with pytest.raises(AssertionError):
        make_run(tmp_path / "run", changed, mine)
    assert "checkpoint: was written with another table" in capsys.readouterr().err
    shutil.copy(tables / "profiling.csv", changed)
    make_run(tmp_path / "run", changed, mine)


def test_a_decoder_is_trained_and_used(decoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = answer(capsys, "decode", decoder, "Set up detect with 4 cores, for small size.")
    configuration = chosen["configuration"]
    assert configuration["tool_name"] in ("detect", "translate") and configuration["size"] in ("small", "large")
    assert 0 <= chosen["config_id"] < 16
    assert 0.5 <= chosen["probability"]["tool"] <= 1 and 1 / 8 <= chosen["probability"]["configuration"] <= 1
    assert call("decode", decoder, "Set up detect with 4 cores, for small size.") == 0
    shown = f"probability of the configuration  {chosen['probability']['configuration']:.3f}"
    assert shown in capsys.readouterr().out
    assert answer(capsys, "decode", decoder / "decoder", "Set up detect with 4 cores, for small size.") == chosen
    for text in ("", " \n"):
        assert "TEXT: " in error(capsys, "decode", decoder, text)
    assert "TEXT: " in error(capsys, "decode", decoder, "word " * 600)


def test_a_language_model_is_trained_and_used(tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ("model.hidden_dim=16", "model.layers=2", "model.heads=2", "model.feed_forward=16", "model.vocabulary=512")
    short = ("training.copying=1", "training.steps=2", "training.schemas=2", "training.batch_size=4")
    chosen = [part for value in (*size, *short) for part in ("--set", value)]
    made = answer(capsys, "language-model", "train", *chosen, "--device", "cpu", "-o", tmp_path / "lm")
    assert "validation_loss" in made["figures"]
    assert (tmp_path / "lm" / "model" / "config.json").is_file()
    # The folder of the run stands for the model in it.
    (tmp_path / "spec.json").write_text(json.dumps(tiny_spec().model_dump(mode="json", exclude_unset=True)))
    more = ("--profiling_data", tables / "profiling.csv", "--llm_model", tmp_path / "lm", "--device", "cpu")
    assert call("train", "-f", tmp_path / "spec.json", *more, "--set", "held_out=0", "-o", tmp_path / "run") == 0
    said = answer(capsys, "describe", tmp_path / "run", *CONFIGURATION, "--llm_model", tmp_path / "lm")
    assert said["template"] == "plain"
