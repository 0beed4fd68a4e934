"""What is in an artifact and where it comes from; and the names that are allowed in one."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from pydantic import BaseModel, ConfigDict, JsonValue

from ethogram.errors import InvalidInput

_NAME = re.compile(r"(?!\.+$)[A-Za-z0-9_.-]{1,80}")
MAX_PATH = 1024


class File(BaseModel):
    """One file: the sha256 of its bytes, in hexadecimal digits, and how many there are."""

    model_config = ConfigDict(frozen=True)

    sha256: str
    size: int


class Manifest(BaseModel):
    """An artifact. Its id is the sha256 of :meth:`canonical`, so an id fixes every byte and the whole lineage."""

    model_config = ConfigDict(frozen=True)

    name: str
    type: str
    """What it is, e.g. ``zoo``, ``codec``, ``checkpoint``."""
    files: dict[str, File]
    """By path inside the artifact, with ``/`` between folders."""
    tenant: str
    job: str | None
    attempt: str | None
    spec: dict[str, JsonValue] | None
    """The spec of the job that made it."""
    parents: list[str]
    """Ids of the artifacts that it was made from."""
    code_version: str
    created: str
    """UTC, ISO 8601."""
    meta: dict[str, JsonValue]

    @property
    def size(self) -> int:
        """Bytes in all files."""
        return sum(file.size for file in self.files.values())

    def canonical(self) -> bytes:
        """The one JSON text of this manifest: sorted keys, no spaces, UTF-8."""
        return canonical_json(self.model_dump(mode="json"))


class ModelPointer(BaseModel):
    """A published model: a name and version that stand for an artifact, for good."""

    model_config = ConfigDict(frozen=True)

    tenant: str
    name: str
    version: str
    artifact: str
    created: str
    """UTC, ISO 8601; the later of two is the newer model."""
    retired: bool = False
    """Served only to those who ask for this version."""
    deleted: bool = False
    """Its artifact was deleted. The version stays taken: what was published under it never changes."""


def canonical_json(value: Any) -> bytes:
    """``value`` as the one JSON text that stands for it."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def digest(data: bytes) -> str:
    """Sha256 in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def check_names(prefix: str = "", **names: str | None) -> None:
    """Raise :class:`InvalidInput` that names the field, after ``prefix``, of a value that cannot be a name."""
    for field, value in names.items():
        if value is not None and not _NAME.fullmatch(value):
            text = "must be 1 to 80 letters, digits, '_', '-' or '.', and not dots alone"
            raise InvalidInput.field(prefix + field, text)


def check_path(path: str, field: str = "path") -> str:
    """``path`` if it stays inside an artifact on every system. Raises :class:`InvalidInput` that names ``field``."""
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        raise InvalidInput.field(field, "is not valid UTF-8") from None
    if "\0" in path or "\\" in path:
        raise InvalidInput.field(field, "must not contain a backslash or NUL")
    if not path or len(encoded) > MAX_PATH:
        raise InvalidInput.field(field, f"must be 1 to {MAX_PATH} bytes long")
    if any(part in ("", ".", "..") for part in path.split("/")):
        raise InvalidInput.field(field, "must be relative and without '..', '.' or empty parts")
    return path
