"""The form in which such datasets were first published, with JSON text in every column: written and read.

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
import pyarrow
import torch
from numpy.typing import NDArray
from pyarrow import parquet
from pydantic import ValidationError

from ethogram.errors import InvalidInput
from ethogram.specs.generation import BUILT_IN, FormatSpec, GenerationSpec, PatternSpec
from services.generation.data import Candidates, activations_of
from services.generation.format import TrainingDataFormatter
from services.generation.pipeline import DatasetGenerationPipeline
from services.generation.train import Trained
from services.runtime.run import Run
from services.zoo.dataset import BASELINE, DATA, architecture_of, data_file, network_of, read_about, read_records
from services.zoo.patterns import Pattern
from services.zoo.reading import reading
from services.zoo.subjects import ACTIVATIONS, Architecture, Params

_WEIGHT = re.compile(r"(?:.*\.)?(\d+)\.(weight|bias)$")
_NAME = re.compile(r"(\w+)(?:\(([A-Z])\))?")
# Records to a file of the zoo.
_SHARD = 1024
# What is read of a record.
_READ = (
    "example_id",
    "metadata",
    "improved_model_weights",
    "degraded_model_weights",
    "training_metrics",
)
PATTERNS = "patterns.json"
"""Beside records: what their patterns' names mean."""


def export_json(zoo: Path, target: Path, run: Run | None = None) -> None:
    """Write the zoo in the folder ``zoo`` into the new folder ``target``, in this form. Prompts are the zoo's own, or
    those of ``FormatSpec()`` where it has none."""
    run = run or Run()
    about, spec, patterns = read_about(zoo)
    formatter = TrainingDataFormatter(spec.model_copy(update={"format": spec.format or FormatSpec()}), patterns)
    (target / DATA).mkdir(parents=True)
    run.stage("export", about["subjects"], "records")
    done = 0
    for number, table in enumerate(read_records(zoo)):
        rows = []
        for record in table.to_pylist():
            rows.append(_written(record, spec, formatter))
            done += 1
            run.advance(done)
        parquet.write_table(pyarrow.Table.from_pylist(rows), target / data_file(number))
    (target / BASELINE).write_bytes((zoo / BASELINE).read_bytes())
    meanings = {"patterns": [pattern.model_dump() for pattern in spec.patterns]}
    if spec.patterns:
        (target / PATTERNS).write_text(json.dumps(meanings, indent=1))
    if spec.counterfactual is not None:
        run.log("this form has no place for counterfactual branches; they are left out", "warning")


def _written(record: Mapping[str, Any], spec: GenerationSpec, formatter: TrainingDataFormatter) -> dict[str, Any]:
    staged = spec.staged is not None
    config = {
        "vocab_size": spec.vocab_size,
        "sequence_length": spec.sequence_length,
        "num_layers": record["layers"],
        "neurons_per_layer": record["neurons"],
        "activation_type": record["activation"],
        "dropout_rate": record["dropout"],
        "learning_rate": record["learning_rate"],
        "precision": spec.subject.precision,
    }
    metadata = {
        "target_pattern": record.get("target_pattern"),
        "selected_patterns": record["patterns"],
        "degraded_accuracy": float(np.mean(record["degraded_accuracy"])) if staged else None,
        "improved_accuracy": float(np.mean(record["accuracy"])),
        "improvement": record.get("improvement"),
        "model_config": config,
        "corruption_stats": {"corruption_rate": spec.staged.corruption_rate} if spec.staged is not None else {},
        "precision": spec.subject.precision,
        "quantization": spec.subject.quantization,
        "tasks_included": ["modification", "classification"] if staged else ["classification"],
    }
    row: dict[str, Any] = {"example_id": record["index"], "metadata": json.dumps(metadata)}
    shape = architecture_of(spec, record)
    for task in ("modification", "classification"):
        made = None
        if task == "classification" or staged:
            made = formatter.modification(record) if task == "modification" else formatter.classification(record)
        row[f"{task}_prompt"] = made and made.prompt
        row[f"{task}_completion"] = made and made.completion
        row[f"{task}_text"] = made and made.text
    for name, prefix, there in (("degraded", "degraded_", staged), ("improved", "", True)):
        row[f"{name}_signature"] = row[f"{name}_model_weights"] = None
        if not there:
            continue
        row[f"{name}_signature"] = json.dumps(_signature(record[f"{prefix}signature"], shape))
        params = network_of(record, f"{prefix}weights", shape)
        weights = {"config": config, "weights": _named(params, record["dropout"] > 0)}
        row[f"{name}_model_weights"] = json.dumps(weights)
    stages = zip(record["epochs"], record["validation_loss"], strict=True) if staged else ()
    metrics = [{"epochs": epochs, "validation_loss": loss} for epochs, loss in stages]
    row["training_metrics"] = json.dumps(dict(zip(("degraded", "improved"), metrics, strict=False)), allow_nan=False)
    return row


def _named(params: Params, dropout: bool) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for name, tensor in params.items():
        _, layer, part = name.split(".")
        # Shortest text of a float32, so that little is written and nothing is lost.
        numbers = np.array([float(str(number)) for number in tensor[0].flatten().numpy()])
        named[f"network.{(3 if dropout else 2) * int(layer)}.{part}"] = numbers.reshape(tensor.shape[1:]).tolist()
    return named


def _signature(signature: Mapping[str, Sequence[float]], shape: Architecture) -> dict[str, Any]:
    rows = {method: np.asarray(values).reshape(shape.neurons, -1).tolist() for method, values in signature.items()}
    layers: dict[str, Any] = {}
    start = 0
    for layer, (_, width) in enumerate(shape.layers):
        profiles = {}
        for neuron in range(width):
            values = {method: numbers[start + neuron] for method, numbers in rows.items()}
            profiles[str(neuron)] = {method: row[0] if len(row) == 1 else row for method, row in values.items()}
        layers[str(layer)] = {"neuron_profiles": profiles}
        start += width
    return {"neuron_activations": layers}


class _Found(NamedTuple):
    """A record of this form."""

    place: str
    """For error messages."""
    id: int | None
    shape: Architecture
    patterns: list[str]
    target: str | None
    improved: Params
    degraded: Params | None
    metadata: dict[str, Any]
    metrics: dict[str, Any]
    dropout: float


@dataclass
class _Survey:
    """What a first look at all records finds."""

    first: _Found
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

    def see(self, record: _Found) -> None:
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


def import_json(
    source: Path,
    folder: Path,
    *,
    patterns: Sequence[PatternSpec] | None = None,
    rename: Mapping[str, str] | None = None,
    run: Run | None = None,
) -> dict[str, Any]:
    """Read the records of this form in ``source`` (a parquet or JSON-lines file, or a folder of them) and write them as
    a zoo into the new ``folder``; its figures.

    Weights, labels and what is known of the training are kept. Signatures are taken again, as their probes are not in
    the records: on those of a ``baseline_dataset.json`` beside them, or on fresh ones; accuracies are measured again.

    ``patterns``: what the names in the records mean; None: what a ``patterns.json`` beside them says, or else the
    built-in patterns of these names. ``rename``: names in the records to names of ``patterns``. Raises
    :class:`InvalidInput` naming the file, row and column that is wrong, before anything is written.
    """
    run, names = run or Run(), dict(rename or {})
    files, beside = _files(source), source if source.is_dir() else source.parent
    survey = _surveyed(files, names, source, run)
    if patterns is None and (beside / PATTERNS).exists():
        with reading(beside, PATTERNS, "dataset") as path:
            patterns = patterns_in(json.loads(path.read_text()), PATTERNS)
    spec = _spec(survey, patterns)
    pipeline = DatasetGenerationPipeline(spec, run.device, beside if (beside / BASELINE).exists() else None)
    meaning = _meaning(survey, pipeline.patterns)
    run.stage("import", survey.records, "records")

    def shards() -> Iterator[pyarrow.Table]:
        rows: list[dict[str, Any]] = []
        for i, record in enumerate(_all(files, names)):
            index = record.id if survey.numbered == survey.records and record.id is not None else i
            rows.append(_row(index, record, pipeline, meaning))
            run.advance(i + 1)
            if len(rows) == _SHARD:
                yield pipeline.table(rows)
                rows = []
        if rows:
            yield pipeline.table(rows)

    return pipeline.write(folder, shards(), {"imported": source.name})


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


def _row(index: int, record: _Found, pipeline: DatasetGenerationPipeline, meaning: Mapping[str, str]) -> dict[str, Any]:
    own = _candidate(index, record, pipeline, meaning)
    improved = _trained(own, record.shape, record.improved)
    degraded = _trained(own, record.shape, record.degraded) if record.degraded is not None else None
    (row,) = pipeline.describe(improved, degraded)
    rate = _mapping(record.metadata.get("model_config")).get("learning_rate")
    row["learning_rate"] = float(rate) if _is_number(rate) else None
    if degraded is not None:
        stages = [_mapping(record.metrics.get(name)) for name in ("degraded", "improved")]
        epochs, losses = ([stage.get(name) for stage in stages] for name in ("epochs", "validation_loss"))
        row["epochs"] = [int(one) for one in epochs if _is_number(one)]
        row["validation_loss"] = [float(one) for one in losses if _is_number(one)]
    return row


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    files = sorted(file for form in ("*.parquet", "*.jsonl") for file in source.rglob(form))
    if not files:
        raise InvalidInput.field(str(source), "is no file, and no folder with .parquet or .jsonl files")
    return files


def _all(files: Sequence[Path], rename: Mapping[str, str]) -> Iterator[_Found]:
    for file in files:
        yield from _records(file, rename)


def _rows(file: Path) -> Iterator[Any]:
    """A few at a time: such records are large."""
    if file.suffix != ".parquet":
        with file.open() as lines:
            yield from (json.loads(line) for line in lines if line.strip())
        return
    table = parquet.ParquetFile(file)
    columns = [name for name in _READ if name in table.schema_arrow.names]
    for batch in table.iter_batches(64, columns=columns):
        yield from batch.to_pylist()


def _records(file: Path, rename: Mapping[str, str]) -> Iterator[_Found]:
    number = 0
    try:
        for number, row in enumerate(_rows(file)):
            yield _record(row, f"{file.name}.{number}", rename)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise InvalidInput.field(file.name, f"cannot be read after {number} rows: {error}") from None


def _record(row: Any, place: str, rename: Mapping[str, str]) -> _Found:
    if not isinstance(row, dict):
        raise InvalidInput.field(place, "is no record")
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
    return _Found(
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


def _candidate(
    index: int, record: _Found, pipeline: DatasetGenerationPipeline, meaning: Mapping[str, str]
) -> Candidates:
    own = {meaning[name] for name in record.patterns}
    names = [pattern.name for pattern in pipeline.patterns]
    target = names.index(meaning[record.target if record.target is not None else record.patterns[0]])
    activation = activations_of(pipeline.spec).index(record.shape.activation)  # type: ignore[arg-type]
    return Candidates(
        indices=torch.tensor([index]),
        selected=torch.tensor([[name in own for name in names]]),
        target=torch.tensor([target]),
        other=torch.tensor([0]),
        layers=torch.tensor([len(record.shape.hidden)]),
        neurons=torch.tensor([record.shape.hidden[0]]),
        activation=torch.tensor([activation]),
        learning_rate=torch.tensor([float("nan")]),
        dropout=torch.tensor([record.dropout]),
    )


def _trained(own: Candidates, shape: Architecture, params: Params) -> Trained:
    return Trained(own, shape, params, torch.zeros(1, dtype=torch.int64), torch.zeros(1))
