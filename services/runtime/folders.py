"""Folders of runs that a command keeps: begun, gone on with, and never overwritten."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ethogram.cli import output
from ethogram.errors import InvalidInput
from ethogram.specs.base import Spec
from services.runtime.console import CHECKPOINT, METRICS

SPEC, REPORT = "spec.json", "report"


def begin(out: Path, spec: Spec) -> None:
    """Make way for a run in ``out``: for a new one, or for one that was begun with the same spec."""
    about, text = out / SPEC, spec.model_dump_json(indent=2)
    if (out / REPORT).exists():
        raise InvalidInput.field("--output", f"{out} holds a finished run; name another folder")
    if about.exists() and about.read_text() != text:
        what = f"{out} was begun with another spec; name another folder, or delete it"
        raise InvalidInput.field("--output", what)
    if out.exists() and not about.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidInput.field("--output", f"{out} is there already, and is no run; name another folder")
    out.mkdir(parents=True, exist_ok=True)
    about.write_text(text)


@contextmanager
def begun(out: Path, result: str) -> Iterator[None]:
    """A run that is not finished inside is left if it is worth going on with, or has its ``result`` (an artifact), and
    is gone otherwise."""
    try:
        yield
    except BaseException as error:
        if (out / CHECKPOINT).exists():
            output.say(f"type the command again to go on from the last checkpoint, or delete {out}")
        elif not (out / result).exists():
            began = (out / METRICS).exists()
            shutil.rmtree(out, ignore_errors=True)
            # Of what could not begin its own message says enough.
            if began or not isinstance(error, InvalidInput):
                output.say("it ended before the first checkpoint, so nothing is kept")
        raise
