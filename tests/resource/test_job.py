"""The job: what it keeps, what it answers, and how it resumes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file
from torch.multiprocessing.spawn import start_processes

from ethogram.errors import InvalidInput
from ethogram.specs.resource import ResourceSpec
from services.resource import job
from services.resource.codec import ResourceCodec
from services.resource.data import Table
from services.resource.describe import Describer
from services.resource.evaluate import describe_figures
from services.resource.evaluate_prediction import prediction_figures
from services.resource.export import validate
from services.resource.job import run as run_job
from services.resource.texts import Template
from services.runtime.parallel import World
from services.runtime.run import Run
from tests.recorder import Interrupted, Recorder
from tests.resource.conftest import SCHEMA, rows, tiny_reader_spec, tiny_spec, write_registry, write_rows

REF = {"artifact": "x"}


class Numbered(Recorder):
    """Numbers its checkpoints, since each part counts its own steps."""

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        super().checkpoint(len(self.checkpoints), write)


def spec(**sections: Any) -> ResourceSpec:
    """The tiny spec with the small table and the language model as inputs."""
    return tiny_spec(**{"tools": REF, "profiling": REF, "language_model": REF, **sections})


@pytest.fixture
def inputs(tables: Path, language_folder: Path) -> dict[str, Path]:
    return {"tools": tables, "profiling": tables, "language_model": language_folder}


def test_a_part_of_the_rows_is_described_by_the_templates_of_training(inputs: dict[str, Path], tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, inputs=inputs)
    result = run_job(spec(evaluation=3, augmentation={"mode": "jitter"}), recorder)
    described = [(name, total) for name, total, unit in recorder.stages if unit == "descriptions"]
    assert described == [
        ("evaluation/seen", 3),
        ("evaluation/unseen", 3),
        ("evaluation/controls", 9),
        ("evaluation/predictions", 3),
    ]
    assert list(result["details"]["seen"]["by_template"]) == ["plain"]
    assert {name: part["rows"] for name, part in result["details"].items()} == {"seen": 3, "unseen": 3}
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [report[name][part]["rows"] for name, part in (("details", "unseen"), ("controls", "zero"))] == [3, 3]
    assert ">descriptions<" in (tmp_path / "report" / "report.html").read_text()
    assert len(validate(tmp_path / "export").weights) == 16


@pytest.mark.pictures
def test_job_keeps_an_encoder_an_export_and_a_report(inputs: dict[str, Path], tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, inputs=inputs)
    result = run_job(spec(), recorder)
    assert recorder.artifacts == [
        ("encoder", "resource-encoder"),
        ("export", "resource-export"),
        ("report", "report"),
    ]
    assert recorder.stage_names[:2] == ["all/train", "unseen/train"]
    json.dumps(result, allow_nan=False)
    figures = result["figures"]
    assert {
        *("exact_match_seen", "exact_match_unseen", "field_accuracy_seen", "field_accuracy_unseen"),
        *("cross_entropy", "control_exact_match", "self_retrieval", "jitter_retrieval"),
    } <= set(figures)
    assert figures["self_retrieval"] == 1

    report = tmp_path / "report"
    for picture in ("digits", "calibration", "history-all", "history-unseen", "map"):
        assert (report / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((report / "report.json").read_text())["figures"] == figures
    assert "<html" in (report / "report.html").read_text()

    codec, exported = ResourceCodec.load(tmp_path / "encoder"), validate(tmp_path / "export")
    values, _ = codec.vectors(named_rows())
    torch.testing.assert_close(codec.embed(values), exported.weights, rtol=0, atol=1e-6)


def named_rows() -> list[dict[str, Any]]:
    """The rows of the small table by the names of its fields."""
    return [{**{k: v for k, v in row.items() if k != "cpu"}, "cores": row["cpu"]} for row in rows()]


def test_the_export_is_as_the_seed_has_it(inputs: dict[str, Path], tmp_path: Path) -> None:
    run_job(spec(held_out=0), Recorder(tmp_path, inputs=inputs))
    folder = tmp_path / "export"
    content = torch.load(folder / "config_weights.pt", weights_only=True)
    assert set(content) == {"weights", "num_configs", "hidden_dim"}
    assert content["num_configs"] == 16 and content["hidden_dim"] == 16
    assert content["weights"].shape == (16, 16) and content["weights"].dtype == torch.float32
    assert torch.equal(load_file(folder / "config_weights.safetensors")["weights"], content["weights"])
    lookup = json.loads((folder / "config_lookup.json").read_text())
    assert list(lookup) == [str(index) for index in range(16)]
    assert lookup["9"] == {"tool_name": "translate", "size": "small", "cores": 2, "latency_ms": 163.0}
    masks = json.loads((folder / "tool_mask_map.json").read_text())
    assert masks == {"detect": list(range(8)), "translate": list(range(8, 16))}
    torch.load(folder / "pretrained_encoder.pt", weights_only=True)


def test_no_more_rows_are_described_at_once_than_training_has_room_for(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(describer: Describer, soft: torch.Tensor, *rest: Any) -> Any:
            sizes.append(len(soft))
            return method(describer, soft, *rest)

        return call

    for name in ("write", "scores"):
        monkeypatch.setattr(Describer, name, watched(getattr(Describer, name)))
    run_job(spec(training={"batch_size": 8, "accumulation": 7}), Recorder(tmp_path, inputs=inputs))
    assert max(sizes) == 8


def test_ranges_of_the_unseen_run_are_of_the_rows_that_it_is_trained_on(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a held-out row has the highest number, no part of that run has the number in its schema."""
    used: dict[str, tuple[ResourceCodec, Describer]] = {}
    predicted: list[Table] = []

    def described(codec: ResourceCodec, describer: Describer, values: torch.Tensor, run: Run, name: str) -> Any:
        used[name.rpartition("/")[2]] = codec, describer
        return describe_figures(codec, describer, values, run, name)

    def prediction(codec: ResourceCodec, describer: Describer, table: Table, **rest: Any) -> Any:
        predicted.append(table)
        return prediction_figures(codec, describer, table, **rest)

    monkeypatch.setattr(job, "describe_figures", described)
    monkeypatch.setattr(job, "prediction_figures", prediction)
    dimensions = [dict(dimension) for dimension in SCHEMA["dimensions"]]
    del dimensions[2]["low"], dimensions[2]["high"]
    given = spec(table=SCHEMA | {"dimensions": dimensions})
    table = job.table_of(given, Recorder(inputs=inputs))
    _, held_out = table.hold_out(given.held_out, given.seed)
    changed = rows()
    changed[int(held_out[0])]["latency_ms"] = 987_654
    inputs = inputs | {"profiling": write_rows(tmp_path / "table.csv", changed)}
    run_job(given, Recorder(tmp_path, inputs=inputs))
    highest = {name: part[0].schema.dimensions[3].high for name, part in used.items()}
    assert highest["seen"] == 987_654 and 0 < (highest["unseen"] or 0) < 300
    places = {name: part[1].schema.templates[0].places[3] for name, part in used.items()}
    assert places == {"seen": 7, "unseen": 3}
    assert predicted[0].schema == used["unseen"][0].schema and float(predicted[0].values.max()) == 987_654


@pytest.mark.parametrize("fall", [None, 3])
def test_the_export_has_the_checkpoint_of_each_snapshot(
    fall: int | None, inputs: dict[str, Path], tmp_path: Path
) -> None:
    """Also of those that an interrupted attempt took."""
    given = spec(held_out=0, training={"steps": 4, "snapshot_epochs": 0.25, "validate_every": 4})
    last = Recorder(tmp_path / "run", inputs=inputs)
    if fall is not None:
        first = Recorder(tmp_path / "first", inputs=inputs, every=True, fall=fall)
        with pytest.raises(Interrupted):
            run_job(given, first)
        last.resume = first.checkpoints[-1]
    run_job(given, last)
    names = [f"encoder_checkpoint_epoch{epoch}.pt" for epoch in ("0.25", "0.5", "0.75", "1")]
    assert sorted(file.name for file in (tmp_path / "run" / "export").glob("encoder_*")) == names
    assert {*names} < {*validate(tmp_path / "run" / "export").files}
    # The encoder's own artifact is as without snapshots.
    kept = sorted(file.name for file in (tmp_path / "run" / "encoder").iterdir())
    assert kept == ["encoder.json", "encoder.safetensors", "table.safetensors"]


def test_without_held_out_rows_there_is_one_training(inputs: dict[str, Path], tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, inputs=inputs)
    result = run_job(spec(held_out=0), recorder)
    assert "exact_match_unseen" not in result["figures"]
    assert not [stage for stage in recorder.stage_names if stage.startswith("unseen")]


@pytest.mark.parametrize("units", [1, 3])
def test_an_interrupted_job_resumes_within_its_part(units: int, inputs: dict[str, Path], tmp_path: Path) -> None:
    """In the first training (of two steps) and in the second one."""

    class Falls(Numbered):
        """Falls at the ``units``-th step that it is told of."""

        def advance(self, done: int) -> None:
            super().advance(done)
            if sum(1 for unit in self.done if unit) > units:
                raise Interrupted

    whole = run_job(spec(), Recorder(tmp_path / "whole", inputs=inputs))
    first = Falls(tmp_path / "first", inputs=inputs, every=True)
    with pytest.raises(Interrupted):
        run_job(spec(), first)
    again = Recorder(tmp_path / "again", inputs=inputs, resume=first.checkpoints[-1])
    assert run_job(spec(), again) == whole
    assert again.artifacts == [("encoder", "resource-encoder"), ("export", "resource-export"), ("report", "report")]
    one, other = (ResourceCodec.load(tmp_path / name / "encoder").model.state_dict() for name in ("whole", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def together(rank: int, inputs: dict[str, Path], folder: Path) -> None:
    """One of two processes, which do the job and then resume it from a checkpoint of the second training."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    for name, resume in (("whole", None), ("again", folder / "whole" / "checkpoints" / "3")):
        run = Numbered(folder / name, inputs=inputs, every=True, resume=resume) if rank == 0 else Run()
        run.inputs = inputs
        (folder / f"{name}-{rank}.json").write_text(json.dumps(run_job(spec(), run, World(rank, 2))))
    torch.distributed.destroy_process_group()


@pytest.mark.timeout(120)
def test_two_processes_do_one_job_and_resume_it(inputs: dict[str, Path], tmp_path: Path) -> None:
    start_processes(together, (inputs, tmp_path), nprocs=2, start_method="fork")  # type: ignore[no-untyped-call]
    results = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert results["whole-0"]["figures"] and results["again-0"] == results["whole-0"]
    assert results["whole-1"] == results["again-1"] == {}
    kept = json.loads((tmp_path / "whole" / "checkpoints" / "3" / "parts.json").read_text())
    assert list(kept["results"]) == ["all"] and kept["present"] == "unseen"


def test_a_model_that_was_trained_through_with_checkpointing_describes_as_well(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With checkpointing a language model keeps no cache, which its descriptions need."""
    said: list[list[str]] = []
    write = Describer.write

    def recorded(describer: Describer, soft: torch.Tensor, template: Template) -> list[str]:
        said.append(write(describer, soft, template))
        return said[-1]

    monkeypatch.setattr(Describer, "write", recorded)
    for checkpointing in (False, True):
        training = {"gradient_checkpointing": checkpointing, "steps": 1, "learning_rate": 1e-9}
        run_job(spec(held_out=0, training=training), Recorder(tmp_path / str(checkpointing), inputs=inputs))
    half = len(said) // 2
    assert said[:half] == said[half:]


def test_a_failing_evaluation_costs_no_encoder(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(job, "describe_figures", fails)
    with pytest.raises(ZeroDivisionError):
        run_job(spec(held_out=0), Recorder(tmp_path, inputs=inputs))
    ResourceCodec.load(tmp_path / "encoder")
    validate(tmp_path / "export")


@pytest.mark.parametrize("failing", ["write_report", "prediction_figures"])
def test_a_failing_report_costs_no_result(
    failing: str, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(job, failing, fails)
    recorder = Recorder(tmp_path, inputs=inputs)
    assert run_job(spec(), recorder)["figures"]
    assert [name for name, _ in recorder.artifacts] == ["encoder", "export"]
    assert [line for line in recorder.logs if "the report failed" in line]


def test_too_few_rows_to_predict_from_are_said_in_the_report(inputs: dict[str, Path], tmp_path: Path) -> None:
    run_job(spec(held_out=0.5), Recorder(tmp_path, inputs=inputs))
    page = (tmp_path / "report" / "report.html").read_text()
    assert "has 8 measured configurations; a prediction takes at least 10" in page


def test_a_language_model_by_folder_and_a_table_without_registry(
    inputs: dict[str, Path], language_folder: Path, tmp_path: Path
) -> None:
    given = tiny_spec(profiling=REF, llm_model=str(language_folder), held_out=0)
    run_job(given, Recorder(tmp_path, inputs={"profiling": inputs["profiling"]}))
    assert ResourceCodec.load(tmp_path / "encoder").schema.tools == ("detect", "translate")


def test_a_language_model_that_was_trained_here_reads_vectors(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.resource import language_model, language_model_job

    monkeypatch.setattr(language_model, "_CORPUS", 10)
    maker = Recorder(tmp_path / "language")
    result = language_model_job.run(tiny_reader_spec(), maker)
    assert maker.artifacts == [("model", "language-model")]
    json.dumps(result, allow_nan=False)
    recorder = Recorder(tmp_path / "run", inputs=inputs | {"language_model": tmp_path / "language" / "model"})
    figures = run_job(spec(), recorder)["figures"]
    assert 0 <= figures["exact_match_seen"] <= 1


def test_the_default_table_is_the_generators(inputs: dict[str, Path]) -> None:
    table = job.table_of(ResourceSpec(seed=3), Recorder())
    assert len(table) == 1701 and table.digest != job.table_of(ResourceSpec(), Recorder()).digest


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"mine.csv": True}, None),
        ({"mine.csv": True, "other.csv": True}, "has 2 files and none is profiling.csv; give the file itself"),
        ({}, "has 0 files and none is profiling.csv"),
    ],
)
def test_the_file_of_an_artifact_is_the_one_of_its_name_or_the_only_one(
    files: dict[str, bool], text: str | None, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    for name in files:
        write_rows(tmp_path / "folder" / name, rows())
    recorder = Recorder(inputs={"profiling": tmp_path / "folder"})
    if text is None:
        assert len(job.table_of(spec(tools=None), recorder)) == 16
    else:
        with pytest.raises(InvalidInput, match=text):
            job.table_of(spec(tools=None), recorder)


def test_a_tool_that_was_never_measured_is_refused_before_training(inputs: dict[str, Path], tmp_path: Path) -> None:
    inputs["tools"] = write_registry(tmp_path / "tools.json", ["detect", "translate", "fly"])
    recorder = Recorder(tmp_path, inputs=inputs)
    with pytest.raises(InvalidInput, match="has no row of the tool fly"):
        run_job(spec(), recorder)
    assert not recorder.stages


LONG = [{"name": name, "high": 9_999_999, "decimals": 3} for name in ("one", "other")]
MANY = [{"name": name, "labels": ["1", *(f"l{number}" for number in range(63))]} for name in ("one", "other")]


@pytest.mark.parametrize(
    ("dimensions", "sections", "field", "says"),
    [
        ([], {"encoder": {"heads": 7}}, "spec.encoder.heads", "hidden size, 128, does not divide into 7 heads"),
        ([], {"training": {"accumulation": 9}}, "spec.training.batch_size", "8 rows are too few for 9 parts"),
        (LONG, {}, "spec.encoder.tokens", "1 soft tokens do not hold the .* digits and labels"),
        (MANY, {}, "spec.table", "has 132 labels, tools among them, and the default language model has marks of 128"),
    ],
)
def test_what_the_default_language_model_cannot_take_is_refused_before_it_is_trained(
    dimensions: list[dict[str, Any]],
    sections: dict[str, Any],
    field: str,
    says: str,
    *,
    inputs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def trained(run: Run) -> Path:
        raise AssertionError("the default language model is trained")

    monkeypatch.setattr(job, "default_folder", trained)
    names = [dimension["name"] for dimension in dimensions]
    text = SCHEMA["templates"][0]["text"] + "".join(f"; {name} {{{name}}}" for name in names)
    table = {"dimensions": SCHEMA["dimensions"] + dimensions, "templates": [{"name": "plain", "text": text}]}
    given = [row | dict.fromkeys(names, 1) for row in rows()]
    inputs = inputs | {"profiling": write_rows(tmp_path / "table.csv", given)}
    with pytest.raises(InvalidInput, match=says) as caught:
        run_job(tiny_spec(table=table, tools=REF, profiling=REF, **sections), Recorder(inputs=inputs))
    assert caught.value.violations[0].field == field


def test_a_single_configuration_cannot_be_held_out_which_is_told_before_training(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    recorder = Recorder(tmp_path, inputs=inputs | {"profiling": write_rows(tmp_path / "one.csv", rows()[:1])})
    with pytest.raises(InvalidInput, match="there is only one configuration; set it to 0"):
        run_job(spec(tools=None), recorder)
    assert not recorder.stages


A, B = {"name": "a", "labels": ["x", "y"]}, {"name": "b"}


@pytest.mark.parametrize(
    ("dimensions", "given"),
    [
        # No number at all, and none that is measured.
        ([A], [{"tool": tool, "a": a} for tool in "pq" for a in "xy"]),
        ([A | {"measured": True}], [{"tool": tool, "a": "x"} for tool in "pqr"]),
        ([B], [{"tool": "p", "b": b} for b in range(3)]),
        # One row, all zero, and numbers as large as they may be.
        ([A, B | {"measured": True}], [{"tool": "p", "a": "x", "b": 0}]),
        ([B | {"decimals": 3, "measured": True}, A], [{"tool": "p", "b": 9_999_999, "a": a} for a in "xy"]),
    ],
)
@pytest.mark.pictures
def test_tables_of_other_kinds_are_trained_on(
    dimensions: list[dict[str, Any]], given: list[dict[str, Any]], language_folder: Path, tmp_path: Path
) -> None:
    names = ["tool", *(dimension["name"] for dimension in dimensions)]
    template = {"name": "only", "text": "; ".join(f"{name} {{{name}}}" for name in names)}
    table = {"dimensions": dimensions, "templates": [template]}
    held_out = 0.3 if len(given) > 1 else 0
    tiny = tiny_spec(profiling=REF, language_model=REF, held_out=held_out).model_dump() | {"table": table}
    inputs = {"profiling": write_rows(tmp_path / "table.csv", given), "language_model": language_folder}
    result = run_job(ResourceSpec.model_validate(tiny), Recorder(tmp_path, inputs=inputs))
    json.dumps(result, allow_nan=False)
    assert result["figures"]["self_retrieval"] == 1
    assert validate(tmp_path / "export").weights.shape == (len(given), 16)
    assert ResourceCodec.load(tmp_path / "encoder").schema.names == tuple(names)


def test_who_has_other_columns_and_no_schema_is_told_of_schemas(tmp_path: Path) -> None:
    given = [{**row, "gpus": 1} for row in rows()]
    (tmp_path / "profiling.jsonl").write_text("\n".join(map(json.dumps, given)))
    for file in (write_rows(tmp_path / "profiling.csv", given), tmp_path / "profiling.jsonl"):
        run = Recorder(inputs={"profiling": file})
        with pytest.raises(InvalidInput, match=r"schema of its own: see examples/resource-table\.yaml"):
            job.table_of(ResourceSpec.model_validate({"profiling": REF}), run)
        with pytest.raises(InvalidInput, match="gpus") as caught:
            job.table_of(tiny_spec(profiling=REF), run)
        assert "examples/" not in str(caught.value)


def test_a_schema_without_measurements_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"spec\.profiling: must be given: a schema \(table\) of your own needs"):
        job.table_of(tiny_spec(), Recorder())


def test_the_schema_of_the_docs_is_all_that_another_table_needs(language_folder: Path, tmp_path: Path) -> None:
    """Other names, units, decimals, categories and repeated measurements, and no code. It is that of the example."""
    text = re.findall(r"```yaml\n(.*?)```", Path("docs/resource.md").read_text(), re.DOTALL)[0]
    given = YAML(typ="safe").load(text)
    assert YAML(typ="safe").load(Path("examples/resource-table.yaml")) == given
    tiny = tiny_spec(profiling=REF, language_model=REF, held_out=0.3).model_dump()
    inputs = {"profiling": Path("examples/resource-table.csv"), "language_model": language_folder}
    result = run_job(ResourceSpec.model_validate(tiny | given), Recorder(tmp_path, inputs=inputs))
    assert set(result["details"]["seen"]["by_template"]) == {"long", "short"}
    lookup = validate(tmp_path / "export").lookup
    assert len(lookup) == 52
    assert lookup["1"] == {"tool_name": "sort", "nodes": 2, "memory": 7.5, "machine": "c4.large", "runtime": 527.0}


def test_a_short_training_has_a_short_evaluation(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row for every two of the batches here."""
    monkeypatch.setattr(job, "MIN_EVALUATION", 1)
    monkeypatch.setattr(job, "TRAINING_RATIO", 2)
    for steps, described in ((1, 4), (5, 16)):
        recorder = Recorder(tmp_path / str(steps), inputs=inputs)
        run_job(spec(held_out=0, training={"steps": steps, "batch_size": 8}), recorder)
        stages = [(name, total) for name, total, unit in recorder.stages if unit == "descriptions"]
        assert stages == [("evaluation/seen", 2 * described), ("evaluation/controls", 3 * described)]
        said = [text for text in recorder.logs if "The evaluation describes" in text]
        assert said == (["The evaluation describes 4 of the 16 rows, drawn at random."] if steps == 1 else [])
    # Whoever asks for more gets more.
    recorder = Recorder(tmp_path / "more", inputs=inputs)
    run_job(spec(held_out=0, training={"steps": 1, "batch_size": 8}, evaluation=16), recorder)
    assert ("evaluation/seen", 32, "descriptions") in recorder.stages
