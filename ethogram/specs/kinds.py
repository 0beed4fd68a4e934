"""The kinds of jobs, by what is known of them without a platform."""

from __future__ import annotations

from dataclasses import dataclass

from ethogram.specs.base import Spec
from ethogram.specs.crossmodal import CrossmodalSpec
from ethogram.specs.generation import GenerationSpec


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of job."""

    name: str
    """As in ``POST /v1/jobs``."""
    summary: str
    """One line for people."""
    spec: type[Spec]
    """Its pydantic spec."""
    queue: str = "cpu"
    """Machine class that runs it unless the submission says otherwise."""


GENERATION = Kind(
    name="generation", summary="make a zoo of small classifiers with known behaviours", spec=GenerationSpec
)
CROSSMODAL = Kind(
    name="crossmodal",
    summary="train and evaluate an encoder-decoder of networks and its steering directions on a zoo",
    spec=CrossmodalSpec,
)
KINDS: dict[str, Kind] = {kind.name: kind for kind in (GENERATION, CROSSMODAL)}
