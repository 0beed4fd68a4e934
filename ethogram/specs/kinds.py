"""The kinds of jobs, by what is known of them without a platform."""

from __future__ import annotations

from dataclasses import dataclass

from ethogram.specs.base import Spec
from ethogram.specs.clt import ActivationsSpec, CltSpec, PolicySpec, SaeSpec, SweepSpec
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
POLICY = Kind(name="policy", summary="train a routing policy and compare it with a solver", spec=PolicySpec)
ACTIVATIONS = Kind(
    name="activations", summary="record activations of a policy or a language model", spec=ActivationsSpec
)
SAE = Kind(name="sae", summary="train a sparse autoencoder of one hook point of a store", spec=SaeSpec)
CLT = Kind(name="clt", summary="train transcoders between hook points of a store", spec=CltSpec)
SWEEP = Kind(name="sweep", summary="train transcoders over pairs and a grid of options", spec=SweepSpec)
KINDS: dict[str, Kind] = {kind.name: kind for kind in (GENERATION, CROSSMODAL, POLICY, ACTIVATIONS, SAE, CLT, SWEEP)}
