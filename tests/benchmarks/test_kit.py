"""What benchmarks keep, and in what form they say what they measured."""

from __future__ import annotations

import argparse
import json
import operator
import os
import subprocess
from pathlib import Path

import pytest

from benchmarks import _kit
from ethogram.bench import Figure
from ethogram.specs.clt import PolicySpec
from services.runtime.run import Run


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _kit.Cache:
    monkeypatch.chdir(tmp_path)
    Path("source").mkdir()
    Path("source/code.py").write_text("1")
    return _kit.Cache("test")


def test_figures_are_kept_but_no_times(cache: _kit.Cache) -> None:
    calls = []

    def measure(folder: Path) -> dict[str, float]:
        assert folder.is_dir()
        calls.append(folder)
        return {"gap": 0.5, "minutes": 3.0, "seconds": 180.0}

    def measured(afresh: bool = False) -> _kit.Measured:
        cache.afresh = afresh
        return cache.measured("part", [PolicySpec()], [str(Path("source").absolute())], measure)

    first, again = measured(), measured()
    assert len(calls) == 1 and first.numbers["minutes"] == 3.0 and not first.kept
    assert again == _kit.Measured({"gap": 0.5}, kept=True)
    assert again.figure("gap", "<=", 1.0) == Figure(0.5, "<=", 1.0, kept=True)
    assert again.figure("gap", "<=", 1.0).dump()["kept"] is True and "kept" not in first.figure("gap").dump()
    # Not measured, so not judged; any other figure that is missing passes no bar.
    assert again.figure("minutes", "<=", 15.0) == Figure(None)
    assert not again.figure("other", "<=", 15.0).dump()["ok"]
    assert not measured(afresh=True).kept and len(calls) == 2


def test_what_figures_follow_from_is_in_the_key(cache: _kit.Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def key() -> Path:
        return cache.folder("part", PolicySpec(), [str(Path("source").absolute())])

    first = key()
    assert key() == first != cache.folder("part", PolicySpec(seed=1), [str(Path("source").absolute())])
    Path("source/code.py").write_text("2")
    second = key()
    assert second != first
    own = Path("own.py")
    own.write_text("1")
    monkeypatch.setattr(_kit, "__file__", str(own.absolute()))
    third = key()
    product = cache.folder("part", PolicySpec(), [str(Path("source").absolute())], own=False)
    own.write_text("2")
    assert len({second, third, key()}) == 3
    assert cache.folder("part", PolicySpec(), [str(Path("source").absolute())], own=False) == product
    monkeypatch.setattr(_kit, "versions", lambda: {"torch": "0"})
    fourth = key()
    assert fourth not in (second, third)
    monkeypatch.setattr("torch.get_num_threads", lambda: 77)
    assert key() != fourth
    with pytest.raises(FileNotFoundError):
        cache.folder("part", PolicySpec(), ["services/none_such"])


def test_parts_and_the_form(capsys: pytest.CaptureFixture[str]) -> None:
    parts = {
        "speed": lambda given: {"ratio": Figure(3.0, ">=", given.bar, 2.0, judged="ratio")},
        "other": lambda given: {"value": Figure(3.0, ">=", 2.0, 2.0)},
    }
    parser = _kit.parser("Doc.", parts)
    parser.add_argument("--bar", type=float, default=1.0)
    for arguments, code, names in ((["--part", "speed", "--bar", "2"], 1, {"ratio"}), ([], 0, {"ratio", "value"})):
        with pytest.raises(SystemExit) as left:
            _kit.run("test", parser.parse_args(arguments), parts)
        assert left.value.code == code
        whole = json.loads(capsys.readouterr().out)
        assert set(whole["figures"]) == names and whole["ok"] == (code == 0) and whole["bench"] == "test"
        assert {one["judged"] for one in whole["figures"].values()} == names
    assert isinstance(parser, argparse.ArgumentParser)


def test_children() -> None:
    assert json.loads(_kit.call("_kit") or "0") == 0
    with pytest.raises(subprocess.CalledProcessError):
        _kit.call("_direct")
    assert _kit.in_child(os.getpid) != os.getpid()
    with pytest.raises(ZeroDivisionError):
        _kit.in_child(operator.truediv, 1, 0)


def test_minutes_of_a_resumed_training_are_not_known(tmp_path: Path) -> None:
    def train(run: Run) -> str:
        if run.resume is None:
            run.checkpoint(1, lambda folder: (folder / "state.json").touch())
        return "model"

    def evaluate(model: str, run: Run) -> dict[str, float]:
        if run.resume is None:
            raise KeyboardInterrupt
        return {"gap": 0.5}

    assert _kit.trained(tmp_path / "whole", train, lambda model, run: {"gap": 1.0}).keys() == {"gap", "minutes"}
    with pytest.raises(KeyboardInterrupt):
        _kit.trained(tmp_path / "interrupted", train, evaluate)
    assert _kit.trained(tmp_path / "interrupted", train, evaluate) == {"gap": 0.5}
