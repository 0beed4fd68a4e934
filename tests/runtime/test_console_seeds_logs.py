"""The smaller parts of what a run is given."""

from __future__ import annotations

import io
import json
import logging
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from services.runtime import logs
from services.runtime.console import ConsoleRun
from services.runtime.seeds import generator


def test_generators_repeat_and_differ_by_purpose() -> None:
    def draw(seed: int, *path: str | int) -> list[float]:
        drawn: list[float] = torch.rand(3, generator=generator(seed, *path)).tolist()
        return drawn

    assert draw(0, "train", 1) == draw(0, "train", 1)
    different = [draw(0), draw(1), draw(0, "train"), draw(0, "train", 1), draw(0, "train", "1"), draw(0, "train1")]
    assert len({tuple(numbers) for numbers in different}) == len(different)
    assert draw(2**63 - 1, "x")


def test_console_run_shows_bars_and_keeps_outputs(tmp_path: Path) -> None:
    shown = io.StringIO()
    made = tmp_path / "made"
    made.mkdir()
    (made / "a.txt").write_text("a")
    with ConsoleRun(tmp_path / "out", console=Console(file=shown, force_terminal=True, width=120)) as run:
        run.stage("train", 2)
        run.metric(1, loss=0.25)
        run.metric(2, loss=float("inf"))
        run.advance(2)
        run.log("all is [well]")
        run.artifact("answer", "text", made)
    assert "train" in shown.getvalue()
    assert "2/2" in shown.getvalue()
    assert "all is [well]" in shown.getvalue()
    assert (tmp_path / "out" / "answer" / "a.txt").read_text() == "a"
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"stage": "train", "step": 1, "loss": 0.25},
        {"stage": "train", "step": 2, "loss": None},
    ]


def test_a_narrow_terminal_shows_fewer_metrics_in_one_line() -> None:
    def lines(width: int) -> list[str]:
        shown = io.StringIO()
        with ConsoleRun(console=Console(file=shown, width=width, force_terminal=True, force_interactive=False)) as run:
            run.stage("generate", 5000, "subjects")
            run.metric(1, accepted_share=0.75, accuracy=0.9123456)
            run.advance(2048)
        return [line for line in shown.getvalue().splitlines() if "generate" in line]

    assert len(lines(80)) == 1 and "accepted_share 0.75" in lines(80)[0]
    assert "accuracy 0.912" in lines(120)[0]


def test_without_a_terminal_progress_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("services.runtime.console.time.monotonic", lambda: now[0])
    shown = io.StringIO()
    with ConsoleRun(console=Console(file=shown, width=80)) as run:
        run.stage("train", 60)
        for step in range(1, 61):
            now[0] += 1
            if step % 10 == 0:
                run.metric(step, loss=1 / step)
            run.advance(step)
    assert shown.getvalue().splitlines() == [
        "train: 15 of 60 steps loss 0.1",
        "train: 30 of 60 steps loss 0.0333",
        "train: 45 of 60 steps loss 0.025",
        "train: 60 of 60 steps loss 0.0167",
    ]


def test_the_end_of_a_stage_is_told_once() -> None:
    shown = io.StringIO()
    with ConsoleRun(console=Console(file=shown, width=80)) as run:
        run.stage("solve", 20)
        for done in (10, 20, 20):
            run.advance(done)
    assert shown.getvalue().splitlines() == ["solve: 20 of 20 steps"]


def test_ctrl_c_ends_at_a_checkpoint_and_twice_at_once(tmp_path: Path) -> None:
    def keep(step: int, folder: Path) -> None:
        (folder / "step").write_text(str(step))

    def steps(run: ConsoleRun, interruptions: dict[int, int]) -> int:
        """The step at which it ended."""
        step = 0
        try:
            with run:
                run.stage("train", 100)
                for step in range(1, 101):
                    run.advance(step)
                    for _ in range(interruptions.get(step, 0)):
                        signal.raise_signal(signal.SIGINT)
                    if step % 10 == 0 and run.checkpoint_due():
                        run.checkpoint(step, partial(keep, step))
        except KeyboardInterrupt:
            pass
        return step

    before = signal.getsignal(signal.SIGINT)
    # Nothing is known of checkpoints before the first could be.
    assert steps(ConsoleRun(tmp_path, checkpoint_seconds=600), {4: 1}) == 4
    assert steps(ConsoleRun(tmp_path, checkpoint_seconds=600), {14: 1}) == 20
    assert (tmp_path / "checkpoint" / "state" / "step").read_text() == "20"
    assert steps(ConsoleRun(tmp_path, checkpoint_seconds=600), {34: 2}) == 34
    assert signal.getsignal(signal.SIGINT) is before


def test_logs_are_one_json_object_per_line(capsys: pytest.CaptureFixture[str]) -> None:
    before = logging.getLogger().handlers[:], logging.getLogger().level
    try:
        logs.configure("gateway")
        try:
            raise ValueError("two\nlines")
        except ValueError:
            logging.getLogger("a.b").exception("went %s", "wrong", extra={"job": "job_1"})
        (line,) = capsys.readouterr().err.splitlines()
    finally:
        logging.getLogger().handlers[:], logging.getLogger().level = before
        logging.captureWarnings(False)
    told = json.loads(line)
    assert told.keys() == {"time", "level", "process", "logger", "message", "job", "error"}
    assert (told["level"], told["process"], told["message"]) == ("ERROR", "gateway", "went wrong")
    assert "two\nlines" in told["error"]


def test_a_process_hears_that_its_parent_is_gone() -> None:
    code = (
        "import os, threading; from services.runtime.lifetime import exit_on_eof; "
        "exit_on_eof(lambda: os._exit(7)); print('up', flush=True); threading.Event().wait(30)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdin is not None
    with process.stdout:
        assert process.stdout.readline() == b"up\n"
        process.stdin.close()
        assert process.wait(10) == 7
