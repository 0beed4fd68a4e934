"""Specs of the clt jobs: a routing policy, its activations or a language model's, and sparse models of them."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from typing import Any, Literal

from pydantic import Field, model_validator

from ethogram.errors import InvalidInput, Violation
from ethogram.specs.base import ArtifactRef, OptimizationSpec, Seed, Spec, TrainedSpec

MAX_RUNS = 1000
"""Most runs of a sweep."""
NODES = 20
"""Cities of an instance on which a policy is trained, by default."""
MAX_NODES = 200
"""Most cities of an instance on which a policy is trained."""
EQUIVALENT = {"model.k": "model.k_ratio", "model.k_ratio": "model.k"}
"""Options that set the same thing: the one that a grid varies replaces the other."""
PAIR_SETS = {
    "mlp": "input and output of each MLP",
    "adjacent": "the output of each layer and that of the next",
    "jumps": "the output of each layer and those of all but the next",
    "output": "the output of each layer but the last, and that of a policy's encoder",
    "decoder": "the output of a policy's encoder, and the input of its decoder",
}
"""Sets of candidate pairs, which may be named instead of a pair."""


class PolicyModelSpec(Spec):
    """Architecture of the attention model (Kool et al. 2019, arXiv 1803.08475)."""

    hidden_dim: int = Field(128, ge=8, le=4096)
    """Width of the residual stream of each city."""
    layers: int = Field(3, ge=1, le=48)
    """Encoder layers."""
    heads: int = Field(8, ge=1, le=64)
    """Attention heads; ``hidden_dim`` divides into them."""
    feed_forward: int = Field(512, ge=1, le=65_536)
    """Width of the hidden layer of each MLP."""
    normalization: Literal["batch", "instance", "layer"] = "batch"
    """Normalization after attention and MLP. ``batch``: of each channel over all cities of a batch, with running
    statistics after training; ``instance``: of each channel over the cities of an instance, as in rl4co's POMO;
    ``layer``: over all channels and cities of an instance, without parameters, as rl4co has it."""
    graph_context: bool = True
    """Whether the decoder's query includes the mean over all cities."""
    clipping: float = Field(10.0, gt=0)
    """The logits of the next city are squashed by tanh to plus or minus this."""

    @model_validator(mode="after")
    def _fits(self) -> PolicyModelSpec:
        if self.hidden_dim % self.heads:
            raise ValueError(f"heads: hidden_dim {self.hidden_dim} does not divide into {self.heads} heads")
        return self


class PolicyTrainingSpec(OptimizationSpec):
    """How the policy is trained: REINFORCE with Adam; gradients are clipped to norm 1."""

    baseline: Literal["pomo", "rollout"] = "pomo"
    """``pomo``: mean length of the tours that start at each city (Kwon et al. 2020, arXiv 2010.16011); ``rollout``: the
    greedy tour of the best policy at any validation so far (Kool et al. 2019)."""
    steps: int = Field(6000, ge=1, le=10_000_000)
    """Optimiser steps; the default takes about ten minutes on two cores."""
    batch_size: int = Field(64, ge=1, le=65_536)
    """Instances per step."""
    learning_rate: float = Field(5e-4, gt=0, le=1)
    """Peak learning rate; it falls along a cosine to a hundredth of this."""
    weight_decay: float = Field(1e-6, ge=0, le=1)
    """Weight decay."""
    validation: int = Field(512, ge=1, le=100_000)
    """Fixed instances that each validation uses."""
    snapshots: int | None = Field(None, ge=1)
    """Steps between snapshots of the policy, each an artifact ``snapshot-<step>``; None: none."""


Distribution = Literal["uniform", "clustered"]


class PolicySpec(TrainedSpec):
    """Train a policy for the travelling salesman problem and compare it with a solver."""

    nodes: int | None = Field(None, ge=4, le=MAX_NODES)
    """Cities per instance; None: 20, or with ``cities`` as many as its instances have."""
    distribution: Distribution = "uniform"
    """How cities are drawn in the unit square. ``clustered``: Gaussian around three random centres per instance."""
    cities: ArtifactRef | None = None
    """Instances of your own instead of random ones: a ``.npy`` file, or a ``.safetensors`` file with ``cities``, of
    numbers ``[instances, cities, 2]`` in the unit square. The first ``training.validation`` are for validations and the
    next ``evaluation`` for the comparison; training draws from the others."""
    model: PolicyModelSpec = PolicyModelSpec()
    """Architecture."""
    training: PolicyTrainingSpec = PolicyTrainingSpec()
    """Optimisation."""
    evaluation: int = Field(1000, ge=0, le=1_000_000)
    """Fixed instances on which greedy and sampled tours are finally compared with a solver's; 0: none."""
    samples: int = Field(16, ge=0, le=10_000)
    """Tours sampled per instance, of which the shortest counts; 0: greedy tours only."""

    def unused(self) -> Iterator[tuple[str, str]]:
        if self.samples and not self.evaluation:
            yield "samples", "evaluation is 0"

    @model_validator(mode="before")
    @classmethod
    def _fill_nodes(cls, values: Any) -> Any:
        # So that a spec is recorded with what it means.
        if isinstance(values, dict) and values.get("nodes") is None and values.get("cities") is None:
            return values | {"nodes": NODES}
        return values

    @model_validator(mode="after")
    def _instances(self) -> PolicySpec:
        _check_instances(self)
        return self


def _check_instances(spec: PolicySpec | ActivationsSpec) -> None:
    if spec.cities is not None and (spec.nodes is not None or spec.distribution != "uniform"):
        name = "distribution" if spec.nodes is None else "nodes"
        raise ValueError(f"{name}: has no effect, because instances are those of `cities`; leave it out")


class LanguageModelSpec(Spec):
    """A causal language model and a text dataset, as a source of activations."""

    model: str = Field(min_length=1, max_length=1024)
    """Folder of a ``transformers`` model, or its name on the Hub."""
    dataset: str = Field(min_length=1, max_length=1024)
    """Text file, folder of a ``datasets`` dataset, or its name on the Hub."""
    config: str | None = Field(None, min_length=1, max_length=256)
    """Configuration of the dataset, if it has several."""
    split: str = Field("train", min_length=1, max_length=256)
    """Split of the dataset."""
    column: str = Field("text", min_length=1, max_length=256)
    """Column with the text."""
    context: int = Field(128, ge=2, le=1_000_000)
    """Tokens per sequence; texts are joined and cut into sequences of exactly this length."""
    skip_first: bool = True
    """Whether to leave out the first position of each sequence, an attention sink with a very large norm."""


def _check_pairs(pairs: list[str]) -> None:
    for number, pair in enumerate(pairs):
        if pair not in PAIR_SETS and len([end for end in pair.split("->") if end]) != 2:
            sets = ", ".join(PAIR_SETS)
            raise ValueError(f"pairs.{number}: {pair} is neither of the form SOURCE->TARGET nor one of {sets}")


class ActivationsSpec(Spec):
    """Record activations of a policy or a language model in a store."""

    policy: ArtifactRef | None = None
    """The policy; give either this or ``language_model``."""
    language_model: LanguageModelSpec | None = None
    """The language model; give either this or ``policy``."""
    hooks: list[str] = Field(default=[], max_length=1000)
    """Hook points. Of a policy: ``encoder_layer_0_input``, ``encoder_layer_0_pre_mlp``, ``encoder_layer_0_mlp``,
    ``encoder_layer_0`` (a layer's output), ..., ``encoder_output`` and ``decoder_input``; of a language model: a
    module's name for its output, followed by ``:input`` for its input."""
    pairs: list[str] = Field(default=[], max_length=1000)
    """Pairs ``SOURCE->TARGET`` of hook points to record, or sets of them: ``mlp``, input and output of each MLP;
    ``adjacent``, the outputs of each layer and the next; ``jumps``, of each layer and all but the next; ``output``, of
    each layer and the encoder; ``decoder``, of encoder and decoder's input. Without hooks and pairs: ``mlp``. MLPs of a
    language model are modules with the usual names (``mlp``, ``ffn``, ``fc1`` to ``fc2``, ...) that text passes."""
    instances: int = Field(10_000, ge=1, le=1_000_000_000)
    """Instances (tours or sequences) to record."""
    validation: float = Field(0.05, gt=0, lt=1)
    """Share of the instances held out for validation, with all their rows."""
    nodes: int | None = Field(None, ge=4, le=1000)
    """Cities per instance; None: as many as the policy was trained on."""
    distribution: Distribution = "uniform"
    """How cities are drawn in the unit square. ``clustered``: Gaussian around three random centres per instance."""
    cities: ArtifactRef | None = None
    """Instances of your own instead of random ones, in their order: a ``.npy`` file, or a ``.safetensors`` file with
    ``cities``, of numbers ``[instances, cities, 2]`` in the unit square."""
    seed: Seed = 0
    """Seed of the instances and of the order of rows."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Number format in the store."""
    shard_rows: int = Field(32_768, ge=16, le=10_000_000)
    """Rows per shard, rounded down to whole instances."""
    batch_size: int = Field(256, ge=1, le=65_536)
    """Instances per forward pass."""
    root: str | None = Field(None, min_length=1, max_length=4096)
    """Absolute path on the worker of a folder for the store, e.g. on a larger disk; None: below the worker's
    ``ACTIVATIONS_ROOT`` if it is set, else the store is an artifact."""

    @model_validator(mode="after")
    def _source(self) -> ActivationsSpec:
        if (self.policy is None) == (self.language_model is None):
            raise ValueError("give either policy or language_model")
        if self.language_model is not None and self.nodes is not None:
            raise ValueError("nodes: instances of a language model have `context` tokens, not cities")
        if self.language_model is not None and (self.cities is not None or self.distribution != "uniform"):
            name = "distribution" if self.cities is None else "cities"
            raise ValueError(f"{name}: instances of a language model are texts, not cities")
        _check_instances(self)
        _check_pairs(self.pairs)
        return self


class SparseModelSpec(Spec):
    """Architecture of a sparse model: features that read one hook point and write to others."""

    expansion: float = Field(8.0, gt=0, le=1024)
    """Features per channel of the source."""
    activation: Literal["topk", "batchtopk", "relu", "jumprelu"] = "topk"
    """Which features are active. ``topk``: the k largest of each row; ``batchtopk``: k per row on average over a batch
    (Bussmann et al. 2024, arXiv 2412.06410); ``relu``: all above 0; ``jumprelu``: all above a learned threshold
    (Rajamanoharan et al. 2024, arXiv 2407.14435)."""
    k: int | None = Field(None, ge=1, le=1_000_000)
    """Active features per row and source."""
    k_ratio: float | None = Field(None, gt=0, le=1)
    """``k`` as a share of the features; 0.05 if neither is given."""
    skip: bool = False
    """Whether to add a linear map from source to target."""
    dictionary: ArtifactRef | None = None
    """A sparse model of the target (its artifact ``model``), whose decoder is used and not trained (tied W_dec); None:
    the decoder is trained."""

    @model_validator(mode="after")
    def _sparsity(self) -> SparseModelSpec:
        if self.k is not None and self.k_ratio is not None:
            raise ValueError("k_ratio: means the same as k; give one of them")
        return self


class SparseLossSpec(Spec):
    """The objective: squared error as a share of the targets' variance, plus penalties. Each option is a penalty's
    weight; 0 switches it off."""

    l1: float = Field(0.0, ge=0)
    """L1 of the feature activations, each times the norm of its decoder direction."""
    l0: float = Field(0.0, ge=0)
    """Number of active features of ``jumprelu``, by a straight-through estimate."""
    dictionary_l1: float = Field(0.0, ge=0)
    """L1 of the decoder's weights."""
    dictionary_l2: float = Field(0.0, ge=0)
    """Squares of the decoder's weights."""
    orthogonality: float = Field(0.0, ge=0)
    """Squared cosines between decoder directions."""
    energy: float = Field(0.0, ge=0)
    """Squared relative difference in energy (squared norm) between reconstructions and targets."""
    alignment: float = Field(0.0, ge=0)
    """1 minus the cosine between reconstructions and targets, in the units of ``training.normalize``."""
    group_features: float = Field(0.0, ge=0)
    """Group lasso of each row's feature activations, in groups of ``group_size`` neighbours."""
    group_size: int = Field(16, ge=2, le=65_536)
    """Features per group."""
    group_heads: float = Field(0.0, ge=0)
    """Group lasso of the decoder; a group is one feature's weights to the channels of one head."""
    heads: int = Field(8, ge=1, le=1024)
    """Heads into which ``group_heads`` divides the target's channels."""
    auxk: float = Field(0.0, ge=0)
    """Error of dead features in reconstructing the residual (Gao et al. 2024, arXiv 2406.04093, use 1/32). Use it only
    when many features die for good: it hinders features that would revive by themselves."""
    auxk_features: int = Field(64, ge=1, le=65_536)
    """Dead features that ``auxk`` uses per row; with fewer dead features, the term counts less."""


class SparseTrainingSpec(OptimizationSpec):
    """How a sparse model is trained: Adam; gradients are clipped to norm 1."""

    steps: int = Field(4000, ge=1, le=100_000_000)
    """Optimiser steps; without ``epochs``."""
    epochs: float | None = Field(None, gt=0, le=10_000)
    """Passes over the training rows instead of ``steps``."""
    batch_size: int = Field(4096, ge=1, le=1_048_576)
    """Rows per step."""
    learning_rate: float = Field(7e-4, gt=0, le=1)
    """Peak learning rate."""
    decay: float = Field(0.2, ge=0, le=1)
    """Share of the steps, at the end, over which the learning rate falls linearly to 0."""
    normalize: Literal["center", "standardize", "whiten", "none"] = "center"
    """Normalization of source and target, by statistics of the training rows. ``center``: subtract the mean and scale
    all channels alike to a mean square of 1; ``standardize``: scale each channel by itself; ``whiten``: also transform
    the source to unit covariance."""
    dead_after: int = Field(200_000, ge=1)
    """A feature is dead when it has not fired for this many rows."""
    revive_every: int | None = Field(None, ge=1)
    """Steps between revivals, which point dead features at rows with large errors, until the learning rate falls; None:
    never."""
    validate_every: int = Field(500, ge=1)
    """Steps between validations."""
    validation_rows: int = Field(65_536, ge=1)
    """Most rows per validation."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the encoder's matrix product."""
    snapshots: int | None = Field(None, ge=1)
    """Steps between snapshots of the weights, each an artifact ``snapshot-<step>``; None: none."""
    snapshot_epochs: float | None = Field(None, gt=0, le=10_000)
    """Passes over the training rows between snapshots, instead of ``snapshots``."""

    @model_validator(mode="after")
    def _snapshots(self) -> SparseTrainingSpec:
        if self.snapshots is not None and self.snapshot_epochs is not None:
            raise ValueError("snapshot_epochs: means the same as snapshots; give one of them")
        return self


class SparseSpec(TrainedSpec):
    """Train sparse models on a store of activations."""

    activations: ArtifactRef
    """The store of activations."""
    model: SparseModelSpec = SparseModelSpec()
    """Architecture."""
    loss: SparseLossSpec = SparseLossSpec()
    """Objective."""
    training: SparseTrainingSpec = SparseTrainingSpec()
    """Optimisation."""

    def unused(self) -> Iterator[tuple[str, str]]:
        model, loss, training = self.model, self.loss, self.training
        if model.activation in ("relu", "jumprelu") and training.revive_every is None:
            for name in ("k", "k_ratio"):
                yield f"model.{name}", f"with activation {model.activation} any number of features is active"
        if model.activation != "jumprelu":
            yield "loss.l0", f"model.activation is {model.activation}, and only jumprelu learns thresholds"
        if model.dictionary is not None:
            yield "model.expansion", "the features are those of model.dictionary"
            for name in ("dictionary_l1", "dictionary_l2", "orthogonality", "group_heads"):
                yield f"loss.{name}", "the decoder is that of model.dictionary, and not trained"
        if not loss.group_features:
            yield "loss.group_size", "loss.group_features is 0"
        if not loss.group_heads or model.dictionary is not None:
            yield "loss.heads", "loss.group_heads is 0, or without effect itself"
        if not loss.auxk:
            yield "loss.auxk_features", "loss.auxk is 0"
        if training.epochs is not None:
            yield "training.steps", "training.epochs says how many there are"

    def doubts(self) -> Iterator[tuple[str, str]]:
        loss, kind = self.loss, self.model.activation
        penalties = {"relu": [loss.l1, loss.group_features], "jumprelu": [loss.l0, loss.l1, loss.group_features]}
        if kind in penalties and not any(penalties[kind]):
            name = "l1" if kind == "relu" else "l0"
            yield f"loss.{name}", f"is 0, so nothing makes the features of {kind} sparse; set it, e.g. to 1e-3"


class SaeSpec(SparseSpec):
    """Train a sparse autoencoder of one hook point."""

    hook: str = Field(min_length=1, max_length=1024)
    """Hook point."""

    @model_validator(mode="after")
    def _untied(self) -> SaeSpec:
        if self.model.dictionary is not None or self.model.skip:
            raise ValueError("model: an autoencoder has neither dictionary nor skip")
        return self


class CltSpec(SparseSpec):
    """Train transcoders from source to target hook points."""

    kind: Literal["pair", "per_layer", "cross_layer"] = "pair"
    """``pair``: one source and one target; ``per_layer``: the i-th source writes to the i-th target; ``cross_layer``:
    it writes to the i-th and all later targets."""
    sources: list[str] = Field(default=[], max_length=1000)
    """Hook points that are read, in order of execution; empty: the input of each MLP in the store."""
    targets: list[str] = Field(default=[], max_length=1000)
    """Hook points that are written to, one for each source; empty: the output of each MLP in the store."""

    @model_validator(mode="after")
    def _fits(self) -> CltSpec:
        if len(self.sources) != len(self.targets):
            raise ValueError(f"targets: {len(self.targets)} for {len(self.sources)} sources; give one for each source")
        if self.kind == "pair" and len(self.sources) != 1:
            raise ValueError(
                "sources: a pair has one source and one target; name them, or use kind per_layer or cross_layer"
            )
        if self.kind != "pair" and self.model.dictionary is not None:
            raise ValueError("model.dictionary: only kind pair can use a dictionary of its target")
        return self


class GridAxis(Spec):
    """One option to vary and its values."""

    option: str = Field(min_length=1, max_length=200, pattern=r"^(model|loss|training)\.[a-z0-9_]+$|^seed$")
    """Option of the clt spec, e.g. ``model.k``."""
    values: list[str] = Field(default=[], min_length=1, max_length=1000)
    """Values as JSON; anything that is not JSON is a string."""


class SweepSpec(SparseSpec):
    """Train transcoders for each pair and each point of a grid, and compare them. Each has its own run at W&B."""

    kind: Literal["pair", "per_layer", "cross_layer"] = "pair"
    """``pair``: a transcoder for each pair; otherwise one transcoder with all pairs as its sources and targets."""
    pairs: list[str] = Field(default=[], max_length=1000)
    """Pairs ``SOURCE->TARGET`` of hook points, or sets of them, as in activations; empty: input and output of each MLP
    in the store."""
    grid: list[GridAxis] = Field(default=[], max_length=20)
    """Options to vary; every combination is trained."""

    def points(self) -> Iterator[tuple[tuple[tuple[str, str], ...], dict[str, Any]]]:
        """Each point of the grid, its options with their values, and the fields of its runs, without hook points.
        Raises as :meth:`check_options`."""
        self.check_options()
        options = {axis.option for axis in self.grid}
        for point in itertools.product(*([(axis.option, value) for value in axis.values] for axis in self.grid)):
            fields = self.model_dump(mode="json", exclude={"pairs", "grid"})
            for option, value in point:
                other = EQUIVALENT.get(option)
                if other is not None and other not in options:
                    _set(fields, other, "null")
                _set(fields, option, value)
            yield point, fields

    def check_options(self, prefix: str = "spec.") -> None:
        """Raise :class:`InvalidInput` for an option of the grid that there is not. ``prefix``: put before its path."""
        for number, axis in enumerate(self.grid):
            section, _, name = axis.option.rpartition(".")
            names = type(getattr(self, section) if section else self).model_fields
            if name not in names:
                text = f"there is no option {axis.option}; there are {', '.join(names)}"
                raise InvalidInput.field(f"{prefix}grid.{number}.option", text)

    def ignored(self, prefix: str = "spec.") -> list[Violation]:
        self.check_options(prefix)
        return super().ignored(prefix)

    def unused(self) -> Iterator[tuple[str, str]]:
        runs = _runs(self.model_dump_json())
        # What is used at one point has an effect.
        unused = {path: why for path, why in runs[0][1].items() if all(path in run for _, run in runs)} if runs else {}
        yield from unused.items()
        for number, axis in enumerate(self.grid):
            if axis.option in unused:
                yield f"grid.{number}", f"it varies {axis.option}, and {unused[axis.option]}"
        if self.wandb is not None:
            yield "wandb.name", "each run has a name of its own"

    def doubts(self) -> Iterator[tuple[str, str]]:
        runs = _runs(self.model_dump_json())
        for axis in self.grid:
            for option in filter(None, (axis.option, EQUIVALENT.get(axis.option))):
                if self._is_set(option):
                    yield option, f"has no effect, because the grid varies {axis.option}"
        yield from dict.fromkeys(doubt for run, _ in runs for doubt in run.doubts())
        different = {json.dumps(_without(run, unused)) for run, unused in runs}
        if same := len(runs) - len(different):
            text = f"{same} of its {len(runs)} points are the same as others: an option has no effect there"
            yield "grid", f"{text}; sweep over these options apart"

    def _is_set(self, path: str) -> bool:
        return path.startswith("grid.") or super()._is_set(path)

    @model_validator(mode="after")
    def _fits(self) -> SweepSpec:
        _check_pairs(self.pairs)
        options = [axis.option for axis in self.grid]
        for number, option in enumerate(options):
            if option in options[:number]:
                raise ValueError(f"grid.{number}.option: {option} occurs twice")
        if math.prod(len(axis.values) for axis in self.grid) > MAX_RUNS:
            raise ValueError(f"grid: has more than {MAX_RUNS} points")
        return self


def _set(fields: dict[str, Any], option: str, text: str) -> None:
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    section, _, name = option.rpartition(".")
    (fields[section] if section else fields)[name] = value


@lru_cache(maxsize=1)
def _runs(sweep: str) -> tuple[tuple[SparseSpec, dict[str, str]], ...]:
    """What the runs at each point of a sweep (as JSON) have in common, with the fields that have no effect there;
    points that are no specs are left out. Kept, since a check asks more than once and a grid may be large."""
    runs = []
    for _, fields in SweepSpec.model_validate_json(sweep).points():
        with suppress(ValueError):
            run = SparseSpec.model_validate({name: fields[name] for name in SparseSpec.model_fields})
            runs.append((run, dict(run.unused())))
    return tuple(runs)


def _without(spec: Spec, paths: Iterable[str]) -> dict[str, Any]:
    fields = spec.model_dump(mode="json")
    for path in paths:
        section, _, name = path.partition(".")
        fields[section].pop(name, None)
    return fields
