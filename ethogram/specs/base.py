"""What every spec shares. A spec is the one place for an option's name, default, bounds, unit and meaning."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]


class Spec(BaseModel):
    """Base of all specs: unknown fields, coercions (``"3"`` for 3) and non-finite numbers are errors.

    Fields are scalars, literals of strings, nested specs, and lists or string-keyed maps of these, so that each has a
    protobuf form. A list's or map's default is empty and an optional field's is ``None``: proto3 cannot tell an empty
    list from an absent one.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )


class ArtifactRef(Spec):
    """Names an artifact: another job's output (``job`` and ``artifact``), or any artifact by its id."""

    job: str | None = Field(None, min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")
    """Id of the job that makes it; in a pipeline, the job's name there. The job that refers to it waits for it."""
    artifact: str = Field(min_length=1, max_length=80, pattern=r"^[A-Za-z0-9_.-]+$")
    """The artifact's name within that job, e.g. ``zoo``; without ``job``, its id (64 hexadecimal digits)."""


class HubSpec(Spec):
    """Upload to the Hugging Face Hub. The worker's ``HF_TOKEN`` gives permission."""

    repo: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}$")
    """Repository, ``owner/name``; made if there is none."""
    private: bool = True
    """Whether a repository that is made is private."""

    @field_validator("repo")
    @classmethod
    def _allowed(cls, repo: str) -> str:
        if "--" in repo or ".." in repo or repo.endswith((".git", "-", ".")):
            raise ValueError("the Hub allows neither -- nor .. in a name, nor -, . or .git at its end")
        return repo


class WandbSpec(Spec):
    """Metrics to Weights & Biases too: to the service with the worker's ``WANDB_API_KEY``, else into the artifact
    ``wandb``, which ``wandb sync`` sends later."""

    project: str = Field(min_length=1, max_length=128, pattern=r"^[^/\\#?%:]+$")
    """Project."""
    name: str | None = Field(None, min_length=1, max_length=128)
    """Name of the run; None: a new one each time."""
