"""Records as text: prompts and completions to train an interpreter on, and its answers read back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ethogram.errors import InvalidInput, Unavailable
from ethogram.specs.generation import FormatSpec, GenerationSpec
from services.artifacts.hub import fetch
from services.zoo.dataset import architecture_of, network_of, signature_of
from services.zoo.patterns import Pattern
from services.zoo.subjects import Architecture, Params

_HEAD = re.compile(r"[`*#\s]*layer (\d+) (weight|bias)s?\s*(?:\d+ ?x ?\d+)?[:`*\s]*$")
_NUMBERS = re.compile(r"[-+0-9.eE,;\[\]\s]*")


NO_PATTERNS = "none"
"""Answer to a classification task where the network classifies no pattern as positive."""


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
    classification task shows the improved one and asks which patterns, out of all that there are, it classifies as
    positive.
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
        """The prompt that shows the network and asks for the patterns that it classifies as positive."""
        share = f"{self._spec.positive_threshold:.4g}"
        task = (
            f"## Task\nName the patterns to which this network answers yes: to at least {share} of a pattern's "
            f"sequences. Write {NO_PATTERNS} if there are none.\n\n## Answer\n"
        )
        shown = self._network(record, "weights", "signature") + f"## Patterns\n{self._pattern_list}\n\n"
        return Prompt(shown + task, (", ".join(record["positive_patterns"]) or NO_PATTERNS) + "\n")

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
        separate, lines = self._form.style == "separate", []
        signatures = signature_of(record, signature, architecture_of(spec, record))
        for i, ((weight, bias), neurons) in enumerate(zip(self._layers(record, weights), signatures, strict=True)):
            for n, (row, offset, values) in enumerate(zip(weight.tolist(), bias.tolist(), neurons, strict=True)):
                shown = "" if separate else f"weights {self._row(row)} bias {self._row([offset])} "
                shown += " ".join(f"{method} {self._row(numbers)}" for method, numbers in values.items())
                lines.append(f"layer {i} neuron {n}: {shown}\n")
        title = "Activation signature" if separate else "Weights and activation signature"
        head = f"## Weights\n{self.weights(record, weights)}\n" if separate else ""
        return f"{about}{head}## {title}\n{''.join(lines)}\n"

    def _layers(self, record: Mapping[str, Any], column: str) -> list[tuple[Tensor, Tensor]]:
        params = network_of(record, column, architecture_of(self._spec, record))
        layers = range(len(params) // 2)
        return [(params[f"layers.{i}.weight"][0], params[f"layers.{i}.bias"][0]) for i in layers]

    def _row(self, numbers: Sequence[float]) -> str:
        # One format for all of them: several times as fast as one for each.
        return _form(self._form.digits, len(numbers)) % tuple(numbers)


@lru_cache(maxsize=4096)
def _form(digits: int, count: int) -> str:
    return " ".join([f"%.{digits}g"] * count)


def _tokenizer(name: str) -> Callable[[str], int]:
    """A function that counts the tokens of a text."""
    # It takes seconds to import.
    from transformers import AutoTokenizer

    field, folder = "spec.format.tokenizer", Path(name)
    try:
        if not folder.is_dir():
            folder = fetch(name, "model", ["*.json", "*.txt", "*.model", "*.jinja"], ["*/*"], field=field)
    except Unavailable:
        # Perhaps it was downloaded before.
        folder = Path(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # It raises whatever its parts do.
        text = str(error).strip().split("\n")[0] or type(error).__name__
        raise InvalidInput.field(field, f"cannot load {name}: {text}") from None
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
        elif current is not None and (numbers := _numbers(line)) is not None:
            current += numbers
        else:
            # Words: the layer has ended.
            current = None
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


def parse_patterns(text: str, patterns: Sequence[Pattern]) -> list[str] | None:
    """The patterns that an interpreter names, in its order; other words are left out. None where it names none, and
    does not say so."""
    known = sorted((pattern.name for pattern in patterns), key=len, reverse=True)
    # Whole words: not the one in nonpalindrome.
    names = "|".join(re.escape(name) for name in known)
    form = re.compile(rf"(?<![a-z0-9_])(?:{names})(?![a-z0-9_])", re.IGNORECASE)
    by_name = {name.lower(): name for name in known}
    named = list(dict.fromkeys(by_name[match.lower()] for match in form.findall(text)))
    return named if named or re.search(rf"\b{NO_PATTERNS}\b", text, re.IGNORECASE) else None
