"""A zoo: networks with known behaviours, and its form on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow
import torch
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from torch import Tensor

from ethogram.errors import InvalidInput
from ethogram.specs.generation import GenerationSpec
from services.zoo.patterns import Pattern, from_specs
from services.zoo.reading import reading
from services.zoo.subjects import Architecture, Params, encode
from services.zoo.universe import Universe

FORMAT = 1
ABOUT, RECORDS, WEIGHTS, SIGNATURES = "zoo.json", "records.parquet", "weights.safetensors", "signatures.safetensors"


@dataclass
class Zoo:
    """Accepted subjects, in the order of their candidate index."""

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
        """Write ``zoo.json``, ``weights.safetensors``, ``signatures.safetensors`` and ``records.parquet``.

        The table has one row per subject (candidate index, pattern names, accuracies);
        ``datasets.load_dataset("parquet", data_files=...)`` reads it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        names = [pattern.name for pattern in self.patterns]
        save_file({name: tensor.contiguous() for name, tensor in self.params.items()}, folder / WEIGHTS)
        save_file({"probes": self.probes, "raw": self.signatures.contiguous()}, folder / SIGNATURES)
        records = {
            "index": self.index.numpy(),
            "patterns": [[n for n, on in zip(names, row, strict=True) if on] for row in self.labels.tolist()],
            "accuracy": list(self.accuracy.numpy()),
            "worst_accuracy": self.accuracy.amin(1).numpy(),
        }
        # Written by Arrow itself: importing datasets takes seconds and adds nothing to a table of plain types.
        parquet.write_table(pyarrow.table(records), folder / RECORDS)
        about = {
            "format": FORMAT,
            "spec": self.spec.model_dump(mode="json"),
            "subjects": len(self),
            "patterns": [{"name": pattern.name, "description": pattern.description} for pattern in self.patterns],
            "strata": [*names, "none"],
        }
        (folder / ABOUT).write_text(json.dumps(about, indent=2))

    @classmethod
    def load(cls, folder: Path) -> Zoo:
        """Read what :meth:`save` wrote. Raises :class:`InvalidInput` naming the file that is missing or wrong."""
        with reading(folder, ABOUT, "zoo") as path:
            about = json.loads(path.read_text())
            if about["format"] != FORMAT:
                raise InvalidInput.field(ABOUT, f"has format {about['format']}; this version reads {FORMAT}")
            spec = GenerationSpec.model_validate(about["spec"])
            names = [pattern.name for pattern in from_specs(spec.patterns, spec.vocab_size, spec.sequence_length)]
        with reading(folder, RECORDS, "zoo") as path:
            records = parquet.read_table(path).to_pydict()
            labels = torch.tensor([[name in row for name in names] for row in records["patterns"]])
            if unknown := {name for row in records["patterns"] for name in row} - set(names):
                raise InvalidInput.field(f"{RECORDS}.patterns", f"{min(unknown)} is no pattern of {ABOUT}'s spec")
            index, accuracy = torch.tensor(records["index"]), torch.tensor(records["accuracy"])
            models, architecture = len(index), Architecture.of(spec)
            _expect(RECORDS, "accuracy", accuracy, (models, len(names) + 1))
        with reading(folder, WEIGHTS, "zoo") as path:
            weights = load_file(path)
            params = {name: weights[name].float() for name in architecture.shapes}
            for name, shape in architecture.shapes.items():
                _expect(WEIGHTS, name, params[name], (models, *shape))
        with reading(folder, SIGNATURES, "zoo") as path:
            stored = load_file(path)
            probes, signatures = stored["probes"].long(), stored["raw"].float()
            _expect(SIGNATURES, "probes", probes, (spec.signature.probes, spec.sequence_length))
            if not bool(((probes >= 0) & (probes < spec.vocab_size)).all()):
                raise InvalidInput.field(f"{SIGNATURES}.probes", f"holds letters outside of 0 to {spec.vocab_size - 1}")
            _expect(SIGNATURES, "raw", signatures, (models, len(probes), architecture.neurons))
        return cls(spec, index, params, labels, accuracy, probes, signatures)


def _expect(file: str, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise InvalidInput.field(f"{file}.{name}", f"has shape {list(tensor.shape)}, not {list(shape)}")
