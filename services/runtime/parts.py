"""A run in parts, one after the other, that resumes within the part that was interrupted."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from services.runtime.parallel import ALONE, World
from services.runtime.reading import reading_checkpoint
from services.runtime.run import Run

STATE, PRESENT, FILES = "parts.json", "present", "files"


class Parts(Run):
    """The :class:`Run` of each part: it passes on what a part reports, each of its stages as ``part/stage``.

    A part may leave files in the folder :attr:`folder` / its name. A checkpoint holds the results of the finished
    parts, their files and those of the present one so far, and the checkpoint of the present one.
    """

    def __init__(self, run: Run, folder: Path, world: World = ALONE) -> None:
        """``world``: processes that do each part together, of which the first one has the ``run``."""
        folder.mkdir(parents=True, exist_ok=True)
        self.device, self.inputs, self.folder = run.device, run.inputs, folder
        self.results: dict[str, Any] = {}
        """What each finished part returned, as JSON has it."""
        self.present = ""
        """Name of the part in progress."""
        self._run, self._interrupted = run, ""
        if run.resume is not None:
            with reading_checkpoint():
                kept = json.loads((run.resume / STATE).read_text(encoding="utf-8"))
                self.results = kept["results"]
                if (run.resume / PRESENT).exists():
                    self._interrupted = kept["present"]
                if (run.resume / FILES).exists():
                    shutil.copytree(run.resume / FILES, folder, dirs_exist_ok=True)
        self.results, self._interrupted = world.share_object((self.results, self._interrupted))

    def part(self, name: str, work: Callable[[Run], Any]) -> Any:
        """The result of ``work``, which is called with this run, unless the part ``name`` is finished already."""
        if name not in self.results:
            self.begin(name)
            resumes = self._run.resume is not None and name == self._interrupted
            self.resume = self._run.resume / PRESENT if self._run.resume is not None and resumes else None
            self.results[name] = work(self)
            self._run.checkpoint(len(self.results), self.save)
        return self.results[name]

    def begin(self, name: str) -> None:
        """Go on to the part ``name``."""
        self.present = name
        # The same in every attempt, so that a resumed run continues that at Weights & Biases.
        self.id = hashlib.sha256(f"{self._run.id} {name}".encode()).hexdigest()[:16] if self._run.id else ""

    def save(self, folder: Path, write: Callable[[Path], None] | None = None) -> None:
        """Write the finished parts, and the files of the present one, into ``folder``; ``write`` writes the checkpoint
        of the present one."""
        kept = {"results": self.results, "present": self.present}
        (folder / STATE).write_text(json.dumps(kept), encoding="utf-8")
        for name in dict.fromkeys((*self.results, self.present)):
            if name and (self.folder / name).exists():
                shutil.copytree(self.folder / name, folder / FILES / name)
        if write is not None:
            (folder / PRESENT).mkdir()
            write(folder / PRESENT)

    def stage(self, name: str, total: int, unit: str = "steps") -> None:
        self._run.stage(f"{self.present}/{name}", total, unit)

    def advance(self, done: int) -> None:
        self._run.advance(done)

    def metric(self, step: int, **values: float) -> None:
        self._run.metric(step, **values)

    def log(self, message: str, level: str = "info") -> None:
        self._run.log(f"{self.present}: {message}", level)

    def checkpoint_due(self) -> bool:
        return self._run.checkpoint_due()

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        self._run.checkpoint(step, lambda folder: self.save(folder, write))

    @contextmanager
    def output_folder(self, name: str) -> Iterator[Path]:
        with self._run.output_folder(name) as folder:
            yield folder

    def artifact(self, name: str, type: str, folder: Path) -> None:
        self._run.artifact(name, type, folder)

    def source_artifact(self, name: str, type: str, folder: Path) -> None:
        self._run.source_artifact(name, type, folder)
