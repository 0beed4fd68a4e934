"""What docs/requirements.md says of the document on the resource encoder is there: options, kinds and files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from ethogram.specs.kinds import KINDS
from services.resource.__main__ import app
from tests.clt.test_requirements import PAGE, named

SECTION = "Resource encoder"


EXPORT = ("encoder_checkpoint", "tool_registry", "profiling_data", "llm_model", "output_dir", "batch_size", "device")
"""Options of the document's export command."""


def test_every_option_is_taken_by_its_command() -> None:
    options = {option.removeprefix("--") for option in named(SECTION)}
    assert len(options) == 15 and set(EXPORT) <= options
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, asked in (("train", options - {"encoder_checkpoint"}), ("export", EXPORT)):
        taken = {option for parameter in commands[name].params for option in parameter.opts}
        assert {f"--{option.replace('_', '-')}" for option in asked} <= taken, name


@pytest.mark.parametrize("path", re.findall(r"`((?:services|examples)/[^`{]+\.\w+)`", PAGE.read_text()))
def test_every_file_is_there(path: str) -> None:
    assert (Path(__file__).parents[2] / path).exists()


def test_every_line_of_the_document_is_done() -> None:
    lines = PAGE.read_text().partition(f"## {SECTION}\n")[2].partition("\n## ")[0].splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith("|")][2:]
    assert len(rows) > 15 and {row[-1].strip() for row in rows} == {"done"}
    assert all(kind in KINDS for kind in re.findall(r"kind `(\w+)`", "".join(row[1] for row in rows)))
