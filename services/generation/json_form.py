"""The form with JSON text in every column, which :mod:`services.zoo.json_records` describes: a zoo written in it, and
records of it made a zoo."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow import parquet

from ethogram.specs.generation import FormatSpec, GenerationSpec, PatternSpec
from services.generation.format import TrainingDataFormatter
from services.generation.pipeline import SHARD, DatasetGenerationPipeline
from services.generation.score import benchmark_of, with_positive
from services.runtime.run import Run
from services.zoo.dataset import (
    BASELINE,
    DATA,
    architecture_of,
    data_file,
    network_of,
    read_about,
    read_networks,
    signature_of,
)
from services.zoo.json_records import DEFINITIONS, JsonRecords
from services.zoo.meanings import PATTERNS
from services.zoo.patterns import Pattern
from services.zoo.source import row_of
from services.zoo.subjects import Architecture, Params


def export_json(zoo: Path, target: Path, run: Run | None = None) -> None:
    """Write the zoo in the folder ``zoo`` into the new folder ``target``, in this form. Prompts are the zoo's own, or
    those of ``FormatSpec()`` where it has none."""
    run = run or Run()
    about, spec, patterns = read_about(zoo)
    formatter = TrainingDataFormatter(spec.model_copy(update={"format": spec.format or FormatSpec()}), patterns)
    benchmark = cache(lambda: benchmark_of(spec, patterns))
    (target / DATA).mkdir(parents=True)
    run.stage("export", about["subjects"], "records")
    done = 0
    for number, table in enumerate(read_networks(zoo, spec)):
        rows = []
        for record in table.to_pylist():
            measured = with_positive(record, spec, patterns, benchmark)
            rows.append(_written(measured, spec, patterns, formatter))
            done += 1
            run.advance(done)
        parquet.write_table(pyarrow.Table.from_pylist(rows), target / data_file(number))
    (target / BASELINE).write_bytes((zoo / BASELINE).read_bytes())
    # Names alone would be read as earlier work meant them.
    definitions = {"patterns": [pattern.spec.model_dump() for pattern in patterns]}
    (target / PATTERNS).write_text(json.dumps(definitions, indent=1), encoding="utf-8")
    if spec.counterfactual is not None:
        run.log("this form has no place for counterfactual branches; they are left out", "warning")


def _written(
    record: Mapping[str, Any], spec: GenerationSpec, patterns: Sequence[Pattern], formatter: TrainingDataFormatter
) -> dict[str, Any]:
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
        DEFINITIONS: [pattern.spec.model_dump() for pattern in patterns],
        "positive_patterns": record["positive_patterns"],
        "positive_threshold": spec.positive_threshold,
        **_accuracies(record, [pattern.name for pattern in patterns]),
        "model_config": config,
        "corruption_stats": {"corruption_rate": spec.staged.corruption_rate} if spec.staged is not None else {},
        "precision": spec.subject.precision,
        "quantization": spec.subject.quantization,
        "tasks_included": ["modification", "classification"] if staged else ["classification"],
    }
    row: dict[str, Any] = {"example_id": record["index"], "metadata": json.dumps(metadata, allow_nan=False)}
    shape = architecture_of(spec, record)
    modification = formatter.modification(record) if staged else None
    for task, prompt in (("modification", modification), ("classification", formatter.classification(record))):
        row[f"{task}_prompt"] = prompt and prompt.prompt
        row[f"{task}_completion"] = prompt and prompt.completion
        row[f"{task}_text"] = prompt and prompt.text
    row["degraded_signature"] = row["degraded_model_weights"] = None
    prefixes = {"degraded": "degraded_", "improved": ""} if staged else {"improved": ""}
    for name, prefix in prefixes.items():
        row[f"{name}_signature"] = json.dumps(_signature(record, f"{prefix}signature", shape))
        params = network_of(record, f"{prefix}weights", shape)
        weights = {"config": config, "weights": _named(params, record["dropout"] > 0)}
        row[f"{name}_model_weights"] = json.dumps(weights)
    metrics: dict[str, dict[str, float]] = {}
    for metric in ("epochs", "validation_loss", "training_loss"):
        # Of an imported record they may be unknown.
        for stage, value in zip(prefixes, record.get(metric) or (), strict=False):
            metrics.setdefault(stage, {})[metric] = value
    row["training_metrics"] = json.dumps(metrics, allow_nan=False)
    return row


def _accuracies(record: Mapping[str, Any], names: Sequence[str]) -> dict[str, float | None]:
    """Held-out accuracies of both networks: means over all strata, and on the target pattern; None where there are no
    such sequences.

    The three that published records have are neither differences of each other nor named for what they are:
    ``degraded_accuracy`` and ``improved_accuracy`` are such means, ``improvement`` is on the target pattern. So each is
    there once more under a name that says it.
    """
    degraded, improved = (record.get(name) for name in ("degraded_accuracy", "accuracy"))
    means = [None if by_stratum is None else float(np.nanmean(by_stratum)) for by_stratum in (degraded, improved)]
    target = names.index(record["target_pattern"]) if record.get("target_pattern") is not None else None
    on_target = [None if target is None or row is None else float(row[target]) for row in (degraded, improved)]
    found: dict[str, float | None] = {
        "degraded_accuracy": means[0],
        "improved_accuracy": means[1],
        "improvement": record.get("improvement"),
    }
    for name, (before, after) in {"mean": means, "target": on_target}.items():
        gain = None if before is None or after is None else after - before
        found |= {f"degraded_{name}_accuracy": before, f"improved_{name}_accuracy": after, f"{name}_improvement": gain}
    return {name: None if value is None or math.isnan(value) else value for name, value in found.items()}


def _named(params: Params, dropout: bool) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for name, tensor in params.items():
        _, layer, part = name.split(".")
        # Shortest text of a float32, so that little is written and nothing is lost.
        numbers = np.array([float(str(number)) for number in tensor[0].flatten().numpy()])
        named[f"network.{(3 if dropout else 2) * int(layer)}.{part}"] = numbers.reshape(tensor.shape[1:]).tolist()
    return named


def _signature(record: Mapping[str, Any], column: str, shape: Architecture) -> dict[str, Any]:
    layers = {
        str(layer): {
            "neuron_profiles": {
                str(neuron): {method: row[0] if len(row) == 1 else row for method, row in values.items()}
                for neuron, values in enumerate(neurons)
            }
        }
        for layer, neurons in enumerate(signature_of(record, column, shape))
    }
    return {"neuron_activations": layers}


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

    ``patterns``: what the names in the records mean; None: what a ``patterns.json`` beside them or their metadata says,
    or else what earlier work meant by them (see :func:`services.zoo.meanings.undefined`). ``rename``: names in the
    records to names of ``patterns``. Raises :class:`InvalidInput` naming the file, row and column that is wrong, before
    anything is written.
    """
    run = run or Run()
    records = JsonRecords(source, patterns=patterns, rename=rename, run=run)
    pipeline = DatasetGenerationPipeline(records.spec, run.device, records.baseline)
    trainer = pipeline.bucket_trainer
    evaluation, extractor = trainer.sampler.evaluation, trainer.extractor
    run.stage("import", len(records), "records")

    def shards() -> Iterator[pyarrow.Table]:
        rows: list[dict[str, Any]] = []
        for done, (index, record) in enumerate(records, 1):
            rows.append(row_of(index, record, trainer.spec, trainer.names, evaluation, extractor=extractor))
            run.advance(done)
            if len(rows) == SHARD or done == len(records):
                yield trainer.table(rows)
                rows = []

    return pipeline.write(folder, shards(), {"imported": source.name}, run)
