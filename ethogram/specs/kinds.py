"""The table of job kinds. REST, the command line, the worker's child process, the docs, the import contracts and the
tests derive from it; a job function and an RPC are named here, and imported by the process that runs the job.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import Any

from ethogram.specs.base import Spec
from ethogram.specs.clt import ActivationsSpec, CltSpec, PolicySpec, SaeSpec, SweepSpec
from ethogram.specs.crossmodal import CrossmodalSpec
from ethogram.specs.edits import OPERATIONS
from ethogram.specs.generation import GenerationSpec
from ethogram.specs.resource import DecoderSpec, ReaderSpec, ResourceSpec

EXAMPLE_JOB = "job_aaaaaaaaaaaaaaaaaaaa"
"""Placeholder in examples for the id of the user's own job."""


SPARSE_HEADLINE = ("fvu", "explained_variance", "cosine", "l0", "dead", "silent")


def _output(artifact: str) -> dict[str, str]:
    return {"job": EXAMPLE_JOB, "artifact": artifact}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of job."""

    name: str
    """As in ``POST /v1/jobs``."""
    summary: str
    """One line for people: what the job is to do."""
    spec: type[Spec]
    """Its pydantic spec. The module that defines it is named after the system."""
    job: str
    """``module:function`` that runs it, called as ``function(spec, run)``; returns a small JSON object."""
    rpc: str
    """Its server-streaming RPC, ``/package.Service/Method``. The request message has fields ``context`` and ``spec``.
    """
    queue: str = "cpu"
    """Machine class that runs it unless the submission says otherwise."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Input artifacts: path in the spec to artifact type."""
    outputs: Mapping[str, str]
    """Output artifacts: name to artifact type, the main one first; ``metrics`` and ``wandb`` come with any kind."""
    example: Mapping[str, Any]
    """A small spec."""
    headline: Sequence[str] = ()
    """The figures to show at the end of a run here; by default all."""

    def makes(self, artifact: str, type: str) -> bool:
        """Whether a job of this kind may make the ``artifact``: an output, what any kind makes, or a snapshot."""
        snapshot = artifact.startswith("snapshot-") and type in self.outputs.values()
        return self.outputs.get(artifact) == type or artifact in ("metrics", "wandb") or snapshot

    @property
    def system(self) -> str:
        """Its system NAME: ``ethogram/specs/NAME.py``, ``services/NAME/``, ``protos/ethogram/v1/NAME.proto``."""
        return self.spec.__module__.rpartition(".")[2]

    def load_job(self) -> Callable[..., dict[str, Any]]:
        """Import the job's function; takes a server install."""
        function: Callable[..., dict[str, Any]] = resolve_name(self.job)
        return function


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            name="generation",
            summary="make a zoo of small classifiers with known behaviours",
            spec=GenerationSpec,
            job="services.generation.job:run",
            rpc="/ethogram.v1.GenerationService/Run",
            inputs={"signature.baseline": "zoo"},
            outputs={"zoo": "zoo", "report": "report"},
            example={"seed": 1, "subjects": 256, "training": {"steps": 300}},
        ),
        Kind(
            name="crossmodal",
            summary="train and evaluate an encoder-decoder of networks and its steering directions on a zoo",
            spec=CrossmodalSpec,
            job="services.crossmodal.job:run",
            rpc="/ethogram.v1.CrossmodalTrainingService/Run",
            inputs={"zoo": "zoo"},
            outputs={"codec": "codec", "report": "report"},
            example={"zoo": _output("zoo"), "training": {"steps": 1000}},
            headline=[
                *("agreement", "nearest_train.agreement", "oracle.agreement", "matched_beats_same_label", "spread"),
                *(f"{edit}.{n}" for edit in OPERATIONS for n in ("target_mean", "local_mean", "kept_mean", "all_gate")),
                *(
                    f"{edit}.{way}.all_gate"
                    for edit in OPERATIONS
                    for way in ("same_label", "nearest_train", "centroid")
                ),
                "controls.max_all_gate",
            ],
        ),
        Kind(
            name="policy",
            summary="train a routing policy and compare it with a solver",
            spec=PolicySpec,
            job="services.clt.policy.job:run",
            rpc="/ethogram.v1.CltService/RunPolicy",
            inputs={"cities": "cities"},
            outputs={"policy": "policy", "report": "report"},
            example={"nodes": 10, "training": {"steps": 500}},
        ),
        Kind(
            name="activations",
            summary="record activations of a policy or a language model",
            spec=ActivationsSpec,
            job="services.clt.activations.job:run",
            rpc="/ethogram.v1.CltService/RunActivations",
            inputs={"policy": "policy", "cities": "cities"},
            outputs={"activations": "activations"},
            example={"policy": _output("policy"), "instances": 2000},
        ),
        Kind(
            name="sae",
            summary="train a sparse autoencoder of one hook point of a store",
            spec=SaeSpec,
            job="services.clt.sparse.job:run",
            rpc="/ethogram.v1.CltService/RunSae",
            inputs={"activations": "activations"},
            outputs={"model": "sparse-model", "report": "report"},
            example={"activations": _output("activations"), "hook": "encoder_layer_2_mlp"},
            headline=SPARSE_HEADLINE,
        ),
        Kind(
            name="clt",
            summary="train transcoders between hook points of a store",
            spec=CltSpec,
            job="services.clt.sparse.job:run",
            rpc="/ethogram.v1.CltService/RunClt",
            inputs={"activations": "activations", "model.dictionary": "sparse-model"},
            outputs={"model": "sparse-model", "report": "report"},
            example={"activations": _output("activations"), "kind": "cross_layer"},
            headline=SPARSE_HEADLINE,
        ),
        Kind(
            name="sweep",
            summary="train transcoders over pairs and a grid of options",
            spec=SweepSpec,
            job="services.clt.sparse.sweep:run",
            rpc="/ethogram.v1.CltService/RunSweep",
            inputs={"activations": "activations", "model.dictionary": "sparse-model"},
            outputs={"models": "sparse-models", "report": "report"},
            example={"activations": _output("activations"), "grid": [{"option": "model.k", "values": ["8", "32"]}]},
        ),
        Kind(
            name="language_model",
            summary="train a small language model that reads vectors of any schema",
            spec=ReaderSpec,
            job="services.resource.language_model_job:run",
            rpc="/ethogram.v1.ResourceTrainingService/RunLanguageModel",
            outputs={"model": "language-model"},
            example={"training": {"steps": 500}},
        ),
        Kind(
            name="resource",
            summary="train an encoder of configurations that a frozen language model reads, and export vectors",
            spec=ResourceSpec,
            job="services.resource.job:run",
            rpc="/ethogram.v1.ResourceTrainingService/RunResource",
            inputs={"tools": "tools", "profiling": "profiling", "language_model": "language-model"},
            outputs={
                "encoder": "resource-encoder",
                "export": "resource-export",
                "report": "report",
                "language_model": "language-model",
            },
            example={"training": {"steps": 500}},
            headline=[
                "exact_match_seen",
                "exact_match_unseen",
                "cross_entropy",
                "control_exact_match",
                "self_retrieval",
            ],
        ),
        Kind(
            name="decoder",
            summary="train a decoder from the text of a task to a tool and a configuration",
            spec=DecoderSpec,
            job="services.resource.decoder.job:run",
            rpc="/ethogram.v1.ResourceTrainingService/RunDecoder",
            inputs={"export": "resource-export"},
            outputs={"decoder": "decoder", "report": "report"},
            example={"export": _output("export")},
        ),
    )
}
