"""Jobs, events, artifacts, models and kinds, as the client receives them.

Fields that a newer server adds are kept, not refused.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ethogram.errors import ERRORS, EthogramError, IllegalState, Violation

TERMINAL = frozenset({"SUCCEEDED", "FAILED", "CANCELLED"})


class Resource(BaseModel):
    """Base of all resources."""

    model_config = ConfigDict(extra="allow", frozen=True)


class Job(Resource):
    """One job."""

    id: str
    kind: str
    spec: dict[str, Any]
    state: str
    queue: str = ""
    priority: int = 0
    labels: dict[str, str] = {}
    attempts: int = 0
    max_attempts: int = 0
    parent: str | None = None
    """Id of the parent job, which calls this one ``name``."""
    name: str | None = None
    time_limit_seconds: float | None = None
    stall_limit_seconds: float | None = None
    ran_seconds: float = 0.0
    """Running time of the attempts that have ended, since the submission or the last retry."""
    inputs: dict[str, str] = {}
    waits_for: list[str] = []
    progress: dict[str, Any] | None = None
    checkpoint: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    created_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    seq: int = 0

    @property
    def terminal(self) -> bool:
        """Whether the job has ended; only a retry changes it."""
        return self.state in TERMINAL

    def check(self) -> Job:
        """Return this job if it succeeded; otherwise raise the error with which it failed."""
        if self.state == "SUCCEEDED":
            return self
        if self.state == "FAILED" and self.error:
            cls = ERRORS.get(str(self.error.get("reason")), EthogramError)
            raise cls(
                f"{self.kind} job {self.id} failed: {self.error.get('message') or 'no reason was given'}",
                [Violation(str(v["field"]), str(v["description"])) for v in self.error.get("violations") or ()],
            )
        raise IllegalState(f"{self.kind} job {self.id} is {self.state}")


class Event(Resource):
    """One thing that happened to a job. ``seq`` is None for ``progress``, which is not kept."""

    type: str
    data: dict[str, Any]
    seq: int | None = None
    job: str = ""
    attempt: str | None = None
    time: datetime | None = None


class File(Resource):
    """One file of an artifact."""

    sha256: str
    size: int


class Manifest(Resource):
    """Files of an artifact, and its origin."""

    name: str
    type: str
    files: dict[str, File]
    parents: list[str] = []
    job: str | None = None
    spec: dict[str, Any] | None = None
    code_version: str = ""
    created: str = ""
    meta: dict[str, Any] = {}

    @property
    def size(self) -> int:
        """Total bytes."""
        return sum(file.size for file in self.files.values())


class Artifact(Resource):
    """An immutable folder of files; ``id`` is the digest of its content."""

    id: str
    name: str = ""
    type: str = ""
    job: str | None = None
    size: int = 0
    created_at: datetime | None = None
    manifest: Manifest | None = None


class Model(Resource):
    """A published model: a name and version that point to an artifact."""

    name: str
    version: str
    artifact: str
    created: datetime | str | None = None
    retired: bool = False


class Kind(Resource):
    """One kind of job."""

    name: str
    summary: str = ""
    queue: str = ""
    spec_schema: dict[str, Any] = Field(default={}, alias="schema")
    """JSON Schema of its spec."""
