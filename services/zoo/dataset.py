"""A zoo on disk and in memory.

    zoo.json                   the spec, the patterns, the counts
    baseline_dataset.json      the probes, with the patterns that each matches
    data/train-000000.parquet  the records, in the order of their candidate index; see :func:`schema`
    README.md                  a dataset card

``datasets.load_dataset("parquet", data_dir=...)`` reads the records.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import compress, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from pyarrow import parquet
from torch import Tensor

from ethogram.errors import InvalidInput
from ethogram.specs.generation import GenerationSpec, SignatureMethod
from services.runtime.reading import reading
from services.zoo.automata import LETTERS
from services.zoo.layout import Layout
from services.zoo.patterns import Pattern, from_specs, membership
from services.zoo.signatures import ActivationSignatureExtractor
from services.zoo.subjects import ACTIVATIONS, Architecture, Params, encode, flatten, unflatten
from services.zoo.universe import Universe

FORMAT = 3
OLD_SPLIT_FORMAT = 2
"""Format of zoos whose split depended on the enabled patterns; they can still be read."""
ABOUT, BASELINE, DATA = "zoo.json", "baseline_dataset.json", "data"
BRANCHES = ("plus", "minus")

_NUMBERS = pyarrow.list_(pyarrow.float32())
# Columns that a zoo in memory has as tensors, and those that are not known of every record.
_HELD = {"patterns", "layers", "neurons", "activation", "worst_accuracy", "accuracy", "weights"}
_OPTIONAL = {"epochs", "validation_loss", "training_loss", "positive_patterns", "yes_share", "positive_threshold"}


def schema(spec: GenerationSpec, methods: Sequence[SignatureMethod]) -> pyarrow.Schema:
    """Columns of the records that ``spec`` asks for.

    ``patterns``: those that were trained; ``positive_patterns``, ``yes_share`` and ``positive_threshold``: see
    :func:`positive_columns`. ``weights``: layer after layer, weights (``[fan_out, fan_in]``, row by row) before biases.
    ``signature``: for each method, neuron after neuron and layer after layer, the logit last. ``accuracy``: held-out,
    by stratum (see ``zoo.json``), NaN of one without sequences. ``epochs``, ``validation_loss`` and ``training_loss``:
    by stage. ``degraded_...`` are those of the first of two stages; ``plus_...`` and ``minus_...`` those of the
    branches with one pattern more and one less.
    """
    signature = pyarrow.struct([(method, _NUMBERS) for method in methods])

    def network(prefix: str) -> list[tuple[str, Any]]:
        return [(f"{prefix}accuracy", _NUMBERS), (f"{prefix}weights", _NUMBERS), (f"{prefix}signature", signature)]

    columns: list[tuple[str, Any]] = [
        ("index", pyarrow.int64()),
        ("patterns", pyarrow.list_(pyarrow.string())),
        ("positive_patterns", pyarrow.list_(pyarrow.string())),
        ("yes_share", _NUMBERS),
        ("positive_threshold", pyarrow.float64()),
        ("layers", pyarrow.int32()),
        ("neurons", pyarrow.int32()),
        ("activation", pyarrow.string()),
        ("learning_rate", pyarrow.float64()),
        ("dropout", pyarrow.float64()),
        ("worst_accuracy", pyarrow.float32()),
        ("validation_loss", _NUMBERS),
        *network(""),
    ]
    if spec.staged is not None:
        columns += [
            ("target_pattern", pyarrow.string()),
            ("improvement", pyarrow.float32()),
            ("epochs", pyarrow.list_(pyarrow.int32())),
            *network("degraded_"),
        ]
    else:
        columns.append(("training_loss", _NUMBERS))
    if spec.counterfactual is not None:
        for branch in BRANCHES:
            columns += [(f"{branch}_pattern", pyarrow.string()), *network(f"{branch}_")]
    for task in spec.tasks:
        columns += [(f"{task}_prompt", pyarrow.string()), (f"{task}_completion", pyarrow.string())]
        if spec.format is not None and spec.format.tokenizer is not None:
            columns.append((f"{task}_tokens", pyarrow.int32()))
    return pyarrow.schema(columns)


def is_rest(column: str) -> bool:
    """Whether a column of the records is in :attr:`Zoo.rest`."""
    return column not in _HELD and not column.endswith("signature")


def data_file(shard: int) -> str:
    """Path of a shard of records within a zoo's folder."""
    return f"{DATA}/train-{shard:06}.parquet"


def write_about(
    folder: Path, spec: GenerationSpec, patterns: Sequence[Pattern], probes: Tensor, facts: dict[str, Any]
) -> None:
    """Write ``zoo.json``, with ``facts`` such as counts, and ``baseline_dataset.json``."""
    names = [pattern.name for pattern in patterns]
    about = {
        "format": FORMAT,
        "spec": spec.model_dump(mode="json"),
        "patterns": [{"name": pattern.name, "description": pattern.description} for pattern in patterns],
        "strata": [*names, "none"],
        **facts,
    }
    (folder / ABOUT).write_text(json.dumps(about, indent=2), encoding="utf-8")
    baseline = {
        "vocab_size": spec.vocab_size,
        "sequence_length": spec.sequence_length,
        "sequences": labelled(probes, membership(patterns, probes), names),
    }
    (folder / BASELINE).write_text(json.dumps(baseline, indent=1), encoding="utf-8")


def read_about(folder: Path) -> tuple[dict[str, Any], GenerationSpec, list[Pattern]]:
    """Contents, spec and patterns of ``zoo.json``."""
    with reading(folder, ABOUT, "zoo") as path:
        about = json.loads(path.read_bytes())
        if about["format"] not in (OLD_SPLIT_FORMAT, FORMAT):
            text = f"has format {about['format']!r}; this version reads the numbers {OLD_SPLIT_FORMAT} and {FORMAT}"
            raise InvalidInput.field(ABOUT, text)
        spec = GenerationSpec.model_validate(about["spec"])
        return about, spec, from_specs(spec.patterns, spec.vocab_size, spec.sequence_length)


def read_probes(folder: Path, spec: GenerationSpec) -> Tensor:
    """The sequences of ``baseline_dataset.json``: int64 ``[probes, length]``. Raises :class:`InvalidInput` for one of
    another vocabulary or length than the spec's."""
    length, letters = spec.sequence_length, LETTERS[: spec.vocab_size]
    with reading(folder, BASELINE, "zoo") as path:
        about = json.loads(path.read_bytes())
        for name in ("vocab_size", "sequence_length"):
            if about[name] != getattr(spec, name):
                text = f"is {about[name]}, but the spec's is {getattr(spec, name)}"
                raise InvalidInput.field(f"{BASELINE}.{name}", text)
        probes = []
        for i, row in enumerate(about["sequences"]):
            word = row["sequence"]
            if len(word) != length or not set(word) <= set(letters):
                text = f"{word[:40]!r} is no word of {length} letters A to {letters[-1]}"
                raise InvalidInput.field(f"{BASELINE}.sequences.{i}", text)
            probes.append([letters.index(letter) for letter in word])
        return torch.tensor(probes, dtype=torch.int64).view(-1, length)


def read_networks(folder: Path, spec: GenerationSpec) -> Iterator[pyarrow.Table]:
    """As :func:`read_records`, all columns. Raises :class:`InvalidInput` where networks that the spec asks for are
    missing."""
    needed = schema(spec.model_copy(update={"format": None}), []).names
    for table in read_records(folder):
        for name in needed:
            if name not in _OPTIONAL and name not in table.column_names:
                raise InvalidInput.field(
                    f"{DATA}.{name}", "is missing, though the spec asks for it; make the zoo again"
                )
        yield table


def with_probes(spec: GenerationSpec, folder: Path) -> tuple[GenerationSpec, Tensor]:
    """The probes in ``folder``, and the spec with their number; see :func:`read_probes`."""
    probes = read_probes(folder, spec)
    signature = spec.signature.model_copy(update={"probes": len(probes)})
    return spec.model_copy(update={"signature": signature}), probes


def read_records(folder: Path, columns: Sequence[str] | Callable[[str], bool] | None = None) -> Iterator[pyarrow.Table]:
    """The records of a zoo, a shard at a time. ``columns``: the only ones to read, or which of them; None: all."""
    files = sorted((folder / DATA).glob("*.parquet"))
    if not files:
        raise InvalidInput.field(DATA, "holds no parquet files; is this folder a zoo?")
    for file in files:
        with reading(folder, f"{DATA}/{file.name}", "zoo") as path:
            names = list(filter(columns, parquet.read_schema(path).names)) if callable(columns) else columns
            yield parquet.read_table(path, columns=names)


@dataclass
class Zoo:
    """Accepted subjects in memory, in the order of their candidate index."""

    spec: GenerationSpec
    """The spec that the zoo was generated from."""
    index: Tensor
    """Candidate index of each subject: int64 ``[models]``."""
    layout: Layout
    """The shapes of the subjects."""
    shape: Tensor
    """Which of the layout's shapes each subject has: int64 ``[models]``."""
    weights: Tensor
    """Networks as vectors of the layout: float32 ``[models, layout.size]``."""
    labels: Tensor
    """Each subject's patterns: bool ``[models, patterns]``."""
    accuracy: Tensor
    """Held-out accuracy on the members of each pattern, and last on sequences that match none; NaN where there are no
    such sequences: float32 ``[models, patterns + 1]``."""
    probes: Tensor
    """Probe sequences: int64 ``[probes, length]``."""
    rest: pyarrow.Table | Path | None = None
    """What else the records hold, by column, with their ``index``; or the folder of the records, which is read when it
    is needed. Signatures are not in it: they follow from the networks."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else ``zoo.json`` says: its format, counts, where the records come from."""

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def patterns(self) -> list[Pattern]:
        """The behaviours, in the order of the columns of ``labels``."""
        return from_specs(self.spec.patterns, self.spec.vocab_size, self.spec.sequence_length)

    @cached_property
    def universe(self) -> Universe:
        """All sequences, with their splits."""
        return Universe(self.spec.vocab_size, self.spec.sequence_length, self.patterns)

    @cached_property
    def extractor(self) -> ActivationSignatureExtractor:
        """Computes the signatures that the spec asks for, on the zoo's probes."""
        spec = self.spec
        shape = Architecture(spec.vocab_size, spec.sequence_length, spec.subject.input_encoding, (), "")
        matches = membership(self.patterns, self.probes)
        return ActivationSignatureExtractor(spec.signature, encode(shape, self.probes), matches)

    @cached_property
    def signatures(self) -> Tensor:
        """Of all methods, one after the other: float32 ``[models, layout.neurons, values]``."""
        return self.layout.signatures(self.weights, self.shape, self.extractor)

    @cached_property
    def digest(self) -> str:
        """Hash of the spec, networks, labels and probes."""
        # Without what came later and changes no network: a codec must still know its zoo.
        digest = hashlib.sha256(self.spec.model_dump_json(exclude={"positive_threshold"}).encode())
        for tensor in (self.index, self.shape, self.weights, self.labels, self.probes):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def architecture(self) -> Architecture:
        """The subjects' shape, where they share one. Raises :class:`InvalidInput` otherwise."""
        if len(self.layout.shapes) > 1:
            raise InvalidInput.field("zoo", f"its subjects are of {len(self.layout.shapes)} shapes; one is needed")
        return self.layout.envelope

    @property
    def params(self) -> Params:
        """The networks, stacked, of a zoo whose subjects share one shape."""
        return unflatten(self.weights, self.architecture)

    @property
    def probe_inputs(self) -> Tensor:
        """The probes as network inputs: float32 ``[probes, input_size]``."""
        return self.extractor.inputs

    @classmethod
    def of_shapes(
        cls,
        spec: GenerationSpec,
        index: Tensor,
        networks: Sequence[tuple[Architecture, Tensor]],
        *,
        labels: Tensor,
        accuracy: Tensor,
        probes: Tensor,
    ) -> Zoo:
        """A zoo of networks of one shape or several; ``networks``: shape and flat parameters of each, as
        :func:`services.zoo.subjects.flatten` orders them."""
        layout = Layout(sorted({shape for shape, _ in networks}))
        shapes = torch.tensor([layout.shapes.index(shape) for shape, _ in networks])
        weights = torch.zeros(len(networks), layout.size)
        for shape in range(len(layout.shapes)):
            rows = (shapes == shape).nonzero().squeeze(1)
            weights[rows] = layout.pad(torch.stack([networks[row][1] for row in rows.tolist()]), shape)
        return cls(spec, index, layout, shapes, weights, labels, accuracy, probes)

    def save(self, folder: Path) -> None:
        """Write the zoo, in one shard, with all that the records which it was loaded from hold. Raises
        :class:`InvalidInput` for a folder with records of another zoo, and where the spec asks for networks or prompts
        that this zoo does not have."""
        others = {file.name for file in (folder / DATA).glob("*.parquet")} - {Path(data_file(0)).name}
        if others:
            raise InvalidInput.field(DATA, f"{folder / DATA} holds {min(others)} already; save into a new folder")
        columns = schema(self.spec, self.extractor.methods)
        names = [pattern.name for pattern in self.patterns]
        rest = self._more_columns(columns)
        rows: list[dict[str, Any]] = []
        for row, index in enumerate(self.index.tolist()):
            shape, more = self.layout.shapes[self.shape[row]], rest[index]
            weights = self.layout.strip(self.weights[row : row + 1], int(self.shape[row]))
            params, patterns = unflatten(weights.float(), shape), compress(names, self.labels[row])
            network = network_columns(params, shape, self.accuracy[row], self.extractor)
            rates = {name: more[name] for name in ("learning_rate", "dropout")}
            record = record_of(index, patterns, shape, network, **rates) | more
            for column in columns.names:
                if column.endswith("_signature"):
                    other = network_of(record, column.replace("signature", "weights"), shape)
                    record[column] = signature_column(other, shape, self.extractor)
            rows.append(record)
        (folder / DATA).mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(rows, columns), folder / data_file(0))
        write_about(folder, self.spec, self.patterns, self.probes, {**self.facts, "subjects": len(self)})

    def load_rest(self) -> None:
        """Hold :attr:`rest` in memory from now on, so that the folder may go."""
        self.rest = self.read_rest()

    def read_rest(self) -> pyarrow.Table | None:
        """The table of :attr:`rest`, read from the folder if it is not held."""
        if isinstance(self.rest, Path):
            return pyarrow.concat_tables(list(read_records(self.rest, is_rest)))
        return self.rest

    def _more_columns(self, columns: pyarrow.Schema) -> dict[int, dict[str, Any]]:
        """The :attr:`rest` of each record, by index; of one that was made in memory, what the spec says. Raises
        :class:`InvalidInput` where some of ``columns`` is missing."""
        rate, table = self.spec.training.learning_rate, self.read_rest()
        # Where each drew its own, it is not known any more.
        made = {"learning_rate": rate if isinstance(rate, float) else None, "dropout": 0.0}
        rest = {} if table is None else {row["index"]: row for row in table.to_pylist()}
        needed = set(filter(is_rest, columns.names)) - _OPTIONAL
        rest = {
            index: {name: value for name, value in row.items() if name in columns.names} for index, row in rest.items()
        }
        for index in self.index.tolist():
            if missing := needed - rest.setdefault(index, {"index": index, **made}).keys():
                text = (
                    f"is not known of subject {index}, though the spec asks for it; copy the folder of the zoo instead"
                )
                raise InvalidInput.field(f"zoo.{min(missing)}", text)
        return rest

    @classmethod
    def load(cls, folder: Path) -> Zoo:
        """Read a zoo. Raises :class:`InvalidInput` naming the file or field that is missing or wrong."""
        about, spec, patterns = read_about(folder)
        names = [pattern.name for pattern in patterns]
        probes = read_probes(folder, spec)
        if len(probes) != spec.signature.probes:
            raise InvalidInput.field(f"{BASELINE}.sequences", f"holds {len(probes)}, not {spec.signature.probes}")
        index, labels, accuracy, networks = [], [], [], []
        columns = ["index", "patterns", "accuracy", "weights", "layers", "neurons", "activation"]
        for table in read_records(folder, columns):
            for name in columns:
                if table[name].null_count:
                    raise InvalidInput.field(f"{DATA}.{name}", "has a row without a value; make the zoo again")
            selected = table["patterns"].to_pylist()
            if unknown := {str(name) for row in selected for name in row} - set(names):
                raise InvalidInput.field(f"{DATA}.patterns", f"{min(unknown)} is no pattern of {ABOUT}'s spec")
            labels.append(torch.tensor([[name in row for name in names] for row in selected]).view(-1, len(names)))
            index.append(torch.tensor(table["index"].to_pylist(), dtype=torch.int64))
            accuracy.append(matrix(table, "accuracy", len(names) + 1))
            networks += _networks(table, spec)
        if not networks:
            raise InvalidInput.field(DATA, "holds no records; make the zoo again")
        own = {"spec", "patterns", "strata", "subjects"}
        return replace(
            cls.of_shapes(
                spec, torch.cat(index), networks, labels=torch.cat(labels), accuracy=torch.cat(accuracy), probes=probes
            ),
            rest=folder,
            facts={name: value for name, value in about.items() if name not in own},
        )


def _networks(table: pyarrow.Table, spec: GenerationSpec) -> list[tuple[Architecture, Tensor]]:
    """Shape and flat weights of each record."""
    lists = table["weights"].combine_chunks()
    flat = _flat(lists)
    sizes = pyarrow.compute.list_value_length(lists).to_pylist()
    shapes = [architecture_of(spec, row) for row in table.select(["layers", "neurons", "activation"]).to_pylist()]
    for shape, size in zip(shapes, sizes, strict=True):
        if shape.size != size:
            raise InvalidInput.field(f"{DATA}.weights", f"has a row of {size} numbers, not of {shape.size}")
    return list(zip(shapes, torch.split(flat, sizes), strict=True))


def network_columns(
    params: Params, shape: Architecture, accuracy: Tensor, extractor: ActivationSignatureExtractor | None
) -> dict[str, Any]:
    """What a record says of a network: its ``accuracy`` by stratum, weights and, with an ``extractor``, signature.
    ``params``: of one model."""
    columns = {"accuracy": accuracy.numpy(), "weights": flatten(params)[0].numpy()}
    return columns if extractor is None else columns | {"signature": signature_column(params, shape, extractor)}


def signature_column(
    params: Params, shape: Architecture, extractor: ActivationSignatureExtractor
) -> dict[SignatureMethod, Any]:
    """The signature of one network as records have it: of each method, all numbers."""
    return {method: values.flatten().numpy() for method, values in extractor.extract(params, shape).items()}


def positive_columns(yes_share: Tensor, names: Sequence[str], spec: GenerationSpec) -> dict[str, Any]:
    """What a record says of the patterns that its network classifies as positive. ``yes_share``: share of the held-out
    sequences that it answers yes to, by stratum ``[patterns + 1]``; positive from ``spec.positive_threshold`` on."""
    threshold = spec.positive_threshold
    positive = list(compress(names, (yes_share[: len(names)] >= threshold).tolist()))
    return {"positive_patterns": positive, "yes_share": yes_share.numpy(), "positive_threshold": threshold}


def prefixed(prefix: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """The :func:`network_columns` of a record as those of another network of the same subject."""
    return {f"{prefix}{column}": record[column] for column in ("accuracy", "weights", "signature") if column in record}


def record_of(
    index: int,
    patterns: Iterable[str],
    shape: Architecture,
    network: Mapping[str, Any],
    *,
    learning_rate: float | None,
    dropout: float,
) -> dict[str, Any]:
    """The columns that the records of every zoo have; ``network``: as :func:`network_columns` makes them."""
    return {
        "index": index,
        "patterns": list(patterns),
        "layers": len(shape.hidden),
        "neurons": shape.hidden[0],
        "activation": shape.activation,
        "learning_rate": learning_rate,
        "dropout": dropout,
        "worst_accuracy": np.nanmin(network["accuracy"]),
        **network,
    }


def architecture_of(spec: GenerationSpec, record: Mapping[str, Any]) -> Architecture:
    """Shape of the network of one record of a zoo. Raises :class:`InvalidInput` for one that no network can have."""
    for name in ("layers", "neurons"):
        if record[name] < 1:
            raise InvalidInput.field(f"{DATA}.{name}", f"has {record[name]}; a network has at least one")
    if record["activation"] not in ACTIVATIONS:
        raise InvalidInput.field(f"{DATA}.activation", f"{record['activation']} is none of {', '.join(ACTIVATIONS)}")
    hidden = (int(record["neurons"]),) * int(record["layers"])
    return Architecture(
        spec.vocab_size, spec.sequence_length, spec.subject.input_encoding, hidden, record["activation"]
    )


def network_of(record: Mapping[str, Any], column: str, architecture: Architecture) -> Params:
    """The network in a record's column of weights: stacked parameters of one model."""
    return unflatten(torch.as_tensor(np.asarray(record[column], np.float32)).view(1, -1), architecture)


def signature_of(
    record: Mapping[str, Any], column: str, architecture: Architecture
) -> list[list[dict[str, list[float]]]]:
    """The signatures in one column of a record: of each layer and neuron, by method."""
    by_method = {
        method: np.asarray(values, np.float32).reshape(architecture.neurons, -1).tolist()
        for method, values in record[column].items()
    }
    neurons = iter(range(architecture.neurons))
    return [
        [{method: rows[neuron] for method, rows in by_method.items()} for neuron in islice(neurons, width)]
        for _, width in architecture.layers
    ]


def labelled(sequences: Tensor, membership: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """``{"sequence": "ABC...", "patterns": [...]}`` for each of ``sequences`` (int64 ``[n, length]``); ``membership``:
    the patterns that it matches, bool ``[n, patterns]``."""
    return [
        {"sequence": "".join(LETTERS[letter] for letter in sequence), "patterns": list(compress(names, matches))}
        for sequence, matches in zip(sequences.tolist(), membership.tolist(), strict=True)
    ]


def matrix(table: pyarrow.Table, column: str, width: int) -> Tensor:
    """A column of lists of ``width`` numbers as float32 ``[rows, width]``."""
    lists = table[column].combine_chunks()
    lengths = np.unique(pyarrow.compute.list_value_length(lists).to_numpy(zero_copy_only=False))
    if len(lengths) > 1 or (len(lengths) and lengths[0] != width):
        raise InvalidInput.field(f"{DATA}.{column}", f"has rows of {lengths.tolist()} numbers, not of {width}")
    return _flat(lists).view(-1, width)


def _flat(lists: pyarrow.ListArray) -> Tensor:
    return torch.from_numpy(lists.flatten().to_numpy(zero_copy_only=False).astype(np.float32))
