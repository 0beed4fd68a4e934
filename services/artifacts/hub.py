"""Upload to and download from the Hugging Face Hub, with its errors as the platform's.

The environment says where the Hub is (``HF_ENDPOINT``) and who may write (``HF_TOKEN``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from ethogram.errors import InvalidInput, Unavailable
from ethogram.specs.base import HubSpec

RepositoryType = Literal["dataset", "model"]


class Repository:
    """A repository to upload to. A file that is there already is not sent again, so an upload that was cut off resumes.

    Every method raises :class:`InvalidInput` without permission and :class:`Unavailable` without a Hub.
    """

    def __init__(self, spec: HubSpec, type: RepositoryType, field: str = "spec.hub.repo") -> None:
        """``field``: where the repository was named, for error messages."""
        # It takes a while to import.
        from huggingface_hub import HfApi
        from huggingface_hub.utils.tqdm import disable_progress_bars

        # The run has its own.
        disable_progress_bars()
        self.spec, self.field = spec, field
        self._type, self._api = type, HfApi()

    def open(self) -> None:
        """Create the repository unless it exists."""
        with hub_errors(self.spec.repo, self.field):
            self._api.create_repo(self.spec.repo, repo_type=self._type, private=self.spec.private, exist_ok=True)

    def read(self, name: str) -> str | None:
        """The text of a file, or None if there is no such file."""
        with hub_errors(self.spec.repo, self.field):
            if not self._api.file_exists(self.spec.repo, name, repo_type=self._type):
                return None
            return Path(self._api.hf_hub_download(self.spec.repo, name, repo_type=self._type)).read_text(
                encoding="utf-8"
            )

    def upload(self, files: Mapping[str, Path | bytes], message: str) -> None:
        """Upload ``files``, by their path in the repository, in one commit."""
        from huggingface_hub import CommitOperationAdd

        with hub_errors(self.spec.repo, self.field):
            operations = [CommitOperationAdd(name, file) for name, file in files.items()]
            self._api.create_commit(self.spec.repo, operations, commit_message=message, repo_type=self._type)


def fetch(
    repo: str,
    type: RepositoryType,
    include: Sequence[str],
    exclude: Sequence[str] = (),
    *,
    field: str,
    described: str | None = None,
) -> Path:
    """Download the files of ``repo`` that match the patterns ``include`` and none of ``exclude``; their folder in the
    Hub's cache.

    ``field``: where the repository was named; ``described``: what error messages call it. Raises as
    :class:`Repository` does.
    """
    from huggingface_hub import HfApi, snapshot_download

    with hub_errors(described or repo, field, "read"):
        # Asked first, since the download says little of what went wrong.
        HfApi().repo_info(repo, repo_type=type)
        return Path(
            snapshot_download(repo, repo_type=type, allow_patterns=list(include), ignore_patterns=list(exclude))
        )


@contextmanager
def hub_errors(repo: str, field: str, action: str = "write to") -> Iterator[None]:
    """Raise the Hub's errors as the platform's, of the field that named ``repo``."""
    import httpx2  # What the client speaks HTTP with.
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    def refused(reason: str) -> InvalidInput:
        text = f"no permission to {action} {repo} ({reason}); set HF_TOKEN to a token that may, where this runs"
        return InvalidInput.field(field, text)

    def unreachable(reason: str) -> Unavailable:
        text = f"the Hugging Face Hub cannot be reached ({reason}) to {action} {repo}"
        return Unavailable.field(field, text)

    try:
        yield
    except LocalTokenNotFoundError:
        raise refused("no token") from None
    except HfHubHTTPError as error:
        code = error.response.status_code
        if code in (401, 403, 404):
            raise refused(f"HTTP {code}") from None
        if code < 500 and code != 429:
            reason = error.server_message or f"HTTP {code}"
            raise InvalidInput.field(field, f"the Hub refuses {repo}: {reason}") from None
        raise unreachable(f"HTTP {code}") from None
    # The client reports large files that did not arrive by RuntimeError and ValueError, and a proxy that it cannot use
    # by ValueError, ImportError and InvalidURL.
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, RuntimeError, ValueError, ImportError) as error:
        raise unreachable(str(error) or type(error).__name__) from None
