"""Upload of a zoo to the Hugging Face Hub: file by file as they are made, the rest at the end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from ethogram.errors import EthogramError, InvalidInput, Unavailable
from ethogram.specs.base import HubSpec
from services.artifacts.hub import Repository
from services.zoo.dataset import ABOUT, BASELINE, DATA, read_about

PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds to wait before each further attempt at the end."""
_NOT_COMPARED = {"hub", "shards"}
"""Fields of a spec that do not change the records."""


class HubUpload:
    """Upload of one zoo to one dataset repository. Methods raise as those of :class:`Repository` do."""

    def __init__(self, spec: HubSpec, log: Callable[[str, str], None], field: str = "spec.hub.repo") -> None:
        """``log(message, level)``: for people. ``field``: where the repository was named, for error messages."""
        self._repository, self._log = Repository(spec, "dataset", field), log
        self._waiting: dict[str, Path] = {}
        self.sent = 0
        """Data files that are uploaded."""

    def open(self, folder: Path) -> None:
        """Create the repository, unless it exists, and upload what is known of the zoo in ``folder`` before any record.

        Raises :class:`InvalidInput` for a repository that holds another zoo.
        """
        self._repository.open()
        about = self._repository.read(ABOUT)
        if about is not None and _compared(about) != _compared((folder / ABOUT).read_text(encoding="utf-8")):
            text = f"{self._repository.spec.repo} holds a zoo of another spec or format; name another one"
            raise InvalidInput.field(self._repository.field, text)
        self._repository.upload({name: folder / name for name in (ABOUT, BASELINE)}, "Begin a zoo")

    def whole(self, folder: Path) -> None:
        """Upload a finished zoo."""
        read_about(folder)
        self.open(folder)
        self._waiting |= {f"{DATA}/{file.name}": file for file in sorted((folder / DATA).iterdir())}
        self.close(folder)

    def add(self, folder: Path, name: str) -> None:
        """Upload the data file ``name`` of the zoo, and those that failed before. A failure is logged, not raised."""
        self._waiting[name] = folder / name
        try:
            self._flush()
        except Exception as error:  # Whatever it is, the zoo is worth more.
            text = error.message if isinstance(error, EthogramError) else f"the upload failed ({error})"
            self._log(f"{text}; generation continues, {len(self._waiting)} files wait for upload", "warning")

    def close(self, folder: Path) -> None:
        """Upload everything that is not there yet; where the Hub does not answer, again after each of ``PAUSES``."""
        for pause in (*PAUSES, None):
            try:
                self._flush()
                rest = {file.name: file for file in sorted(folder.iterdir()) if file.is_file()}
                self._repository.upload(rest, "Finish the zoo")
                return
            except Unavailable:
                if pause is None:
                    raise
                time.sleep(pause)

    def _flush(self) -> None:
        for name, file in list(self._waiting.items()):
            self._repository.upload({name: file}, f"Add {file.name}")
            del self._waiting[name]
            self.sent += 1


def _compared(about: str) -> dict[str, object] | None:
    """The part of a ``zoo.json`` that decides whether two zoos are the same; None for another file."""
    try:
        parsed = json.loads(about)
        spec = {key: value for key, value in parsed["spec"].items() if key not in _NOT_COMPARED}
        return {"format": parsed["format"], "spec": spec}
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
