"""Specs of the clt jobs: a routing policy, its activations or a language model's, and sparse models of them."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from ethogram.specs.base import ArtifactRef, OptimizationSpec, Seed, Spec, TrainedSpec, WandbSpec

MOST_RUNS = 1000
"""Of a sweep."""


class PolicyModelSpec(Spec):
    """Architecture of the attention model (Kool et al. 2019, arXiv 1803.08475)."""

    hidden_dim: int = Field(128, ge=8, le=4096)
    """Width of the stream of each city."""
    layers: int = Field(3, ge=1, le=48)
    """Layers of the encoder."""
    heads: int = Field(8, ge=1, le=64)
    """Attention heads; ``hidden_dim`` divides into them."""
    feed_forward: int = Field(512, ge=1, le=65_536)
    """Width of the hidden layer of each MLP."""
    graph_context: bool = True
    """Whether the decoder's query has the mean of the cities too."""
    clipping: float = Field(10.0, gt=0)
    """Logits of the next city lie within plus and minus this (by tanh)."""

    @model_validator(mode="after")
    def _fits(self) -> PolicyModelSpec:
        if self.hidden_dim % self.heads:
            raise ValueError(f"heads: hidden_dim {self.hidden_dim} does not divide into {self.heads} heads")
        return self


class PolicyTrainingSpec(OptimizationSpec):
    """How the policy is trained: REINFORCE, Adam, gradients clipped to norm 1."""

    baseline: Literal["pomo", "rollout"] = "pomo"
    """``pomo``: the mean of the tours that begin at each city (Kwon et al. 2020, arXiv 2010.16011); ``rollout``: the
    greedy tour of the best policy so far (Kool et al. 2019)."""
    steps: int = Field(6000, ge=1, le=10_000_000)
    """Optimiser steps; the default ones are about ten minutes on two cores."""
    batch_size: int = Field(64, ge=1, le=65_536)
    """Instances per step."""
    learning_rate: float = Field(5e-4, gt=0, le=1)
    """Peak learning rate; it falls to a hundredth along a cosine."""
    weight_decay: float = Field(1e-6, ge=0, le=1)
    """Weight decay."""
    validate_every: int = Field(500, ge=1, le=1_000_000)
    """Steps between validations, at which a ``rollout`` baseline may be replaced."""
    validation: int = Field(512, ge=1, le=100_000)
    """Fixed instances of a validation."""


class PolicySpec(TrainedSpec):
    """Train a policy that builds tours of cities (TSP), and compare it with a solver."""

    nodes: int = Field(20, ge=4, le=200)
    """Cities of an instance, uniform in the unit square."""
    model: PolicyModelSpec = PolicyModelSpec()
    """Architecture."""
    training: PolicyTrainingSpec = PolicyTrainingSpec()
    """Optimisation."""
    evaluation: int = Field(1000, ge=0, le=1_000_000)
    """Fixed instances on which greedy and sampled tours are compared with a solver's at the end; 0: none."""
    samples: int = Field(16, ge=0, le=10_000)
    """Tours sampled for each of them, of which the shortest counts; 0: greedy tours alone."""


class LanguageModelSpec(Spec):
    """A causal language model and a text dataset, as a source of activations."""

    model: str = Field(min_length=1, max_length=1024)
    """Folder of a ``transformers`` model, or its name on the Hub."""
    dataset: str = Field(min_length=1, max_length=1024)
    """Text file, folder of a ``datasets`` dataset, or its name on the Hub."""
    config: str | None = Field(None, min_length=1, max_length=256)
    """Configuration of the dataset, where it has several."""
    split: str = Field("train", min_length=1, max_length=256)
    """Split of the dataset."""
    column: str = Field("text", min_length=1, max_length=256)
    """Column of the text."""
    context: int = Field(128, ge=2, le=1_000_000)
    """Tokens of a sequence; texts are joined and cut into sequences of just this length."""
    skip_first: bool = True
    """Whether the first position of each sequence is left out: it is an attention sink with an outsize norm."""


def _check_pairs(pairs: list[str]) -> None:
    for number, pair in enumerate(pairs):
        if len([end for end in pair.split("->") if end]) != 2:
            raise ValueError(f"pairs.{number}: {pair} is not of the form SOURCE->TARGET")


class ActivationsSpec(Spec):
    """Record activations of a policy or a language model into a store."""

    policy: ArtifactRef | None = None
    """The policy; or give ``language_model``."""
    language_model: LanguageModelSpec | None = None
    """The language model; or give ``policy``."""
    hooks: list[str] = Field(default=[], max_length=1000)
    """Hook points. Of a policy: ``encoder_layer_0_input``, ``encoder_layer_0_pre_mlp``, ``encoder_layer_0_mlp``,
    ``encoder_layer_0`` (a layer's output), ..., ``encoder_output`` and ``decoder_input``; of a language model: names of
    modules for their output, with ``:input`` for their input."""
    pairs: list[str] = Field(default=[], max_length=1000)
    """Pairs ``SOURCE->TARGET`` of hook points, whose two ends are recorded. With neither hooks nor pairs: of a policy,
    what enters and leaves each MLP; of a language model, the same of its modules called ``mlp``."""
    instances: int = Field(10_000, ge=1, le=1_000_000_000)
    """Instances (tours or sequences) to record."""
    validation: float = Field(0.05, gt=0, lt=1)
    """Share of the instances that are kept for validation, with all their rows."""
    nodes: int | None = Field(None, ge=4, le=1000)
    """Cities of an instance; None: as many as the policy was trained on."""
    seed: Seed = 0
    """Draws the instances and the order of rows."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Of the numbers in the store."""
    shard_rows: int = Field(32_768, ge=16, le=10_000_000)
    """Rows of a shard, rounded down to whole instances."""
    batch_size: int = Field(256, ge=1, le=65_536)
    """Instances that go through the model at once."""
    root: str | None = Field(None, min_length=1, max_length=4096)
    """Folder on the worker for the store, e.g. on a larger disk; None: below ``ACTIVATIONS_ROOT`` where the worker has
    it, else the store is kept as an artifact."""

    @model_validator(mode="after")
    def _source(self) -> ActivationsSpec:
        if (self.policy is None) == (self.language_model is None):
            raise ValueError("give either policy or language_model")
        if self.language_model is not None and self.nodes is not None:
            raise ValueError("nodes: instances of a language model have `context` tokens, not cities")
        _check_pairs(self.pairs)
        return self


class SparseModelSpec(Spec):
    """Form of a sparse model: features that read one stream and write others."""

    expansion: float = Field(8.0, gt=0, le=1024)
    """Features per number of the source stream."""
    activation: Literal["topk", "batchtopk", "relu", "jumprelu"] = "topk"
    """``topk``: the k largest of each row; ``batchtopk``: k on average over a batch (Bussmann et al. 2024, arXiv
    2412.06410); ``relu``: all above 0; ``jumprelu``: all above a threshold that is learned (Rajamanoharan et al. 2024,
    arXiv 2407.14435)."""
    k: int | None = Field(None, ge=1, le=1_000_000)
    """Features of a row, of each source."""
    k_ratio: float | None = Field(None, gt=0, le=1)
    """The same as a share of the features; 0.05 where ``k`` is not given either."""
    skip: bool = False
    """Whether a linear map goes from source to target beside the features."""
    dictionary: ArtifactRef | None = None
    """A sparse model of the target (its artifact ``model``), whose decoder is this one's too and is not trained: W_dec
    is tied to it. None: untied."""

    @model_validator(mode="after")
    def _one(self) -> SparseModelSpec:
        if self.k is not None and self.k_ratio is not None:
            raise ValueError("k_ratio: says what k says too; give one of them")
        return self


class SparseLossSpec(Spec):
    """The objective: the error as a share of the targets' variance, and penalties by their weights, of which 0 switches
    one off."""

    l1: float = Field(0.0, ge=0)
    """Of the features' values, each times the norm of what it writes."""
    l0: float = Field(0.0, ge=0)
    """Of the number of active features of ``jumprelu``, by a straight-through estimate."""
    dictionary_l1: float = Field(0.0, ge=0)
    """Of the decoder's numbers, absolute."""
    dictionary_l2: float = Field(0.0, ge=0)
    """Of the decoder's numbers, squared."""
    orthogonality: float = Field(0.0, ge=0)
    """Of the squared cosines between the directions that features write."""
    energy: float = Field(0.0, ge=0)
    """Of the squared difference between the energy (squared norm) of reconstructions and of targets, relative."""
    alignment: float = Field(0.0, ge=0)
    """Of 1 minus the cosine between reconstructions and targets, in the units of ``training.normalize``."""
    group_features: float = Field(0.0, ge=0)
    """Group lasso of the features of each row, in groups of ``group_size`` neighbours."""
    group_size: int = Field(16, ge=2, le=65_536)
    """Features of a group."""
    group_heads: float = Field(0.0, ge=0)
    """Group lasso of the decoder, in groups of a feature and the channels of one head."""
    heads: int = Field(8, ge=1, le=1024)
    """Heads that the target's channels are divided into for ``group_heads``."""
    auxk: float = Field(0.0, ge=0)
    """Of the error with which dead features explain what is left (Gao et al. 2024, arXiv 2406.04093, take 1/32). For
    when many features die for good: those that are rare for a while come back by themselves, and it keeps them from
    it."""
    auxk_features: int = Field(64, ge=1, le=65_536)
    """Dead features of a row that do; where fewer are dead, the term counts for less."""


class SparseTrainingSpec(OptimizationSpec):
    """How a sparse model is trained (Adam, gradients clipped to norm 1)."""

    steps: int = Field(4000, ge=1, le=100_000_000)
    """Optimiser steps; of ``epochs`` where they are given."""
    epochs: float | None = Field(None, gt=0, le=10_000)
    """Passes over the training rows instead of ``steps``."""
    batch_size: int = Field(4096, ge=1, le=1_048_576)
    """Rows of a step."""
    learning_rate: float = Field(7e-4, gt=0, le=1)
    """Peak learning rate."""
    decay: float = Field(0.2, ge=0, le=1)
    """Share of the steps, at the end, over which it falls to 0 in a straight line."""
    normalize: Literal["center", "standardize", "whiten", "none"] = "center"
    """Of source and target, by the training rows: ``center``: the mean is taken off and the whole is scaled to a mean
    square of 1 per channel; ``standardize``: each channel by itself; ``whiten``: the source to unit covariance."""
    dead_after: int = Field(200_000, ge=1)
    """Rows without a single activation after which a feature is dead."""
    revive_every: int | None = Field(None, ge=1)
    """Steps between revivals, at which dead features are set on rows with large errors, until the learning rate falls;
    None: never."""
    validate_every: int = Field(500, ge=1)
    """Steps between validations."""
    validation_rows: int = Field(65_536, ge=1)
    """Most rows of a validation."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the encoder's matrix product."""
    snapshots: int | None = Field(None, ge=1)
    """Steps between snapshots of the weights, each an artifact ``snapshot-<step>``; None: none."""


class SparseSpec(TrainedSpec):
    """What the trainings of all sparse models take."""

    activations: ArtifactRef
    """The store."""
    model: SparseModelSpec = SparseModelSpec()
    """Form."""
    loss: SparseLossSpec = SparseLossSpec()
    """Objective."""
    training: SparseTrainingSpec = SparseTrainingSpec()
    """Optimisation."""


class SaeSpec(SparseSpec):
    """Train a sparse autoencoder of one hook point."""

    hook: str = Field(min_length=1, max_length=1024)
    """Hook point."""

    @model_validator(mode="after")
    def _untied(self) -> SaeSpec:
        if self.model.dictionary is not None or self.model.skip:
            raise ValueError("model: an autoencoder has neither a dictionary of a target nor a skip")
        return self


class CltSpec(SparseSpec):
    """Train transcoders from source to target hook points."""

    kind: Literal["pair", "per_layer", "cross_layer"] = "pair"
    """``pair``: one source, one target; ``per_layer``: each source writes the target of its own place;
    ``cross_layer``: each source writes the targets of its own and all later places."""
    sources: list[str] = Field(default=[], max_length=1000)
    """Hook points that are read, in order of execution; without, what enters each MLP of the store."""
    targets: list[str] = Field(default=[], max_length=1000)
    """Hook points that are written, as many; without, what leaves each MLP of the store."""

    @model_validator(mode="after")
    def _fits(self) -> CltSpec:
        if len(self.sources) != len(self.targets):
            raise ValueError(f"targets: {len(self.targets)} for {len(self.sources)} sources; give as many of both")
        if self.kind == "pair" and len(self.sources) != 1:
            raise ValueError(
                "sources: a pair has one source and one target; name them, or take kind per_layer or cross_layer"
            )
        if self.kind != "pair" and self.model.dictionary is not None:
            raise ValueError("model.dictionary: a pair alone can be tied to a dictionary of its target")
        return self


class GridAxis(Spec):
    """One option of a grid and its values."""

    option: str = Field(min_length=1, max_length=200, pattern=r"^(model|loss|training)\.[a-z0-9_]+$|^seed$")
    """Option of a clt spec, e.g. ``model.k``."""
    values: list[str] = Field(default=[], max_length=1000)
    """Values, written as in JSON; what is no JSON is a string."""

    @model_validator(mode="after")
    def _some(self) -> GridAxis:
        if not self.values:
            raise ValueError("values: name at least one")
        return self


class SweepSpec(SparseSpec):
    """Train transcoders for each pair and each point of a grid, and compare them."""

    kind: Literal["pair", "per_layer", "cross_layer"] = "pair"
    """``pair``: each pair has runs of its own; else the pairs are the places of one transcoder, see the clt spec."""
    pairs: list[str] = Field(default=[], max_length=1000)
    """Pairs ``SOURCE->TARGET`` of hook points; without, what enters and leaves each MLP of the store."""
    grid: list[GridAxis] = Field(default=[], max_length=20)
    """Options to vary; every combination is trained."""
    model: SparseModelSpec = SparseModelSpec()
    """Form, but for the grid."""
    loss: SparseLossSpec = SparseLossSpec()
    """Objective, but for the grid."""
    training: SparseTrainingSpec = SparseTrainingSpec()
    """Optimisation, but for the grid."""
    wandb: WandbSpec | None = None
    """Metrics of each run to Weights & Biases too, under its name."""

    @model_validator(mode="after")
    def _fits(self) -> SweepSpec:
        _check_pairs(self.pairs)
        options = [axis.option for axis in self.grid]
        for number, option in enumerate(options):
            if option in options[:number]:
                raise ValueError(f"grid.{number}.option: {option} is there twice")
        if math.prod(len(axis.values) for axis in self.grid) > MOST_RUNS:
            raise ValueError(f"grid: has more than {MOST_RUNS} points")
        return self
