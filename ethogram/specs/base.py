"""Base classes of specs. A spec is the one place for an option's name, default, bounds, unit and documentation."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ethogram.errors import InvalidInput, Violation
from ethogram.plain import python_value

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

    @model_validator(mode="before")
    @classmethod
    def _take_numpy(cls, values: Any) -> Any:
        # Specs inside of this one take theirs themselves.
        return python_value(values)

    def unused(self) -> Iterator[tuple[str, str]]:
        """Fields that have no effect because of others: each with its path below this spec, and why."""
        yield from ()

    def lacking(self) -> Iterator[tuple[str, str]]:
        """Fields that must be given because of others: each with its path below this spec, and what to give."""
        yield from ()

    def doubts(self) -> Iterator[tuple[str, str]]:
        """Fields that are hardly meant to be as they are: each with its path below this spec, and what to do."""
        yield from ()

    def ignored(self, prefix: str = "spec.") -> list[Violation]:
        """Fields that were set to other values than their defaults and have no effect, here and in specs inside. Not
        those at their default: a stored spec has all of these. ``prefix``: put before each path."""
        unused = {path: why for path, why in self.unused() if self._is_set(path)}
        found = [Violation(f"{prefix}{path}", f"has no effect, because {why}") for path, why in unused.items()]
        for name, part in self._parts():
            found += part.ignored(f"{prefix}{name}.")
        return found

    def refuse_new(self, prefix: str = "spec.") -> None:
        """Raise :class:`InvalidInput` of what no new job may have: fields that were set and have no effect, and fields
        that others need and that are not there. Not where a spec is read, since earlier versions took such specs: where
        one is submitted, or its run begins."""
        unused = [item._replace(description=f"{item.description}; leave it out") for item in self.ignored(prefix)]
        _refuse([*unused, *self._missing(prefix)])

    def check_complete(self, prefix: str = "spec.") -> None:
        """Raise :class:`InvalidInput` of fields that others need and that are not there, here and in specs inside."""
        _refuse(self._missing(prefix))

    def warnings(self, prefix: str = "spec.") -> list[str]:
        """What a job warns of when it starts: fields without effect, and what else is hardly meant."""
        found = [*self.ignored(prefix), *(Violation(f"{prefix}{path}", text) for path, text in self.doubts())]
        return [f"{field}: {text}" for field, text in found]

    def _missing(self, prefix: str) -> list[Violation]:
        """What is :meth:`lacking` here and in specs inside."""
        found = [Violation(f"{prefix}{path}", text) for path, text in self.lacking()]
        for name, part in self._parts():
            found += part._missing(f"{prefix}{name}.")
        return found

    def _parts(self) -> Iterator[tuple[str, Spec]]:
        """Fields that hold a spec."""
        for name in type(self).model_fields:
            if isinstance(value := getattr(self, name), Spec):
                yield name, value

    def _is_set(self, path: str) -> bool:
        """Whether a field differs from its default."""
        parents, _, name = path.rpartition(".")
        spec: Spec = attrgetter(parents)(self) if parents else self
        return bool(getattr(spec, name) != type(spec).model_fields[name].get_default(call_default_factory=True))


def _refuse(violations: list[Violation]) -> None:
    """Raise :class:`InvalidInput` of these violations, if there are any."""
    if violations:
        (field, description), more = violations[0], f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
        raise InvalidInput(f"{field}: {description}{more}", violations)


class ArtifactRef(Spec):
    """Names an artifact: another job's output (``job`` and ``artifact``), or any artifact by its id."""

    how_to_give: ClassVar[str] = 'give {"job": "job_...", "artifact": NAME}, or {"artifact": ID}'

    job: str | None = Field(None, min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")
    """Id of the job that outputs it; in a pipeline, the job's name there. The referring job waits for it."""
    artifact: str = Field(min_length=1, max_length=80, pattern=r"^[A-Za-z0-9_.-]+$")
    """Name of the job's output, e.g. ``zoo``; without ``job``, the artifact's id (64 hexadecimal digits)."""


class HubSpec(Spec):
    """Upload to the Hugging Face Hub, with the token in the worker's ``HF_TOKEN``."""

    repo: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}$")
    """Repository, ``owner/name``; created if it does not exist."""
    private: bool = True
    """Whether a repository that is created is private."""

    @field_validator("repo")
    @classmethod
    def _allowed(cls, repo: str) -> str:
        if "--" in repo or ".." in repo or repo.endswith((".git", "-", ".")):
            raise ValueError("the Hub allows neither -- nor .. in a name, nor -, . or .git at its end")
        return repo


class WandbSpec(Spec):
    """Log metrics to Weights & Biases: online if the worker has ``WANDB_API_KEY``, else into the artifact ``wandb``,
    which ``wandb sync`` uploads later."""

    project: str = Field(min_length=1, max_length=128, pattern=r"^[^/\\#?%:]+$")
    """Project at Weights & Biases."""
    name: str | None = Field(None, min_length=1, max_length=128)
    """Name of the run; None: Weights & Biases makes one up."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """Where metrics go; None: as the worker's ``WANDB_MODE`` says, else online if it has ``WANDB_API_KEY``, else
    offline."""


class OptimizationSpec(Spec):
    """Options that all trainers share; each has its own defaults and bounds."""

    steps: int = Field(4000, ge=1, le=10_000_000)
    """Optimiser steps."""
    batch_size: int = Field(256, ge=1, le=65_536)
    """Rows per step."""
    learning_rate: float = Field(1e-3, gt=0, le=1)
    """Peak learning rate."""
    warm_up: int = Field(100, ge=0, le=1_000_000)
    """Steps over which the learning rate rises linearly from 0."""
    validate_every: int = Field(500, ge=1, le=1_000_000)
    """Steps between validations."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of matrix products; ``auto``: bfloat16 where the hardware supports it."""


class TrainedSpec(Spec):
    """A job that trains a model by gradient steps."""

    seed: Seed = 0
    """Seed of everything random."""
    training: OptimizationSpec = OptimizationSpec()
    """Optimisation."""
    wandb: WandbSpec | None = None
    """Also log metrics to Weights & Biases."""
