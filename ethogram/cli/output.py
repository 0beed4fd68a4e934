"""Run commands and print: results on standard output, everything else on standard error; errors and exit codes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from ethogram.errors import EthogramError, Internal, InvalidInput, Unavailable, did_you_mean

if TYPE_CHECKING:
    from rich.console import Console

# Wide enough for a row of ids when the output goes to a file or a pipe.
_PIPE_WIDTH = 200


def execute(app: typer.Typer, name: str, arguments: list[str] | None = None) -> NoReturn:
    """Run ``app`` and exit: 0; 2 for bad input; 1 for any other failure. Errors become a message, never a traceback.

    ``arguments``: by default the process's.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    problem: EthogramError
    try:
        code = app(arguments, standalone_mode=False, prog_name=name)
        sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except typer.TyperException as failure:
        problem = InvalidInput(failure.format_message().removesuffix(".") + _hint(app, failure, arguments))
    except EthogramError as failure:
        problem = failure
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except BrokenPipeError:
        # The reader has left, e.g. `| head`. Nothing more can be written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as failure:
        problem = Unavailable(f"{failure.filename or 'the system'}: {failure.strerror or failure}")
    except Exception as failure:
        if os.environ.get("ETHOGRAM_DEBUG"):
            raise
        text = f"{type(failure).__name__}: {failure}. This is a defect; ETHOGRAM_DEBUG=1 shows the traceback."
        problem = Internal(text)
    error(problem)
    if "--json" in arguments:
        violations = [violation._asdict() for violation in problem.violations]
        print_json({"error": {"reason": problem.reason, "message": problem.message, "violations": violations}})
    sys.exit(2 if isinstance(problem, InvalidInput) else 1)


def _hint(app: typer.Typer, failure: typer.TyperException, arguments: Sequence[str]) -> str:
    """What to write instead, where a command line has a word that means nothing in its place."""
    message, context = failure.format_message(), getattr(failure, "ctx", None)
    word = next((word for word in arguments if f"'{word}'" in message or f"({word}" in message), "")
    if message.startswith("No such command") and "Did you mean" not in message:
        groups = {group.name: group.typer_instance for group in app.registered_groups if group.name}
        return did_you_mean(word, (f"{name} {word}" for name, group in groups.items() if word in _names(group)), 0)
    if message.startswith("Got unexpected extra argument") and context is not None:
        options = {name: option for option in context.command.params for name in option.opts if name.startswith("--")}
        if word.startswith("job_") and "--job" in options:
            return f"; did you mean --job {word}?"
        taking = [name for name, option in options.items() if not getattr(option, "is_flag", False)]
        return f"; options that take a value: {', '.join(taking)}" if taking else ""
    return ""


def _names(commands: typer.Typer | None) -> set[str]:
    return {
        command.name or getattr(command.callback, "__name__", "").strip("_").replace("_", "-")
        for command in (commands.registered_commands if commands else ())
    }


def console(stderr: bool = False) -> Console:
    """A console that prints text as it is, without markup."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPE_WIDTH
    return Console(
        stderr=stderr, markup=False, emoji=False, highlight=False, width=width, soft_wrap=not stream.isatty()
    )


def dump(value: object) -> Any:
    """``value`` with every resource and array in it as plain data; NaN and infinities become null."""
    from pydantic_core import to_jsonable_python

    def listed(value: Any) -> Any:
        return value.tolist() if hasattr(value, "tolist") else str(value)

    return to_jsonable_python(value, by_alias=True, fallback=listed, inf_nan_mode="null")


def print_json(value: object, *, indent: int | None = 2) -> None:
    """Print ``value`` as JSON on standard output."""
    sys.stdout.write(json.dumps(dump(value), indent=indent, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def result(value: object, as_json: bool, show: Callable[[], None]) -> None:
    """Print a command's result: ``value`` as JSON, or what ``show`` prints for people."""
    if as_json:
        print_json(value)
    else:
        show()


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> None:
    """Print a table, with numbers aligned right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    cells = [[_cell(value) for value in row] for row in rows]
    numeric = [bool(cells) and all(_is_number(row[i]) for row in cells) for i in range(len(columns))]
    grid = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for name, right in zip(columns, numeric, strict=True):
        grid.add_column(name, justify="right" if right else "left", no_wrap=name.lower() in ("id", "job", "artifact"))
    for row in cells:
        grid.add_row(*(Text(cell) for cell in row))
    console().print(grid)


def figures(values: Mapping[str, Any]) -> None:
    """Print the numbers in a job's result as a table; nested ones by dotted names."""

    rows = _flat(values.get("figures", values))
    table(["figure", "value"], [(name, f"{v:.4f}" if isinstance(v, float) else v) for name, v in rows])


def pairs(*groups: Mapping[str, object]) -> None:
    """Print the names and values of ``groups`` below each other; empty values are left out. On a terminal, a mapping's
    values have lines of their own, with dotted names; in a pipe it is JSON. Groups may have names in common."""
    rows = [row for group in groups for row in (_flat(group) if sys.stdout.isatty() else group.items())]
    filled = [(name, value) for name, value in rows if value not in (None, "", {}, [])]
    shown = [(name, number(value) if isinstance(value, float) else _cell(value)) for name, value in filled]
    width = max((len(name) for name, _ in shown), default=0)
    out = console()
    for name, value in shown:
        out.print(f"{name:<{width}}  {value}")


def number(value: float, digits: int = 6) -> str:
    """A number with ``digits`` significant digits; with all before the point where these are more, and at most 15."""
    is_long = 10**digits - 0.5 <= abs(value) < 10**15
    return f"{value:.0f}" if is_long else f"{value:.{digits}g}"


def say(text: str) -> None:
    """Print a line on standard error."""
    console(stderr=True).print(text)


def visible(text: str) -> str:
    """``text`` of anyone without what a terminal would obey."""
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text)


def error(problem: EthogramError) -> None:
    """Print an error's message in red, and the fields that are wrong."""
    out = console(stderr=True)
    out.print(problem.message, style="bold red")
    for violation in problem.violations:
        # One is usually the sentence itself, and of several the first.
        if violation.field not in problem.message or violation.description not in problem.message:
            out.print(f"  {violation.field}: {violation.description}")


def _flat(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, datetime):
        return value.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(dump(value), ensure_ascii=False)
    return str(value)


def _is_number(text: str) -> bool:
    try:
        float(text or "0")
    except ValueError:
        return False
    return True
