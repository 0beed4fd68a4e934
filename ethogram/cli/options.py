"""Options that several commands share."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ethogram.errors import InvalidInput

if TYPE_CHECKING:
    from ethogram.client import Client

# Shorter than the SDK's: someone waits at the terminal.
_RETRY_SECONDS = 5.0

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on standard output.")]
Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        help="URL of the platform; by default ETHOGRAM_URL, else the one that runs in ETHOGRAM_STATE.",
        show_default=False,
    ),
]
State = Annotated[
    str | None,
    typer.Option(
        "--state",
        metavar="DIR",
        help="Folder of the platform's state; by default ETHOGRAM_STATE, else runs/state.",
        show_default=False,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="PATH=VALUE", help="Set one value, e.g. training.steps=500; read as YAML. Repeatable."
    ),
]
KindName = Annotated[str, typer.Argument(metavar="KIND", help="See `ethogram kinds`.", show_default=False)]
SpecFile = Annotated[Path | None, typer.Option("--file", "-f", metavar="FILE", help="YAML or JSON file of the spec.")]


def new_path(path: Path | None) -> Path | None:
    """Callback of an option: refuse a path that exists."""
    if path is not None and path.exists():
        raise InvalidInput.field("--output", f"{path} is there already; name another one")
    return path


Out = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="DIR",
        help="Folder of the run: artifacts, report, metrics, checkpoint.",
        show_default=False,
    ),
]
NewFolder = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="DIR",
        help="Folder to write; it must not exist.",
        callback=new_path,
        show_default=False,
    ),
]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1 or mps; by default a GPU if there is one.")
]
ZooFolder = Annotated[Path, typer.Argument(metavar="ZOO", help="Folder of a zoo.", exists=True, file_okay=False)]
Limit = Annotated[int, typer.Option("--limit", min=1, help="Show at most this many, newest first.")]
Wait = Annotated[bool, typer.Option("--wait", help="Follow the job to its end; exit code 1 when it fails.")]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The safetensors file to write.")]
Version = Annotated[
    str | None, typer.Option("--version", metavar="VERSION", help="Version of the model; by default the latest.")
]


_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds(text: str) -> float:
    """Seconds of a time limit such as 90, 30m or none (infinity)."""
    if text == "none":
        return math.inf
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    if found is None or float(found[1]) == 0:
        raise typer.BadParameter(f"{text!r} is no time; write 90, 90s, 30m, 2h, 1d or none")
    return float(found[1]) * _SECONDS[found[2]]


def connect(url: str | None) -> Client:
    """A client of the platform at ``url``."""
    from ethogram.client import Client

    return Client(url, retry_seconds=_RETRY_SECONDS)


def examples(*lines: str) -> str:
    """The examples at the end of a command's help."""
    return "Examples:\n\n" + "\n\n".join(f"  $ {line}" for line in lines)


def show_help(context: typer.Context) -> None:
    """Callback of a group: alone on the command line it prints its help."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def system_app(name: str, text: str) -> typer.Typer:
    """The commands of a system, ``python -m services.<name>``; ``text``: its help."""
    return typer.Typer(
        name=name,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        # Options may also be written with underscores.
        context_settings={
            "help_option_names": ["-h", "--help"],
            "token_normalize_func": lambda token: token.replace("_", "-"),
        },
        callback=show_help,
        invoke_without_command=True,
        help=text,
    )
