"""The bodies of ``POST /v1/jobs`` and ``POST /v1/pipelines``: a union over the table of kinds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from fastapi.openapi.models import Example
from pydantic import BaseModel, ConfigDict, Field, create_model

from ethogram.specs.base import Spec
from ethogram.specs.kinds import EXAMPLE_JOB, KINDS
from gateway.inputs import explained
from services.jobs.records import Options


class SubmissionBase(Options):
    """A job: its kind, its spec and how it is queued."""

    kind: str
    spec: Spec

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of the registry besides the kind and the spec."""
        return {name: getattr(self, name) for name in Options.model_fields}


if TYPE_CHECKING:
    Submission = SubmissionBase
else:
    _SUBMISSIONS = (
        create_model(
            f"{kind.name.title()}Submission",
            __base__=SubmissionBase,
            __doc__=f"A job to {kind.summary}.",
            # Pydantic looks for the source of what has none, in every module that is loaded.
            __cls_kwargs__={"use_attribute_docstrings": False},
            kind=(Literal[kind.name], ...),
            spec=(kind.spec, ...),
        )
        for kind in KINDS.values()
    )
    Submission = Annotated[Union[*_SUBMISSIONS], Field(discriminator="kind")]

_JOB_NAME = r"^[A-Za-z0-9_-]{1,64}$"
JobName = Annotated[
    str, Field(pattern=_JOB_NAME), explained(_JOB_NAME, "a job's name must be 1 to 64 letters, digits, '_' or '-'")
]


class Pipeline(BaseModel):
    """Several jobs, queued all or none. An input ``{"job": NAME, "artifact": ...}`` names another one of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    jobs: dict[JobName, Submission] = Field(min_length=1, max_length=1000)


JOB_EXAMPLES: dict[str, Example] = {
    kind.name: Example(
        summary=kind.summary,
        description=f"Put the id of your own job in place of {EXAMPLE_JOB}."
        if EXAMPLE_JOB in str(kind.example)
        else "",
        value={"kind": kind.name, "spec": kind.example},
    )
    for kind in KINDS.values()
}

PIPELINE_EXAMPLES: dict[str, Example] = {
    "zoo and codec": Example(
        summary="make a zoo, then train a codec on it",
        value={
            "jobs": {
                "zoo": {"kind": "generation", "spec": KINDS["generation"].example},
                "codec": {
                    "kind": "crossmodal",
                    "spec": {**KINDS["crossmodal"].example, "zoo": {"job": "zoo", "artifact": "zoo"}},
                    "labels": {"for": "the docs"},
                },
            }
        },
    )
}
