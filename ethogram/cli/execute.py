"""Running a typer app: errors become a message and an exit code, never a traceback."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import typer

from ethogram.cli import output
from ethogram.errors import EthogramError, Internal, InvalidInput


def execute(app: typer.Typer, name: str, arguments: list[str] | None = None) -> NoReturn:
    """Run ``app`` and exit: 0; 2 for bad input; 1 for any other failure. ``arguments``: by default the process's."""
    arguments = sys.argv[1:] if arguments is None else arguments
    problem: EthogramError
    try:
        code = app(arguments, standalone_mode=False, prog_name=name)
        sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except typer.TyperException as error:
        problem = InvalidInput(error.format_message())
    except EthogramError as error:
        problem = error
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except BrokenPipeError:
        # The reader has left, e.g. `| head`. Nothing more can be written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        problem = Internal(f"{error.filename or 'the system'}: {error.strerror or error}")
    except Exception as error:
        if os.environ.get("ETHOGRAM_DEBUG"):
            raise
        problem = Internal(f"{type(error).__name__}: {error}. This is a defect; ETHOGRAM_DEBUG=1 shows the traceback.")
    output.error(problem)
    if "--json" in arguments:
        violations = [violation._asdict() for violation in problem.violations]
        output.print_json({"error": {"reason": problem.reason, "message": problem.message, "violations": violations}})
    sys.exit(2 if isinstance(problem, InvalidInput) else 1)
