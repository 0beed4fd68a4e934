"""A zoo: networks with known behaviours, and its form on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ethogram.errors import InvalidInput
from ethogram.specs.generation import GenerationSpec
from services.zoo.patterns import Pattern, from_specs
from services.zoo.subjects import Architecture, Params, encode
from services.zoo.universe import Universe

FORMAT = 1


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

        The parquet table has one row per subject (index, patterns, accuracy); ``datasets.load_dataset("parquet", ...)``
        reads it.
        """
        from datasets import Dataset

        folder.mkdir(parents=True, exist_ok=True)
        names = [pattern.name for pattern in self.patterns]
        save_file({name: tensor.contiguous() for name, tensor in self.params.items()}, folder / "weights.safetensors")
        save_file({"probes": self.probes, "raw": self.signatures.contiguous()}, folder / "signatures.safetensors")
        rows = {
            "index": self.index.tolist(),
            "patterns": [[n for n, on in zip(names, row, strict=True) if on] for row in self.labels.tolist()],
            "accuracy": self.accuracy.tolist(),
            "worst_accuracy": self.accuracy.amin(1).tolist(),
        }
        Dataset.from_dict(rows).to_parquet(str(folder / "records.parquet"))
        about = {
            "format": FORMAT,
            "spec": self.spec.model_dump(mode="json"),
            "subjects": len(self),
            "patterns": [{"name": pattern.name, "description": pattern.description} for pattern in self.patterns],
            "strata": [*names, "none"],
        }
        (folder / "zoo.json").write_text(json.dumps(about, indent=2))

    @classmethod
    def load(cls, folder: Path) -> Zoo:
        """Read what :meth:`save` wrote. Raises :class:`InvalidInput` naming the file that is missing or wrong."""
        from datasets import Dataset

        for name in ("zoo.json", "weights.safetensors", "signatures.safetensors", "records.parquet"):
            if not (folder / name).is_file():
                raise InvalidInput.field(name, f"missing in {folder}; is this a zoo?")
        about = json.loads((folder / "zoo.json").read_text())
        if about.get("format") != FORMAT:
            raise InvalidInput.field("zoo.json", f"has format {about.get('format')}; this version reads {FORMAT}")
        spec = GenerationSpec.model_validate(about["spec"])
        stored = load_file(folder / "signatures.safetensors")
        weights = load_file(folder / "weights.safetensors")
        records = Dataset.from_parquet(str(folder / "records.parquet"), keep_in_memory=True)
        names = [entry["name"] for entry in about["patterns"]]
        labels = torch.tensor([[name in row for name in names] for row in records["patterns"]])
        return cls(
            spec,
            torch.tensor(records["index"]),
            {name: weights[name] for name in Architecture.of(spec).shapes},
            labels,
            torch.tensor(records["accuracy"]),
            stored["probes"],
            stored["raw"],
        )
