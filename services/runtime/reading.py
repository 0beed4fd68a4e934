"""Reading files that users bring: whatever a parser raises becomes an error that names the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError

from ethogram.errors import InvalidInput

BROKEN = (
    *(ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError, EOFError, MemoryError),
    SafetensorError,
)
"""What parsers raise for contents that are not what they should be."""


@contextmanager
def reading(folder: Path, file: str, what: str, field: str | None = None) -> Iterator[Path]:
    """The path of ``file`` in ``folder``, to read it, and files beside it, inside the block.

    A missing file, and any error of the block that tells of broken contents, becomes :class:`InvalidInput`. ``what``:
    what the folder should be, e.g. ``zoo``. ``field``: the input that named the folder, e.g. ``policy``; the error is
    then of that field and names the folder. Otherwise it is of the field ``file``.
    """
    subject = "" if field is None else f"{folder / file} "
    field = field or file
    if not (folder / file).is_file():
        inner = next((path.parent for path in sorted(folder.glob(f"*/{file}"))), None)
        hint = f"is {folder} a {what}?" if inner is None else f"did you mean {inner}?"
        text = f"{subject}is missing; {hint}" if folder.exists() else f"{folder} does not exist"
        raise InvalidInput.field(field, text)
    try:
        yield folder / file
    except FileNotFoundError as error:
        # safetensors leaves the attribute ``filename`` empty.
        other = Path(str(error).rpartition(": ")[2].strip("'")).name
        raise InvalidInput.field(field, f"{subject}needs {other}, which is missing; make the {what} again") from None
    except KeyError as error:
        raise InvalidInput.field(field, f"{subject}has no {error.args[0]}") from None
    # It is a folder, say, or not this user's.
    except OSError as error:
        raise InvalidInput.field(field, f"{subject}cannot be read ({reason_of(error)})") from None
    # A spec names what is wrong, a pattern that is not registered here say.
    except ValidationError as error:
        raise InvalidInput.from_pydantic(error, field) from None
    # torch raises RuntimeError for shapes that do not fit; Arrow's errors are ValueErrors.
    except BROKEN as error:
        text = f"cannot be read, or does not fit the other files ({type(error).__name__}); make the {what} again"
        raise InvalidInput.field(field, subject + text) from None


@contextmanager
def reading_checkpoint() -> Iterator[None]:
    """Whatever is wrong with the files of a checkpoint becomes :class:`InvalidInput` of the field ``checkpoint``."""
    try:
        yield
    except (OSError, *BROKEN) as error:
        raise InvalidInput.field("checkpoint", f"cannot be read ({type(error).__name__}); start afresh") from None


def reason_of(error: Exception) -> str:
    """What went wrong with a file, without its name."""
    return (isinstance(error, OSError) and error.strerror) or first_line(error)


def first_line(error: Exception) -> str:
    """What an error of a library says, short enough for one of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
