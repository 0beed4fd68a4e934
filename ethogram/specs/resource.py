"""Specs of the resource system: tables of measured configurations as vectors that a frozen language model reads."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ethogram.specs.base import ArtifactRef, HubSpec, OptimizationSpec, Spec, TrainedSpec

Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-z][a-z0-9_]*$")]
Label = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^\s{}](?:[^\n\r\t{}]*[^\s{}])?$")]
MAX_LABELS = 64
"""Labels of a category, and tools of a table, at most."""
MAX_DIMENSIONS = 31
"""Dimensions of a table, at most."""
MOST, FINEST = 9_999_999, 3
"""The largest number in a description, and the most decimals."""


def has_more_decimals(value: float, decimals: int) -> bool:
    """Whether a number has more decimals than ``decimals``, apart from the rounding errors of floating point:
    ``3 * 0.1``, which is 0.30000000000000004, has one."""
    return not math.isclose(round(value, decimals), value, rel_tol=1e-12, abs_tol=1e-9)


class DimensionSpec(Spec):
    """A column of a table of configurations: a number or a category."""

    name: Name
    """As templates and results name it; ``tool`` and ``tool_name`` are taken."""
    column: str | None = Field(None, min_length=1, max_length=128)
    """Column of the table of measurements; None: the name."""
    unit: str = Field("", max_length=32)
    """Unit of a number, for people."""
    levels: list[float] = Field(default_factory=list, max_length=4096)
    """Values of a number on the grid of configurations."""
    low: float | None = Field(None, ge=0, le=MOST)
    """Least value of a number in its declared range; None: the least of the levels, else of the table."""
    high: float | None = Field(None, ge=0, le=MOST)
    """Greatest value of a number in its declared range; None: the greatest of the levels, else of the table."""
    labels: list[Label] = Field(default_factory=list, max_length=MAX_LABELS)
    """Values of a category, which makes the dimension one; in order, where there is an order."""
    decimals: int = Field(0, ge=0, le=FINEST)
    """Decimals of a number in descriptions."""
    price: float = Field(0.0, ge=0)
    """Cost per unit of a number that is not measured, for recommendations."""
    measured: bool = False
    """Whether it is an outcome, such as a latency; other dimensions are what a user chooses."""

    @property
    def number(self) -> bool:
        """Whether it is a number, not a category."""
        return not self.labels

    @model_validator(mode="after")
    def _consistent(self) -> DimensionSpec:
        if self.name in ("tool", "tool_name"):
            raise ValueError(f"name: {self.name} is the name of the tool's own column; give the dimension another")
        if len(set(self.labels)) < len(self.labels):
            raise ValueError("labels: one of them is there twice")
        if self.labels and (self.levels or self.low is not None or self.high is not None or self.price):
            raise ValueError("labels: a category has no levels, low, high or price")
        if self.price and self.measured:
            raise ValueError("price: what is measured is not chosen, and has no price")
        if len(set(self.levels)) < len(self.levels):
            raise ValueError("levels: one of them is there twice")
        for level in self.levels:
            if not 0 <= level <= MOST:
                raise ValueError(f"levels: {level:.10g} is not from 0 to {MOST}")
            if round(level, self.decimals) != level:
                raise ValueError(
                    f"levels: {level!r} has more decimals than descriptions, {self.decimals}; set decimals"
                )
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"high: the range from {self.low:.10g} to {self.high:.10g} is empty")
        for level in self.levels:
            if not (self.low is None or self.low <= level) or not (self.high is None or level <= self.high):
                raise ValueError(f"levels: {level:.10g} is outside the declared range")
        return self


class TemplateSpec(Spec):
    """A form of description, with ``{tool}`` and ``{<name of a dimension>}`` once each."""

    name: Name
    """As results name it."""
    text: str = Field(min_length=1, max_length=2000)
    """The text."""


class SchemaSpec(Spec):
    """What a table of configurations holds, and how it is described."""

    dimensions: list[DimensionSpec] = Field(default_factory=list, max_length=MAX_DIMENSIONS)
    """Its dimensions, in the order of the vectors."""
    templates: list[TemplateSpec] = Field(default_factory=list, max_length=16)
    """Forms of description; training takes them in turn."""
    tool_column: str = Field("tool", min_length=1, max_length=128)
    """Column of the tool in the table of measurements."""
    repeated: bool = False
    """Whether a configuration may be there several times, as repeated measurements."""

    @model_validator(mode="after")
    def _consistent(self) -> SchemaSpec:
        columns = [self.tool_column, *(dimension.column or dimension.name for dimension in self.dimensions)]
        for field, what, found in (
            ("dimensions", "name", [dimension.name for dimension in self.dimensions]),
            ("dimensions", "column", columns),
            ("templates", "name", [template.name for template in self.templates]),
        ):
            if not found:
                raise ValueError(f"{field}: there must be at least one")
            if repeated := [name for name in found if found.count(name) > 1]:
                raise ValueError(f"{field}: two of them have the {what} {repeated[0]}")
        return self


class ReaderSizeSpec(Spec):
    """Size of a language model of the Qwen2 architecture."""

    hidden_dim: int = Field(128, ge=8, le=4096)
    """Width of the residual stream."""
    layers: int = Field(4, ge=2, le=48)
    """Transformer layers."""
    heads: int = Field(8, ge=1, le=64)
    """Attention heads; ``hidden_dim`` divides into them."""
    feed_forward: int = Field(256, ge=1, le=65_536)
    """Width of the hidden layer of each MLP."""
    vocabulary: int = Field(1024, ge=512, le=65_536)
    """Tokens: marks of slots, labels and edges, digits one by one, and pieces of words."""

    @model_validator(mode="after")
    def _fits(self) -> ReaderSizeSpec:
        if self.hidden_dim % self.heads:
            raise ValueError(f"heads: hidden_dim {self.hidden_dim} does not divide into {self.heads} heads")
        return self


class ReaderTrainingSpec(OptimizationSpec):
    """How the language model is trained: matrices by Muon, the rest by AdamW; gradients are clipped to norm 1."""

    copying: int = Field(450, ge=0, le=10_000_000)
    """Steps before the others, in which it learns to copy random tokens and to read soft tokens."""
    steps: int = Field(800, ge=1, le=10_000_000)
    """Steps in which it learns to describe what it reads in soft tokens, on random schemas."""
    batch_size: int = Field(32, ge=1, le=65_536)
    """Descriptions per step; fewer of schemas with more than 8 fields."""
    schemas: int = Field(16, ge=1, le=4096)
    """Random schemas per step, fewer of those; ``batch_size`` divides into them."""
    learning_rate: float = Field(3e-3, gt=0, le=1)
    """Learning rate of copying; from then on it falls along a cosine to a hundredth of this."""
    warm_up: int = Field(20, ge=0, le=1_000_000)
    """Steps over which the learning rate rises linearly from 0."""
    noise: float = Field(0.05, ge=0, le=10)
    """Standard deviation of noise on soft tokens, so that near ones are read alike."""

    def unused(self) -> Iterator[tuple[str, str]]:
        yield "precision", "a language model that reads digits is trained in float32"

    @model_validator(mode="after")
    def _divides(self) -> ReaderTrainingSpec:
        if self.batch_size % self.schemas:
            raise ValueError(f"schemas: batch_size {self.batch_size} does not divide into {self.schemas} schemas")
        return self


class ReaderSpec(TrainedSpec):
    """A small language model that learns to read vectors of any schema, and is frozen then."""

    model: ReaderSizeSpec = ReaderSizeSpec()
    """Size."""
    training: ReaderTrainingSpec = ReaderTrainingSpec()
    """Optimisation."""
    fields: int = Field(17, ge=2, le=32)
    """Most fields of a random schema; most schemas have no more than 8."""


class AugmentationSpec(Spec):
    """How the rows of the table vary in training."""

    mode: Literal["none", "jitter", "variation", "both"] = "both"
    """``jitter``: measured numbers are changed, in the vector and in its description; ``variation``: the description
    takes a random template, not the first."""
    copies: int = Field(10, ge=1, le=10_000)
    """Variants of each row per epoch."""
    jitter: float = Field(0.25, gt=0, lt=1)
    """A jittered number is multiplied by up to 1 + this, or divided by it."""
    share: float = Field(0.7, ge=0, le=1)
    """Share of the rows without unknown dimensions that are jittered."""
    range: float = Field(0.2, ge=0, le=1)
    """Share of the rows without unknown dimensions in which every number is drawn from its declared range, half of them
    log-uniformly, so that levels outside the table can be read."""
    mask: float = Field(0.1, ge=0, le=1)
    """Share of the rows in which dimensions are unknown to the encoder; the description says them. In half of these it
    is all measured ones, in the others any but the tool, each with probability one half."""

    @property
    def jitters(self) -> bool:
        """Whether numbers are jittered."""
        return self.mode in ("jitter", "both") and self.share > 0

    @property
    def varies(self) -> bool:
        """Whether templates vary."""
        return self.mode in ("variation", "both")

    def unused(self) -> Iterator[tuple[str, str]]:
        if self.mode not in ("jitter", "both"):
            for name in ("jitter", "share"):
                yield name, f"mode is {self.mode}"


class EncoderSpec(Spec):
    """Architecture of the encoder."""

    numbers: Literal["digits", "fourier", "zscore", "xval", "raw"] = "digits"
    """Features of numbers. ``fourier``: sine and cosine for each decimal digit; ``digits``: these, and each character
    as written; ``zscore``: standardised; ``xval``: the number scales a learned direction; ``raw``: as it is."""
    fusion: Literal["attention", "sum"] = "attention"
    """How the tool and the numbers meet: self-attention over both, or their sum."""
    hidden_dim: int = Field(512, ge=1, le=65_536)
    """Width of the hidden layers of the MLP of numbers, which ``xval`` does not have, and of that of estimates."""
    heads: int = Field(8, ge=1, le=1024)
    """Heads of the attention; the language model's hidden size divides into them."""
    tokens: int = Field(1, ge=1, le=8)
    """Soft tokens of a vector."""
    initialization: Literal["code", "random"] = "code"
    """Weights before training. ``code``: those that put characters and labels into soft tokens as the language model
    was taught to read them; of one without such a code, and for features other than these, they are random."""

    def unused(self) -> Iterator[tuple[str, str]]:
        if self.fusion == "sum":
            yield "heads", "fusion is sum"


class ResourceTrainingSpec(OptimizationSpec):
    """How the encoder is trained: AdamW through the frozen language model; gradients are clipped to norm 1."""

    steps: int = Field(400, ge=1, le=10_000_000)
    """Most optimiser steps; without ``epochs``."""
    epochs: float | None = Field(None, gt=0, le=100_000)
    """Most passes over the rows, each in all its copies, instead of ``steps``."""
    batch_size: int = Field(64, ge=1, le=65_536)
    """Rows per step."""
    accumulation: int = Field(1, ge=1, le=1024)
    """Parts of each batch that pass through the language model one after the other; their gradients are added."""
    learning_rate: float = Field(3e-3, gt=0, le=1)
    """Peak learning rate; an encoder of ``digits`` that begins as the language model's code takes 0.3 of it."""
    warm_up: int = Field(20, ge=0, le=1_000_000)
    """Steps over which the learning rate rises linearly from 0."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up. ``cosine``: falls to a hundredth at the last step."""
    weight_decay: float = Field(0.01, ge=0, le=1)
    """Weight decay."""
    validate_every: int = Field(50, ge=1, le=1_000_000)
    """Steps between validations."""
    target_loss: float = Field(0.001, ge=0)
    """Training ends, once all copies of all rows were seen, when the cross-entropy of the validation is below this; 0:
    all steps are taken."""
    target_exact_match: float | None = Field(None, gt=0, le=1)
    """Training ends only when at least this share of the validation's descriptions is also exact in greedy decoding."""
    retrieval: float = Field(0.1, ge=0)
    """Weight of the contrastive loss between two jittered views of a row (InfoNCE), beside that of descriptions."""
    temperature: float = Field(0.1, gt=0)
    """Temperature of the contrastive loss."""
    snapshot_epochs: float | None = Field(None, gt=0)
    """Epochs between snapshots of the encoder, each an artifact; None: none."""
    gradient_checkpointing: bool = False
    """Whether the language model's activations are computed again in the backward pass, to save memory."""

    def unused(self) -> Iterator[tuple[str, str]]:
        if self.epochs is not None:
            yield "steps", "epochs says how many there are"
        if not self.target_loss:
            yield "target_exact_match", "target_loss is 0"
        if not self.retrieval:
            yield "temperature", "retrieval is 0"


class ResourceSpec(TrainedSpec):
    """Vectors of measured configurations that a frozen language model reads as exactly as text."""

    table: SchemaSpec | None = None
    """Schema of the table; None: that of the generator's seven tools."""
    tools: ArtifactRef | None = None
    """Registry of the tools, ``tools.json``: a list of objects with ``name``; None: the generator's, or with
    ``profiling`` the tools of that table."""
    profiling: ArtifactRef | None = None
    """Table of measurements, a CSV, JSON lines or parquet file; None: the generator's 1,701 rows."""
    language_model: ArtifactRef | None = None
    """The frozen language model; None: that of ``llm_model``."""
    llm_model: str = Field("default", min_length=1, max_length=512)
    """Folder, or name on the Hugging Face Hub, of a causal language model; ``default``: a small one that is trained
    here once."""
    encoder: EncoderSpec = EncoderSpec()
    """Architecture."""
    augmentation: AugmentationSpec = AugmentationSpec()
    """How rows vary in training."""
    training: ResourceTrainingSpec = ResourceTrainingSpec()
    """Optimisation."""
    held_out: float = Field(0.1, ge=0, lt=1)
    """Share of the configurations that a second run, of which the figures of unseen ones are, is not trained on; 0: no
    second run. The encoder that is kept is trained on all rows."""
    evaluation: int | None = Field(None, ge=1, le=10_000_000)
    """Most rows, seen and unseen, that are described in the evaluation, drawn at random; None: all, or after a short
    training one for every ten rows of its batches, at least 64."""
    hub: HubSpec | None = None
    """Model repository to upload encoder and export to."""

    def unused(self) -> Iterator[tuple[str, str]]:
        if self.language_model is not None:
            yield "llm_model", "language_model says which one it is"

    def lacking(self) -> Iterator[tuple[str, str]]:
        if self.profiling is None and (self.table is not None or self.tools is not None):
            own = "schema (table)" if self.table is not None else "registry (tools)"
            yield (
                "profiling",
                f"must be given: a {own} of your own needs your own measurements; name the file with --profiling-data "
                "FILE, or on a platform the artifact that `ethogram artifacts put FILE --type profiling` makes",
            )


class DecoderModelSpec(Spec):
    """Architecture of the text encoder below the two heads."""

    hidden_dim: int = Field(128, ge=8, le=4096)
    """Width of its residual stream."""
    layers: int = Field(2, ge=1, le=48)
    """Transformer layers."""
    heads: int = Field(4, ge=1, le=64)
    """Attention heads; ``hidden_dim`` divides into them."""
    initialization: Literal["export", "random"] = "export"
    """Rows of the configuration head before training: the vectors of the export, or random ones."""

    @model_validator(mode="after")
    def _fits(self) -> DecoderModelSpec:
        if self.hidden_dim % self.heads:
            raise ValueError(f"heads: hidden_dim {self.hidden_dim} does not divide into {self.heads} heads")
        return self


class DecoderTrainingSpec(OptimizationSpec):
    """How the decoder is trained: AdamW on the cross-entropies of both heads; gradients are clipped to norm 1."""

    steps: int = Field(3000, ge=1, le=10_000_000)
    """Optimiser steps."""
    batch_size: int = Field(128, ge=1, le=65_536)
    """Texts per step."""
    validate_every: int = Field(100, ge=1, le=1_000_000)
    """Steps between validations."""
    weight_decay: float = Field(0.01, ge=0, le=1)
    """Weight decay."""
    validation: int = Field(512, ge=1, le=100_000)
    """Texts of each validation."""
    target_accuracy: float | None = Field(None, gt=0, le=1)
    """Training ends at a validation with this accuracy of configurations; None: all steps are taken."""


class DecoderSpec(TrainedSpec):
    """A hierarchical decoder: from the text of a task to a tool, and to one of that tool's configurations."""

    export: ArtifactRef
    """Vectors and fields of the configurations, and which of them each tool has."""
    model: DecoderModelSpec = DecoderModelSpec()
    """Architecture."""
    training: DecoderTrainingSpec = DecoderTrainingSpec()
    """Optimisation."""
    evaluation: int = Field(2000, ge=1, le=1_000_000)
    """Held-out texts of the evaluation."""
