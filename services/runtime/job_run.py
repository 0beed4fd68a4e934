"""The run of a job's child process: reports become events for the supervisor, and outputs artifacts in the store."""

from __future__ import annotations

import json
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ethogram.errors import NotFound, Unavailable, printable
from ethogram.resources import TERMINAL
from ethogram.specs.base import Spec
from ethogram.v1 import jobs_pb2
from services.artifacts.store import ArtifactStore
from services.runtime import lifetime
from services.runtime.metrics import STATE, MetricsWriter
from services.runtime.run import Cancelled, ChildJob, Run, Stopped, Waiting

PROGRESS_SECONDS = 1.0
MAX_LOG = 4000
# Most of the time that checkpoints take: one of a second is written every hundred seconds at most.
CHECKPOINT_SHARE = 1 / 100
# Pauses between the tries to store an output, half a minute in all: a store that is full may soon have room again.
RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0)


class JobRun(Run):
    """Streams events to ``send`` and writes artifacts to ``store``.

    A checkpoint holds the job's files under ``state/`` and the metrics so far, so that a resumed job has the metrics of
    an uninterrupted one.
    """

    in_scratch = True

    def __init__(
        self,
        spec: Spec,
        context: jobs_pb2.RunContext,
        send: Callable[[jobs_pb2.JobEvent], None],
        cancelled: threading.Event,
    ) -> None:
        self.id, self.device = context.job, context.device or "cpu"
        self._spec, self._context = spec.model_dump(mode="json"), context
        self._send, self._cancelled = send, cancelled
        self._work, self._store = Path(context.work_dir), ArtifactStore(context.store)
        self._progress, self._metric, self._unsent = jobs_pb2.Progress(), jobs_pb2.Metric(), False
        self._next_report, self._next_checkpoint = 0.0, math.inf
        self.seconds = {"imports": 0.0, "inputs": 0.0, "checkpoints": 0.0, "outputs": 0.0}
        """How long the job has waited for the platform in this attempt."""
        self._uploader = ThreadPoolExecutor(1, "checkpoint")
        self._upload: Future[None] | None = None
        self._sources: set[str] = set()
        """Outputs that later ones are made from."""
        with self._timed("inputs"):
            self.inputs = {
                path: self._store.fetch(artifact, self._work / "inputs" / path)
                for path, artifact in context.inputs.items()
            }
            checkpoint = self._store.fetch(context.checkpoint, self._work / "resume") if context.checkpoint else None
        if checkpoint is not None:
            self.resume = checkpoint / STATE
        self._metrics = MetricsWriter(self._work / "metrics", checkpoint, partial(self.log, level="warning"))
        self._next_checkpoint = self._due_after(cost=0.0)

    def stage(self, name: str, total: int, unit: str = "steps") -> None:
        self._report()
        self._progress, self._unsent = jobs_pb2.Progress(stage=name, total=total, unit=unit), True
        self._report()

    def advance(self, done: int) -> None:
        if self._cancelled.is_set():
            raise Cancelled
        self._progress.done, self._unsent = done, True
        if done >= self._progress.total or time.monotonic() >= self._next_report:
            self._report()

    def metric(self, step: int, **values: float) -> None:
        metrics = {name: float(value) for name, value in values.items()}
        self._metrics.write(self._progress.stage, step, metrics)
        self._metric.step, self._unsent = step, True
        self._metric.values.update({name: value for name, value in metrics.items() if math.isfinite(value)})
        if time.monotonic() >= self._next_report:
            self._report()

    def log(self, message: str, level: str = "info") -> None:
        self._send(jobs_pb2.JobEvent(log=jobs_pb2.Log(level=level, message=printable(message)[:MAX_LOG])))

    def checkpoint_due(self) -> bool:
        return lifetime.stopping.is_set() or time.monotonic() >= self._next_checkpoint

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        if self._cancelled.is_set():
            raise Cancelled
        began = time.monotonic()
        with self._timed("checkpoints"):
            stored = self.wait_for_checkpoint()
            folder = self._work / "checkpoint"
            self._metrics.checkpoint(folder, write)
            self._report()
            # Writing to the disk takes most of the time and none of the processor's: the job goes on meanwhile.
            self._next_checkpoint = math.inf
            upload = self._uploader.submit(self._upload_checkpoint, folder, step, time.monotonic() - began)
            stopping = lifetime.stopping.is_set()
            if stopping or not stored:
                upload.result()
            self._upload = upload
            if stopping:
                raise Stopped

    def wait_for_checkpoint(self) -> bool:
        """Wait until the last checkpoint is in the store. If it cannot be stored, log a warning and return False."""
        upload, self._upload = self._upload, None
        with self.side_output("storing a checkpoint"):
            if upload is not None:
                upload.result()
            return True
        return False

    def _upload_checkpoint(self, folder: Path, step: int, cost: float) -> None:
        began = time.monotonic()
        # Unless it succeeds, the next one is due at once.
        next_checkpoint = 0.0
        try:
            artifact, _ = self._put(folder, "checkpoint", "checkpoint")
            self._send(jobs_pb2.JobEvent(checkpoint=jobs_pb2.Checkpoint(artifact=artifact, step=step)))
            next_checkpoint = self._due_after(cost + time.monotonic() - began)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            self._next_checkpoint = next_checkpoint

    def children(self, parts: Mapping[str, tuple[str, Spec]]) -> Mapping[str, ChildJob]:
        known = {child.name: child for child in self._context.children}
        missing = [name for name in parts if name not in known]
        for name in missing:
            kind, spec = parts[name]
            text = json.dumps(spec.model_dump(mode="json"), allow_nan=False)
            self._send(jobs_pb2.JobEvent(spawn=jobs_pb2.Spawn(name=name, kind=kind, spec_json=text)))
        if missing or any(known[name].state not in TERMINAL for name in parts):
            raise Waiting
        return {
            child.name: ChildJob(
                child.name,
                child.job,
                child.state,
                dict(child.outputs),
                json.loads(child.result_json or "{}"),
                child.error,
            )
            for child in self._context.children
            if child.name in parts
        }

    def output(self, child: ChildJob, name: str) -> Path:
        artifact = child.outputs.get(name)
        if artifact is None:
            outputs = ", ".join(sorted(child.outputs)) or "none"
            raise NotFound(f"child job {child.name} ({child.job}) has no output {name!r}; it has: {outputs}")
        folder = self._work / "children" / child.name / name
        return folder if folder.exists() else self._store.fetch(artifact, folder)

    def artifact(self, name: str, type: str, folder: Path) -> None:
        self._output(name, type, folder)

    def source_artifact(self, name: str, type: str, folder: Path) -> None:
        self._sources.add(self._output(name, type, folder))

    def _output(self, name: str, type: str, folder: Path) -> str:
        """Keep an output; its id."""
        with self._timed("outputs"):
            artifact, size = self._keep(folder, name, type)
        self._send(jobs_pb2.JobEvent(artifact=jobs_pb2.Artifact(name=name, type=type, id=artifact, size=size)))
        return artifact

    def wait(self) -> None:
        """Send the last progress, and that the attempt ends until its child jobs have ended."""
        self.wait_for_checkpoint()
        self._report()
        self._send(jobs_pb2.JobEvent(wait=jobs_pb2.Wait()))

    def finish(self, result: dict[str, Any]) -> None:
        """Send the last progress, the metrics as an artifact, what the platform took, and the job's result."""
        with self._timed("checkpoints"):
            self.wait_for_checkpoint()
        self._report()
        with self.side_output("keeping the metrics", "the job has no artifact 'metrics'; everything else is kept"):
            self._metrics.close()
            if self._metrics.file.exists():
                self.artifact("metrics", "metrics", self._metrics.folder)
        answer = json.dumps(result, allow_nan=False)
        self.log("apart from the work: " + ", ".join(f"{name} {took:.2f} s" for name, took in self.seconds.items()))
        self._send(jobs_pb2.JobEvent(result=jobs_pb2.Result(json=answer)))

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[part] += time.monotonic() - began

    def _report(self) -> None:
        if not self._unsent:
            return
        self._unsent, self._next_report = False, time.monotonic() + PROGRESS_SECONDS
        if self._metric.values:
            self._send(jobs_pb2.JobEvent(metric=self._metric))
        if self._progress.stage:
            self._send(jobs_pb2.JobEvent(progress=self._progress))

    def _due_after(self, cost: float) -> float:
        """When the checkpoint after one that took ``cost`` seconds is due."""
        return time.monotonic() + max(self._context.checkpoint_seconds, cost / CHECKPOINT_SHARE)

    def _keep(self, folder: Path, name: str, type: str) -> tuple[str, int]:
        """Put an output into the store, again while the store cannot take it. Raises :class:`Unavailable` if it still
        cannot after the last pause, or when the process is asked to leave."""
        pauses = iter(RETRY_SECONDS)
        while True:
            try:
                return self._put(folder, name, type)
            except Unavailable as error:
                pause = next(pauses, None)
                if pause is None or lifetime.stopping.is_set():
                    raise
                # A line per try: a job that waits is not stalled.
                self.log(f"cannot store the output {name!r} yet ({error}); next try in {pause:g} s", "warning")
            lifetime.stopping.wait(pause)
            if self._cancelled.is_set():
                raise Cancelled

    def _put(self, folder: Path, name: str, type: str) -> tuple[str, int]:
        gathered = {artifact for child in self._context.children for artifact in child.outputs.values()}
        artifact, manifest = self._store.put(
            folder,
            name=name,
            type=type,
            tenant=self._context.tenant,
            job=self._context.job,
            attempt=self._context.attempt,
            spec=self._spec,
            parents=sorted({*self._context.inputs.values(), *gathered, *self._sources}),
        )
        return artifact, manifest.size
