"""Spec of a generation job: a zoo of small classifiers with known behaviours."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

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
"""The patterns that are there, and what each is; ``{}`` stands for the token."""


REGISTERED: set[str] = set()
"""Names of the patterns that this process has registered."""
ENTRY_POINTS = "ethogram.patterns"
"""Group of the entry points by which installed packages bring patterns."""


class PatternSpec(Spec):
    """One behaviour: a set of letter sequences."""

    token: str | None = Field(None, pattern=r"^[A-Z]$")
    """The letter of ``starts_with`` and ``ends_with``; the others take none."""
    regex: str | None = Field(None, min_length=1, max_length=500)
    """A pattern of your own: a regular expression over the letters, which matches whole sequences. Letters, ``.``,
    ``[AB]``, ``[A-C]``, ``[^A]``, ``(...)``, ``|``, ``*``, ``+``, ``?``, ``{2,4}``."""
    # Last, so that its check knows of the regex.
    name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")
    """One of the built-in patterns (all_same, palindrome, sorted_ascending, sorted_descending, alternating,
    contains_abc, starts_with, ends_with, no_repeats, has_majority, increasing_pairs, decreasing_pairs, vowel_consonant,
    first_last_match, mountain_pattern), one that an installed package registers, or a name of your own with
    ``regex``."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str, info: ValidationInfo) -> str:
        own = info.data.get("regex") is not None
        if own and name in BUILT_IN:
            raise ValueError(f"{name} is a pattern already; give yours another name")
        known = own or name in BUILT_IN or name in REGISTERED or entry_points(group=ENTRY_POINTS, name=name)
        if not known:
            how = f"register it, as an entry point of the group {ENTRY_POINTS} in an installed package"
            raise ValueError(
                f"there is no pattern {name}; take one that `ethogram kinds generation` names, give yours a regex, or "
                f"{how}, or in this process with services.zoo.patterns.register"
            )
        return name


def _from_number(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"min": value, "max": value}
    if not isinstance(value, dict | IntRange | FloatRange):
        raise ValueError("must be a number or a range, e.g. 8 or {min: 3, max: 8}")
    return value


class IntRange(Spec):
    """Whole numbers from ``min`` to ``max``, both included; a single number stands for itself alone."""

    min: int
    """The least."""
    max: int
    """The most."""

    @property
    def size(self) -> int:
        """How many they are."""
        return self.max - self.min + 1


class FloatRange(Spec):
    """Numbers from ``min`` to ``max``; a single number stands for itself alone."""

    min: float
    """The least."""
    max: float
    """The most."""


def _bounds(number: Literal["integer", "number"], least: float, most: float) -> WithJsonSchema:
    one = {"type": number, "minimum": least, "maximum": most}
    ends = {"min": one | {"description": "The least."}, "max": one | {"description": "The most."}}
    span = {"type": "object", "properties": ends, "required": ["min", "max"], "additionalProperties": False}
    return WithJsonSchema({"anyOf": [one, span]})


def _within(least: float, most: float) -> Callable[[Any], Any]:
    def check(value: IntRange | FloatRange) -> IntRange | FloatRange:
        if not least <= value.min <= value.max <= most:
            raise ValueError(f"must have {least:g} <= min <= max <= {most:g}, not min {value.min:g}, max {value.max:g}")
        return value

    return check


Layers = Annotated[IntRange, BeforeValidator(_from_number), AfterValidator(_within(1, 12)), _bounds("integer", 1, 12)]
Neurons = Annotated[
    IntRange, BeforeValidator(_from_number), AfterValidator(_within(1, 512)), _bounds("integer", 1, 512)
]
Rate = Annotated[
    FloatRange, BeforeValidator(_from_number), AfterValidator(_within(1e-8, 1)), _bounds("number", 1e-8, 1)
]
Share = Annotated[FloatRange, BeforeValidator(_from_number), AfterValidator(_within(0, 0.9)), _bounds("number", 0, 0.9)]
Activation = Literal["relu", "gelu", "tanh", "sigmoid", "leaky_relu"]


class SubjectSpec(Spec):
    """Architecture of the subject networks: fully connected, one logit. Each subject draws its own out of ranges."""

    layers: Layers = IntRange(min=2, max=2)
    """Hidden layers."""
    neurons: Neurons = IntRange(min=16, max=16)
    """Neurons in each hidden layer of a subject."""
    activations: list[Activation] = []
    """Activations of the hidden layers to draw from; empty: relu."""
    dropout: Share = FloatRange(min=0.0, max=0.0)
    """Share of the hidden activations that are dropped in training."""
    input_encoding: Literal["one_hot", "index"] = "one_hot"
    """``one_hot``: length x vocabulary inputs; ``index``: one float per position."""
    init: Literal["shared", "independent"] = "shared"
    """``shared``: all subjects of one shape start from one draw of weights, so their differences are comparable."""
    weight_init: Literal["uniform", "kaiming"] = "uniform"
    """``uniform``: weights and biases within 1/sqrt(fan_in), as in torch.nn.Linear; ``kaiming``: weights within
    sqrt(6/fan_in), biases 0, for deep subjects, whose signals would otherwise fade from layer to layer."""
    precision: Literal["float32", "float16", "bfloat16"] = "float32"
    """Floating-point type that the trained weights are rounded to."""
    quantization: Literal["none", "int8", "int4", "ternary", "binary"] = "none"
    """Levels that the trained weights are rounded to, layer by layer. What is judged, described and kept is the rounded
    network; training itself is in float32."""


class SubjectTrainingSpec(Spec):
    """How each subject is trained (Adam, binary cross-entropy): on fresh sequences at every step."""

    steps: int = Field(800, ge=1, le=1_000_000)
    """Optimiser steps."""
    batch_size: int = Field(96, ge=1, le=65_536)
    """Sequences per step and subject."""
    learning_rate: float = Field(1e-2, gt=0, le=1)
    """Peak learning rate; it falls to nothing along half a cosine. A higher one leaves subjects further from where they
    started, and so less alike where their behaviours do not differ."""


class StagedSpec(Spec):
    """Training in two stages: a degraded network, which learned one of its patterns from wrong labels, and an improved
    one, which is the same network trained on with the right ones."""

    examples: int = Field(512, ge=8, le=1_000_000)
    """Sequences of each subject's own dataset; half of them match one of its patterns."""
    batch_size: int = Field(128, ge=1, le=65_536)
    """Sequences per step and subject."""
    epochs: int = Field(10, ge=1, le=10_000)
    """Most passes over the dataset in the first stage."""
    improvement_epochs: int = Field(10, ge=1, le=10_000)
    """Most passes over the dataset in the second stage."""
    learning_rate: Rate = FloatRange(min=1e-3, max=1e-2)
    """Of the first stage; drawn evenly on a logarithmic scale."""
    improvement_lr_factor: float = Field(0.5, gt=0, le=10)
    """Learning rate of the second stage, as a share of the first one's."""
    corruption_rate: float = Field(0.3, ge=0, le=1)
    """Share of the target pattern's labels that are flipped in the first stage."""
    patience: int = Field(5, ge=1, le=10_000)
    """A stage ends early when the loss on validation sequences has not fallen for so many epochs; the network of the
    best epoch is kept."""
    min_degradation_threshold: float = Field(0.05, ge=0, le=1)
    """Check of magnitude: the least gain in held-out accuracy on the target pattern from degraded to improved."""
    min_specificity: float = Field(0.0, ge=-1, le=1)
    """Check of specificity: by how much that gain must exceed the mean gain on all other kinds of sequences."""
    max_instability: float = Field(0.1, ge=0, le=1)
    """Check of stability: the most held-out accuracy that any of the subject's other patterns may lose, and the mean
    over the sequences that it must answer no to."""


SignatureMethod = Literal[
    "mean",
    "std",
    "max",
    "min",
    "sparsity",
    "pca",
    "svd",
    "entropy",
    "clustering",
    "fourier",
    "pattern_wise",
    "raw",
]


class SignatureSpec(Spec):
    """What is recorded of a subject's activations on the probes."""

    probes: int = Field(128, ge=1, le=65_536)
    """Number of probe sequences, the baseline dataset; the same for every subject."""
    baseline: ArtifactRef | None = None
    """A zoo, or any artifact with a ``baseline_dataset.json``, whose probes are taken instead."""
    methods: list[SignatureMethod] = []
    """What is kept for each neuron; empty: ``raw``, its activation on every probe."""
    activations: Literal["pre", "post"] = "pre"
    """Before or after the activation function."""
    components: int = Field(4, ge=1, le=64)
    """Numbers per neuron of ``pca``, ``svd``, ``clustering`` and ``fourier``."""
    bins: int = Field(16, ge=2, le=1024)
    """Bins of the histogram whose ``entropy`` is taken."""


class CounterfactualSpec(Spec):
    """Paired networks: each subject is branched into one that goes on as it is, one that learns one pattern more, and
    one that unlearns one of its own."""

    steps: int = Field(400, ge=1, le=1_000_000)
    """Optimiser steps of each branch, with the same sequences and the batch size and peak learning rate of
    ``training``."""


class FormatSpec(Spec):
    """Prompts and completions for training an interpreter, beside each record."""

    include_modification: bool | None = None
    """Task: better weights for one pattern. It takes staged training; None: where there is any."""
    include_classification: bool = True
    """Task: name the patterns."""
    style: Literal["separate", "interwoven"] = "separate"
    """``separate``: all weights, then all signatures; ``interwoven``: both of each neuron together."""
    digits: int = Field(4, ge=1, le=9)
    """Significant digits of numbers; nine keep a float32 as it is."""
    tokenizer: str | None = Field(None, min_length=1, max_length=200)
    """Name on the Hugging Face Hub, or folder on the worker, of a tokenizer to count tokens with."""


class PartSpec(Spec):
    """A part of a zoo: all that is accepted of some of its candidates. What ``shards`` are made of."""

    first: int = Field(ge=0, le=10_000_000)
    """First data file."""
    count: int = Field(ge=1, le=1_000_000)
    """Data files, each of about a thousand candidates."""


class GenerationSpec(Spec):
    """A zoo: ``subjects`` networks, each trained to answer yes to its own random subset of the patterns."""

    seed: Seed = 0
    """Everything random flows from it."""
    subjects: int = Field(2048, ge=1, le=10_000_000)
    """Accepted subjects to make."""
    vocab_size: int = Field(7, ge=5, le=26)
    """Letters A, B, ..."""
    sequence_length: int = Field(7, ge=4, le=20)
    """Letters per sequence."""
    patterns: list[PatternSpec] = []
    """The behaviours to draw from; empty: the default suite of ten."""
    min_patterns_per_batch: int = Field(1, ge=1, le=32)
    """Fewest patterns of one subject."""
    max_patterns_per_batch: int | None = Field(None, ge=1, le=32)
    """Most patterns of one subject. None: 4, or as many as there are if these are fewer; one less than there are where
    ``counterfactual`` needs one to learn."""
    subject: SubjectSpec = SubjectSpec()
    """Architecture."""
    training: SubjectTrainingSpec = SubjectTrainingSpec()
    """Training on fresh sequences, in one stage."""
    staged: StagedSpec | None = None
    """Training in two stages, instead of ``training``."""
    signature: SignatureSpec = SignatureSpec()
    """Activation signatures."""
    counterfactual: CounterfactualSpec | None = None
    """Pairs: what one pattern more and one pattern less make of each subject."""
    format: FormatSpec | None = None
    """Records as text too."""
    hub: HubSpec | None = None
    """Dataset repository to upload the zoo to, file by file as it is made."""
    shards: int = Field(1, ge=1, le=1000)
    """Jobs that make the zoo side by side, on whatever workers are free. The zoo is the same."""
    part: PartSpec | None = None
    """Only some of the candidates, instead of ``subjects`` accepted ones."""
    min_accuracy: float | None = Field(None, ge=0, le=1)
    """Quality gate: a subject that is less accurate on held-out sequences of any enabled pattern, or on those that
    match none, is rejected and counted. None: 0.9; in two stages 0, since the checks decide."""

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
            raise ValueError("counterfactual branches off training in one stage; leave staged out")
        if self.part is not None and (self.shards > 1 or self.hub is not None):
            raise ValueError("a part has no shards and is not uploaded; leave shards and hub to the whole")
        if self.format is not None and self.staged is None and self.format.include_modification:
            raise ValueError("format.include_modification takes staged training")
        if self.format is not None and not self.tasks:
            raise ValueError("format asks for no task; include one")
        return self

    @property
    def tasks(self) -> list[Literal["modification", "classification"]]:
        """The tasks that records are written as."""
        if self.format is None:
            return []
        wanted = self.format.include_modification
        tasks: list[Literal["modification", "classification"]] = []
        if self.staged is not None and (wanted is None or wanted):
            tasks.append("modification")
        return [*tasks, "classification"] if self.format.include_classification else tasks

    def most_patterns(self, enabled: int) -> int:
        """``max_patterns_per_batch``, or its default with so many patterns enabled."""
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
