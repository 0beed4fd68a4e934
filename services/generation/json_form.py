"""The form in which such datasets were first published, with JSON text in every column: written and read.

Columns: ``example_id``; ``metadata``; ``modification_prompt``, ``_completion`` and ``_text``, the same for
``classification``; ``degraded_signature``, ``improved_signature``, ``degraded_model_weights``,
``improved_model_weights``; ``training_metrics``. Weights are ``{"config": {...}, "weights": {"network.0.weight":
[[...]], "network.0.bias": [...], "network.2.weight": ...}}``, numbered as the modules of a sequential network;
signatures ``{"neuron_activations": {layer: {"neuron_profiles": {neuron: {method: value or values}}}}}``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import torch
from numpy.typing import NDArray
from pyarrow import parquet

from ethogram.errors import InvalidInput
from ethogram.specs.generation import BUILT_IN, FormatSpec, GenerationSpec, PatternSpec
from services.generation.data import Candidates, activations_of
from services.generation.format import TrainingDataFormatter
from services.generation.pipeline import DatasetGenerationPipeline
from services.generation.train import Trained
from services.runtime.run import Run
from services.zoo.dataset import BASELINE, DATA, architecture_of, data_file, read_about, read_probes, read_records
from services.zoo.subjects import Architecture, Params

_WEIGHT = re.compile(r"(?:.*\.)?(\d+)\.(weight|bias)$")
# Records that are described together.
_AT_ONCE = 256


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
        weights = {"config": config, "weights": _named(record[f"{prefix}weights"], shape, record["dropout"] > 0)}
        row[f"{name}_model_weights"] = json.dumps(weights)
    stages = zip(record["epochs"], record["validation_loss"], strict=True) if staged else ()
    metrics = [{"epochs": epochs, "validation_loss": loss} for epochs, loss in stages]
    row["training_metrics"] = json.dumps(dict(zip(("degraded", "improved"), metrics, strict=False)))
    return row


def _named(weights: Sequence[float], shape: Architecture, dropout: bool) -> dict[str, Any]:
    named: dict[str, Any] = {}
    start, modules = 0, 3 if dropout else 2
    for name, size in shape.shapes.items():
        stop = start + int(np.prod(size))
        _, layer, part = name.split(".")
        # Shortest text of a float32, so that little is written and nothing is lost.
        numbers = np.array([float(str(np.float32(number))) for number in weights[start:stop]])
        named[f"network.{modules * int(layer)}.{part}"] = numbers.reshape(size).tolist()
        start = stop
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
    shape: Architecture
    patterns: list[str]
    target: str | None
    improved: Params
    degraded: Params | None
    metadata: dict[str, Any]
    dropout: float


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

    Weights and labels are kept. Signatures are taken again, as their probes are not in the records: on those of a
    ``baseline_dataset.json`` beside them, or on fresh ones; accuracies are measured again, with exact labels.

    ``patterns``: what the names in the records mean; None: the built-in patterns of these names. ``rename``: names in
    the records to names of ``patterns``. Raises :class:`InvalidInput` naming the file, row and column that is wrong.
    """
    run = run or Run()
    files = _files(source)
    found = [record for file in files for record in _records(file, dict(rename or {}))]
    if not found:
        raise InvalidInput.field(str(source), "holds no records")
    spec = _spec(found, patterns)
    beside = source if source.is_dir() else source.parent
    baseline = beside if (beside / BASELINE).exists() else None
    if baseline is not None:
        signature = spec.signature.model_copy(update={"probes": len(read_probes(baseline, spec))})
        spec = spec.model_copy(update={"signature": signature})
    pipeline = DatasetGenerationPipeline(spec, run.device, baseline)
    names = {pattern.kind: pattern.name for pattern in pipeline.patterns}
    names |= {pattern.name: pattern.name for pattern in pipeline.patterns}
    run.stage("import", len(found), "records")
    shards: list[pyarrow.Table] = []
    for first in range(0, len(found), _AT_ONCE):
        rows = []
        for i, record in enumerate(found[first : first + _AT_ONCE], first):
            own = _candidate(i, record, spec, names)
            improved = _trained(own, record.shape, record.improved)
            degraded = _trained(own, record.shape, record.degraded) if record.degraded is not None else None
            rows += pipeline.describe(improved, degraded)
            run.advance(i + 1)
        shards.append(pipeline.table(rows))
    return pipeline.write(folder, shards, {"imported": True})


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    files = sorted(file for form in ("*.parquet", "*.jsonl") for file in source.rglob(form))
    if not files:
        raise InvalidInput.field(str(source), "is no file, and no folder with .parquet or .jsonl files")
    return files


def _records(file: Path, rename: Mapping[str, str]) -> Iterator[_Found]:
    try:
        if file.suffix == ".parquet":
            rows = parquet.read_table(file).to_pylist()
        else:
            rows = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise InvalidInput.field(file.name, f"cannot be read: {error}") from None
    for number, row in enumerate(rows):
        place = f"{file.name}.{number}"
        metadata = _parsed(row, "metadata", place)
        selected = metadata.get("selected_patterns")
        if not isinstance(selected, list) or not all(isinstance(name, str) for name in selected) or not selected:
            raise InvalidInput.field(f"{place}.metadata.selected_patterns", "is no list of pattern names")
        improved = _parsed(row, "improved_model_weights", place)
        shape, params = _network(improved, f"{place}.improved_model_weights")
        degraded = None
        if row.get("degraded_model_weights"):
            other, degraded = _network(_parsed(row, "degraded_model_weights", place), f"{place}.degraded_model_weights")
            if other != shape:
                raise InvalidInput.field(f"{place}.degraded_model_weights", "is not of the improved network's shape")
        target = metadata.get("target_pattern")
        own = [rename.get(name, name) for name in selected]
        dropout = float((improved.get("config") or {}).get("dropout_rate") or 0.0)
        target = rename.get(target, target) if isinstance(target, str) else None
        yield _Found(place, shape, own, target, params, degraded, metadata, dropout)


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


def _network(value: Mapping[str, Any], place: str) -> tuple[Architecture, Params]:
    config, named = value.get("config"), value.get("weights")
    if not isinstance(config, dict) or not isinstance(named, dict):
        raise InvalidInput.field(place, 'must be {"config": {...}, "weights": {...}}')
    modules: dict[int, dict[str, NDArray[np.float32]]] = {}
    for name, numbers in named.items():
        match = _WEIGHT.match(name)
        try:
            array = np.array(numbers, np.float32)
        except ValueError:
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
    try:
        vocabulary, length, activation = config["vocab_size"], config["sequence_length"], config["activation_type"]
        encoding = {length: "index", length * vocabulary: "one_hot"}[fan_in]
    except (KeyError, TypeError):
        needed = "must give vocab_size, sequence_length and activation_type that fit the first layer"
        raise InvalidInput.field(f"{place}.config", needed) from None
    return Architecture(vocabulary, length, encoding, tuple(widths[:-1]), activation), params


def _spec(found: Sequence[_Found], patterns: Sequence[PatternSpec] | None) -> GenerationSpec:
    """The spec of a zoo of these records."""
    first = found[0].shape
    for record in found:
        if record.shape[:3] != first[:3]:
            text = "has another vocabulary, length or input encoding than the records before it"
            raise InvalidInput.field(record.place, text)
        if (record.degraded is None) != (found[0].degraded is None):
            raise InvalidInput.field(f"{record.place}.degraded_model_weights", "is there in some records alone")
    if patterns is None:
        names = list(dict.fromkeys(name for record in found for name in record.patterns))
        for record in found:
            for name in record.patterns:
                if name not in BUILT_IN or name in ("starts_with", "ends_with"):
                    text = f"{name} is not one of the built-in patterns as it stands; say what it is with patterns"
                    raise InvalidInput.field(f"{record.place}.metadata.selected_patterns", f"{text} and rename")
        patterns = [PatternSpec(name=name) for name in names]
    depths, widths = ([f(record.shape.hidden) for record in found] for f in (len, max))
    counts, metadata = [len(record.patterns) for record in found], found[0].metadata
    config = {
        "subjects": len(found),
        "vocab_size": first.vocab_size,
        "sequence_length": first.length,
        "patterns": [pattern.model_dump() for pattern in patterns],
        "min_patterns_per_batch": min(counts),
        "max_patterns_per_batch": max(counts),
        "subject": {
            "layers": {"min": min(depths), "max": max(depths)},
            "neurons": {"min": min(widths), "max": max(widths)},
            "activations": sorted({record.shape.activation for record in found}),
            "input_encoding": first.input_encoding,
            "dropout": {
                "min": min(record.dropout for record in found),
                "max": max(record.dropout for record in found),
            },
            "init": "independent",
            "precision": metadata.get("precision") or "float32",
            "quantization": metadata.get("quantization") or "none",
        },
        "staged": {} if found[0].degraded is not None else None,
        "min_accuracy": 0.0,
    }
    return GenerationSpec.model_validate(config)


def _candidate(index: int, record: _Found, spec: GenerationSpec, names: Mapping[str, str]) -> Candidates:
    """``names``: what each name in the records means. ``starts_with`` will do where there is one such pattern."""
    for name in (*record.patterns, *([record.target] if record.target is not None else [])):
        if name not in names:
            text = f"{name} is none of the patterns: {', '.join(sorted(set(names.values())))}"
            raise InvalidInput.field(f"{record.place}.metadata.selected_patterns", text)
    rate = (record.metadata.get("model_config") or {}).get("learning_rate")
    own, every = {names[name] for name in record.patterns}, list(dict.fromkeys(names.values()))
    target = names[record.target if record.target is not None else record.patterns[0]]
    activation = activations_of(spec).index(record.shape.activation)  # type: ignore[arg-type]
    return Candidates(
        indices=torch.tensor([index]),
        selected=torch.tensor([[name in own for name in every]]),
        target=torch.tensor([every.index(target)]),
        other=torch.tensor([0]),
        layers=torch.tensor([len(record.shape.hidden)]),
        neurons=torch.tensor([record.shape.hidden[0]]),
        activation=torch.tensor([activation]),
        learning_rate=torch.tensor([float(rate) if isinstance(rate, int | float) else float("nan")]),
        dropout=torch.tensor([record.dropout]),
    )


def _trained(own: Candidates, shape: Architecture, params: Params) -> Trained:
    return Trained(own, shape, params, torch.zeros(1, dtype=torch.int64), torch.full((1,), float("nan")))
