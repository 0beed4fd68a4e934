"""The job and the commands, end to end."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ethogram.cli.output import execute
from services.clt import __main__ as command
from services.clt.policy import evaluate as evaluation
from services.clt.policy import job
from services.clt.policy.evaluate import evaluate
from services.clt.policy.model import AttentionPolicy
from services.clt.policy.tsp import instances
from services.runtime import trained
from services.runtime.seeds import generator
from tests.clt.conftest import policy_spec, small_policy
from tests.clt.held_karp import solve_exactly
from tests.clt.rl4co import state_dict
from tests.recorder import Recorder


def call(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as left:
        execute(command.app, "clt", [str(argument) for argument in arguments])
    code = left.value.code
    assert isinstance(code, int)
    return code


@pytest.mark.pictures
def test_job_keeps_a_policy_and_a_report(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    result = job.run(policy_spec(), recorder)
    assert recorder.stage_names == ["train", "solve", "evaluate"]
    assert set(recorder.metrics[6]) == {"loss", "length", "entropy", "validation_length"}
    json.dumps(result, allow_nan=False)
    figures = result["figures"]
    assert figures["gap_greedy"] >= figures["gap_multistart"] > -1e-5
    policy = AttentionPolicy.load(tmp_path / "policy")
    assert policy.nodes == 6
    for name in ("history", "gaps", "tours"):
        assert (tmp_path / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "report" / "report.json").read_text())
    assert written["figures"] == figures and len(written["gaps"]["sampled"]) == 5
    assert "multistart" in (tmp_path / "report" / "report.html").read_text()


def test_job_without_evaluation(tmp_path: Path) -> None:
    assert job.run(policy_spec(evaluation=0), Recorder(tmp_path)) == {"figures": {}}
    assert (tmp_path / "report" / "report.html").exists()


def test_gap_of_an_exact_solver_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "greedy", lambda policy, cities, stream: solve_exactly(cities))
    found = evaluate(small_policy(), instances(10, 7, generator(0, "test")), 0, 0)
    assert set(found.gaps) == {"greedy", "multistart"}
    assert float(found.gaps["greedy"].abs().max()) < 1e-6
    assert float(found.gaps["multistart"].min()) > -1e-6


def test_default_policy_is_trained_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    monkeypatch.setattr(trained, "ConsoleRun", lambda *_, **__: nullcontext(recorder))
    first = job.default_policy(spec=policy_spec())
    assert recorder.stage_names == ["train"] and recorder.done[-1] == 6
    monkeypatch.setattr(job, "PolicyTrainer", None)
    # The evaluation has no part in it.
    assert job.default_policy(spec=policy_spec(evaluation=9)).digest == first.digest


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "spec.json").write_text(policy_spec().model_dump_json())
    run = tmp_path / "run"
    assert call("policy", "-f", tmp_path / "spec.json", "--device", "cpu", "-o", run, "--json") == 0
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert call("policy", "-f", tmp_path / "spec.json", "-o", run) == 2
    assert "finished run" in capsys.readouterr().err
    # The instances of the job's own evaluation.
    given = ("gap", run / "policy", "--instances", "5", "--samples", "3", "--json")
    assert call(*given) == 0
    again = json.loads(capsys.readouterr().out)["figures"]
    assert again == pytest.approx(figures)

    save_file({"cities": torch.rand(4, 9, 2)}, tmp_path / "mine.safetensors")
    assert call("gap", run, "--cities", tmp_path / "mine.safetensors", "--samples", "0") == 0
    assert "gap_multistart" in capsys.readouterr().out
    assert call("gap", run / "report") == 2
    assert f"policy.json is missing; is {run / 'report'} a policy?" in " ".join(capsys.readouterr().err.split())
    assert call("gap", tmp_path) == 2
    assert f"POLICY: {tmp_path} is the folder of a run, with no artifact" in " ".join(capsys.readouterr().err.split())


def test_import_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": state_dict("instance")}, tmp_path / "last.ckpt")
    given = ("import-policy", tmp_path / "last.ckpt", "-o", tmp_path / "policy", "--heads", "2", "--nodes", "7")
    assert call(*given) == 2
    assert "give --graph-context or --no-graph-context" in " ".join(capsys.readouterr().err.split())
    assert call(*given, "--no-graph-context") == 0
    assert "left out, as they serve training alone: baseline." in " ".join(capsys.readouterr().err.split())
    assert AttentionPolicy.load(tmp_path / "policy").nodes == 7
    assert call(*given) == 2
    assert "exists already" in capsys.readouterr().err
