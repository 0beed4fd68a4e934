"""Reading from the Hugging Face Hub, and what goes wrong there, as the platform's errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from ethogram.errors import InvalidInput, Unavailable, Violation


def fetch(repo: str, kind: Literal["dataset", "model"], wanted: Sequence[str], left_out: Sequence[str] = ()) -> Path:
    """The files of ``repo`` that match the patterns ``wanted`` and none of ``left_out``: their folder in the Hub's
    cache. Raises the Hub's errors; see :func:`told`."""
    from huggingface_hub import HfApi, snapshot_download

    # Asked first, since the download tells little of what went wrong.
    HfApi().repo_info(repo, repo_type=kind)
    return Path(snapshot_download(repo, repo_type=kind, allow_patterns=list(wanted), ignore_patterns=list(left_out)))


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
