"""Options that several commands share, and how commands are declared."""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeVar

import typer

from ethogram.cli.output import result
from ethogram.errors import InvalidInput, NotFound, Violation

if TYPE_CHECKING:
    from ethogram.client import Client
    from ethogram.specs.base import HubSpec

# Shorter than the SDK's: someone waits at the terminal.
_RETRY_SECONDS = 5.0

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on standard output.")]
Url = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="URL of the platform; by default ETHOGRAM_URL, else the one that runs in ETHOGRAM_STATE."
    ),
]
State = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Folder of the platform's state; by default ETHOGRAM_STATE, else runs/state."),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Set one value, e.g. training.steps=500; read as YAML. Repeatable. `ethogram kinds KIND` lists them all.",
    ),
]
KindName = Annotated[str, typer.Argument(metavar="KIND", help="See `ethogram kinds`.")]
SpecFile = Annotated[Path | None, typer.Option("--file", "-f", metavar="FILE", help="YAML or JSON file of the spec.")]


def new_path(option: typer.CallbackParam, path: Path | None) -> Path | None:
    """Callback of an option: refuse a path where there is something, be it a link that leads nowhere."""
    if path is not None and os.path.lexists(path):
        raise InvalidInput.field(option.opts[0], f"{path} exists already; name another folder or file")
    return path


Out = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="DIR", help="Folder of the run: artifacts, report, metrics, checkpoint."),
]
NewFolder = Annotated[
    Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write; it must not exist.", callback=new_path)
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 or mps; by default a GPU if there is one.")]
Limit = Annotated[int, typer.Option(min=1, help="Show at most this many, newest first.")]
Wait = Annotated[bool, typer.Option("--wait", help="Follow to the end; exit code 1 when a job fails.")]
Output = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="FILE", help="New safetensors file to write.", callback=new_path),
]
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="Name of the model.")]
Version = Annotated[str | None, typer.Option(metavar="VERSION", help="Version of the model; by default the latest.")]

Public = Annotated[bool, typer.Option("--public", help="Create it as a public repository.")]

F = TypeVar("F", bound=Callable[..., Any])

_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds(text: str) -> float:
    """Seconds of a time limit such as 90, 30m or none (infinity)."""
    if text == "none":
        return math.inf
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    if match is None or float(match[1]) == 0:
        raise typer.BadParameter(f"{text!r} is not a time; write 90, 90s, 30m, 2h, 1d or none")
    return float(match[1]) * _SECONDS[match[2]]


def assignment(option: str, text: str, form: str, *, empty: bool = False) -> tuple[str, str]:
    """Both sides of ``text``, the value of ``option``, which must look like ``form``, e.g. OLD=NEW. ``empty``: whether
    the right side may be."""
    name, equals, value = text.partition("=")
    if not name or not equals or not (value or empty):
        raise InvalidInput.field(option, f"{text} is not of the form {form}")
    return name, value


@contextmanager
def rename_fields(location: Callable[[str], str]) -> Iterator[None]:
    """In errors, name each field by the ``location`` where the user wrote it."""
    try:
        yield
    except InvalidInput as error:
        violations = [Violation(location(field), text) for field, text in error.violations]
        message = error.message
        for old, new in zip(error.violations, violations, strict=True):
            message = message.replace(f"{old.field}: ", f"{new.field}: ", 1)
        raise InvalidInput(message, violations) from None


def connect(url: str | None) -> Client:
    """A client of the platform at ``url``."""
    from ethogram.client import Client

    return Client(url, retry_seconds=_RETRY_SECONDS)


@contextmanager
def naming(client: Client, job: str) -> Iterator[None]:
    """Where ``job`` is not the id of a job but the name of some, say their ids."""
    try:
        yield
    except NotFound as error:
        if job.startswith("job_") or job not in error.message:
            raise
        ids = [found.id for found in client.jobs(labels={"name": job}, limit=3)]
        hint = (
            f"; did you mean {' or '.join(ids)}, which has the name {job}?" if ids else "; `ethogram jobs list` has ids"
        )
        raise NotFound(error.message + hint, error.violations) from None


def hub_spec(repo: str, public: bool, field: str) -> HubSpec:
    """The upload to ``repo``, which the user named as ``field``."""
    from pydantic import ValidationError

    from ethogram.specs.base import HubSpec

    try:
        return HubSpec(repo=repo, private=not public)
    except ValidationError:
        raise InvalidInput.field(field, f"{repo} is not a name that the Hub allows, e.g. me/my-model") from None


def examples(*lines: str) -> str:
    """The examples at the end of a command's help."""
    return "Examples:\n\n" + "\n\n".join(f"  $ {line}" for line in lines)


class Answer(NamedTuple):
    """The result of a command."""

    value: object
    """Printed with --json."""
    show: Callable[[], None]
    """Prints it for people otherwise."""
    ok: bool = True
    """Whether the command leaves with exit code 0, not 1."""


def command(app: typer.Typer, *lines: str, name: str | None = None) -> Callable[[F], F]:
    """Decorator: a command of ``app``, named and documented as the function, which takes the command's options and
    returns an :class:`Answer`, or None when it has printed all. ``lines``: examples. The command has --json besides;
    where the function takes a ``client``, --url, and the function gets a client of that platform."""

    def decorate(function: F) -> F:
        own = dict(inspect.signature(function, eval_str=True, locals={"Client": object}).parameters)
        shared = dict(inspect.signature(_shared, eval_str=True).parameters)
        if own.pop("client", None) is None:
            del shared["url"]

        @wraps(function)
        def run(**given: Any) -> None:
            with connect(given["url"]) if "url" in shared else nullcontext() as client:
                options = {"client": client} if "url" in shared else {}
                job = str(given.get("id") or given.get("job") or given.get("source") or "").partition("/")[0]
                with naming(client, job) if client and job else nullcontext():
                    answer = function(**options, **{name: given[name] for name in own})
            if answer is not None:
                result(answer.value, given["as_json"], answer.show)
                if not answer.ok:
                    raise typer.Exit(1)

        declare(app, run, (own | shared).values(), lines, name)
        return function

    return decorate


def _shared(url: Url = None, as_json: Json = False) -> None:
    """The options of every command that asks a platform."""


def declare(
    app: typer.Typer,
    command: Callable[..., None],
    parameters: Iterable[inspect.Parameter],
    lines: Iterable[str],
    name: str | None = None,
) -> None:
    """Make ``command`` a command of ``app`` with these ``parameters``, which it takes by name."""
    keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    command.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in keywords}
    app.command(name, epilog=examples(*lines))(command)


def show_help(context: typer.Context) -> None:
    """Callback of a group: alone on the command line it prints its help."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def group(text: str, *lines: str, **settings: Any) -> typer.Typer:
    """Commands below a word; ``text``: their help; ``lines``: examples."""
    return typer.Typer(help=text, invoke_without_command=True, callback=show_help, epilog=examples(*lines), **settings)


def system_app(name: str, text: str, *lines: str) -> typer.Typer:
    """A whole command line, ``ethogram`` or ``python -m services.<name>``; ``text``: its help; ``lines``: examples."""
    # Options may also be written with underscores.
    settings = {"help_option_names": ["-h", "--help"], "token_normalize_func": lambda token: token.replace("_", "-")}
    more = {"rich_markup_mode": "markdown", "pretty_exceptions_enable": False, "context_settings": settings}
    return group(text, *lines, name=name, **more)
