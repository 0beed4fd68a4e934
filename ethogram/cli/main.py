"""The command ``ethogram``. Commands import what they need when they run, so that ``--help`` is quick."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from ethogram.cli import artifacts, jobs, networks, platform
from ethogram.cli.options import examples, show_help

if TYPE_CHECKING:
    from ethogram.errors import EthogramError

app = typer.Typer(
    name="ethogram",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples("ethogram demo --quick", "ethogram up", "ethogram submit generation -f zoo.yaml --wait"),
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
    """Record, encode, steer and explain the behaviour of neural networks."""
    show_help(context)


app.command(epilog=platform.up_examples)(platform.up)
app.command(epilog=platform.demo_examples)(platform.demo)
app.command(epilog=platform.doctor_examples)(platform.doctor)
app.command(epilog=jobs.submit_examples)(jobs.submit)
app.command(epilog=jobs.pipeline_examples)(jobs.pipeline)
app.add_typer(jobs.app, name="jobs")
app.add_typer(artifacts.app, name="artifacts")
app.add_typer(artifacts.models, name="models")
app.command(epilog=platform.kinds_examples)(platform.kinds)
app.command(epilog=networks.encode_examples)(networks.encode)
app.command(epilog=networks.steer_examples)(networks.steer)
app.command(epilog=networks.decode_examples)(networks.decode)
app.command(epilog=networks.evaluate_examples)(networks.evaluate)


def run(arguments: list[str] | None = None) -> None:
    """Run the command line and leave: 0; 2 for bad input; 1 for any other failure. Never a traceback."""
    from ethogram.errors import EthogramError, Internal, InvalidInput

    arguments = sys.argv[1:] if arguments is None else arguments
    problem: EthogramError
    try:
        code = app(arguments, standalone_mode=False, prog_name="ethogram")
        sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except typer.TyperException as error:
        problem = InvalidInput(error.format_message())
    except EthogramError as error:
        problem = error
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except BrokenPipeError:
        # The reader has left, `| head` say. Nothing more can be written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        problem = Internal(f"{error.filename or 'the system'}: {error.strerror or error}")
    except Exception as error:
        if os.environ.get("ETHOGRAM_DEBUG"):
            raise
        problem = Internal(f"{type(error).__name__}: {error}. This is a defect; ETHOGRAM_DEBUG=1 shows where.")
    _fail(problem, "--json" in arguments)


def _fail(problem: EthogramError, as_json: bool) -> None:
    from ethogram.cli import output
    from ethogram.errors import InvalidInput

    output.error(problem)
    if as_json:
        violations = [violation._asdict() for violation in problem.violations]
        output.print_json({"error": {"reason": problem.reason, "message": problem.message, "violations": violations}})
    sys.exit(2 if isinstance(problem, InvalidInput) else 1)
