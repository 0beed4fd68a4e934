"""The command ``ethogram``. Commands import what they need when they run, so that ``--help`` is quick."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ethogram.cli import artifacts, embedding, jobs, networks, platform
from ethogram.cli import run as local
from ethogram.cli.options import show_help, system_app
from ethogram.cli.output import execute

app = system_app(
    "ethogram",
    "Record, encode, steer and explain the behaviour of neural networks.",
    "ethogram demo --quick",
    "ethogram up",
    "ethogram submit generation -f zoo.yaml --wait",
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        sys.stdout.write(version("ethogram") + "\n")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    show_help(context)


for commands in (local.app, platform.app, jobs.top, networks.app, embedding.app):
    app.add_typer(commands)
app.add_typer(jobs.app, name="jobs")
app.add_typer(artifacts.app, name="artifacts")
app.add_typer(artifacts.models, name="models")


def run(arguments: list[str] | None = None) -> None:
    """Run the command line and leave; see :func:`execute`."""
    execute(app, "ethogram", arguments)
