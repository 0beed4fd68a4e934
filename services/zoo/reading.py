"""Reading what users bring: whatever a file's parser raises becomes an error that names the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError

from ethogram.errors import InvalidInput


@contextmanager
def reading(folder: Path, name: str, what: str) -> Iterator[Path]:
    """The path of ``name`` in ``folder``, to read it inside the block.

    What the block raises because the file is not as it must be becomes :class:`InvalidInput` with the field ``name``;
    so does a file that is missing. ``what`` is what the folder should be, e.g. ``zoo``.
    """
    if not (folder / name).is_file():
        raise InvalidInput.field(name, f"is missing; is this folder a {what}?")
    try:
        yield folder / name
    except KeyError as error:
        raise InvalidInput.field(name, f"has no {error.args[0]}") from None
    # A spec names what is wrong, a pattern that is not registered here say.
    except ValidationError as error:
        raise InvalidInput.from_pydantic(error, name) from None
    # Torch tells of shapes that do not fit by RuntimeError; those of Arrow are ValueErrors.
    except (ValueError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise InvalidInput.field(
            name, f"cannot be read, or does not fit the other files ({type(error).__name__}); make the {what} again"
        ) from None
