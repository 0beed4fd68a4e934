"""A run seen through its servicer, over a real channel."""

from __future__ import annotations

import errno
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from ethogram.convert import to_proto
from ethogram.errors import InvalidInput, NotFound, Unavailable
from ethogram.rpc import CHANNEL_OPTIONS, error_of
from ethogram.specs.base import WandbSpec
from ethogram.specs.generation import GenerationSpec
from ethogram.specs.kinds import KINDS
from ethogram.v1 import generation_pb2, generation_pb2_grpc, jobs_pb2
from services.artifacts.store import ArtifactStore
from services.runtime import job_run, lifetime
from services.runtime.job_run import JobRun
from services.runtime.metrics import MetricsWriter
from services.runtime.parts import Parts
from services.runtime.run import Cancelled, Run
from services.runtime.servicer import STOPPED, add_to_server
from services.runtime.tracking import tracked
from tests.runtime.test_scalars import scalars

Job = Callable[[GenerationSpec, Run], dict[str, Any]]
Call = Callable[..., Any]


def job(spec: GenerationSpec, run: Run) -> dict[str, Any]:
    """The job of the server below; each test puts its own in ``CURRENT``."""
    return CURRENT[0](spec, run)


CURRENT: list[Job] = []


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "store"))


@pytest.fixture
def call(tmp_path: Path) -> Iterator[Call]:
    """Calls Run with a job and yields its events."""
    server = grpc.server(ThreadPoolExecutor(2), options=CHANNEL_OPTIONS)
    kind = replace(KINDS["generation"], job="tests.runtime.test_job_run:job")
    add_to_server(server, kind, generation_pb2.RunGenerationRequest)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) as channel:
        count = 0

        def start(run_job: Job, **context: Any) -> Any:
            nonlocal count
            count += 1
            work = tmp_path / f"work{count}"
            work.mkdir()
            CURRENT[:] = [run_job]
            given = {"job": "job_1", "attempt": "att_1", "tenant": "default", "checkpoint_seconds": 600.0, **context}
            request = generation_pb2.RunGenerationRequest(
                context=jobs_pb2.RunContext(work_dir=str(work), store=str(tmp_path / "store"), **given),
                spec=to_proto(GenerationSpec(seed=7), generation_pb2.GenerationSpec),
            )
            return generation_pb2_grpc.GenerationServiceStub(channel).Run(request)

        yield start
    lifetime.stopping.clear()
    server.stop(None)


def names(events: list[jobs_pb2.JobEvent]) -> list[str]:
    return [event.WhichOneof("event") or "" for event in events]


def test_progress_is_merged_and_its_ends_are_told(call: Call) -> None:
    def run_job(spec: GenerationSpec, run: Run) -> dict[str, Any]:
        for stage in ("one", "two"):
            run.stage(stage, 5000, unit="subjects")
            for step in range(5000):
                run.advance(step + 1)
        return {"seed": spec.seed, "share": 0.5}

    events = list(call(run_job))
    told = [(e.progress.stage, e.progress.done) for e in events if e.WhichOneof("event") == "progress"]
    assert told[0] == ("one", 0)
    assert ("one", 5000) in told
    assert told[-1] == ("two", 5000)
    assert len(told) < 20
    assert json.loads(events[-1].result.json) == {"seed": 7, "share": 0.5}


def test_metrics_are_all_kept_and_what_is_not_finite_is_null(call: Call, store: ArtifactStore) -> None:
    def run_job(spec: GenerationSpec, run: Run) -> dict[str, Any]:
        run.stage("train", 2)
        run.metric(0, loss=0.5, accuracy=0.25)
        run.metric(1, loss=float("nan"), accuracy=0.5)
        return {}

    events = list(call(run_job))
    assert names(events)[-3:] == ["artifact", "log", "result"]
    made = events[-3].artifact
    assert (made.name, made.type) == ("metrics", "metrics")
    with store.open(made.id, "metrics.jsonl") as file:
        lines = [json.loads(line) for line in file]
    assert lines == [
        {"stage": "train", "step": 0, "loss": 0.5, "accuracy": 0.25},
        {"stage": "train", "step": 1, "loss": None, "accuracy": 0.5},
    ]
    (last,) = [e.metric for e in events if e.WhichOneof("event") == "metric"][-1:]
    assert dict(last.values) == {"loss": 0.5, "accuracy": 0.5}


def test_a_stop_checkpoints_and_the_next_run_goes_on_with_its_metrics(call: Call, store: ArtifactStore) -> None:
    began = threading.Event()

    def run_job(spec: GenerationSpec, run: Run) -> dict[str, Any]:
        first = int((run.resume / "step").read_text()) if run.resume else 0
        run.stage("count", 200)
        for step in range(first, 200):
            run.metric(step, step_again=float(step))
            run.advance(step + 1)
            if step == 50 and not run.resume:
                began.set()
                run.log("at step 50")
                lifetime.stopping.wait(5)
            if run.checkpoint_due():
                run.checkpoint(step + 1, lambda folder, n=step + 1: (folder / "step").write_text(str(n)))  # type: ignore[misc]
        return {"from": first}

    events, running = [], call(run_job)
    with pytest.raises(grpc.RpcError) as stopped:
        for event in running:
            events.append(event)
            if began.is_set():
                lifetime.stopping.set()
    assert stopped.value.code() == STOPPED
    (checkpoint,) = [e.checkpoint for e in events if e.WhichOneof("event") == "checkpoint"]
    assert checkpoint.step == 51

    lifetime.stopping.clear()
    events = list(call(run_job, checkpoint=checkpoint.artifact))
    assert json.loads(events[-1].result.json) == {"from": 51}
    with store.open(events[-3].artifact.id, "metrics.jsonl") as file:
        assert [json.loads(line)["step"] for line in file] == list(range(200))


def test_cancelling_the_call_ends_the_job_at_its_next_step(call: Call) -> None:
    ended = threading.Event()

    def run_job(spec: GenerationSpec, run: Run) -> dict[str, Any]:
        try:
            run.stage("count", 10**9)
            for step in range(10**9):
                run.advance(step)
                time.sleep(0.001)
        finally:
            ended.set()
        return {}

    running = call(run_job)
    next(running)
    running.cancel()
    assert ended.wait(5)


def test_a_job_far_ahead_of_its_listener_waits_for_it(call: Call) -> None:
    def run_job(spec: GenerationSpec, run: Run) -> dict[str, Any]:
        for line in range(5000):
            run.log(f"line {line}")
        return {}

    *lines, last = [e.log.message for e in call(run_job) if e.WhichOneof("event") == "log"]
    assert lines == ["computes on cpu", *(f"line {line}" for line in range(5000))]
    assert last.startswith("apart from the work: imports ")


def test_a_job_goes_on_while_its_checkpoint_is_stored(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    went_on, put = threading.Event(), ArtifactStore.put

    def slow(self: ArtifactStore, folder: Path, **given: Any) -> Any:
        assert given["name"] != "checkpoint" or went_on.wait(5)
        return put(self, folder, **given)

    def run_job(spec: GenerationSpec, run: Run) -> dict[str, Any]:
        run.checkpoint(1, lambda folder: (folder / "state").touch())
        went_on.set()
        return {}

    monkeypatch.setattr(ArtifactStore, "put", slow)
    # It is there before the job ends.
    assert [name for name in names(list(call(run_job))) if name != "log"] == ["checkpoint", "result"]


@pytest.mark.parametrize("checkpoints", [1, 2])
def test_a_checkpoint_that_cannot_be_stored_ends_the_attempt_but_not_finished_work(
    checkpoints: int, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: ArtifactStore, folder: Path, **given: Any) -> Any:
        raise Unavailable("the artifact store has no space left")

    def run_job(spec: GenerationSpec, run: Run) -> dict[str, Any]:
        for step in range(checkpoints):
            run.checkpoint(step, lambda folder: (folder / "state").touch())
        return {"done": True}

    monkeypatch.setattr(ArtifactStore, "put", full)
    if checkpoints == 1:
        events = list(call(run_job))
        assert json.loads(events[-1].result.json) == {"done": True}
        assert any(e.log.level == "warning" and "no space left" in e.log.message for e in events)
    else:
        with pytest.raises(grpc.RpcError) as failed:
            list(call(run_job))
        assert failed.value.code() == grpc.StatusCode.UNAVAILABLE


def test_after_a_checkpoint_that_was_not_stored_the_next_is_due_at_once_and_waited_for(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems, put = [RuntimeError("a moment of weakness")], ArtifactStore.put

    def flaky(self: ArtifactStore, folder: Path, **given: Any) -> Any:
        if problems:
            raise problems.pop()
        return put(self, folder, **given)

    def run_job(spec: GenerationSpec, run: Run) -> dict[str, Any]:
        run.checkpoint(1, lambda folder: (folder / "state").touch())
        while not run.checkpoint_due():
            time.sleep(0.01)
        run.checkpoint(2, lambda folder: (folder / "state").touch())
        run.log("goes on")
        assert not run.checkpoint_due()
        return {}

    monkeypatch.setattr(ArtifactStore, "put", flaky)
    events = list(call(run_job))
    (warning,) = [e.log.message for e in events if e.log.level == "warning"]
    assert "storing a checkpoint failed" in warning and "a moment of weakness" in warning
    told = [e.checkpoint.step or e.log.message for e in events]
    assert told.index(2) < told.index("goes on") and 1 not in told


def test_a_stop_during_an_upload_stores_both_checkpoints(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, put = threading.Event(), ArtifactStore.put

    def slow(self: ArtifactStore, folder: Path, **given: Any) -> Any:
        assert go_on.wait(5)
        return put(self, folder, **given)

    def run_job(spec: GenerationSpec, run: Run) -> dict[str, Any]:
        run.checkpoint(1, lambda folder: (folder / "state").touch())
        assert not run.checkpoint_due()
        lifetime.stopping.set()
        assert run.checkpoint_due()
        threading.Timer(0.05, go_on.set).start()
        run.checkpoint(2, lambda folder: (folder / "state").touch())
        return {}

    monkeypatch.setattr(ArtifactStore, "put", slow)
    events = []
    with pytest.raises(grpc.RpcError) as stopped:
        for event in call(run_job):
            events.append(event)
    assert stopped.value.code() == STOPPED
    assert [e.checkpoint.step for e in events if e.WhichOneof("event") == "checkpoint"] == [1, 2]


def test_the_log_ends_with_what_the_platform_took(call: Call) -> None:
    def run_job(spec: GenerationSpec, run: Run) -> dict[str, Any]:
        def write(folder: Path) -> None:
            time.sleep(0.3)
            (folder / "state").touch()

        run.checkpoint(1, write)
        return {}

    *_, last = [e.log.message for e in call(run_job) if e.WhichOneof("event") == "log"]
    took = {name: float(seconds) for name, seconds in re.findall(r"(\w+) ([\d.]+) s", last)}
    assert list(took) == ["imports", "inputs", "checkpoints", "outputs"]
    assert took["checkpoints"] > took["outputs"] + took["inputs"]


def test_inputs_come_as_folders_and_are_the_parents_of_outputs(
    call: Call, store: ArtifactStore, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.txt").write_text("hello")
    given, _ = store.put(source, name="zoo", type="zoo")

    def run_job(spec: GenerationSpec, run: Run) -> dict[str, Any]:
        text = (run.inputs["zoo"] / "a.txt").read_text()
        out = tmp_path / "out"
        out.mkdir()
        (out / "b.txt").write_text(text.upper())
        run.artifact("loud", "text", out)
        return {}

    made = next(e.artifact for e in call(run_job, inputs={"zoo": given}) if e.WhichOneof("event") == "artifact")
    manifest = store.manifest(made.id)
    assert manifest.parents == [given]
    assert (manifest.job, manifest.attempt) == ("job_1", "att_1")
    assert manifest.spec is not None
    assert manifest.spec["seed"] == 7
    assert made.size == 5


def test_an_output_may_be_a_source_of_later_ones(call: Call, store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")

    def run_job(spec: GenerationSpec, run: Run) -> dict[str, Any]:
        run.artifact("first", "text", tmp_path)
        Parts(run, tmp_path / "parts").source_artifact("base", "text", tmp_path)
        run.artifact("last", "text", tmp_path)
        return {}

    made = {e.artifact.name: e.artifact.id for e in call(run_job) if e.WhichOneof("event") == "artifact"}
    parents = {name: store.manifest(id).parents for name, id in made.items()}
    assert parents == {"first": [], "base": [], "last": [made["base"]]}


def test_errors_arrive_as_what_they_are(call: Call) -> None:
    def refuse(spec: GenerationSpec, run: Run) -> dict[str, Any]:
        raise InvalidInput.field("spec.patterns.0.token", "is missing")

    def break_down(spec: GenerationSpec, run: Run) -> dict[str, Any]:
        raise ZeroDivisionError("secret")

    with pytest.raises(grpc.RpcError) as refused:
        list(call(refuse))
    error = error_of(refused.value)
    assert isinstance(error, InvalidInput)
    assert error.violations[0].field == "spec.patterns.0.token"

    events = []
    with pytest.raises(grpc.RpcError) as broken:
        events.extend(call(break_down))
    assert broken.value.code() == grpc.StatusCode.INTERNAL
    assert "secret" not in (broken.value.details() or "")

    with pytest.raises(grpc.RpcError) as missing:
        list(call(break_down, inputs={"zoo": "0" * 64}))
    assert isinstance(error_of(missing.value), NotFound)


def test_a_result_that_is_no_json_is_a_defect(call: Call) -> None:
    with pytest.raises(grpc.RpcError) as broken:
        list(call(lambda spec, run: {"loss": float("nan")}))
    assert broken.value.code() == grpc.StatusCode.INTERNAL


def test_events_are_there_while_a_job_runs(call: Call, tmp_path: Path) -> None:
    seen: list[Any] = []

    def run_job(spec: GenerationSpec, run: Run) -> dict[str, Any]:
        run.stage("train", 2)
        run.metric(1, loss=0.5)
        # Below the worker's state folder, where TensorBoard finds them.
        seen.extend(scalars(tmp_path / "work1" / "metrics"))
        return {}

    list(call(run_job))
    assert seen == [("train/loss", 1, 0.5)]


def test_weights_and_biases_of_a_job_are_an_artifact_and_one_run_in_all_attempts(
    call: Call, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)

    def run_job(spec: GenerationSpec, run: Run) -> dict[str, Any]:
        with tracked(WandbSpec(project="zoos"), {}, run) as log:
            log(1, {"loss": 0.5})
        return {"id": log.id}

    for _ in range(2):
        events = list(call(run_job))
        (made,) = [event.artifact for event in events if event.WhichOneof("event") == "artifact"]
        assert (made.name, made.type) == ("wandb", "wandb")
        assert any(path.endswith("/run-job_1.wandb") for path in store.manifest(made.id).files)
        assert json.loads(events[-1].result.json) == {"id": "job_1"}


@pytest.mark.parametrize("broken", [(ArtifactStore, "put"), (MetricsWriter, "close")])
def test_metrics_that_cannot_be_kept_cost_no_result(
    broken: tuple[type, str], call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise Unavailable("the artifact store has no space left")

    def run_job(spec: GenerationSpec, run: Run) -> dict[str, Any]:
        run.metric(1, loss=0.5)
        return {"done": True}

    monkeypatch.setattr(*broken, full)
    monkeypatch.setattr(job_run, "RETRY_SECONDS", (0.01, 0.01))
    events = list(call(run_job))
    assert json.loads(events[-1].result.json) == {"done": True}
    warnings = [event.log.message for event in events if event.log.level == "warning"]
    assert warnings[-1] == (
        "keeping the metrics failed (the artifact store has no space left); the job has no artifact 'metrics'; "
        "everything else is kept"
    )
    assert len(warnings) == (3 if broken[1] == "put" else 1), "one for each pause, and the last"


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """While it is set, the disk of the store has no space left."""
    full, fsync = threading.Event(), os.fsync

    def sync(descriptor: int) -> None:
        if full.is_set():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    return full


@pytest.mark.parametrize("name", ["answer", "report", "metrics"])
def test_a_store_that_is_full_for_a_moment_costs_no_output(
    name: str, call: Call, store: ArtifactStore, full_disk: threading.Event, tmp_path: Path
) -> None:
    def run_job(spec: GenerationSpec, run: Run) -> dict[str, Any]:
        def output(made: str) -> None:
            (tmp_path / made).mkdir()
            (tmp_path / made / "text.txt").write_text(made)
            if made == name:
                full_disk.set()
            run.artifact(made, "text", tmp_path / made)

        run.metric(1, loss=0.5)
        output("answer")
        with run.side_output("the report"):
            output("report")
        if name == "metrics":
            full_disk.set()
        return {"done": True}

    events = []
    for event in call(run_job):
        events.append(event)
        if "next try" in event.log.message:
            full_disk.clear()
    made = {event.artifact.name: event.artifact.id for event in events if event.WhichOneof("event") == "artifact"}
    assert sorted(made) == ["answer", "metrics", "report"]
    assert all(store.manifest(id).files for id in made.values())
    warnings = [event.log.message for event in events if event.log.level == "warning"]
    assert warnings[0] == (
        f"cannot store the output {name!r} yet (the artifact store at {store.url} has no space left; free some); "
        "next try in 0.5 s"
    )
    # On a busy machine the disk is perhaps still full at the next try.
    assert all(warning.startswith(warnings[0].partition(";")[0]) for warning in warnings)
    assert json.loads(events[-1].result.json) == {"done": True}


def full_when_it_ends(full_disk: threading.Event, output: Path) -> Job:
    """A job whose output and metrics the store cannot take."""

    def run_job(spec: GenerationSpec, run: Run) -> dict[str, Any]:
        run.metric(1, loss=0.5)
        full_disk.set()
        if output.exists():
            run.artifact("answer", "text", output)
        return {"done": True}

    return run_job


def test_a_store_that_stays_full_ends_the_attempt_of_an_output(
    call: Call, full_disk: threading.Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "answer").mkdir()
    (tmp_path / "answer" / "text.txt").write_text("answer")
    monkeypatch.setattr(job_run, "RETRY_SECONDS", (0.01, 0.01))
    with pytest.raises(grpc.RpcError) as failed:
        list(call(full_when_it_ends(full_disk, tmp_path / "answer")))
    assert failed.value.code() == grpc.StatusCode.UNAVAILABLE


def test_a_process_that_is_asked_to_leave_does_not_wait_for_the_store(
    call: Call, store: ArtifactStore, full_disk: threading.Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_run, "RETRY_SECONDS", (60.0, 60.0))
    began, events = time.monotonic(), []
    for event in call(full_when_it_ends(full_disk, tmp_path / "none")):
        events.append(event)
        if "next try" in event.log.message:
            lifetime.stopping.set()
    assert json.loads(events[-1].result.json) == {"done": True}
    assert time.monotonic() - began < 30
    # It tries once more, and no longer.
    _, warning = (event.log.message for event in events if event.log.level == "warning")
    assert warning == (
        f"keeping the metrics failed (the artifact store at {store.url} has no space left; free some); the job has no "
        "artifact 'metrics'; everything else is kept"
    )


def test_a_job_that_waits_for_the_store_can_be_cancelled(
    call: Call, full_disk: threading.Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[BaseException] = []
    finish = JobRun.finish

    def watched(self: JobRun, result: dict[str, Any]) -> None:
        try:
            finish(self, result)
        except BaseException as error:
            ended.append(error)
            raise

    monkeypatch.setattr(JobRun, "finish", watched)
    events = call(full_when_it_ends(full_disk, tmp_path / "none"))
    while "next try" not in next(events).log.message:
        pass
    events.cancel()
    deadline = time.monotonic() + 10
    while not ended:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert isinstance(ended[0], Cancelled)
