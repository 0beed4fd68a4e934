"""A run in parts: each is reported under its name, and an interrupted run resumes within the part that it was in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ethogram.errors import InvalidInput
from services.runtime.parts import Parts
from services.runtime.run import Run
from services.runtime.training import fit
from tests.recorder import Interrupted, Recorder
from tests.runtime.test_training import ToyTrainer, same, toy_spec

NAMES = ("first", "second", "third")


class Kept(Recorder):
    """Keeps every checkpoint, each in a folder of its own: parts count their own steps."""

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        super().checkpoint(len(self.checkpoints), write)


def trained(run: Run, folder: Path, seen: list[str] | None = None) -> dict[str, Any]:
    """The results of three trainings, whose weights are files."""
    parts = Parts(run, folder)

    def work(seed: int) -> Callable[[Run], Any]:
        def train(part: Run) -> Any:
            if seen is not None:
                seen.append(parts.present)
            trainer = ToyTrainer(toy_spec().model_copy(update={"seed": seed}))
            fit(trainer, part)
            (folder / parts.present).mkdir()
            (folder / parts.present / "weights.json").write_text(json.dumps(trainer.weight.tolist()))
            return {"steps": trainer.step, "loss": trainer.progress.lowest}

        return train

    return {name: parts.part(name, work(seed)) for seed, name in enumerate(NAMES)}


def files(folder: Path) -> dict[str, str]:
    return {path.parent.name: path.read_text() for path in folder.rglob("weights.json")}


def test_each_part_is_reported_under_its_name(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "run")
    found = trained(recorder, tmp_path / "parts")
    assert recorder.stage_names == ["first/train", "second/train", "third/train"]
    assert list(found) == list(NAMES) and all(result["steps"] == 9 for result in found.values())
    assert len({result["loss"] for result in found.values()}) == 3


@pytest.mark.parametrize("fall", range(1, 27, 4))
def test_an_interrupted_run_resumes_within_its_part(fall: int, tmp_path: Path) -> None:
    class Falls(Kept):
        def advance(self, done: int) -> None:
            super().advance(done)
            if sum(1 for unit in self.done if unit) > fall:
                raise Interrupted

    whole = trained(Recorder(), tmp_path / "whole")
    first, seen = Falls(tmp_path / "run", every=True), list[str]()
    with pytest.raises(Interrupted):
        trained(first, tmp_path / "first")
    again = Recorder(resume=first.checkpoints[-1])
    assert trained(again, tmp_path / "again", seen) == whole
    assert files(tmp_path / "again") == files(tmp_path / "whole")
    # Finished parts are not done again, and the present one goes on from its own checkpoint.
    assert seen == list(NAMES)[fall // 9 :]
    assert again.done[0] == fall % 9


def test_a_finished_run_does_nothing_again(tmp_path: Path) -> None:
    run, seen = Kept(tmp_path / "run", every=True), list[str]()
    whole = trained(run, tmp_path / "first")
    again = Recorder(resume=run.checkpoints[-1])
    assert trained(again, tmp_path / "again", seen) == whole
    assert not seen and not again.stages and files(tmp_path / "again") == files(tmp_path / "first")


def test_the_checkpoint_of_a_part_is_no_other_parts(tmp_path: Path) -> None:
    """A part that is not the one of the checkpoint begins afresh."""
    first = Kept(tmp_path / "run", keep=3, fall=4)
    with pytest.raises(Interrupted):
        trained(first, tmp_path / "first")
    parts = Parts(Recorder(resume=first.checkpoints[0]), tmp_path / "again")
    resumed: dict[str, Path | None] = {}
    for name in ("second", "first"):
        parts.part(name, lambda run: resumed.update({parts.present: run.resume}))
    assert resumed["second"] is None and resumed["first"] == first.checkpoints[0] / "present"


def test_a_resumed_part_equals_an_uninterrupted_one_to_the_bit(tmp_path: Path) -> None:
    alone = ToyTrainer(toy_spec())
    fit(alone)
    trainer = ToyTrainer(toy_spec())
    Parts(Recorder(), tmp_path).part("any", lambda run: fit(trainer, run))
    same(trainer, alone)


def test_messages_and_artifacts_are_passed_on(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "run", inputs={"zoo": tmp_path})
    parts = Parts(recorder, tmp_path / "parts")

    def work(run: Run) -> int:
        assert run.inputs == {"zoo": tmp_path}
        run.log("something", "warning")
        run.metric(3, loss=0.5)
        with run.output_folder("model") as folder:
            folder.mkdir()
            run.artifact("model", "codec", folder)
        return 5

    assert parts.part("one", work) == 5
    assert recorder.logs == ["one: something"] and recorder.levels == ["warning"]
    assert recorder.metrics == {3: {"loss": 0.5}} and recorder.artifacts == [("model", "codec")]


def test_each_part_has_a_run_of_its_own_at_weights_and_biases(tmp_path: Path) -> None:
    run = Recorder()
    run.id = "job_a"
    attempts = []
    for attempt in range(2):
        parts, ids = Parts(run, tmp_path / str(attempt)), list[str]()
        for name in NAMES:
            parts.part(name, lambda part, ids=ids: ids.append(part.id))  # type: ignore[misc]
        attempts.append(ids)
    assert attempts[0] == attempts[1]
    assert len(set(attempts[0])) == 3 and "job_a" not in attempts[0]


@pytest.mark.parametrize("content", ["{", "[]", None])
def test_a_broken_checkpoint_is_said_to_be_one(content: str | None, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    if content is not None:
        (tmp_path / "checkpoint" / "parts.json").write_text(content)
    with pytest.raises(InvalidInput, match=r"checkpoint: cannot be read .*start afresh"):
        Parts(Recorder(resume=tmp_path / "checkpoint"), tmp_path / "parts")
