"""Folders of runs in this process: started, resumed, finished, and never overwritten."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from ethogram.errors import InvalidInput
from ethogram.specs.base import Spec
from ethogram.specs.kinds import KINDS
from services.runtime.console import CHECKPOINT, checkpoints, remove
from services.runtime.metrics import EVENTS, METRICS
from services.runtime.tracking import ARTIFACT as WANDB

RUN, SPEC, RESULT = "run.json", "spec.json", "result.json"
# Files of a store of activations, which is resumed by its own manifest, and may lie where the other one says.
_STORE = ("manifest.json", "activation_store.json")


class RunFolder:
    """``run.json``, ``spec.json``, metrics, the last checkpoint until the run ends, the artifacts, each in a folder of
    its name, and ``result.json`` at the end. Then those in ``places`` move to where it says.

    A folder without ``run.json`` is not a run. Only what a run makes is ever replaced or removed in it.
    """

    def __init__(self, root: Path, places: Mapping[str, Path] = MappingProxyType({})) -> None:
        self.root, self.places = root, places
        self.id = ""
        """Names the run, in every attempt at it."""
        self._moved: dict[str, Path] = {}
        # Folders that hold others of ``places`` are named by the user, if there are any.
        self._named = [place for place in places.values() if place.parent not in places.values()] or [root]
        self._existed = False

    def place(self, artifact: str) -> Path:
        """Folder of an artifact."""
        return self._moved.get(artifact, self.root / artifact)

    def check(self, spec: Spec) -> None:
        """Raise :class:`InvalidInput` for a folder in which no run of ``spec`` can begin or resume: one with a finished
        run, a run of another spec, or anything else."""
        if reason := self._reason_against(spec):
            raise InvalidInput.field("--output", reason)

    def _reason_against(self, spec: Spec) -> str | None:
        record, named = self._record(), self._named[0]
        finished = record is not None and (self.root / RESULT).exists()
        for place in self._named if self.places else ():
            if os.path.lexists(place):
                what = "holds a finished run" if finished else "is not a run"
                return f"{place} exists already and {what}; name another folder"
        if record is None:
            return None if self._free() else f"{self.root} exists already and is not a run; name another folder"
        if record.get("places") != sorted(self.places):
            if self.places:
                return f"{self.root}, which {named} needs for its run, holds another run; name another folder"
            return f"{self.root} exists already and holds a run of another command; name another folder"
        if self._moved_away:
            return None
        if finished and not self._store:
            holder = self.root if self.places else named
            return f"{holder} exists already and holds a finished run; name another folder"
        if (self.root / SPEC).exists() and not _same(self.root / SPEC, spec):
            return f"{named} holds a run of another spec; name another folder, or delete {self.root}"
        return None

    @property
    def resumes(self) -> bool:
        """Whether a run that is there would be resumed."""
        return not self._moved_away and ((self.root / SPEC).exists() or self._store)

    def begin(self, spec: Spec) -> None:
        """Prepare a new run of ``spec``, or resume one. Raises as :meth:`check` does."""
        self.check(spec)
        record = self._record()
        if record is None or self._moved_away:
            self._existed = self.root.exists()
            self.root.mkdir(parents=True, exist_ok=True)
            self._remove(())
            record = {"id": secrets.token_hex(6), "places": sorted(self.places)}
            (self.root / RUN).write_text(json.dumps(record), encoding="utf-8")
        self.id = str(record["id"])
        (self.root / SPEC).write_text(spec.model_dump_json(indent=2), encoding="utf-8")

    def finish(self, result: Mapping[str, Any], artifacts: Collection[str], log: Callable[[str, str], None]) -> None:
        """Move the ``artifacts`` that have a place, and mark the run as finished."""
        for name, place in self.places.items():
            if name not in artifacts:
                remove(self.root / name)
                continue
            if place.parent in self.places.values() and place.parent not in self._moved.values():
                continue
            if os.path.lexists(place):
                log(f"{place} exists by now; the {name} is in {self.root / name}", "warning")
                continue
            (self.root / name).rename(place)
            self._moved[name] = place
        (self.root / RESULT).write_text(json.dumps(result, indent=2), encoding="utf-8")

    def leave(self, error: BaseException, artifacts: Iterable[str], unfinished: Collection[str], note: str = "") -> str:
        """What to tell the user of a run that ended with ``error``. A run is kept when it has a checkpoint, a store of
        activations or one of its ``artifacts``; otherwise what it made is removed. ``note``: what to say
        in place of that."""
        if (self.root / CHECKPOINT).exists() or any(any(self.root.rglob(name)) for name in _STORE):
            return f"Run the same command again to resume from the last checkpoint, or delete {self.root}."
        if complete := [name for name in artifacts if (self.root / name).exists()]:
            return f"The run did not finish; {', '.join(f'its {name} is in {self.root / name}' for name in complete)}."
        started = (self.root / METRICS).exists()
        self._remove(unfinished)
        if not self._existed and not any(self.root.iterdir()):
            self.root.rmdir()
        # An error before the start explains itself.
        if note or (isinstance(error, InvalidInput) and not started):
            return note
        return "Nothing is kept: there was no checkpoint yet."

    @property
    def _moved_away(self) -> bool:
        """Whether this is a finished run whose artifacts are no longer where it left them."""
        left = any(os.path.lexists(path) for name in self.places for path in (self.root / name, self.places[name]))
        return bool(self.places) and not left and (self.root / RESULT).exists()

    def _record(self) -> dict[str, Any] | None:
        """What ``run.json`` says."""
        try:
            record = json.loads((self.root / RUN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) and "id" in record else None

    def _free(self) -> bool:
        """Whether a run can begin in a folder that is not one: it is empty, or has a store of activations beside which
        earlier versions wrote no ``run.json``."""
        if not os.path.lexists(self.root):
            return True
        if not self.root.is_dir() or self.places:
            return False
        return not any(self.root.iterdir()) or (self._store and not self._made(()))

    def _made(self, names: Iterable[str]) -> list[Path]:
        """What there is of the files and folders that every run makes, and of ``names``."""
        known = [RUN, SPEC, RESULT, METRICS, WANDB, *(path.name for path in checkpoints(self.root)), *names]
        paths = [*(self.root / name for name in known), *self.root.glob(EVENTS)]
        return [path for path in paths if os.path.lexists(path)]

    def _remove(self, names: Iterable[str]) -> None:
        """Remove what a run made."""
        for path in self._made(names):
            remove(path)

    @property
    def _store(self) -> bool:
        # A folder that has one further below is not its run.
        return any((self.root / "activations" / name).exists() for name in _STORE)


def artifact_in(source: Path, type: str, field: str = "--input") -> Path:
    """The artifact of ``type`` in ``source``, which is the artifact itself or the folder of the run that made it.
    Raises :class:`InvalidInput` of ``field`` if there is nothing, or the folder of a run without such an artifact."""
    if not source.exists():
        raise InvalidInput.field(field, f"{source} is not a file or folder")
    made = sorted({item for kind in KINDS.values() for item in kind.outputs.items() if (source / item[0]).is_dir()})
    fitting = [name for name, made_type in made if made_type == type]
    if not fitting and (source / CHECKPOINT).exists():
        raise InvalidInput.field(field, f"{source} is a run that has not finished; run its command again to resume it")
    if not fitting and (source / SPEC).is_file():
        contents = ", ".join(dict.fromkeys(name for name, _ in made)) or "no artifact"
        raise InvalidInput.field(field, f"{source} is the folder of a run, with {contents} in it; name a {type}")
    return source / fitting[0] if fitting else source


def _same(about: Path, spec: Spec) -> bool:
    try:
        earlier = type(spec).model_validate_json(about.read_text(encoding="utf-8"))
    except ValidationError:
        return False
    return earlier.model_dump() == spec.model_dump()
