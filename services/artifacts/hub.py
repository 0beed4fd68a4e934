"""What goes wrong at the Hugging Face Hub, as the platform's errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ethogram.errors import InvalidInput, Unavailable, Violation


@contextmanager
def told(repo: str, field: str, what: str = "write to") -> Iterator[None]:
    """The Hub's errors as the platform's, of the field that named ``repo``."""
    import httpx2  # What the client speaks HTTP with.
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        yield
    except LocalTokenNotFoundError:
        raise _refused(repo, field, what, "no token") from None
    except HfHubHTTPError as error:
        code = error.response.status_code
        if code in (401, 403, 404):
            raise _refused(repo, field, what, f"HTTP {code}") from None
        if code < 500 and code != 429:
            said = error.server_message or f"HTTP {code}"
            raise InvalidInput.field(field, f"the Hub refuses {repo}: {said}") from None
        raise _absent(repo, field, what, f"HTTP {code}") from None
    # The client tells of large files that did not arrive by RuntimeError and ValueError.
    except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
        raise _absent(repo, field, what, str(error) or type(error).__name__) from None


def _refused(repo: str, field: str, what: str, why: str) -> InvalidInput:
    text = f"no permission to {what} {repo} ({why}); set HF_TOKEN to a token that may, where this runs"
    return InvalidInput.field(field, text)


def _absent(repo: str, field: str, what: str, why: str) -> Unavailable:
    text = f"the Hugging Face Hub cannot be reached ({why}) to {what} {repo}"
    return Unavailable(f"{field}: {text}", [Violation(field, text)])
