"""A zoo's form on disk, and the one in memory for zoos whose networks are all of one shape.

    zoo.json                   the spec, the patterns, the counts
    baseline_dataset.json      the probes, with the patterns that each matches
    data/train-000000.parquet  the records, in the order of their candidate index; see :func:`schema`
    README.md                  a dataset card

``datasets.load_dataset("parquet", data_dir=...)`` reads the records.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from pyarrow import parquet
from torch import Tensor

from ethogram.errors import InvalidInput
from ethogram.specs.generation import GenerationSpec, SignatureMethod
from services.zoo.patterns import Pattern, from_specs
from services.zoo.reading import reading
from services.zoo.sequences import from_letters, to_letters
from services.zoo.signatures import raw
from services.zoo.subjects import Architecture, Params, encode, flatten, unflatten
from services.zoo.universe import Universe

FORMAT = 2
ABOUT, BASELINE, DATA = "zoo.json", "baseline_dataset.json", "data"
BRANCHES = ("plus", "minus")

_NUMBERS = pyarrow.list_(pyarrow.float32())


def schema(spec: GenerationSpec, methods: Sequence[SignatureMethod]) -> pyarrow.Schema:
    """Columns of the records that ``spec`` asks for.

    ``weights``: layer after layer, weights (``[fan_out, fan_in]``, row by row) before biases. ``signature``: for each
    method, neuron after neuron and layer after layer, the logit last. ``accuracy``: held-out, by stratum (see
    ``zoo.json``). ``epochs`` and ``validation_loss``: by stage. ``degraded_...`` are those of the first of two stages;
    ``plus_...`` and ``minus_...`` those of the branches with one pattern more and one less.
    """
    signature = pyarrow.struct([(method, _NUMBERS) for method in methods])

    def network(prefix: str) -> list[tuple[str, Any]]:
        return [(f"{prefix}accuracy", _NUMBERS), (f"{prefix}weights", _NUMBERS), (f"{prefix}signature", signature)]

    columns: list[tuple[str, Any]] = [
        ("index", pyarrow.int64()),
        ("patterns", pyarrow.list_(pyarrow.string())),
        ("layers", pyarrow.int32()),
        ("neurons", pyarrow.int32()),
        ("activation", pyarrow.string()),
        ("learning_rate", pyarrow.float64()),
        ("dropout", pyarrow.float64()),
        ("worst_accuracy", pyarrow.float32()),
        *network(""),
    ]
    if spec.staged is not None:
        columns += [
            ("target_pattern", pyarrow.string()),
            ("improvement", pyarrow.float32()),
            ("epochs", pyarrow.list_(pyarrow.int32())),
            ("validation_loss", _NUMBERS),
            *network("degraded_"),
        ]
    if spec.counterfactual is not None:
        for branch in BRANCHES:
            columns += [(f"{branch}_pattern", pyarrow.string()), *network(f"{branch}_")]
    for task in spec.tasks:
        columns += [(f"{task}_prompt", pyarrow.string()), (f"{task}_completion", pyarrow.string())]
        if spec.format is not None and spec.format.tokenizer is not None:
            columns.append((f"{task}_tokens", pyarrow.int32()))
    return pyarrow.schema(columns)


def data_file(shard: int) -> str:
    """Path of a shard of records within a zoo's folder."""
    return f"{DATA}/train-{shard:06}.parquet"


def write_about(
    folder: Path, spec: GenerationSpec, patterns: Sequence[Pattern], probes: Tensor, facts: dict[str, Any]
) -> None:
    """Write ``zoo.json`` and ``baseline_dataset.json``. ``facts``: counts and the like."""
    names = [pattern.name for pattern in patterns]
    about = {
        "format": FORMAT,
        "spec": spec.model_dump(mode="json"),
        "patterns": [{"name": pattern.name, "description": pattern.description} for pattern in patterns],
        "strata": [*names, "none"],
        **facts,
    }
    (folder / ABOUT).write_text(json.dumps(about, indent=2))
    matches = Universe(spec.vocab_size, spec.sequence_length, patterns).matches(probes)
    baseline = {
        "vocab_size": spec.vocab_size,
        "sequence_length": spec.sequence_length,
        "sequences": labelled(probes, matches, names),
    }
    (folder / BASELINE).write_text(json.dumps(baseline, indent=1))


def read_about(folder: Path) -> tuple[dict[str, Any], GenerationSpec, list[Pattern]]:
    """What ``zoo.json`` says."""
    with reading(folder, ABOUT, "zoo") as path:
        about = json.loads(path.read_text())
        if about["format"] != FORMAT:
            raise InvalidInput.field(ABOUT, f"has format {about['format']}; this version reads {FORMAT}")
        spec = GenerationSpec.model_validate(about["spec"])
        return about, spec, from_specs(spec.patterns, spec.vocab_size, spec.sequence_length)


def read_probes(folder: Path, spec: GenerationSpec, file: str = BASELINE) -> Tensor:
    """The sequences of a baseline file: int64 ``[probes, length]``. Raises :class:`InvalidInput` for one of another
    vocabulary or length than the spec's."""
    with reading(folder, file, "zoo") as path:
        about = json.loads(path.read_text())
        for name in ("vocab_size", "sequence_length"):
            if about[name] != (wanted := getattr(spec, name)):
                raise InvalidInput.field(f"{file}.{name}", f"is {about[name]}, but the spec's is {wanted}")
        words = [row["sequence"] for row in about["sequences"]]
        return from_letters(words, spec.vocab_size, spec.sequence_length, f"{file}.sequences")


def read_records(folder: Path, columns: Sequence[str] | None = None) -> Iterator[pyarrow.Table]:
    """The records of a zoo, a shard at a time."""
    files = sorted((folder / DATA).glob("*.parquet"))
    if not files:
        raise InvalidInput.field(DATA, "holds no parquet files; is this folder a zoo?")
    for file in files:
        with reading(folder, f"{DATA}/{file.name}", "zoo") as path:
            yield parquet.read_table(path, columns=columns)


@dataclass
class Zoo:
    """Accepted subjects of one shape, in the order of their candidate index."""

    spec: GenerationSpec
    """What was asked for."""
    index: Tensor
    """Candidate index of each subject: int64 ``[models]``."""
    params: Params
    """Weights, stacked (see :mod:`services.zoo.subjects`)."""
    labels: Tensor
    """Each subject's own patterns: bool ``[models, patterns]``."""
    accuracy: Tensor
    """Held-out accuracy on the members of each pattern, and last on sequences that match none: float32
    ``[models, patterns + 1]``."""
    probes: Tensor
    """Probe sequences: int64 ``[probes, length]``."""
    signatures: Tensor
    """Raw signatures: float32 ``[models, probes, neurons]`` (pre-activations of all layers, the logit last)."""

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def patterns(self) -> list[Pattern]:
        """The behaviours, in the order of the columns of ``labels``."""
        return from_specs(self.spec.patterns, self.spec.vocab_size, self.spec.sequence_length)

    @cached_property
    def architecture(self) -> Architecture:
        """Shape of the subjects."""
        return Architecture.of(self.spec)

    @cached_property
    def universe(self) -> Universe:
        """All sequences, with their splits."""
        return Universe(self.spec.vocab_size, self.spec.sequence_length, self.patterns)

    @property
    def probe_inputs(self) -> Tensor:
        """The probes as network inputs: float32 ``[probes, input_size]``."""
        return encode(self.architecture, self.probes)

    def save(self, folder: Path) -> None:
        """Write the zoo, in one shard and with raw signatures."""
        (folder / DATA).mkdir(parents=True, exist_ok=True)
        names = [pattern.name for pattern in self.patterns]
        architecture = self.architecture
        weights, signatures = flatten(self.params).numpy(), self.signatures.transpose(1, 2).flatten(1).numpy()
        rows = [
            {
                "index": index,
                "patterns": [name for name, on in zip(names, labels, strict=True) if on],
                "layers": len(architecture.hidden),
                "neurons": architecture.hidden[0],
                "activation": architecture.activation,
                "learning_rate": self.spec.training.learning_rate,
                "dropout": 0.0,
                "accuracy": accuracy,
                "worst_accuracy": accuracy.min(),
                "weights": own,
                "signature": {"raw": signature},
            }
            for index, labels, accuracy, own, signature in zip(
                self.index.tolist(), self.labels.tolist(), self.accuracy.numpy(), weights, signatures, strict=True
            )
        ]
        parquet.write_table(pyarrow.Table.from_pylist(rows, schema(GenerationSpec(), ["raw"])), folder / data_file(0))
        write_about(folder, self.spec, self.patterns, self.probes, {"subjects": len(self)})

    @classmethod
    def load(cls, folder: Path) -> Zoo:
        """Read a zoo whose networks are all of one shape. Raises :class:`InvalidInput` naming the file or field that is
        missing or wrong."""
        _, spec, patterns = read_about(folder)
        architecture, names = Architecture.of(spec), [pattern.name for pattern in patterns]
        probes = read_probes(folder, spec)
        if len(probes) != spec.signature.probes:
            raise InvalidInput.field(f"{BASELINE}.sequences", f"holds {len(probes)}, not {spec.signature.probes}")
        parts: list[tuple[Tensor, ...]] = []
        for table in read_records(folder, ["index", "patterns", "accuracy", "weights"]):
            found = table["patterns"].to_pylist()
            if unknown := {name for row in found for name in row} - set(names):
                raise InvalidInput.field(f"{DATA}.patterns", f"{min(unknown)} is no pattern of {ABOUT}'s spec")
            labels = torch.tensor([[name in row for name in names] for row in found]).view(len(table), len(names))
            index = torch.tensor(table["index"].to_pylist(), dtype=torch.int64)
            accuracy = matrix(table, "accuracy", len(names) + 1)
            parts.append((index, labels, accuracy, matrix(table, "weights", architecture.size)))
        index, labels, accuracy, weights = (torch.cat(column) for column in zip(*parts, strict=True))
        params = {name: tensor.contiguous() for name, tensor in unflatten(weights, architecture).items()}
        signatures = raw(params, encode(architecture, probes), architecture.activation)
        return cls(spec, index, params, labels, accuracy, probes, signatures)


def architecture_of(spec: GenerationSpec, record: Mapping[str, Any]) -> Architecture:
    """Shape of the network of one record of a zoo."""
    hidden = (int(record["neurons"]),) * int(record["layers"])
    return Architecture(
        spec.vocab_size, spec.sequence_length, spec.subject.input_encoding, hidden, record["activation"]
    )


def network_of(record: Mapping[str, Any], column: str, architecture: Architecture) -> Params:
    """The network in one column of weights of a record: stacked parameters of one model."""
    return unflatten(torch.as_tensor(np.asarray(record[column], np.float32)).view(1, -1), architecture)


def labelled(sequences: Tensor, membership: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """``{"sequence": "ABC...", "patterns": [...]}`` for each of ``sequences`` (int64 ``[n, length]``); ``membership``:
    the patterns that it matches, bool ``[n, patterns]``."""
    return [
        {"sequence": word, "patterns": [name for name, on in zip(names, row, strict=True) if on]}
        for word, row in zip(to_letters(sequences), membership.tolist(), strict=True)
    ]


def matrix(table: pyarrow.Table, column: str, width: int) -> Tensor:
    """A column of lists of ``width`` numbers as float32 ``[rows, width]``."""
    lists = table[column].combine_chunks()
    lengths = np.unique(pyarrow.compute.list_value_length(lists).to_numpy(zero_copy_only=False))
    if len(lengths) > 1 or (len(lengths) and lengths[0] != width):
        raise InvalidInput.field(f"{DATA}.{column}", f"has rows of {lengths.tolist()} numbers, not of {width}")
    return torch.from_numpy(lists.flatten().to_numpy(zero_copy_only=False).astype(np.float32)).view(-1, width)
