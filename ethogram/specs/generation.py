"""Spec of a generation job: a zoo of small classifiers with known behaviours."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Annotated, Any, Literal

from annotated_types import GroupedMetadata
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    GetCoreSchemaHandler,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from ethogram.specs.base import ArtifactRef, HubSpec, Seed, Spec

BUILT_IN = {
    "all_same": "every letter is the same",
    "palindrome": "reads the same backwards",
    "sorted_ascending": "no letter comes before its predecessor in the alphabet",
    "sorted_descending": "no letter comes after its predecessor in the alphabet",
    "alternating": "two different letters take turns",
    "contains_abc": "A, B, C stand in a row somewhere",
    "starts_with": "the first letter is {}",
    "ends_with": "the last letter is {}",
    "no_repeats": "no letter occurs twice",
    "has_majority": "one letter fills more than half of the positions",
    "increasing_pairs": "in each pair of positions (1st and 2nd, 3rd and 4th, ...) the second letter is later",
    "decreasing_pairs": "in each pair of positions (1st and 2nd, 3rd and 4th, ...) the second letter is earlier",
    "vowel_consonant": "vowels and consonants take turns",
    "first_last_match": "the first and the last letter are equal",
    "mountain_pattern": "the letters rise strictly to a peak inside and then fall strictly",
}
"""Built-in patterns with their meanings; ``{}`` stands for the token."""

REGISTERED: set[str] = set()
"""Names of the patterns that this process has registered."""
ENTRY_POINTS = "ethogram.patterns"
"""Entry-point group in which installed packages register patterns."""


class PatternSpec(Spec):
    """One behaviour: a set of letter sequences."""

    token: str | None = Field(None, pattern=r"^[A-Z]$")
    """Letter of ``starts_with`` and ``ends_with``; not allowed for other patterns."""
    regex: str | None = Field(None, min_length=1, max_length=500)
    """A pattern of your own: a regular expression that matches whole sequences. Syntax: letters, ``.``, ``[AB]``,
    ``[A-C]``, ``[^A]``, ``(...)``, ``|``, ``*``, ``+``, ``?``, ``{2,4}``. ``^`` and ``$`` at the ends change
    nothing."""
    # The last field, because its validator reads the regex.
    name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")
    """One of the built-in patterns (all_same, palindrome, sorted_ascending, sorted_descending, alternating,
    contains_abc, starts_with, ends_with, no_repeats, has_majority, increasing_pairs, decreasing_pairs, vowel_consonant,
    first_last_match, mountain_pattern), a pattern of an installed package, or your own name for a ``regex``."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str, info: ValidationInfo) -> str:
        if info.data.get("regex") is not None:
            if name in BUILT_IN:
                raise ValueError(f"{name} is a built-in pattern; choose another name for yours")
        elif not (name in BUILT_IN or name in REGISTERED or entry_points(group=ENTRY_POINTS, name=name)):
            raise ValueError(
                f"there is no pattern {name}; use one that `ethogram kinds generation` lists, give a regex, or "
                f"register it: as an entry point of the group {ENTRY_POINTS}, or in this process with "
                "services.zoo.patterns.register"
            )
        return name


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _from_number(value: Any) -> Any:
    if _is_number(value):
        # An error of the number, not of the ends of a range that nobody wrote; infinite, NaN or too large for a float.
        if not abs(value) <= sys.float_info.max:
            raise ValueError("must be a finite number")
        return {"min": value, "max": value}
    if not isinstance(value, dict | IntRange | FloatRange):
        raise ValueError("must be a number or a range, e.g. 8 or {min: 3, max: 8}")
    return value


class IntRange(Spec):
    """Whole numbers from ``min`` to ``max`` inclusive; a single number is a range of one."""

    min: int
    """Minimum."""
    max: int
    """Maximum."""

    @property
    def size(self) -> int:
        """Count of the numbers."""
        return self.max - self.min + 1


class FloatRange(Spec):
    """Numbers from ``min`` to ``max``; a single number is a range of one."""

    min: float
    """Minimum."""
    max: float
    """Maximum."""


@dataclass(frozen=True)
class _Bounds(GroupedMetadata):
    """Annotates a range: a number is accepted for it, and it lies within ``minimum`` and ``maximum``."""

    type: Literal["integer", "number"]
    minimum: float
    maximum: float

    def __iter__(self) -> Iterator[Any]:
        number = {"type": self.type, "minimum": self.minimum, "maximum": self.maximum}
        ends = {"min": number | {"description": "Minimum."}, "max": number | {"description": "Maximum."}}
        span = {"type": "object", "properties": ends, "required": ["min", "max"], "additionalProperties": False}
        schema = WithJsonSchema({"anyOf": [number, span]})
        return iter((BeforeValidator(_from_number), AfterValidator(self._check), schema))

    def _check(self, value: IntRange | FloatRange) -> IntRange | FloatRange:
        if not self.minimum <= value.min <= value.max <= self.maximum:
            bounds = f"{self.minimum:g} <= min <= max <= {self.maximum:g}"
            raise ValueError(f"must have {bounds}, not min {value.min:g}, max {value.max:g}")
        return value


Layers = Annotated[IntRange, _Bounds("integer", 1, 12)]
Neurons = Annotated[IntRange, _Bounds("integer", 1, 512)]
Rate = Annotated[FloatRange, _Bounds("number", 1e-8, 1)]
Share = Annotated[FloatRange, _Bounds("number", 0, 0.9)]


class _NumberStays:
    """Annotates a :data:`Rate` that may be a number too: it is kept as the number, so that the spec keeps its form."""

    def __get_pydantic_core_schema__(self, _: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        as_it_is = core_schema.plain_serializer_function_ser_schema(lambda rate: rate)
        rate = handler.generate_schema(Rate)
        return core_schema.no_info_wrap_validator_function(self._validate, rate, serialization=as_it_is)

    def _validate(self, value: Any, ranged: ValidatorFunctionWrapHandler) -> Any:
        found = ranged(value)
        return found.min if _is_number(value) else found


NumberOrRate = Annotated[float | FloatRange, _NumberStays()]
Activation = Literal["relu", "gelu", "tanh", "sigmoid", "leaky_relu"]


class SubjectSpec(Spec):
    """Architecture of the subject networks: fully connected, one logit. Ranges are drawn for each subject."""

    layers: Layers = IntRange(min=2, max=2)
    """Hidden layers."""
    neurons: Neurons = IntRange(min=16, max=16)
    """Neurons per hidden layer."""
    activations: list[Activation] = []
    """Activation functions to draw from; empty: relu."""
    dropout: Share = FloatRange(min=0.0, max=0.0)
    """Share of the hidden activations dropped in training."""
    input_encoding: Literal["one_hot", "index"] = "one_hot"
    """``one_hot``: ``sequence_length`` x ``vocab_size`` inputs; ``index``: one float per position."""
    init: Literal["shared", "independent"] = "shared"
    """``shared``: subjects of the same shape start from the same weights, so that their weights are comparable;
    ``independent``: each starts from its own."""
    weight_init: Literal["uniform", "kaiming"] = "uniform"
    """``uniform``: weights and biases within 1/sqrt(fan_in), as in torch.nn.Linear; ``kaiming``: weights within
    sqrt(6/fan_in) and biases 0, for deep subjects, whose activations would otherwise fade."""
    precision: Literal["float32", "float16", "bfloat16"] = "float32"
    """Floating-point type to which trained weights are rounded."""
    quantization: Literal["none", "int8", "int4", "ternary", "binary"] = "none"
    """Levels to which trained weights are rounded, layer by layer. Training is in float32; the rounded network is
    evaluated, described and stored."""


class SubjectTrainingSpec(Spec):
    """How each subject is trained: Adam and binary cross-entropy, on fresh sequences at every step."""

    steps: int = Field(800, ge=1, le=1_000_000)
    """Optimiser steps."""
    batch_size: int = Field(96, ge=1, le=65_536)
    """Sequences per step and subject."""
    learning_rate: NumberOrRate = 1e-2
    """Peak learning rate, of all subjects, or a range from which each draws its own log-uniformly; it falls to 0 along
    half a cosine. The higher it is, the further subjects move from their start, and the less alike are subjects with
    the same behaviours."""

    @property
    def rates(self) -> FloatRange:
        """``learning_rate`` as a range."""
        rate = self.learning_rate
        return rate if isinstance(rate, FloatRange) else FloatRange(min=rate, max=rate)


class StagedSpec(Spec):
    """Training in two stages: the degraded network learns one pattern from corrupted labels, and the improved network
    is the same one trained further on correct labels."""

    examples: int = Field(512, ge=8, le=1_000_000)
    """Sequences in each subject's dataset; half of them match one of its patterns."""
    batch_size: int = Field(128, ge=1, le=65_536)
    """Sequences per step and subject."""
    epochs: int = Field(10, ge=1, le=10_000)
    """Most passes over the dataset in the first stage."""
    improvement_epochs: int = Field(10, ge=1, le=10_000)
    """Most passes over the dataset in the second stage."""
    learning_rate: Rate = FloatRange(min=1e-3, max=1e-2)
    """Learning rate of the first stage, drawn log-uniformly."""
    improvement_lr_factor: float = Field(0.5, gt=0, le=10)
    """Learning rate of the second stage divided by that of the first."""
    corruption_rate: float = Field(0.3, ge=0, le=1)
    """Share of the target pattern's labels flipped in the first stage."""
    patience: int = Field(5, ge=1, le=10_000)
    """Epochs without a lower validation loss before a stage ends; the network of the best epoch is kept."""
    min_degradation_threshold: float = Field(0.05, ge=0, le=1)
    """Magnitude check: minimum gain in accuracy on the target pattern, from degraded to improved, on the sequences that
    decide which subjects are accepted, as in all checks. It must also be significant: McNemar's exact test on the
    answers that changed, one-sided at the level 0.05. The improved network must also be better than chance. 0: the gain
    must not be negative, and that is all."""
    min_specificity: float = Field(0.15, ge=-1, le=1)
    """Specificity check: how much that gain must at least exceed the mean gain everywhere else: the mean over the
    other patterns and the sequences that match none."""
    max_instability: float = Field(0.1, ge=0, le=1)
    """Stability check: maximum loss of accuracy, from degraded to improved, on any of the subject's other patterns, and
    on average over the patterns and other sequences to which it must answer no."""
    max_other_degradation: float = Field(0.2, ge=0, le=1)
    """Check that the first stage left the rest alone: maximum gain in accuracy, from degraded to improved, on any other
    pattern and on the sequences that match none; a gain in the second stage means that the first had degraded it."""


SignatureMethod = Literal[
    "mean", "std", "max", "min", "sparsity", "pca", "svd", "entropy", "clustering", "fourier", "pattern_wise", "raw"
]


class SignatureSpec(Spec):
    """What a signature holds of a subject's activations on the probes."""

    probes: int = Field(128, ge=1, le=65_536)
    """Probe sequences (the baseline dataset), the same for every subject."""
    baseline: ArtifactRef | None = None
    """A zoo, or any artifact with a ``baseline_dataset.json``, whose probes are used instead."""
    methods: list[SignatureMethod] = []
    """Features of each neuron; empty: ``raw``, its activation on every probe."""
    activations: Literal["pre", "post"] = "pre"
    """Activations before or after the activation function."""
    components: int = Field(4, ge=1, le=64)
    """Features per neuron of ``pca``, ``svd``, ``clustering`` and ``fourier``."""
    bins: int = Field(16, ge=2, le=1024)
    """Histogram bins of ``entropy``."""

    def unused(self) -> Iterator[tuple[str, str]]:
        if self.baseline is not None:
            yield "probes", "the probes are those of baseline"
        if not {"pca", "svd", "clustering", "fourier"} & {*self.methods}:
            yield "components", "methods has none of pca, svd, clustering and fourier"
        if "entropy" not in self.methods:
            yield "bins", "methods has no entropy"


class CounterfactualSpec(Spec):
    """Counterfactual networks: each subject is trained further in three branches, with the same patterns, with one more
    and with one less."""

    steps: int = Field(400, ge=1, le=1_000_000)
    """Optimiser steps of each branch, with the batch size and peak learning rate of ``training``."""


class FormatSpec(Spec):
    """Prompts and completions for training an interpreter, one set for each record."""

    include_modification: bool | None = None
    """Task: improve the weights for one pattern. It needs staged training; None: included if training is staged."""
    include_classification: bool = True
    """Task: name the patterns that the subject classifies as positive; see ``positive_threshold``."""
    style: Literal["separate", "interwoven"] = "separate"
    """``separate``: all weights, then all signatures; ``interwoven``: weights and signature neuron by neuron."""
    digits: int = Field(4, ge=1, le=9)
    """Significant digits of numbers; nine represent a float32 exactly."""
    tokenizer: str | None = Field(None, min_length=1, max_length=200)
    """Tokenizer that counts tokens: its name on the Hugging Face Hub, or a folder on the worker."""


class PartSpec(Spec):
    """Part of a zoo, made by one of its ``shards``: the accepted subjects of some data files."""

    first: int = Field(ge=0, le=10_000_000)
    """First data file."""
    count: int = Field(ge=1, le=1_000_000)
    """Data files, each of about a thousand candidates."""


class GenerationSpec(Spec):
    """A zoo of ``subjects`` networks, each trained to answer yes to its own random subset of the patterns."""

    seed: Seed = 0
    """Everything random flows from it."""
    subjects: int = Field(2048, ge=1, le=10_000_000)
    """Number of accepted subjects."""
    vocab_size: int = Field(7, ge=5, le=26)
    """Number of letters (A, B, ...)."""
    sequence_length: int = Field(7, ge=4, le=20)
    """Letters per sequence."""
    patterns: list[PatternSpec] = []
    """Patterns to draw from; empty: the default suite of ten."""
    min_patterns_per_batch: int = Field(1, ge=1, le=32)
    """Fewest patterns per subject."""
    max_patterns_per_batch: int | None = Field(None, ge=1, le=32)
    """Most patterns per subject; None: 4, or all if there are fewer, less one that ``counterfactual`` can add."""
    subject: SubjectSpec = SubjectSpec()
    """Architecture."""
    training: SubjectTrainingSpec = SubjectTrainingSpec()
    """Training in one stage, on fresh sequences."""
    staged: StagedSpec | None = None
    """Training in two stages, instead of ``training``."""
    signature: SignatureSpec = SignatureSpec()
    """Activation signatures."""
    counterfactual: CounterfactualSpec | None = None
    """Also train variants of each subject with one pattern more and with one less."""
    format: FormatSpec | None = None
    """Also write records as text."""
    hub: HubSpec | None = None
    """Dataset repository to which each file of the zoo is uploaded as soon as it is complete."""
    shards: int = Field(1, ge=1, le=1000)
    """Jobs that make the zoo in parallel, on whatever workers are free. The zoo is the same for any number."""
    part: PartSpec | None = None
    """Only these data files, instead of ``subjects`` accepted subjects."""
    min_accuracy: float | None = Field(None, ge=0, le=1)
    """Minimum accuracy on each enabled pattern's sequences and on those that match none; other subjects are rejected
    and counted. The sequences are neither trained on nor those of the reported accuracy. None: 0.9, or 0 for staged
    training, which has its own checks."""
    positive_threshold: float = Field(0.75, gt=0, le=1)
    """Share of a pattern's held-out sequences to which a network must at least answer yes to count as classifying the
    pattern as positive. Classification tasks ask for these patterns, whatever was trained."""

    @field_validator("max_patterns_per_batch")
    @classmethod
    def _most(cls, most: int | None, info: ValidationInfo) -> int | None:
        if most is not None and most < (fewest := info.data.get("min_patterns_per_batch", 1)):
            raise ValueError(f"must be at least min_patterns_per_batch, which is {fewest}")
        return most

    @model_validator(mode="after")
    def _together(self) -> GenerationSpec:
        if self.staged is not None and self.training != SubjectTrainingSpec():
            raise ValueError("training is for one stage and staged for two; leave one of them out")
        if self.counterfactual is not None and self.staged is not None:
            raise ValueError("counterfactual needs training in one stage; leave staged out")
        if self.part is not None and (self.shards > 1 or self.hub is not None):
            raise ValueError("part cannot be combined with shards or hub, which belong to the whole zoo")
        if self.format is not None and self.staged is None and self.format.include_modification:
            raise ValueError("format.include_modification needs staged training")
        if self.format is not None and not self.tasks:
            raise ValueError("format includes no task; include at least one")
        return self

    @property
    def tasks(self) -> list[Literal["modification", "classification"]]:
        """Tasks as which records are written."""
        tasks: list[Literal["modification", "classification"]] = []
        if self.format is not None and self.staged is not None and self.format.include_modification is not False:
            tasks.append("modification")
        if self.format is not None and self.format.include_classification:
            tasks.append("classification")
        return tasks

    def most_patterns(self, enabled: int) -> int:
        """``max_patterns_per_batch``, or its default for ``enabled`` patterns."""
        if self.max_patterns_per_batch is not None:
            return self.max_patterns_per_batch
        spare = 0 if self.counterfactual is None else 1
        return max(self.min_patterns_per_batch, min(4, enabled - spare))

    @property
    def gate(self) -> float:
        """``min_accuracy``, or its default."""
        if self.min_accuracy is not None:
            return self.min_accuracy
        return 0.9 if self.staged is None else 0.0
