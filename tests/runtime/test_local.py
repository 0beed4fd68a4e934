"""``ethogram run``: jobs in this process, their folders, and what is refused."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ethogram.cli.main import run as run_cli
from ethogram.specs.base import ArtifactRef, Spec
from ethogram.specs.kinds import KINDS, Kind
from services.runtime import local, parallel
from services.runtime.devices import chosen_device
from services.runtime.parallel import ALONE, World
from services.runtime.run import Run


class ToySpec(Spec):
    """Count to ``steps``."""

    table: ArtifactRef
    hint: ArtifactRef | None = None
    steps: int = 5


SEEN: list[Any] = []
"""What the job below was given, and the steps it took."""


def job(spec: ToySpec, run: Run, world: World = ALONE) -> dict[str, Any]:
    """Counts, and ends at step 3 where the spec has an odd number of steps and there is no checkpoint yet."""
    step = int((run.resume / "step").read_text()) if run.resume else 0
    SEEN.append((run.device, dict(run.inputs), step))
    if not world.first:
        return {}
    run.stage("count", spec.steps)
    while step < spec.steps:
        step += 1
        run.metric(step, count=float(step))
        run.advance(step)
        if run.checkpoint_due():
            run.checkpoint(step, lambda folder, step=step: (folder / "step").write_text(str(step)))  # type: ignore[misc]
        if spec.steps % 2 and step == 3 and not run.resume:
            raise KeyboardInterrupt
    with run.output_folder("sum") as folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "sum.txt").write_text(str(step))
        run.artifact("sum", "sum", folder)
    return {"figures": {"sum": float(step), "of": {"steps": step}}}


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kind = Kind(
        name="toy",
        summary="count",
        spec=ToySpec,
        job="tests.runtime.test_local:job",
        rpc="/ethogram.v1.ToyService/Run",
        inputs={"table": "sum", "hint": "sum"},
        outputs={"sum": "sum"},
        example={},
    )
    monkeypatch.setitem(KINDS, "toy", kind)
    (tmp_path / "table").mkdir()
    monkeypatch.chdir(tmp_path)
    SEEN.clear()


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        run_cli(["run", *arguments])
    code = left.value.code
    assert isinstance(code, int)
    return code


def files(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_run_leaves_its_artifacts_metrics_spec_and_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("toy", "-i", "table=table", "--set", "steps=2", "-o", "out", "--device", "cpu", "--json") == 0
    out, err = capsys.readouterr()
    assert (
        json.loads(out)
        == json.loads(Path("out/result.json").read_text())
        == {"figures": {"sum": 2.0, "of": {"steps": 2}}}
    )
    assert "sum: out/sum" in err and "metrics: out" in err
    assert [("cpu", {"table": Path("table")}, 0)] == SEEN
    assert Path("out/sum/sum.txt").read_text() == "2"
    assert json.loads(Path("out/metrics.jsonl").read_text().splitlines()[0]) == {
        "stage": "count",
        "step": 1,
        "count": 1.0,
    }
    assert len(list(Path("out").glob("events.out.tfevents*"))) == 1
    assert json.loads(Path("out/spec.json").read_text()) == {
        "table": {"job": None, "artifact": "table"},
        "hint": None,
        "steps": 2,
    }

    # The folder of a run stands for the artifact in it.
    assert call("toy", "-i", "table=out", "--set", "steps=2", "-o", "next", "--device", "cpu") == 0
    assert SEEN[-1][1] == {"table": Path("out/sum")}
    assert "of.steps" in capsys.readouterr().out

    kept = files(Path("out"))
    # Of a kind with headline figures only those are shown; --json has all.
    monkeypatch.setitem(KINDS, "toy", replace(KINDS["toy"], headline=("sum", "none")))
    assert call("toy", "-i", "table=out", "--set", "steps=2", "-o", "third", "--device", "cpu") == 0
    shown = capsys.readouterr().out
    assert "sum" in shown and "of.steps" not in shown
    monkeypatch.setitem(KINDS, "toy", replace(KINDS["toy"], outputs={"sum": "number"}))
    assert call("toy", "-i", "table=table", "--set", "steps=2", "-o", "fourth", "--device", "cpu") not in (0, 2)
    assert "toy made {('sum', 'sum')}" in capsys.readouterr().err
    for steps in ("2", "4"):
        assert call("toy", "-i", "table=table", "--set", f"steps={steps}", "-o", "out") == 2
        assert "--output: out exists already and holds a finished run" in capsys.readouterr().err
    assert files(Path("out")) == kept


def test_an_interrupted_run_resumes_and_is_no_other_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local, "CHECKPOINT_SECONDS", 0.0)
    typed = ("toy", "--input", "table=table", "-o", "out", "--device", "cpu")
    assert call(*typed) == 130
    assert "Run the same command again to resume from the last checkpoint, or delete out." in capsys.readouterr().err
    kept = files(Path("out"))
    assert call(*typed, "--set", "steps=7") == 2
    assert "--output: out holds a run of another spec" in capsys.readouterr().err
    assert files(Path("out")) == kept
    # The same spec, written otherwise.
    spec = Path("out/spec.json")
    spec.write_text(json.dumps(json.loads(spec.read_text()) | {"steps": 5}, sort_keys=True))
    assert call(*typed) == 0
    assert SEEN[-1][2] == 3
    steps = [json.loads(line)["step"] for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5]
    assert not Path("out/checkpoint").exists() and len(list(Path("out").glob("events.out.tfevents*"))) == 1


def test_a_field_without_effect_is_refused_and_a_run_of_an_earlier_version_resumes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local, "CHECKPOINT_SECONDS", 0.0)
    typed = ("toy", "--input", "table=table", "--set", "steps=7", "--device", "cpu", "-o")
    assert call(*typed, "begun") == 130
    # What took the field before does no longer.
    monkeypatch.setattr(ToySpec, "unused", lambda _: iter([("steps", "there are none")]))
    assert call(*typed, "new") == 2
    assert "spec.steps: has no effect, because there are none; leave it out" in capsys.readouterr().err
    assert not Path("new").exists()
    assert call(*typed, "begun") == 0
    assert SEEN[-1][2] == 3 and "spec.steps: has no effect" not in capsys.readouterr().err


def test_what_ends_before_a_checkpoint_leaves_nothing_but_a_store(capsys: pytest.CaptureFixture[str]) -> None:
    typed = ("toy", "--input", "table=table", "-o", "out", "--device", "cpu")
    assert call(*typed) == 130
    assert "Nothing is kept" in capsys.readouterr().err
    assert not Path("out").exists()
    # A store is read and resumed by its own manifest.
    Path("out/activations").mkdir(parents=True)
    Path("out/activations/manifest.json").write_text("{}")
    assert call(*typed) == 130
    assert "Run the same command again" in capsys.readouterr().err
    assert Path("out/activations/manifest.json").exists()
    # The store of another run, further below, does not make its folder a run.
    Path("home").mkdir()
    Path("out").rename("home/recording")
    kept = files(Path("home"))
    assert call(*typed[:-3], "home", *typed[-2:]) == 2
    assert "--output: home exists already and is not a run" in capsys.readouterr().err
    assert files(Path("home")) == kept


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["toi"], "KIND: there is no kind 'toi'; there are: generation,"),
        (["toy", "--input", "tabel=table"], "--input: toy has no input 'tabel'; its inputs: table, hint"),
        (["toy", "--input", "table"], "--input: table is not of the form NAME=PATH"),
        (["toy"], "--input: toy needs a file or folder for table, as table=PATH"),
        (["toy", "--input", "table=nowhere"], "--input: nowhere is not a file or folder"),
        (["toy", "-i", "table=table", "--set", "hint.artifact=x"], "spec.hint: names an artifact of a platform"),
        (["toy", "-i", "table=table", "--set", "step=1"], "spec.step: there is no such field"),
        (["toy", "-i", "table=table", "--device", "gpu"], "--device: gpu is none of cpu"),
        (["toy", "-i", "table=table", "--device", "cuda:99"], "--device: cuda:99 cannot be used on this machine"),
    ],
)
def test_what_is_wrong_is_said_and_leaves_nothing(
    arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*arguments, "-o", "out") == 2
    assert error in capsys.readouterr().err
    assert not Path("out").exists()


def test_the_command_is_checked_before_the_libraries_are_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Kind, "load_job", lambda _: pytest.fail("the job was imported"))
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("all of it")
    Path("wrong/zoo").mkdir(parents=True)
    Path("wrong/spec.json").write_text("{}")
    Path("begun/checkpoint").mkdir(parents=True)
    Path("begun/spec.json").write_text("{}")
    for table, out, device, error in (
        ("table", "full", "cpu", "--output: full exists already and is not a run"),
        ("begun", "out", "cpu", "--input: begun is a run that has not finished; run its command again to resume it"),
        ("wrong", "out", "cpu", "--input: wrong is the folder of a run, with zoo in it; name a sum"),
        ("table", "out", "gpu", "--device: gpu is none of cpu"),
    ):
        assert call("toy", "-i", f"table={table}", "-o", out, "--device", device) == 2
        assert error in capsys.readouterr().err


def test_a_gpu_is_tried_on_the_one_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.setattr("torch.zeros", lambda _, device: tried.append(device))
    assert chosen_device("cuda") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert chosen_device("cuda") == "cuda"
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert (chosen_device("cuda"), chosen_device("cuda:3"), chosen_device("cpu")) == ("cuda", "cuda:3", "cpu")
    assert tried == ["cuda:0", "cuda:0", "cuda:1", "cuda:3", "cpu"]


def test_a_folder_of_something_else_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("all of it")
    assert call("toy", "-i", "table=table", "-o", "out") == 2
    assert "is not a run" in capsys.readouterr().err
    assert [file.name for file in Path("out").iterdir()] == ["thesis.txt"]


def test_the_first_process_of_torchrun_reports_and_the_others_are_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parallel, "join", lambda device: (World(1, 2), device))
    assert call("toy", "-i", "table=table", "-o", "out", "--device", "cpu", "--json") == 0
    assert [("cpu", {"table": Path("table")}, 0)] == SEEN
    assert capsys.readouterr().out == "" and not Path("out").exists()


def test_a_client_install_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "services.runtime.folders", None)
    assert call("toy", "-i", "table=table", "-o", "out") == 1
    told = capsys.readouterr().err
    assert "running jobs here needs services.runtime.folders, which is not installed" in told and "pip install" in told


def test_a_module_that_the_users_own_package_needs_is_not_asked_of_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "their_own_code.py").write_text("import surely_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)

    def imports(*_: object, **__: object) -> None:
        importlib.import_module("their_own_code")

    monkeypatch.setattr("services.runtime.local.run", imports)
    assert call("toy", "-i", "table=table", "-o", "out") == 1
    told = capsys.readouterr().err
    assert "their_own_code.py imports surely_not_installed, which is not installed here" in " ".join(told.split())
    assert "pip install -c" not in told
