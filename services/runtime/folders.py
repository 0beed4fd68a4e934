"""Folders of runs in this process: started, resumed, finished, and never overwritten."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from ethogram.errors import InvalidInput
from ethogram.specs.base import Spec
from ethogram.specs.kinds import KINDS
from services.runtime.console import CHECKPOINT
from services.runtime.metrics import METRICS

SPEC, RESULT, REPORT = "spec.json", "result.json", "report"
# Files of a store of activations, which is resumed by its own manifest, and may lie where the other one says.
_STORE = ("manifest.json", "activation_store.json")


class RunFolder:
    """``spec.json``, metrics, the last checkpoint until the run ends, ``result.json`` at its end, and the artifacts,
    each in a folder of its name or where ``places`` says."""

    def __init__(self, root: Path, places: Mapping[str, Path] = MappingProxyType({})) -> None:
        self.root, self.places = root, places
        outside = [place for place in places.values() if place.parent not in places.values()]
        self._folders = [*outside, root]

    def place(self, artifact: str) -> Path:
        """Folder of an artifact."""
        return self.places.get(artifact, self.root / artifact)

    def check(self, spec: Spec) -> None:
        """Raise :class:`InvalidInput` for a folder in which no run of ``spec`` can begin or resume: one with a finished
        run, a run of another spec, or anything else."""
        if reason := self._reason_against(spec):
            raise InvalidInput.field("--output", reason)

    def _reason_against(self, spec: Spec) -> str | None:
        first, about = self._folders[0], self.root / SPEC
        if about.exists() and any((self.root / name).exists() for name in self.places):
            return f"{self.root}, which {first} needs for its run, holds another run; name another folder"
        if self._moved:
            return None
        if self._finished and not self._store:
            return f"{first} exists already and holds a finished run; name another folder"
        if about.exists():
            other = f"{first} holds a run of another spec; name another folder, or delete {self._names}"
            return None if _same(about, spec) else other
        for folder in self._folders:
            empty = not folder.exists() or (not self.places and folder.is_dir() and not any(folder.iterdir()))
            if not (empty or self._store):
                return f"{folder} exists already and is not a run; name another folder"
        return None

    @property
    def resumes(self) -> bool:
        """Whether a run that is there would be resumed."""
        return not self._moved and ((self.root / SPEC).exists() or self._store)

    def begin(self, spec: Spec) -> None:
        """Prepare a new run of ``spec``, or resume one. Raises as :meth:`check` does."""
        self.check(spec)
        if self._moved:
            shutil.rmtree(self.root)
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / SPEC).write_text(spec.model_dump_json(indent=2))

    def finish(self, result: Mapping[str, Any]) -> None:
        """Mark the run as finished."""
        (self.root / RESULT).write_text(json.dumps(result, indent=2))

    def leave(self, error: BaseException, outputs: Iterable[str], unfinished: Collection[str]) -> str:
        """What to tell the user of a run that ended with ``error``. A run is kept when it has a checkpoint, a store of
        activations or one of its ``outputs`` in full; anything else is removed."""
        if (self.root / CHECKPOINT).exists() or any(any(self.root.rglob(name)) for name in _STORE):
            return f"Run the same command again to resume from the last checkpoint, or delete {self._names}."
        complete = [name for name in outputs if name not in unfinished and self.place(name).exists()]
        if complete:
            return f"The run did not finish; {', '.join(f'its {name} is in {self.place(name)}' for name in complete)}."
        started = (self.root / METRICS).exists()
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)
        # An error before the start explains itself.
        return (
            "" if isinstance(error, InvalidInput) and not started else "Nothing is kept: there was no checkpoint yet."
        )

    @property
    def _moved(self) -> bool:
        """Whether this was a run whose artifacts have been moved elsewhere."""
        kept = not self.places or any(folder.exists() for folder in self._folders[:-1])
        return not kept and (self.root / SPEC).exists()

    @property
    def _finished(self) -> bool:
        # Earlier versions wrote no result.
        reported = self.place(REPORT).exists() and not (self.root / CHECKPOINT).exists()
        return (self.root / RESULT).exists() or reported

    @property
    def _store(self) -> bool:
        # Earlier versions wrote no spec beside it. A folder that has one further below is not its run.
        return any((self.root / "activations" / name).exists() for name in _STORE)

    @property
    def _names(self) -> str:
        return " and ".join(map(str, self._folders))


def artifact_in(source: Path, type: str, field: str = "--input") -> Path:
    """The artifact of ``type`` in ``source``, which is the artifact itself or the folder of the run that made it.
    Raises :class:`InvalidInput` of ``field`` if there is nothing, or the folder of a run without such an artifact."""
    if not source.exists():
        raise InvalidInput.field(field, f"{source} is not a file or folder")
    made = sorted({item for kind in KINDS.values() for item in kind.outputs.items() if (source / item[0]).is_dir()})
    fitting = [name for name, made_type in made if made_type == type]
    if not fitting and (source / SPEC).is_file():
        contents = ", ".join(dict.fromkeys(name for name, _ in made)) or "no artifact"
        raise InvalidInput.field(field, f"{source} is the folder of a run, with {contents} in it; name a {type}")
    return source / fitting[0] if fitting else source


def _same(about: Path, spec: Spec) -> bool:
    try:
        earlier = type(spec).model_validate_json(about.read_text())
    except ValidationError:
        return False
    return earlier.model_dump() == spec.model_dump()
