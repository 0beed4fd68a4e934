"""Models that are trained once and kept in the cache."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest

from services.runtime.run import Run
from services.runtime.trained import trained_once
from services.runtime.training import fit
from tests.recorder import Interrupted, Recorder
from tests.runtime.test_training import ToyTrainer, toy_spec


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ETHOGRAM_CACHE", raising=False)
    return tmp_path


def write(run: Run, folder: Path) -> None:
    folder.mkdir()
    (folder / "weights").write_text("trained")


def never(run: Run, folder: Path) -> None:
    raise AssertionError("it was trained already")


def test_a_model_is_trained_once() -> None:
    folder = trained_once("toys/a", "model", write)
    assert (folder / "weights").read_text() == "trained" and folder.name == "model"
    assert trained_once("toys/a", "model", never) == folder
    with pytest.raises(AssertionError):
        trained_once("toys/b", "model", never)


def test_what_was_interrupted_resumes_and_is_no_model_before() -> None:
    whole = ToyTrainer(toy_spec())
    fit(whole)
    steps: list[int] = []

    def train(run: Run, folder: Path, fall: bool) -> None:
        class Falls(ToyTrainer):
            def advance(self) -> dict[str, object]:  # type: ignore[override]
                steps.append(self.step)
                if fall and self.step == 5:
                    raise Interrupted
                return super().advance()  # type: ignore[return-value]

        trainer = Falls(toy_spec())
        folder.mkdir()
        fit(trainer, run)
        (folder / "weights").write_text(str(trainer.weight.tolist()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("services.runtime.trained._CHECKPOINT_SECONDS", 0.0)
        with pytest.raises(Interrupted):
            trained_once("toys/c", "model", lambda run, folder: train(run, folder, fall=True))
        folder = trained_once("toys/c", "model", lambda run, folder: train(run, folder, fall=False))
    assert steps == [0, 1, 2, 3, 4, 5, 5, 6, 7, 8]
    assert (folder / "weights").read_text() == str(whole.weight.tolist())


@pytest.mark.parametrize("part", [False, True])
def test_who_interrupts_a_training_is_told_what_is_kept(
    part: bool, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(run: Run, folder: Path, first: bool) -> None:
        run.stage("train", 2)
        if not first:
            run.checkpoint(1, lambda folder: None)
        raise KeyboardInterrupt

    for first in (True, False):
        recorder = Recorder() if part else None
        with pytest.raises(KeyboardInterrupt):
            trained_once("toys/f", "model", lambda run, folder: train(run, folder, first), run=recorder)  # noqa: B023
        said = recorder.resume_note if recorder else " ".join(capsys.readouterr().err.split())
        text = f"Run the same command again to resume from the last checkpoint, in {cache / 'ethogram' / 'toys' / 'f'}."
        assert said == ("" if first else text)


def test_a_training_reports_to_the_run_that_it_is_a_part_of(capsys: pytest.CaptureFixture[str]) -> None:
    def train(run: Run, folder: Path) -> None:
        assert run.device == "toy"
        run.stage("train", 3)
        for step in range(4):
            run.advance(step)
        run.metric(3, loss=0.5)
        run.log("done")
        write(run, folder)

    recorder = Recorder()
    recorder.device = "toy"
    folder = trained_once("toys/e", "model", train, run=recorder)
    assert recorder.stages == [("toys/train", 3, "steps")] and recorder.done == [0, 1, 2, 3]
    assert recorder.logs == ["toys: done"] and (folder / "weights").exists()
    assert capsys.readouterr() == ("", "")


def slowly(run: Run, folder: Path) -> None:
    time.sleep(0.3)
    folder.mkdir()
    (folder / "weights").write_text(str(time.monotonic()))


def in_process(queue: multiprocessing.Queue[str]) -> None:
    queue.put((trained_once("toys/d", "model", slowly) / "weights").read_text())


def test_of_two_processes_one_trains_and_the_other_waits() -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=in_process, args=(queue,)) for _ in range(2)]
    for process in processes:
        process.start()
    found = {queue.get(timeout=20) for _ in processes}
    for process in processes:
        process.join(20)
    assert len(found) == 1
