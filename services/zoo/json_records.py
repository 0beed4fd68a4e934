"""Reads the form in which such datasets were first published, with JSON text in every column.

Columns: ``example_id``; ``metadata``; ``modification_prompt``, ``_completion`` and ``_text``, the same for
``classification``; ``degraded_signature``, ``improved_signature``, ``degraded_model_weights``,
``improved_model_weights``; ``training_metrics``. Weights are ``{"config": {...}, "weights": {"network.0.weight":
[[...]], "network.0.bias": [...], "network.2.weight": ...}}``, numbered as the modules of a sequential network;
signatures ``{"neuron_activations": {layer: {"neuron_profiles": {neuron: {method: value or values}}}}}``.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from ethogram.errors import InvalidInput
from ethogram.specs.generation import BUILT_IN, GenerationSpec, PatternSpec
from services.language.tables import Malformed, read_rows
from services.runtime.reading import reading
from services.runtime.run import Run
from services.zoo.dataset import BASELINE
from services.zoo.patterns import Pattern, from_specs
from services.zoo.subjects import ACTIVATIONS, Architecture, Params

_WEIGHT = re.compile(r"(?:.*\.)?(\d+)\.(weight|bias)$")
_NAME = re.compile(r"(\w+)(?:\(([A-Z])\))?")
# What is read of a record.
_READ = (
    "example_id",
    "metadata",
    "improved_model_weights",
    "degraded_model_weights",
    "training_metrics",
)
SUFFIXES = (".parquet", ".jsonl")
"""Of files of records."""
PATTERNS = "patterns.json"
"""Beside records: what their patterns' names mean."""


class Record(NamedTuple):
    """A record of this form."""

    place: str
    """For error messages."""
    id: int | None
    """Its own number, if it has one."""
    shape: Architecture
    patterns: list[str]
    target: str | None
    """The pattern that was degraded, if it is known."""
    improved: Params
    degraded: Params | None
    metadata: dict[str, Any]
    metrics: dict[str, Any]
    """What is known of the training, by stage."""
    dropout: float

    @property
    def learning_rate(self) -> float | None:
        """Of the first stage, if it is known."""
        rate = _mapping(self.metadata.get("model_config")).get("learning_rate")
        return float(rate) if _is_number(rate) else None

    def by_stage(self, metric: str) -> list[float]:
        """A number of the training, of each stage where it is known."""
        stages = [_mapping(self.metrics.get(name)) for name in ("degraded", "improved")]
        return [float(one) for one in (stage.get(metric) for stage in stages) if _is_number(one)]


@dataclass
class _Survey:
    """What a first pass over all records finds."""

    first: Record
    names: dict[str, str] = field(default_factory=dict)
    """Each pattern's name, and where it first occurs."""
    ids: set[int] = field(default_factory=set)
    records: int = 0
    numbered: int = 0
    """Records with an id of their own."""
    depths: set[int] = field(default_factory=set)
    widths: set[int] = field(default_factory=set)
    counts: set[int] = field(default_factory=set)
    dropouts: set[float] = field(default_factory=set)
    activations: set[str] = field(default_factory=set)

    def see(self, record: Record) -> None:
        """Raises :class:`InvalidInput` for a record that does not go with those before."""
        if record.shape[:3] != self.first.shape[:3]:
            raise InvalidInput.field(record.place, "has another vocabulary, length or input encoding than the first")
        if (record.degraded is None) != (self.first.degraded is None):
            raise InvalidInput.field(f"{record.place}.degraded_model_weights", "is there in some records alone")
        if record.degraded is not None and record.target is None:
            raise InvalidInput.field(f"{record.place}.metadata.target_pattern", "is missing")
        for name in (*record.patterns, *filter(None, [record.target])):
            self.names.setdefault(name, record.place)
        if record.id is not None and record.id not in self.ids:
            self.ids.add(record.id)
            self.numbered += 1
        self.records += 1
        self.depths.add(len(record.shape.hidden))
        self.widths.add(record.shape.hidden[0])
        self.counts.add(len(record.patterns))
        self.dropouts.add(record.dropout)
        self.activations.add(record.shape.activation)


class JsonRecords:
    """The records in a parquet or JSON-lines file, or in a folder of them. A first pass finds what there is;
    iteration reads the files again, since they are large."""

    def __init__(
        self,
        source: Path,
        *,
        patterns: Sequence[PatternSpec] | None = None,
        rename: Mapping[str, str] | None = None,
        run: Run | None = None,
    ) -> None:
        """``patterns``: what the names in the records mean; None: what a ``patterns.json`` beside them says, or else
        the built-in patterns of these names. ``rename``: names in the records to names of ``patterns``. Raises
        :class:`InvalidInput` naming the file, row and column that is wrong."""
        self._files, self._rename = files_in(source), dict(rename or {})
        if not self._files:
            raise InvalidInput.field(str(source), "is no file, and no folder with .parquet or .jsonl files")
        beside = source if source.is_dir() else source.parent
        survey = _surveyed(self._files, self._rename, source, run or Run())
        if patterns is None and (beside / PATTERNS).exists():
            with reading(beside, PATTERNS, "dataset") as path:
                patterns = patterns_in(json.loads(path.read_text()), PATTERNS)
        self.spec = _spec(survey, patterns)
        """Of a zoo of these records."""
        self.patterns = from_specs(self.spec.patterns, self.spec.vocab_size, self.spec.sequence_length)
        self.baseline = beside if (beside / BASELINE).exists() else None
        """Folder with the probes of the records, if they are there."""
        self._meaning = _meaning(survey, self.patterns)
        self._numbered = survey.numbered == survey.records

    def __len__(self) -> int:
        return self.spec.subjects

    def __iter__(self) -> Iterator[tuple[int, Record]]:
        """Each record with its index, its own where all have one, and with the names of :attr:`patterns`."""
        meaning = self._meaning
        for place, record in enumerate(_all(self._files, self._rename)):
            index = record.id if self._numbered and record.id is not None else place
            patterns = [meaning[name] for name in record.patterns]
            target = None if record.target is None else meaning[record.target]
            yield index, record._replace(patterns=patterns, target=target)


def files_in(source: Path) -> list[Path]:
    """The files in ``source`` that can hold records: itself, or those of a folder."""
    if source.is_file():
        return [source]
    return sorted(file for suffix in SUFFIXES for file in source.rglob(f"*{suffix}"))


def _surveyed(files: Sequence[Path], rename: Mapping[str, str], source: Path, run: Run) -> _Survey:
    survey: _Survey | None = None
    run.stage("read", len(files), "files")
    for i, file in enumerate(files):
        for record in _records(file, rename):
            survey = survey or _Survey(record)
            survey.see(record)
        run.advance(i + 1)
    if survey is None:
        raise InvalidInput.field(str(source), "holds no records")
    return survey


def _all(files: Sequence[Path], rename: Mapping[str, str]) -> Iterator[Record]:
    for file in files:
        yield from _records(file, rename)


def _records(file: Path, rename: Mapping[str, str]) -> Iterator[Record]:
    for number, (_, row) in enumerate(read_rows(file, _READ)):
        place = f"{file.name}.{number}"
        if isinstance(row, Malformed):
            raise InvalidInput.field(place, row)
        yield _record(row, place, rename)


def _record(row: Mapping[str, Any], place: str, rename: Mapping[str, str]) -> Record:
    metadata = _parsed(row, "metadata", place)
    selected, target = metadata.get("selected_patterns"), metadata.get("target_pattern")
    if not isinstance(selected, list) or not selected or not all(isinstance(name, str) for name in selected):
        raise InvalidInput.field(f"{place}.metadata.selected_patterns", "is no list of pattern names")
    weights = _parsed(row, "improved_model_weights", place)
    shape, params = _network(weights, f"{place}.improved_model_weights")
    degraded = None
    if row.get("degraded_model_weights"):
        there = f"{place}.degraded_model_weights"
        other, degraded = _network(_parsed(row, "degraded_model_weights", place), there)
        if other != shape:
            raise InvalidInput.field(there, "is not of the improved network's shape")
    dropout = _mapping(weights.get("config")).get("dropout_rate") or 0.0
    if not _is_number(dropout) or not 0 <= dropout <= 0.9:
        raise InvalidInput.field(f"{place}.improved_model_weights.config.dropout_rate", "is no number from 0 to 0.9")
    metrics = _parsed(row, "training_metrics", place) if row.get("training_metrics") else {}
    id = row.get("example_id")
    return Record(
        place,
        id if isinstance(id, int) and 0 <= id < 2**62 else None,
        shape,
        [rename.get(name, name) for name in selected],
        rename.get(target, target) if isinstance(target, str) else None,
        params,
        degraded,
        metadata,
        metrics,
        float(dropout),
    )


def _parsed(row: Mapping[str, Any], column: str, place: str) -> dict[str, Any]:
    """A column of JSON text, or already an object."""
    value = row.get(column)
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise InvalidInput.field(f"{place}.{column}", f"is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise InvalidInput.field(f"{place}.{column}", "is missing" if found is None else "is no JSON object")
    return found


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _network(value: Mapping[str, Any], place: str) -> tuple[Architecture, Params]:
    config, named = value.get("config"), value.get("weights")
    if not isinstance(config, dict) or not isinstance(named, dict):
        raise InvalidInput.field(place, 'must be {"config": {...}, "weights": {...}}')
    modules: dict[int, dict[str, NDArray[np.float32]]] = {}
    for name, numbers in named.items():
        match = _WEIGHT.match(name)
        try:
            array = np.array(numbers, np.float32)
        except (ValueError, TypeError):
            array = np.zeros(0, np.float32)
        if match is None or array.ndim != (2 if match[2] == "weight" else 1) or not np.isfinite(array).all():
            raise InvalidInput.field(f"{place}.weights.{name}", "is no weight matrix or bias of a sequential network")
        modules.setdefault(int(match[1]), {})[match[2]] = array
    params, widths, fan_in = Params(), list[int](), 0
    for layer, number in enumerate(sorted(modules)):
        weight, bias = modules[number].get("weight"), modules[number].get("bias")
        if weight is None or bias is None or len(weight) != len(bias) or (layer and weight.shape[1] != widths[-1]):
            raise InvalidInput.field(f"{place}.weights.network.{number}", "does not fit the layer before it")
        fan_in = fan_in or weight.shape[1]
        widths.append(len(bias))
        params[f"layers.{layer}.weight"] = torch.from_numpy(weight).unsqueeze(0)
        params[f"layers.{layer}.bias"] = torch.from_numpy(bias).unsqueeze(0)
    if len(widths) < 2 or widths[-1] != 1 or len(set(widths[:-1])) != 1:
        raise InvalidInput.field(f"{place}.weights", f"has layers of {widths} neurons, not some of equal width and one")
    vocabulary, length, activation = (config.get(name) for name in ("vocab_size", "sequence_length", "activation_type"))
    if not isinstance(vocabulary, int) or not isinstance(length, int) or activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        text = f"must give vocab_size, sequence_length and an activation_type out of {known}"
        raise InvalidInput.field(f"{place}.config", text)
    encoding = {length: "index", length * vocabulary: "one_hot"}.get(fan_in)
    if encoding is None:
        text = f"says {length} letters out of {vocabulary}, but the network has {fan_in} inputs"
        raise InvalidInput.field(f"{place}.config", text)
    return Architecture(vocabulary, length, encoding, tuple(widths[:-1]), activation), params


def patterns_in(value: Any, place: str) -> list[PatternSpec]:
    """What ``{"patterns": [...]}`` says, as in a spec; ``place`` is for error messages."""
    try:
        return [PatternSpec.model_validate(one) for one in value["patterns"]]
    except ValidationError as error:
        raise InvalidInput.from_pydantic(error, place) from None
    except (KeyError, TypeError):
        raise InvalidInput.field(place, 'must be {"patterns": [...]}, as in a spec') from None


def _built_in(survey: _Survey) -> list[PatternSpec]:
    """The patterns that the names in the records stand for."""
    found = []
    for name, place in survey.names.items():
        match = _NAME.fullmatch(name)
        if match is None or match[1] not in BUILT_IN or (match[1] in ("starts_with", "ends_with")) != bool(match[2]):
            text = f"{name} is not one of the built-in patterns as it stands; say what it is with patterns"
            raise InvalidInput.field(f"{place}.metadata.selected_patterns", text)
        found.append(PatternSpec(name=match[1], token=match[2]))
    return found


def _spec(survey: _Survey, patterns: Sequence[PatternSpec] | None) -> GenerationSpec:
    """The spec of a zoo of these records."""
    first, metadata = survey.first.shape, survey.first.metadata
    staged: dict[str, Any] | None = None
    if survey.first.degraded is not None:
        rate = _mapping(metadata.get("corruption_stats")).get("corruption_rate")
        staged = {"corruption_rate": rate} if _is_number(rate) else {}
    config = {
        "subjects": survey.records,
        "vocab_size": first.vocab_size,
        "sequence_length": first.length,
        "patterns": [pattern.model_dump() for pattern in (_built_in(survey) if patterns is None else patterns)],
        "min_patterns_per_batch": min(survey.counts),
        "max_patterns_per_batch": max(survey.counts),
        "subject": {
            "layers": {"min": min(survey.depths), "max": max(survey.depths)},
            "neurons": {"min": min(survey.widths), "max": max(survey.widths)},
            "activations": sorted(survey.activations),
            "input_encoding": first.input_encoding,
            "dropout": {"min": min(survey.dropouts), "max": max(survey.dropouts)},
            "init": "independent",
            "precision": metadata.get("precision") or "float32",
            "quantization": metadata.get("quantization") or "none",
        },
        "staged": staged,
        "min_accuracy": 0.0,
    }
    try:
        return GenerationSpec.model_validate(config)
    except ValidationError as error:
        raise InvalidInput.from_pydantic(error, "records") from None


def _meaning(survey: _Survey, patterns: Sequence[Pattern]) -> dict[str, str]:
    """Of each name in the records the pattern's; ``starts_with`` will do where there is one such pattern."""
    kinds = Counter(pattern.kind for pattern in patterns)
    names = {pattern.kind: pattern.name for pattern in patterns if kinds[pattern.kind] == 1}
    names |= {pattern.name: pattern.name for pattern in patterns}
    for name, place in survey.names.items():
        if name not in names:
            text = f"{name} is none of the patterns: {', '.join(pattern.name for pattern in patterns)}"
            raise InvalidInput.field(f"{place}.metadata.selected_patterns", text)
    return names
