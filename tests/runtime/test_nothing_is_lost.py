"""Side outputs never end a run, and nothing that a run did not make is replaced or removed."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ethogram.cli.artifacts import _name
from ethogram.cli.options import new_path
from ethogram.demo import _check_output
from ethogram.errors import InvalidInput, Unavailable
from ethogram.platform.state import StateDir
from ethogram.specs.base import ArtifactRef
from ethogram.specs.clt import ActivationsSpec
from ethogram.specs.generation import GenerationSpec
from services.runtime import scratch
from services.runtime.console import ConsoleRun
from services.runtime.folders import RunFolder
from services.runtime.metrics import MetricsWriter
from services.runtime.run import Cancelled, Stopped, Waiting
from tests.recorder import Recorder
from tests.runtime.test_scalars import scalars

SPEC = GenerationSpec(subjects=8)


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the report failed ([Errno 28] No space left on device)"),
        (Unavailable("the Hub does not answer"), "the report failed (the Hub does not answer)"),
        (KeyError("figures"), "the report failed, which is a defect"),
    ],
)
def test_a_side_output_that_fails_is_a_warning(error: Exception, told: str) -> None:
    run = Recorder()
    with run.side_output("the report"):
        raise error
    assert run.levels == ["warning"] and run.logs[0].startswith(told) and "everything else is kept" in run.logs[0]


@pytest.mark.parametrize("signal", [Cancelled, Stopped, Waiting, KeyboardInterrupt])
def test_the_end_of_a_run_is_no_failure_of_a_side_output(signal: type[BaseException]) -> None:
    with pytest.raises(signal), Recorder().side_output("the report"):
        raise signal


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file can be longer than 400 bytes, as on a disk that is full then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_metrics_that_cannot_be_written_end_no_run(tmp_path: Path, small_disk: None) -> None:
    warnings: list[str] = []
    writer = MetricsWriter(tmp_path, warn=warnings.append)
    for step in range(1, 50):
        writer.write("train", step, {"loss": 0.5})
    writer.close()
    assert len(warnings) == 2 and all("the run continues" in text for text in warnings)
    # Whole lines and whole events, which resume.
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)) and 3 < len(rows) < 49
    assert [step for _, step, _ in scalars(tmp_path)] == list(range(1, len(scalars(tmp_path)) + 1))


def test_a_damaged_line_of_an_earlier_attempt_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "metrics.jsonl").write_text('{"stage": "tr')
    warnings: list[str] = []
    writer = MetricsWriter(tmp_path / "metrics", tmp_path / "checkpoint", warnings.append)
    writer.write("train", 1, {"loss": 0.5})
    writer.close()
    (warning,) = warnings
    assert warning.startswith("the TensorBoard events cannot be written (Unterminated string")


def test_events_are_there_while_a_run_goes_on(tmp_path: Path) -> None:
    with ConsoleRun(tmp_path) as run:
        run.stage("train", 2)
        run.metric(1, loss=0.5)
        assert scalars(tmp_path) == [("train/loss", 1, 0.5)]


MINE = {"metrics.jsonl": b"mine", "events.out.tfevents.mine": b"mine", "checkpoint/mine": b"mine", "spec.json": b"{}"}


def own(folder: Path, names: dict[str, bytes] = MINE) -> dict[str, bytes | None]:
    for name, data in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return contents(folder)


@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("name", sorted({*MINE, "result.json", "wandb/mine", "checkpoint.old/mine", "run.json"}))
def test_a_folder_with_files_of_ones_own_is_no_run(tmp_path: Path, store: bool, name: str) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    if store:
        own(mine, {"activations/manifest.json": b"{}"})
    kept = own(mine, {name: b"mine"})
    with pytest.raises(InvalidInput, match="exists already and is not a run"):
        RunFolder(mine).begin(ActivationsSpec(policy=ArtifactRef(artifact="policy")))
    assert contents(mine) == kept


def test_the_spec_of_a_run_alone_makes_no_run(tmp_path: Path) -> None:
    kept = own(tmp_path / "mine", MINE | {"spec.json": SPEC.model_dump_json().encode()})
    with pytest.raises(InvalidInput, match="is not a run"):
        RunFolder(tmp_path / "mine").begin(SPEC)
    # Nor does one beside a zoo that is to be made.
    (tmp_path / "mine").rename(tmp_path / "zoo-run")
    with pytest.raises(InvalidInput, match="is not a run"):
        RunFolder(tmp_path / "zoo-run", {"zoo": tmp_path / "zoo"}).begin(SPEC)
    assert contents(tmp_path / "zoo-run") == kept


def test_what_people_put_into_a_run_stays(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out")
    folder.begin(SPEC)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert folder.leave(RuntimeError(), (), ("zoo",)).startswith("Nothing is kept")
    assert list(contents(tmp_path / "out")) == ["notes.txt"]
    # A folder that was there before is too.
    (tmp_path / "empty").mkdir()
    folder = RunFolder(tmp_path / "empty")
    folder.begin(SPEC)
    folder.leave(RuntimeError(), (), ())
    assert (tmp_path / "empty").exists() and not contents(tmp_path / "empty")


def test_artifacts_move_to_their_places_at_the_end_and_replace_nothing(tmp_path: Path) -> None:
    places = {"zoo": tmp_path / "zoo", "report": tmp_path / "zoo" / "report"}

    def finished(root: str) -> tuple[RunFolder, list[str]]:
        folder, logs = RunFolder(tmp_path / root, places), list[str]()
        folder.begin(SPEC)
        for name in places:
            own(tmp_path / root / name, {"made": b"made"})
        folder.finish({}, set(places), lambda text, level: logs.append(text))
        return folder, logs

    folder, logs = finished("zoo-run")
    assert contents(tmp_path / "zoo") == {"made": b"made", "report": None, "report/made": b"made"} and logs == []
    assert folder.place("zoo") == tmp_path / "zoo" and folder.id
    with pytest.raises(InvalidInput, match="holds a finished run"):
        RunFolder(tmp_path / "zoo-run", places).begin(SPEC)
    # Moved elsewhere, it is made again; what was put there meanwhile stays.
    (tmp_path / "zoo").rename(tmp_path / "elsewhere")
    folder = RunFolder(tmp_path / "zoo-run", places)
    folder.begin(SPEC)
    own(tmp_path / "zoo-run" / "zoo", {"made": b"made"})
    kept, logs = own(tmp_path / "zoo", {"mine": b"mine"}), []
    folder.finish({}, {"zoo", "report"}, lambda text, level: logs.append(text))
    assert contents(tmp_path / "zoo") == kept and "exists by now" in logs[0]
    assert folder.place("zoo") == tmp_path / "zoo-run" / "zoo"


def test_a_checkpoint_on_another_disk_is_replaced_but_not_emptied(tmp_path: Path) -> None:
    own(tmp_path / "disk", {"state/step": b"1"})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint").symlink_to(tmp_path / "disk")
    with ConsoleRun(tmp_path / "run", checkpoint_seconds=0) as run:
        for step in ("2", "3"):
            run.checkpoint(int(step), lambda folder, step=step: (folder / "step").write_text(step))  # type: ignore[misc]
    assert (tmp_path / "disk" / "state" / "step").read_text() == "1"


def test_folders_of_others_are_no_scratch_and_no_state(tmp_path: Path) -> None:
    kept = own(tmp_path / "work", {"mine/lock": b"", "mine/data": b"mine"})
    with scratch.folder(tmp_path / "work", "worker"):
        pass
    assert contents(tmp_path / "work") == kept
    (tmp_path / "project").mkdir()
    kept = own(tmp_path / "project", {"lock": b"mine", "redis/dump.rdb": b"mine"})
    with pytest.raises(InvalidInput, match="holds other files"):
        StateDir(tmp_path / "project").make()
    assert contents(tmp_path / "project") == kept
    # A new disk, on which a worker and an inference server ran by themselves, and a state that is used again.
    for name in ("lost+found", "work", "store/tmp"):
        (tmp_path / "disk" / name).mkdir(parents=True)
    for name in ("registry.db", "registry.db-wal", "registry.db-shm", "inference.json"):
        (tmp_path / "disk" / name).touch()
    for _ in range(2):
        StateDir(tmp_path / "disk").make()


@pytest.mark.parametrize("name", ["report.json", "evaluation", "steering.png"])
def test_a_demo_replaces_a_demo_alone(tmp_path: Path, name: str) -> None:
    _check_output(tmp_path)
    own(tmp_path, {name: b"[]"})
    with pytest.raises(InvalidInput, match=f"has a {name} that no demo made"):
        _check_output(tmp_path)
    (tmp_path / "report.json").write_text('{"bench": "demo"}')
    _check_output(tmp_path)


def test_new_files_and_folders_are_new(tmp_path: Path) -> None:
    class Option:
        opts = ("--report", "-r")

    option: Any = Option()
    (tmp_path / "there").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "nothing")
    for name in ("there", "nowhere"):
        with pytest.raises(InvalidInput, match=f"--report: .*{name} exists already"):
            new_path(option, tmp_path / name)
    assert new_path(option, tmp_path / "new") == tmp_path / "new" and new_path(option, None) is None


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("run.v1.2", "run.v1.2"),
        ("data.parquet", "data.parquet"),
        ("my zoo \u00e9", "my-zoo-e"),
        (".hidden", "hidden"),
        ("\u52d5\u7269\u5712", "zoo"),
        ("x" * 200, "x" * 80),
    ],
)
def test_an_artifact_is_named_as_it_was_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], typed: str, name: str
) -> None:
    (tmp_path / typed).mkdir()
    monkeypatch.chdir(tmp_path)
    assert _name(Path(typed), "zoo") == name
    assert (f"is called {name}" in capsys.readouterr().err.replace("\n", "")) is (typed != name)
    os.chdir(tmp_path / typed)
    assert _name(Path(), "zoo") == name
    shutil.rmtree(tmp_path / typed)
