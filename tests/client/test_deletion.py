"""Commands that delete, against a real platform."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ethogram.cli.main import run
from ethogram.platform.stack import Platform

Cli = Callable[..., tuple[int, Any]]


@pytest.fixture
def cli(platform: Platform, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs a command with --json: its exit code and its answer."""
    monkeypatch.setenv("ETHOGRAM_URL", platform.url)

    def call(*arguments: str) -> tuple[int, Any]:
        with pytest.raises(SystemExit) as left:
            run([*arguments, "--json"])
        return int(left.value.code or 0), json.loads(capsys.readouterr().out)

    return call


def test_a_model_and_its_artifact(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    artifact = cli("artifacts", "put", str(tmp_path), "--name", "mine", "--type", "codec")[1]["id"]
    assert cli("models", "publish", "to-delete", artifact)[1]["version"] == "1"
    code, answer = cli("artifacts", "rm", artifact)
    assert code == 1 and "retire that first" in answer["error"]["message"]
    assert cli("models", "retire", "to-delete", "1")[1]["retired"] is True
    assert cli("artifacts", "rm", artifact)[1] == {"deleted": artifact}
    code, answer = cli("artifacts", "rm", artifact)
    assert (code, answer["error"]["reason"]) == (1, "NOT_FOUND")
    assert "to-delete" not in {model["name"] for model in cli("models", "ls")[1]}


def test_a_job(cli: Cli) -> None:
    job = cli("submit", "generation", "--queue", "nobody")[1]["id"]
    code, answer = cli("jobs", "rm", job)
    assert code == 1 and "cancel it first" in answer["error"]["message"]
    cli("jobs", "cancel", job)
    assert cli("jobs", "rm", job)[1] == {"deleted": job}
    assert cli("jobs", "get", job)[1]["error"]["reason"] == "NOT_FOUND"
