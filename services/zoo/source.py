"""Open zoos in either form (ours, or records with JSON text), from a folder or the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from pydantic import ValidationError
from torch import Tensor

from ethogram.errors import InvalidInput
from ethogram.specs.base import HubSpec
from ethogram.specs.generation import GenerationSpec
from services.artifacts.hub import fetch
from services.runtime.run import Run
from services.zoo.dataset import (
    ABOUT,
    BASELINE,
    OLD_SPLIT_FORMAT,
    Zoo,
    is_rest,
    network_columns,
    positive_columns,
    prefixed,
    read_about,
    record_of,
    schema,
    with_probes,
)
from services.zoo.json_records import SUFFIXES, JsonRecords, Record, files_in
from services.zoo.meanings import PATTERNS
from services.zoo.pools import JUDGED, JUDGED_NONE, Evaluation, probes
from services.zoo.signatures import ActivationSignatureExtractor
from services.zoo.subjects import Params, encode, flatten
from services.zoo.universe import Universe


def locate(source: str, field: str) -> Path:
    """The file or folder ``source``; where there is none, the dataset ``owner/name`` of the Hugging Face Hub, in a
    folder of the Hub's cache. ``field``: where the source was named, for error messages.

    Raises :class:`InvalidInput` for what is neither or may not be read, and :class:`ethogram.errors.Unavailable`
    without a Hub.
    """
    path = Path(source)
    if path.exists():
        return path
    try:
        repo = HubSpec(repo="" if path.suffix in SUFFIXES else source).repo
    except ValidationError:
        text = f"{source} is no file or folder here, and no name of a dataset on the Hub, e.g. me/my-zoo"
        raise InvalidInput.field(field, text) from None
    include = [*(f"*{suffix}" for suffix in SUFFIXES), ABOUT, BASELINE, PATTERNS]
    # The name may be a misspelt folder.
    return fetch(repo, "dataset", include, field=field, described=f"{source}, which is no file or folder here")


def open_zoo(source: Path, run: Run | None = None) -> Zoo:
    """The zoo in ``source``: a folder in our own form, or records in the JSON-string form, a file or a folder of them
    (see :mod:`services.zoo.json_records`). Raises :class:`InvalidInput` naming what is missing or wrong."""
    run = run or Run()
    if (source / ABOUT).is_file():
        about, _, _ = read_about(source)
        if about["format"] == OLD_SPLIT_FORMAT and "imported" not in about:
            text = "an earlier version split sequences differently: a few that are held out now were trained on"
            run.log(f"{ABOUT}: {text}; make the zoo again for figures that hold", "warning")
        return Zoo.load(source)
    if not files_in(source):
        raise InvalidInput.field("zoo", f"{source} has neither {ABOUT} nor .parquet or .jsonl files")
    records = JsonRecords(source, run=run)
    # The rest is as an import to our own form has it: accuracies are measured, and missing probes drawn.
    spec = records.spec
    universe = Universe(spec.vocab_size, spec.sequence_length, records.patterns)
    universe.check()
    if records.baseline is not None:
        spec, chosen = with_probes(spec, records.baseline)
    else:
        chosen = probes(universe, spec.signature.probes, spec.seed)
    evaluation = Evaluation.build(universe, JUDGED, JUDGED_NONE, seed=spec.seed)
    run.stage("judge", len(records), "records")
    names, rows, networks = [pattern.name for pattern in records.patterns], list[dict[str, Any]](), []
    for done, (index, record) in enumerate(records, 1):
        rows.append(row_of(index, record, spec, names, evaluation))
        networks.append((record.shape, flatten(record.improved)[0]))
        run.advance(done)
    zoo = Zoo.of_shapes(
        spec,
        torch.tensor([row["index"] for row in rows]),
        networks,
        labels=torch.tensor([[name in row["patterns"] for name in names] for row in rows]),
        accuracy=torch.from_numpy(np.stack([row["accuracy"] for row in rows])),
        probes=chosen,
    )
    columns = schema(spec, [])
    rest = pyarrow.Table.from_pylist(rows, columns).select(list(filter(is_rest, columns.names)))
    return replace(zoo, rest=rest, facts={"candidates": len(rows), "rejected": {}, "imported": source.name})


def row_of(
    index: int,
    record: Record,
    spec: GenerationSpec,
    names: Sequence[str],
    evaluation: Evaluation,
    *,
    extractor: ActivationSignatureExtractor | None = None,
) -> dict[str, Any]:
    """A record of a zoo of ``spec`` in our own form, with accuracies on ``evaluation`` and, with an ``extractor``,
    signatures. ``names``: of the patterns."""
    shape, selected = record.shape, torch.tensor([[name in record.patterns for name in names]])
    inputs = encode(shape, evaluation.sequences)

    def predict(params: Params) -> Tensor:
        return evaluation.predictions(params, inputs, shape.activation)

    def network(params: Params, predictions: Tensor) -> dict[str, Any]:
        accuracy = evaluation.by_stratum(predictions == labels)[0]
        return network_columns(params, shape, accuracy, extractor)

    labels, predictions = evaluation.labels(selected), predict(record.improved)
    patterns, improved = compress(names, selected[0]), network(record.improved, predictions)
    rate, dropout = record.learning_rate, record.dropout
    row = record_of(index, patterns, shape, improved, learning_rate=rate, dropout=dropout)
    row |= {name: record.by_stage(name) for name in ("validation_loss", "training_loss")}
    row |= positive_columns(evaluation.by_stratum(predictions)[0], names, spec)
    if record.degraded is not None and record.target is not None:
        row |= prefixed("degraded_", network(record.degraded, predict(record.degraded)))
        target = names.index(record.target)
        row["target_pattern"], row["epochs"] = record.target, [int(count) for count in record.by_stage("epochs")]
        row["improvement"] = row["accuracy"][target] - row["degraded_accuracy"][target]
    return row
