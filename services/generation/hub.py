"""Upload of a zoo to the Hugging Face Hub: file by file as they are made, the rest at the end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from ethogram.errors import EthogramError, InvalidInput, Unavailable
from ethogram.specs.base import HubSpec
from ethogram.specs.generation import GenerationSpec
from services.artifacts.hub import told
from services.zoo.dataset import ABOUT, BASELINE, DATA, read_about

# Waits before another try at the end, in seconds.
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)
# What does not change the records.
_ASIDE = {"hub", "shards"}


class HubUpload:
    """One zoo on its way to one dataset repository. The environment says where the Hub is (``HF_ENDPOINT``) and who may
    write (``HF_TOKEN``).

    A file that is there already is not sent again, so an upload that was cut off goes on where it was.
    """

    def __init__(self, spec: HubSpec, log: Callable[[str, str], None], field: str = "spec.hub.repo") -> None:
        """``log(message, level)``: for people. ``field``: where the repository was named, for error messages."""
        # It takes a while to import.
        from huggingface_hub import HfApi
        from huggingface_hub.utils.tqdm import disable_progress_bars

        # The run has its own.
        disable_progress_bars()
        self._spec, self._log, self._api, self._field = spec, log, HfApi(), field
        self._waiting: dict[str, Path] = {}
        self.sent = 0
        """Data files that are there."""

    def open(self, folder: Path, spec: GenerationSpec) -> None:
        """Make the repository, unless it is there, and send what is known of the zoo in ``folder`` before any record.

        Raises :class:`InvalidInput` without permission, or for a repository that holds another zoo;
        :class:`Unavailable` without a Hub.
        """
        repo = self._spec.repo
        with told(repo, self._field):
            self._api.create_repo(repo, repo_type="dataset", private=self._spec.private, exist_ok=True)
            if self._api.file_exists(repo, ABOUT, repo_type="dataset"):
                there = Path(self._api.hf_hub_download(repo, ABOUT, repo_type="dataset")).read_text()
                if _spec_in(there) != _same(spec.model_dump(mode="json")):
                    raise InvalidInput.field(self._field, f"{repo} holds a zoo of another spec; name another one")
            self._send({name: folder / name for name in (ABOUT, BASELINE)}, "Begin a zoo")

    def whole(self, folder: Path) -> None:
        """Send a zoo that is finished. Raises as :meth:`open` does."""
        self.open(folder, read_about(folder)[1])
        for file in sorted((folder / DATA).iterdir()):
            self._waiting[f"{DATA}/{file.name}"] = file
        self.close(folder)

    def add(self, folder: Path, name: str) -> None:
        """Send the data file ``name`` of the zoo, and those that could not be sent before. What fails waits."""
        self._waiting[name] = folder / name
        try:
            self._flush()
        except Exception as error:  # Whatever it is, the zoo is worth more.
            text = error.message if isinstance(error, EthogramError) else f"the upload failed ({error})"
            self._log(f"{text}; the zoo goes on, and {len(self._waiting)} files wait", "warning")

    def close(self, folder: Path) -> None:
        """Send all that is not there yet. Raises as :meth:`open` does."""
        for pause in (*PAUSES, None):
            try:
                self._flush()
                with told(self._spec.repo, self._field):
                    rest = {file.name: file for file in sorted(folder.iterdir()) if file.is_file()}
                    self._send(rest, "Finish the zoo")
                return
            except Unavailable:
                if pause is None:
                    raise
                time.sleep(pause)

    def _flush(self) -> None:
        for name, file in list(self._waiting.items()):
            with told(self._spec.repo, self._field):
                self._send({name: file}, f"Add {name.removeprefix(f'{DATA}/')}")
            del self._waiting[name]
            self.sent += 1

    def _send(self, files: dict[str, Path], message: str) -> None:
        from huggingface_hub import CommitOperationAdd

        operations = [CommitOperationAdd(name, file) for name, file in files.items()]
        self._api.create_commit(self._spec.repo, operations, commit_message=message, repo_type="dataset")


def _spec_in(about: str) -> object:
    try:
        found = json.loads(about)
    except ValueError:
        return None
    return _same(found.get("spec")) if isinstance(found, dict) else None


def _same(spec: object) -> object:
    return {key: value for key, value in spec.items() if key not in _ASIDE} if isinstance(spec, dict) else spec
