"""Records as text: prompts and completions to train an interpreter on, and its answers read back and scored."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ethogram.errors import InvalidInput
from ethogram.specs.generation import FormatSpec, GenerationSpec
from services.zoo.dataset import architecture_of, network_of, signature_of
from services.zoo.patterns import Pattern
from services.zoo.pools import Evaluation
from services.zoo.subjects import Architecture, Params, encode

_HEAD = re.compile(r"[`*#\s]*layer (\d+) (weight|bias)s?\s*(?:\d+ ?x ?\d+)?[:`*\s]*$")
_NUMBERS = re.compile(r"[-+0-9.eE,;\[\]\s]*")


class Prompt(NamedTuple):
    """One task of one record."""

    prompt: str
    completion: str

    @property
    def text(self) -> str:
        """Both, as they are trained on."""
        return self.prompt + self.completion


class TrainingDataFormatter:
    """Writes the records of a zoo as prompts.

    A modification task shows the degraded network and asks for one that is better at the target pattern; a
    classification task shows the improved one and asks for its patterns, out of all that there are.
    """

    def __init__(self, spec: GenerationSpec, patterns: Sequence[Pattern]) -> None:
        """Raises :class:`InvalidInput` for a tokenizer that cannot be loaded."""
        self._spec, self._patterns, self._form = spec, patterns, spec.format or FormatSpec()
        self._pattern_list = "\n".join(f"- {pattern.name}: {pattern.description}" for pattern in patterns)
        self._tokens = _tokenizer(self._form.tokenizer) if self._form.tokenizer is not None else None

    def columns(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Prompt and completion, and the number of tokens in both, of each task that the spec asks for."""
        columns: dict[str, Any] = {}
        for task in self._spec.tasks:
            prompt = self.modification(record) if task == "modification" else self.classification(record)
            columns |= {f"{task}_prompt": prompt.prompt, f"{task}_completion": prompt.completion}
            if self._tokens is not None:
                columns[f"{task}_tokens"] = self._tokens(prompt.text)
        return columns

    def modification(self, record: Mapping[str, Any]) -> Prompt:
        """The prompt that shows the degraded network and asks for the improved one."""
        target = next(pattern for pattern in self._patterns if pattern.name == record["target_pattern"])
        task = (
            f"## Task\nImprove this network on the pattern {target.name} ({target.description}), and leave its other "
            "answers as they are. Write all of its weights: each layer's under a line like `layer 0 weight 8x5`, one "
            "line for each neuron, then its biases under `layer 0 bias`.\n\n## Improved weights\n"
        )
        shown = self._network(record, "degraded_weights", "degraded_signature")
        return Prompt(shown + task, self.weights(record, "weights"))

    def classification(self, record: Mapping[str, Any]) -> Prompt:
        """The prompt that shows the network and asks for its patterns."""
        task = "## Task\nName the patterns to which this network answers yes.\n\n## Answer\n"
        shown = self._network(record, "weights", "signature") + f"## Patterns\n{self._pattern_list}\n\n"
        return Prompt(shown + task, ", ".join(record["patterns"]) + "\n")

    def weights(self, record: Mapping[str, Any], column: str) -> str:
        """The weights of one column as text; :func:`parse_weights` reads it."""
        lines = []
        for i, (weight, bias) in enumerate(self._layers(record, column)):
            lines.append(f"layer {i} weight {weight.shape[0]}x{weight.shape[1]}")
            lines += [self._row(row) for row in weight.tolist()]
            lines += [f"layer {i} bias", self._row(bias.tolist())]
        return "\n".join(lines) + "\n"

    def _network(self, record: Mapping[str, Any], weights: str, signature: str) -> str:
        spec, depth = self._spec, record["layers"]
        layers = f"{depth} hidden layer{'' if depth == 1 else 's'} of {record['neurons']} neurons"
        about = (
            f"## Network\nA classifier of sequences of {spec.sequence_length} letters out of {spec.vocab_size}: "
            f"{layers}, {record['activation']}; inputs: {spec.subject.input_encoding}; "
            "one output, positive for yes.\n\n"
        )
        described = self._signatures(record, signature)
        if self._form.style == "separate":
            lines = [
                f"layer {i} neuron {n}: {text}" for i, layer in enumerate(described) for n, text in enumerate(layer)
            ]
            signatures = "\n".join(lines)
            return f"{about}## Weights\n{self.weights(record, weights)}\n## Activation signature\n{signatures}\n\n"
        lines = []
        for i, ((weight, bias), layer) in enumerate(zip(self._layers(record, weights), described, strict=True)):
            for n, (row, offset, text) in enumerate(zip(weight.tolist(), bias.tolist(), layer, strict=True)):
                lines.append(f"layer {i} neuron {n}: weights {self._row(row)} bias {self._row([offset])} {text}")
        return f"{about}## Weights and activation signature\n" + "\n".join(lines) + "\n\n"

    def _layers(self, record: Mapping[str, Any], column: str) -> list[tuple[Tensor, Tensor]]:
        params = network_of(record, column, architecture_of(self._spec, record))
        layers = range(len(params) // 2)
        return [(params[f"layers.{i}.weight"][0], params[f"layers.{i}.bias"][0]) for i in layers]

    def _signatures(self, record: Mapping[str, Any], column: str) -> list[list[str]]:
        """The signature of each layer and neuron as text."""
        return [
            [" ".join(f"{method} {self._row(values)}" for method, values in neuron.items()) for neuron in layer]
            for layer in signature_of(record, column, architecture_of(self._spec, record))
        ]

    def _row(self, numbers: Sequence[float]) -> str:
        # One format for all of them: several times as fast as one for each.
        return _form(self._form.digits, len(numbers)) % tuple(numbers)


@lru_cache(maxsize=4096)
def _form(digits: int, count: int) -> str:
    return " ".join([f"%.{digits}g"] * count)


def _tokenizer(name: str) -> Callable[[str], int]:
    """A function that counts the tokens of a text."""
    # Imported here, since they take seconds.
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from transformers import AutoTokenizer

    here = Path(name).is_dir()
    if not here:
        try:
            # Asked first, since the download tries each file several times where there is no network.
            HfApi().model_info(name, timeout=10)
        except HfHubHTTPError:
            # The Hub answers, so the download fails at once too, and says more.
            pass
        except Exception:
            # Perhaps it was downloaded before.
            here = True
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=here)
    except Exception as error:  # It raises whatever its parts do.
        text = str(error).strip().split("\n")[0] or type(error).__name__
        raise InvalidInput.field("spec.format.tokenizer", f"cannot load {name}: {text}") from None
    # No warning about long texts.
    tokenizer.model_max_length = 2**62
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def parse_weights(text: str, shape: Architecture) -> Params:
    """The network that an interpreter has written: stacked parameters of one model. Raises :class:`InvalidInput` naming
    the layer that is missing, or whose numbers do not fit."""
    numbers_of: dict[str, list[float]] = {}
    current: list[float] | None = None
    for line in text.splitlines():
        head = _HEAD.match(line.strip().lower())
        if head is not None:
            current = numbers_of.setdefault(f"layers.{head[1]}.{head[2]}", [])
        elif current is not None:
            numbers = _numbers(line)
            if numbers is None:
                # Words: the layer has ended.
                current = None
            else:
                current += numbers
    params: Params = {}
    for name, size in shape.shapes.items():
        numbers = numbers_of.get(name)
        if numbers is None:
            raise InvalidInput.field(f"completion.{name}", "is missing")
        expected = int(np.prod(size))
        if len(numbers) != expected:
            raise InvalidInput.field(f"completion.{name}", f"has {len(numbers)} numbers, not {expected}")
        params[name] = torch.tensor(numbers, dtype=torch.float32).view(1, *size)
        if not params[name].isfinite().all():
            raise InvalidInput.field(f"completion.{name}", "holds numbers that are not finite")
    return params


def _numbers(line: str) -> list[float] | None:
    """The numbers of a line that holds nothing else."""
    if _NUMBERS.fullmatch(line) is None:
        return None
    try:
        return [float(number) for number in re.split(r"[,;\[\]\s]+", line) if number]
    except ValueError:
        return None


def parse_patterns(text: str, patterns: Sequence[Pattern]) -> list[str]:
    """The patterns that an interpreter names, in its order; other words are left out."""
    known = sorted((pattern.name for pattern in patterns), key=len, reverse=True)
    # Whole words: not the one in nonpalindrome.
    names = "|".join(re.escape(name) for name in known)
    form = re.compile(rf"(?<![a-z0-9_])(?:{names})(?![a-z0-9_])", re.IGNORECASE)
    by_name = {name.lower(): name for name in known}
    return list(dict.fromkeys(by_name[match.lower()] for match in form.findall(text)))


class ModificationScore(NamedTuple):
    """What a network that an interpreter has written does on benchmark sequences."""

    accuracy: Tensor
    """By stratum: ``[patterns + 1]``."""
    gain: float
    """On the target pattern, over the degraded network."""
    reference_gain: float
    """That of the improved network of the record."""
    others: float
    """Mean change of accuracy on all other strata."""


def score_modification(
    text: str, record: Mapping[str, Any], spec: GenerationSpec, patterns: Sequence[Pattern], benchmark: Evaluation
) -> ModificationScore:
    """Judge an answer to a modification task. Raises what :func:`parse_weights` raises."""
    shape = architecture_of(spec, record)
    names = [pattern.name for pattern in patterns]
    selected = torch.tensor([[name in record["patterns"] for name in names]])
    questions = encode(shape, benchmark.sequences)

    def accuracy(params: Params) -> Tensor:
        return benchmark.accuracy(params, questions, shape.activation, selected)[0]

    written = accuracy(parse_weights(text, shape))
    before, after = (accuracy(network_of(record, column, shape)) for column in ("degraded_weights", "weights"))
    target = names.index(record["target_pattern"])
    change = written - before
    rest = torch.cat([change[:target], change[target + 1 :]])
    return ModificationScore(written, float(change[target]), float((after - before)[target]), float(rest.mean()))


class ClassificationScore(NamedTuple):
    """How the patterns that an interpreter names compare with the network's own."""

    precision: float
    recall: float
    exact: bool


def score_classification(text: str, record: Mapping[str, Any], patterns: Sequence[Pattern]) -> ClassificationScore:
    """Judge an answer to a classification task."""
    named, actual = set(parse_patterns(text, patterns)), set(record["patterns"])
    right = len(named & actual)
    recall = right / len(actual) if actual else 1.0
    return ClassificationScore(right / len(named) if named else 0.0, recall, named == actual)
