"""``python -m services.generation``, as it is typed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from ethogram.cli.output import execute
from ethogram.specs.generation import GenerationSpec
from services.generation import buckets
from services.generation.__main__ import app
from services.generation.json_form import export_json
from services.runtime.console import ConsoleRun
from services.runtime.folders import RunFolder
from tests.generation.conftest import records, staged_spec
from tests.hub_server import reach, serve

TASKS = ("modification", "classification")
SHAPE = ("--set", "vocab_size=5", "--set", "sequence_length=4")


def call(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as left:
        execute(app, "generation", [str(argument) for argument in arguments])
    code = left.value.code
    assert isinstance(code, int)
    return code


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("command") / "spec.json"
    file.write_text(json.dumps(staged_spec(subjects=8).model_dump()))
    return file


@pytest.fixture(scope="module")
def zoo(spec: Path) -> Path:
    assert call("make", "-f", spec, "-o", spec.with_name("zoo"), "--set", "format.digits=9") == 0
    return spec.with_name("zoo")


@pytest.mark.pictures
def test_make_leaves_a_zoo_a_card_a_report_and_metrics(zoo: Path) -> None:
    assert len(records(zoo)) == 8
    assert {"README.md", "zoo.json", "baseline_dataset.json", "data", "report"} == {file.name for file in zoo.iterdir()}
    pages = {"report.html", "report.json", "zoo.html"}
    assert {file.name for file in (zoo / "report").iterdir()} == {"zoo.png", *pages}
    assert 'url=report.html"' in (zoo / "report" / "zoo.html").read_text()
    names = [file.name for file in zoo.with_name("zoo-run").iterdir()]
    assert "metrics.jsonl" in names and any(name.startswith("events.out.tfevents") for name in names)


def test_the_report_says_what_its_numbers_are(zoo: Path) -> None:
    page = (zoo / "report" / "report.html").read_text()
    about = json.loads((zoo / "zoo.json").read_text())
    passed = about["candidates"] - sum(about["rejected"].values())
    kept = "all of these" if passed == 8 else "the first 8 of these"
    origin = f"{about['candidates']} candidates were trained, {passed} passed the checks, and {kept} are kept."
    assert origin in page and origin in (zoo / "README.md").read_text()
    for cause, count in about["rejected"].items():
        assert f"<tr><td>{cause}</td><td>{count}</td></tr>" in page
    rows = records(zoo)
    for i, name in enumerate(about["strata"]):
        before, after = (sum(row[of][i] for row in rows) / 8 for of in ("degraded_accuracy", "accuracy"))
        cells = next(line for line in page.split("<tr>") if line.startswith(f"<td>{name}</td><td>"))
        assert f"<td>{before:.3f}</td><td>{after:.3f}</td>" in cells


def test_what_is_there_is_not_overwritten(zoo: Path, spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("make", "-f", spec, "-o", zoo) == 2
    assert "exists already" in capsys.readouterr().err


def test_the_run_folder_of_another_command_is_not_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "zoo-run"
    RunFolder(other).begin(GenerationSpec(subjects=8))
    (other / "zoo").mkdir()
    assert call("make", "--set", "subjects=8", "--device", "cpu", "-o", tmp_path / "zoo") == 2
    assert f"--output: {other}, which {tmp_path / 'zoo'} needs" in capsys.readouterr().err.replace("\n", "")
    assert (other / "spec.json").exists() and (other / "zoo").exists() and not (tmp_path / "zoo").exists()


def test_what_was_interrupted_goes_on(
    spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("services.runtime.local.CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(buckets, "CACHE_BYTES", 1)
    monkeypatch.setattr(buckets, "MOST_SHAPES", 1)
    asked: list[str | Path] = ["make", "-f", spec, "--set", "subjects=40", "-o"]
    assert call(*asked, tmp_path / "whole") == 0
    advance = ConsoleRun.advance

    def stop_in_the_middle(self: ConsoleRun, done: int) -> None:
        advance(self, done)
        if done > 25:
            raise KeyboardInterrupt

    monkeypatch.setattr(ConsoleRun, "advance", stop_in_the_middle)
    assert call(*asked, tmp_path / "zoo") == 130
    assert "Run the same command again to resume" in capsys.readouterr().err
    begun: list[int] = []

    def note(self: ConsoleRun, done: int) -> None:
        begun.append(done)
        advance(self, done)

    monkeypatch.setattr(ConsoleRun, "advance", note)
    assert call("make", "-f", spec, "--set", "subjects=41", "-o", tmp_path / "zoo") == 2
    assert f"or delete {tmp_path / 'zoo-run'}" in capsys.readouterr().err
    assert not (tmp_path / "zoo").exists()
    assert call(*asked, tmp_path / "zoo") == 0
    shown = "".join(capsys.readouterr().err.split("\n"))
    assert "resumed from a checkpoint" in shown and str(tmp_path / "zoo" / "report" / "report.html") in shown
    assert begun[0] > 0
    assert records(tmp_path / "zoo") == records(tmp_path / "whole")
    lines = [(tmp_path / f"{name}-run" / "metrics.jsonl").read_text() for name in ("whole", "zoo")]
    assert lines[0] == lines[1]


def test_bad_specs_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("make", "--set", "subjects=0", "-o", tmp_path / "zoo") == 2
    assert "spec.subjects" in capsys.readouterr().err
    assert call("make", "--set", "signature.baseline.artifact=zoo", "-o", tmp_path / "zoo") == 2
    assert "spec.signature.baseline" in capsys.readouterr().err
    assert call("make", "--device", "gpu", "-o", tmp_path / "zoo") == 2
    assert "--device" in capsys.readouterr().err
    assert call("make", "--device", "cuda:99", "-o", tmp_path / "zoo") == 2
    assert "--device: cuda:99 cannot be used on this machine" in capsys.readouterr().err
    assert call("make", "--baseline", tmp_path / "nowhere", "-o", tmp_path / "zoo") == 2
    assert "--baseline" in (told := capsys.readouterr().err) and "nowhere" in told
    assert call("make", "--baseline", tmp_path, "-o", tmp_path / "zoo") == 2
    assert f"--baseline: {tmp_path} has no baseline_dataset.json" in capsys.readouterr().err
    assert call("dataset", "baseline", "-o", tmp_path / "probes.csv") == 2
    assert "must end in .json or .parquet" in capsys.readouterr().err
    assert call("import", tmp_path / "missing.parquet", "-o", tmp_path / "zoo") == 2
    assert "is no file" in capsys.readouterr().err
    assert not (tmp_path / "zoo").exists()


def test_what_fails_leaves_nothing_behind(
    zoo: Path, spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reach("http://127.0.0.1:9", monkeypatch, tmp_path)
    assert call("make", "-f", spec, "--set", "hub.repo=me/zoo", "-o", tmp_path / "new") == 1
    assert call("import", "them/set", "-o", tmp_path / "new") == 1
    assert "SOURCE: the Hugging Face Hub cannot be reached" in capsys.readouterr().err
    assert call("upload", zoo, "zoo") == 2
    assert "OWNER/NAME: zoo is not a name that the Hub allows" in capsys.readouterr().err
    shutil.copytree(zoo, tmp_path / "broken")
    (tmp_path / "broken" / "data" / "train-000000.parquet").write_bytes(b"PAR1")
    assert call("report", tmp_path / "broken", "-o", tmp_path / "new") == 2
    assert call("export", tmp_path / "broken", "-o", tmp_path / "new") == 2
    monkeypatch.setattr(ConsoleRun, "advance", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert call("make", "-f", spec, "-o", tmp_path / "new") == 130
    assert "Nothing is kept" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["broken"]


def test_a_folder_of_another_making_is_left_alone(spec: Path, tmp_path: Path) -> None:
    (tmp_path / "zoo-run").mkdir()
    assert call("make", "-f", spec, "-o", tmp_path / "zoo") == 2
    assert (tmp_path / "zoo-run").exists()


def test_the_probes_of_another_zoo(zoo: Path, spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = ["--set", "seed=9", "--set", "subjects=2"]
    assert call("make", "-f", spec, *changed, "--baseline", zoo, "-o", tmp_path / "zoo") == 0
    one, other = (json.loads((folder / "baseline_dataset.json").read_text()) for folder in (zoo, tmp_path / "zoo"))
    assert one == other
    artifact = ("--set", "signature.baseline.artifact=zoo")
    for command in (["make"], ["make", "--baseline", zoo], ["dataset", "baseline"]):
        assert call(*command, "-f", spec, *artifact, "-o", tmp_path / "other.json") == 2
        assert "leave it out here, and give its folder with --baseline" in " ".join(capsys.readouterr().err.split())
    changed += ["--set", "vocab_size=6"]
    assert call("make", "-f", spec, *changed, "--baseline", zoo, "-o", tmp_path / "other") == 2
    assert "baseline_dataset.json.vocab_size: is 5, but the spec's is 6" in capsys.readouterr().err


def test_sequences_of_a_pattern_too_rare_to_train_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = [{"name": "few", "regex": "A[AB]{2}[CDE]"}, {"name": "starts_with", "token": "A"}]
    fields = {"vocab_size": 5, "sequence_length": 4, "patterns": few, "staged": {}, "signature": {"probes": 8}}
    (tmp_path / "spec.json").write_text(json.dumps(fields))
    for which in ("baseline", "benchmark"):
        assert call("dataset", which, "-f", tmp_path / "spec.json", "-o", tmp_path / f"{which}.json") == 0
    assert call("dataset", "training", "-f", tmp_path / "spec.json", "-o", tmp_path / "training.json") == 2
    assert "few is judged on" in capsys.readouterr().err and not (tmp_path / "training.json").exists()


def test_there_and_back(zoo: Path, tmp_path: Path) -> None:
    assert call("export", zoo, "-o", tmp_path / "json") == 0
    patterns = tmp_path / "patterns.json"
    patterns.write_text(json.dumps({"patterns": json.loads((zoo / "zoo.json").read_text())["spec"]["patterns"]}))
    assert call("import", tmp_path / "json", "-f", patterns, "-o", tmp_path / "back") == 0
    assert [row["weights"] for row in records(tmp_path / "back")] == [row["weights"] for row in records(zoo)]
    assert call("report", zoo, "-o", tmp_path / "report") == 0


def test_the_folder_of_a_run_stands_for_the_zoo_in_it(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(zoo, tmp_path / "run" / "zoo")
    (tmp_path / "run" / "spec.json").write_text("{}")
    for folder, out in ((zoo, "one"), (tmp_path / "run", "other")):
        assert call("export", folder, "-o", tmp_path / f"{out}-json") == 0
        assert call("report", folder, "-o", tmp_path / f"{out}-report") == 0
        assert call("dataset", "baseline", "--baseline", folder, "-o", tmp_path / f"{out}.json", *SHAPE) == 0
    for file in ("json/baseline_dataset.json", "report/report.json"):
        assert (tmp_path / f"one-{file}").read_text() == (tmp_path / f"other-{file}").read_text()
    assert (tmp_path / "one.json").read_text() == (tmp_path / "other.json").read_text()
    (tmp_path / "codec-run" / "codec").mkdir(parents=True)
    (tmp_path / "codec-run" / "spec.json").write_text("{}")
    other = "is the folder of a run, with codec in it; name a zoo"
    for arguments, field in ((["report"], "ZOO"), (["make", "--baseline"], "--baseline")):
        assert call(*arguments, tmp_path / "codec-run", "-o", tmp_path / "no") == 2
        assert f"{field}: {tmp_path / 'codec-run'} {other}" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "answers.jsonl").write_text('{"index": 1000000, "task": "classification", "completion": ""}')
    assert call("score", tmp_path / "run", tmp_path / "answers.jsonl") == 2
    assert "the zoo has no record" in capsys.readouterr().err
    with serve() as hub:
        reach(hub.url, monkeypatch, tmp_path / "cache")
        assert call("upload", tmp_path / "run", "me/zoo") == 0
        assert "zoo.json" in hub.repos["me/zoo"]


@pytest.mark.slow
def test_a_set_is_fetched_from_the_hub(zoo: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export_json(zoo, tmp_path / "json")
    patterns = tmp_path / "patterns.json"
    patterns.write_text(json.dumps({"patterns": json.loads((zoo / "zoo.json").read_text())["spec"]["patterns"]}))
    with serve() as hub:
        files = [file for file in (tmp_path / "json").rglob("*") if file.is_file()]
        hub.repos["them/set"] = {str(file.relative_to(tmp_path / "json")): file.read_bytes() for file in files}
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
        }

        def fetch(repo: str, out: str) -> int:
            module = [sys.executable, "-m", "services.generation", "import", repo, "-f", str(patterns)]
            return subprocess.run([*module, "-o", str(tmp_path / out)], env=environment, check=False).returncode

        assert fetch("them/set", "zoo") == 0
        assert fetch("them/nothing", "none") == 2
    assert "no permission to read them/nothing" in capfd.readouterr().err
    assert [row["weights"] for row in records(tmp_path / "zoo")] == [row["weights"] for row in records(zoo)]


@pytest.mark.parametrize("form", ["json", "parquet"])
def test_datasets(spec: Path, tmp_path: Path, form: str) -> None:
    def rows(file: Path) -> list[dict[str, Any]]:
        if form == "parquet":
            return parquet.read_table(file).to_pylist()  # type: ignore[no-any-return]
        return json.loads(file.read_text())["sequences"]  # type: ignore[no-any-return]

    for which in ("baseline", "benchmark", "training"):
        assert call("dataset", which, "-f", spec, "--index", "3", "-o", tmp_path / f"{which}.{form}") == 0
    assert call("dataset", "baseline", "-f", spec, "-o", tmp_path / f"baseline.{form}") == 2
    assert len(rows(tmp_path / f"baseline.{form}")) == 12
    training = rows(tmp_path / f"training.{form}")
    assert len(training) == 96 and any(row["label"] != row["first_stage_label"] for row in training)
    used = {row["sequence"] for row in training}
    assert used.isdisjoint(row["sequence"] for row in rows(tmp_path / f"benchmark.{form}"))


def test_answers_are_scored(zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = records(zoo)
    answers = tmp_path / "answers.jsonl"
    lines = [
        {"index": row["index"], "task": task, "completion": row[f"{task}_completion"]} for row in rows for task in TASKS
    ]
    lines.append({"index": rows[0]["index"], "task": "modification", "completion": "no idea"})
    answers.write_text("\n".join(json.dumps(line) for line in lines))
    assert call("score", zoo, answers, "-o", tmp_path / "each.jsonl", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    each = [json.loads(line) for line in (tmp_path / "each.jsonl").read_text().splitlines()]
    assert [(row["index"], row["task"]) for row in each] == [(line["index"], line["task"]) for line in lines]
    assert (each[-1]["parsed"], each[-1]["gain"], each[0]["parsed"]) == (0.0, 0.0, 1.0)
    assert found["classification"] == {"answers": 8, "precision": 1.0, "recall": 1.0, "exact": 1.0}
    modified = found["modification"]
    assert modified["answers"] == 9 and modified["parsed"] == pytest.approx(8 / 9)
    total = sum(row["improvement"] for row in rows)
    assert modified["gain"] == pytest.approx(total / 9, abs=1e-4)
    # Raw separators that end no line of JSON.
    prose = [line | {"completion": f"Here\u2028it is:\x85\n{line['completion']}"} for line in lines[:2]]
    answers.write_bytes("\n".join(json.dumps(line, ensure_ascii=False) for line in prose).encode())
    assert call("score", zoo, answers, "--json") == 0
    assert json.loads(capsys.readouterr().out)["modification"]["parsed"] == 1.0
    answers.write_text("\n")
    assert call("score", zoo, answers) == 2
    assert "holds no answers" in capsys.readouterr().err
    assert call("score", zoo, tmp_path / "none") == 2
    assert "rrno" not in (told := capsys.readouterr().err) and "none" in told
    answers.write_text(json.dumps({"index": 10**6, "task": "classification", "completion": ""}))
    assert call("score", zoo, answers) == 2
    assert "answers.0.index" in capsys.readouterr().err
    answers.write_text(json.dumps({"index": 0, "task": "poetry", "completion": ""}))
    assert call("score", zoo, answers) == 2
    assert "answers.0.task" in capsys.readouterr().err
