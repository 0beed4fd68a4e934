"""Reads the form in which such datasets were first published, with JSON text in every column.

Columns: ``example_id``; ``metadata``; ``modification_prompt``, ``_completion`` and ``_text``, the same for
``classification``; ``degraded_signature``, ``improved_signature``, ``degraded_model_weights``,
``improved_model_weights``; ``training_metrics``. Weights are ``{"config": {...}, "weights": {"network.0.weight":
[[...]], "network.0.bias": [...], "network.2.weight": ...}}``, numbered as the modules of a sequential network;
signatures ``{"neuron_activations": {layer: {"neuron_profiles": {neuron: {method: value or values}}}}}``.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from ethogram.errors import InvalidInput
from ethogram.specs.generation import GenerationSpec, PatternSpec
from services.language.tables import Malformed, files_below, read_rows
from services.runtime.reading import reading
from services.runtime.run import Run
from services.zoo.dataset import BASELINE
from services.zoo.meanings import PATTERNS, defined, named, patterns_in, undefined
from services.zoo.patterns import from_specs
from services.zoo.subjects import ACTIVATIONS, Architecture, Params

_WEIGHT = re.compile(r"(?:.*\.)?(\d+)\.(weight|bias)$")
# Columns that are read.
_COLUMNS = ("example_id", "metadata", "improved_model_weights", "degraded_model_weights", "training_metrics")
SUFFIXES = (".parquet", ".jsonl")
"""Suffixes of files of records."""
DEFINITIONS = "pattern_definitions"
"""Key of a record's metadata: the patterns of its zoo, as in a spec."""


class Record(NamedTuple):
    """A record in this form."""

    location: str
    """File and row, for error messages."""
    id: int | None
    shape: Architecture
    patterns: list[str]
    target: str | None
    """The pattern that was degraded, if it is known."""
    improved: Params
    degraded: Params | None
    metadata: dict[str, Any]
    metrics: dict[str, Any]
    """Training metrics, by stage."""
    dropout: float

    @property
    def learning_rate(self) -> float | None:
        """Learning rate of the first stage, if it is known."""
        rate = _mapping(self.metadata.get("model_config")).get("learning_rate")
        return float(rate) if _is_number(rate) else None

    def by_stage(self, metric: str) -> list[float]:
        """A training metric of each stage that has it."""
        stages = [_mapping(self.metrics.get(name)) for name in ("degraded", "improved")]
        return [float(stage[metric]) for stage in stages if _is_number(stage.get(metric))]


@dataclass
class _Survey:
    """What a first pass over all records collects."""

    first: Record
    names: dict[str, str] = field(default_factory=dict)
    """Location of the first occurrence of each pattern name."""
    ids: set[int] = field(default_factory=set)
    records: int = 0
    shapes: set[Architecture] = field(default_factory=set)
    selections: set[frozenset[str]] = field(default_factory=set)
    """The sets of patterns."""
    dropouts: set[float] = field(default_factory=set)

    def add(self, record: Record) -> None:
        """Add a record. Raises :class:`InvalidInput` if it does not fit those before."""
        if record.shape[:3] != self.first.shape[:3]:
            raise InvalidInput.field(record.location, "has another vocabulary, length or input encoding than the first")
        if (record.degraded is None) != (self.first.degraded is None):
            raise InvalidInput.field(f"{record.location}.degraded_model_weights", "is missing in some records")
        if record.degraded is not None and record.target is None:
            raise InvalidInput.field(f"{record.location}.metadata.target_pattern", "is missing")
        for name in (*record.patterns, *filter(None, [record.target])):
            self.names.setdefault(name, f"{record.location}.metadata.selected_patterns")
        if record.id is not None:
            self.ids.add(record.id)
        self.records += 1
        self.shapes.add(record.shape)
        self.selections.add(frozenset(record.patterns))
        self.dropouts.add(record.dropout)


class JsonRecords:
    """The records in a parquet or JSON-lines file, or in a folder of them. A first pass checks them; iteration reads
    the files again, since they are large."""

    def __init__(
        self,
        source: Path,
        *,
        patterns: Sequence[PatternSpec] | None = None,
        rename: Mapping[str, str] | None = None,
        run: Run | None = None,
    ) -> None:
        """``patterns``: definitions of the names in the records; None: those of a ``patterns.json`` beside them or in
        their metadata, or else what :func:`services.zoo.meanings.undefined` says. ``rename``: names in the records to
        names of ``patterns``. Raises :class:`InvalidInput` naming the file, row and column that is wrong."""
        self._files, self._rename = files_in(source), dict(rename or {})
        if not self._files:
            raise InvalidInput.field(str(source), "is neither a file nor a folder with .parquet or .jsonl files")
        run = run or Run()
        survey = self._survey(source, run)
        folder = source if source.is_dir() else source.parent
        if patterns is None:
            patterns = _definitions(survey.first, folder)
        sizes = _spec({"vocab_size": survey.first.shape.vocab_size, "sequence_length": survey.first.shape.length})
        if patterns is None:
            meanings = undefined(survey.names, sizes, folder, self._rename, run)
            # Two names may be one set.
            patterns = list({named(pattern): pattern for pattern in meanings.values()}.values())
        else:
            suite = [pattern.spec for pattern in from_specs(patterns, sizes.vocab_size, sizes.sequence_length)]
            meanings = defined(survey.names, suite)
        self._names = {name: named(pattern) for name, pattern in meanings.items()}
        self.spec = _spec(_described(survey, patterns, self._names))
        """Spec of a zoo of these records."""
        self.patterns = from_specs(self.spec.patterns, self.spec.vocab_size, self.spec.sequence_length)
        self.baseline = folder if (folder / BASELINE).exists() else None
        """Folder with the probes of the records, if there is one."""
        self._numbered = len(survey.ids) == survey.records

    def __len__(self) -> int:
        return self.spec.subjects

    def __iter__(self) -> Iterator[tuple[int, Record]]:
        """Each record, with the names of :attr:`patterns`, and its index: its id if all ids differ, else its row."""
        for row, record in enumerate(record for file in self._files for record in self._records(file)):
            index = record.id if self._numbered and record.id is not None else row
            patterns = list(dict.fromkeys(self._names[name] for name in record.patterns))
            target = None if record.target is None else self._names[record.target]
            yield index, record._replace(patterns=patterns, target=target)

    def _survey(self, source: Path, run: Run) -> _Survey:
        survey: _Survey | None = None
        run.stage("read", len(self._files), "files")
        for i, file in enumerate(self._files):
            for record in self._records(file):
                survey = survey or _Survey(record)
                survey.add(record)
            run.advance(i + 1)
        if survey is None:
            raise InvalidInput.field(str(source), "holds no records")
        return survey

    def _records(self, file: Path) -> Iterator[Record]:
        for number, (_, row) in enumerate(read_rows(file, _COLUMNS)):
            location = f"{file.name}.{number}"
            if isinstance(row, Malformed):
                raise InvalidInput.field(location, row)
            yield _record(row, location, self._rename)


def files_in(source: Path) -> list[Path]:
    """The files of records in ``source``: itself, or those in a folder."""
    if source.is_file():
        return [source]
    return files_below(source, SUFFIXES, str(source))[0] if source.is_dir() else []


def _record(row: Mapping[str, Any], location: str, rename: Mapping[str, str]) -> Record:
    metadata = _parsed(row, "metadata", location)
    selected, target = metadata.get("selected_patterns"), metadata.get("target_pattern")
    if not isinstance(selected, list) or not selected or not all(isinstance(name, str) for name in selected):
        raise InvalidInput.field(f"{location}.metadata.selected_patterns", "is not a list of pattern names")
    weights = _parsed(row, "improved_model_weights", location)
    shape, params = _network(weights, f"{location}.improved_model_weights")
    degraded = None
    if row.get("degraded_model_weights"):
        field = f"{location}.degraded_model_weights"
        degraded_shape, degraded = _network(_parsed(row, "degraded_model_weights", location), field)
        if degraded_shape != shape:
            raise InvalidInput.field(field, "has another shape than the improved network")
    dropout = _mapping(weights.get("config")).get("dropout_rate") or 0.0
    if not _is_number(dropout) or not 0 <= dropout <= 0.9:
        raise InvalidInput.field(
            f"{location}.improved_model_weights.config.dropout_rate", "is not a number from 0 to 0.9"
        )
    metrics = _parsed(row, "training_metrics", location) if row.get("training_metrics") else {}
    id = row.get("example_id")
    return Record(
        location,
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


def _parsed(row: Mapping[str, Any], column: str, location: str) -> dict[str, Any]:
    """An object, or the JSON text of one."""
    value = row.get(column)
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise InvalidInput.field(f"{location}.{column}", f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidInput.field(f"{location}.{column}", "is missing" if value is None else "is not a JSON object")
    return value


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_number(value: Any) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    # An integer of JSON may be larger than any float.
    return abs(value) <= sys.float_info.max


def _network(value: Mapping[str, Any], location: str) -> tuple[Architecture, Params]:
    config, weights = value.get("config"), value.get("weights")
    if not isinstance(config, dict) or not isinstance(weights, dict):
        raise InvalidInput.field(location, 'must be {"config": {...}, "weights": {...}}')
    modules: dict[int, dict[str, NDArray[np.float32]]] = {}
    for name, numbers in weights.items():
        match = _WEIGHT.match(name)
        try:
            array = np.array(numbers, np.float32)
        except (ValueError, TypeError, OverflowError):
            array = np.zeros(0, np.float32)
        if match is None or array.ndim != (2 if match[2] == "weight" else 1) or not np.isfinite(array).all():
            raise InvalidInput.field(
                f"{location}.weights.{name}", "is not a weight matrix or bias of a sequential network"
            )
        modules.setdefault(int(match[1]), {})[match[2]] = array
    params, widths, fan_in = Params(), list[int](), 0
    for layer, number in enumerate(sorted(modules)):
        weight, bias = modules[number].get("weight"), modules[number].get("bias")
        if weight is None or bias is None or len(weight) != len(bias) or (layer and weight.shape[1] != widths[-1]):
            raise InvalidInput.field(f"{location}.weights.network.{number}", "does not fit the layer before it")
        fan_in = fan_in or weight.shape[1]
        widths.append(len(bias))
        params[f"layers.{layer}.weight"] = torch.from_numpy(weight).unsqueeze(0)
        params[f"layers.{layer}.bias"] = torch.from_numpy(bias).unsqueeze(0)
    if len(widths) < 2 or widths[-1] != 1 or len(set(widths[:-1])) != 1:
        raise InvalidInput.field(f"{location}.weights", f"has layers of {widths} neurons, not equal widths and then 1")
    vocabulary, length, activation = (config.get(name) for name in ("vocab_size", "sequence_length", "activation_type"))
    if not isinstance(vocabulary, int) or not isinstance(length, int) or activation not in ACTIVATIONS:
        text = f"must give vocab_size, sequence_length and an activation_type out of {', '.join(ACTIVATIONS)}"
        raise InvalidInput.field(f"{location}.config", text)
    encoding = {length: "index", length * vocabulary: "one_hot"}.get(fan_in)
    if encoding is None:
        text = f"gives {length} letters out of {vocabulary}, but the network has {fan_in} inputs"
        raise InvalidInput.field(f"{location}.config", text)
    return Architecture(vocabulary, length, encoding, tuple(widths[:-1]), activation), params


def _definitions(record: Record, folder: Path) -> list[PatternSpec] | None:
    """The definitions of pattern names beside the records, or in the metadata of one, if there are any."""
    if (folder / PATTERNS).exists():
        with reading(folder, PATTERNS, "dataset") as path:
            return patterns_in(json.loads(path.read_bytes()), PATTERNS)
    if DEFINITIONS in record.metadata:
        return patterns_in({"patterns": record.metadata[DEFINITIONS]}, f"{record.location}.metadata.{DEFINITIONS}")
    return None


def _described(survey: _Survey, patterns: Sequence[PatternSpec], names: Mapping[str, str]) -> dict[str, Any]:
    """The spec of a zoo of these records; ``names``: the zoo's name of each pattern."""
    first, metadata = survey.first.shape, survey.first.metadata
    staged: dict[str, Any] | None = None
    if survey.first.degraded is not None:
        rate = _mapping(metadata.get("corruption_stats")).get("corruption_rate")
        # They were accepted elsewhere.
        staged = {"min_degradation_threshold": 0.0} | ({"corruption_rate": rate} if _is_number(rate) else {})
    threshold = metadata.get("positive_threshold")
    counts = {len({names[name] for name in selection}) for selection in survey.selections}
    return {
        "subjects": survey.records,
        "vocab_size": first.vocab_size,
        "sequence_length": first.length,
        "patterns": [pattern.model_dump() for pattern in patterns],
        "min_patterns_per_batch": min(counts),
        "max_patterns_per_batch": max(counts),
        "subject": {
            "layers": _range({len(shape.hidden) for shape in survey.shapes}),
            "neurons": _range({shape.hidden[0] for shape in survey.shapes}),
            "activations": sorted({shape.activation for shape in survey.shapes}),
            "input_encoding": first.input_encoding,
            "dropout": _range(survey.dropouts),
            "init": "independent",
            "precision": metadata.get("precision") or "float32",
            "quantization": metadata.get("quantization") or "none",
        },
        "staged": staged,
        "min_accuracy": 0.0,
        **({"positive_threshold": threshold} if _is_number(threshold) else {}),
    }


def _spec(values: Mapping[str, Any]) -> GenerationSpec:
    try:
        return GenerationSpec.model_validate(values)
    except ValidationError as error:
        raise InvalidInput.from_pydantic(error, "records") from None


def _range(values: set[Any]) -> dict[str, Any]:
    return {"min": min(values), "max": max(values)}
