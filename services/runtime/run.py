"""What a running job is given: where to compute, what to resume from, and where to report.

The science takes a :class:`Run` as its last argument. The base class is silent and keeps nothing, so that the same
functions work from a few lines of Python; a job's child process passes one that streams to the supervisor.
"""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ethogram.errors import EthogramError, NotFound
from ethogram.specs.base import Spec


class Cancelled(Exception):
    """The job was cancelled; raised out of :meth:`Run.advance`."""


class Stopped(Exception):
    """The process must leave and its last checkpoint is in the store; raised out of :meth:`Run.checkpoint`."""


class Waiting(Exception):
    """The attempt ends here and the job resumes when its children have ended; raised out of :meth:`Run.children`."""


@dataclass(frozen=True)
class ChildJob:
    """A part of the work that another job did, or could not do."""

    name: str
    job: str
    """Its id."""
    state: str
    """``SUCCEEDED``, ``FAILED`` or ``CANCELLED``."""
    outputs: Mapping[str, str]
    """Name to artifact id; see :meth:`Run.output`."""
    result: Mapping[str, Any]
    error: str
    """Why it failed; empty if it did not."""


def warn(spec: Spec, run: Run) -> None:
    """Log what ``spec`` has that has no effect, once: not again when the run resumes."""
    if run.resume is None:
        for text in spec.warnings():
            run.log(text, "warning")


class Run:
    """A run that reports to nobody."""

    id: str = ""
    """Names the run, in every attempt at it; empty where nothing keeps a name."""
    device: str = "cpu"
    """Torch device to compute on."""
    inputs: Mapping[str, Path] = MappingProxyType({})
    """Input artifacts as local folders, by spec path."""
    resume: Path | None = None
    """Folder of the checkpoint to resume from, as :meth:`checkpoint` wrote it."""
    in_scratch: bool = False
    """Whether the current folder is removed after the run."""
    resume_note: str = ""
    """A sentence for the user of an interrupted run on what it resumes from outside of its own folder."""

    def stage(self, name: str, total: int, unit: str = "steps") -> None:
        """Begin a stage of ``total`` units."""

    def advance(self, done: int) -> None:
        """Report that ``done`` units of the stage are done, counted from its start. Cheap: call it every step.

        Raises :class:`Cancelled` when the job was cancelled.
        """

    def metric(self, step: int, **values: float) -> None:
        """Record metrics of a step; they end up in the job's ``metrics`` artifact."""

    def log(self, message: str, level: str = "info") -> None:
        """Write a line to the log."""

    def checkpoint_due(self) -> bool:
        """Whether it is time to call :meth:`checkpoint`: enough time has passed, or the process is asked to leave."""
        return False

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        """Keep a state to resume from: ``write`` fills an empty folder, the run puts it into the store.

        Raises :class:`Stopped` when the process was asked to leave.
        """

    def children(self, parts: Mapping[str, tuple[str, Spec]]) -> Mapping[str, ChildJob] | None:
        """Run ``parts`` (name to kind and spec) as jobs of their own, on whatever workers are free. Returns what became
        of each, by name; ``None`` where there is no platform: the caller does the work itself.

        The attempt ends while they run and its slot is free: the job's function is called again, from its last
        checkpoint, when all have ended. So call it with the same names each time, and before anything that is not kept.
        A part that failed is the caller's to judge. Raises :class:`Waiting`.
        """
        return None

    def output(self, child: ChildJob, name: str) -> Path:
        """Output ``name`` of a child as a local folder. Raises :class:`NotFound`."""
        raise NotFound(f"there is no output {name!r}: no child jobs ran")

    @contextmanager
    def output_folder(self, name: str) -> Iterator[Path]:
        """Where to write a large output ``name`` before :meth:`artifact` keeps it. In a run folder that is its place
        there, which may hold what an interrupted run has written."""
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
            yield Path(scratch, name)

    def artifact(self, name: str, type: str, folder: Path) -> None:
        """Keep ``folder`` as the output ``name``."""

    def source_artifact(self, name: str, type: str, folder: Path) -> None:
        """:meth:`artifact` that later outputs are made from: their manifests name it beside the inputs."""
        self.artifact(name, type, folder)

    @contextmanager
    def side_output(self, what: str, advice: str = "everything else is kept") -> Iterator[None]:
        """Make ``what``, which is no part of the result: a report, an upload, a log elsewhere. Its failure is a warning
        that ends in ``advice``, and the run continues. Artifacts are kept before, each as it is made."""
        try:
            yield
        except (Cancelled, Stopped, Waiting):
            raise
        except (EthogramError, OSError) as error:
            self.log(f"{what} failed ({error}); {advice}", "warning")
        except Exception:
            self.log(f"{what} failed, which is a defect; {advice}. {traceback.format_exc()}", "warning")
