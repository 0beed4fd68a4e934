"""What the documents say about the command line is so."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from ethogram.cli.main import app

ROOT = Path(__file__).parents[2]
COMMANDS = [
    line
    for file in ("README.md", "examples/main.yaml", "examples/clt.yaml")
    for line in re.findall(r"^(?:\$|#)\s+(ethogram [a-z].*)$", (ROOT / file).read_text(), re.MULTILINE)
]


def parse(line: str) -> None:
    """Parse ``line`` as the command line would; run nothing. Raises ``typer.TyperException``."""
    rest = shlex.split(line, comments=True)[1:]
    command: Any = typer.main.get_command(app)
    context = command.make_context("ethogram", list(rest))
    while hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, list(rest), parent=context)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_commands(line: str) -> None:
    parse(line)


def test_what_is_no_command_would_be_found() -> None:
    assert len(COMMANDS) > 8
    for wrong in ("ethogram nothing", "ethogram jobs nothing", "ethogram models publish x --job JOB"):
        with pytest.raises(typer.TyperException):
            parse(wrong)


@pytest.mark.parametrize("name", ["main", "clt"])
def test_the_example_pipelines_are_valid(name: str) -> None:
    from ethogram.cli.files import read_mapping
    from ethogram.specs.kinds import KINDS

    jobs = read_mapping(ROOT / "examples" / f"{name}.yaml", "pipeline")["jobs"]
    for job in jobs.values():
        KINDS[job["kind"]].spec.model_validate(job["spec"])


def test_the_example_of_a_staged_zoo_is_valid() -> None:
    from ethogram.cli.files import read_mapping
    from ethogram.specs.generation import GenerationSpec

    assert GenerationSpec.model_validate(read_mapping(ROOT / "examples" / "staged.yaml", "spec")).staged is not None
