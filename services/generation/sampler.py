"""Sequences to train, describe and evaluate subjects with: in memory, labelled exactly, each split for itself."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import torch
from pyarrow import parquet
from torch import Tensor

from ethogram.errors import InvalidInput
from ethogram.specs.generation import GenerationSpec
from services.generation import checks
from services.generation.data import Candidates, Examples
from services.zoo.dataset import labelled, with_probes
from services.zoo.patterns import from_specs
from services.zoo.pools import JUDGED, JUDGED_NONE, Evaluation, Pools, probes
from services.zoo.universe import HELD_OUT, SELECTION, TRAIN, VALIDATION, Universe


class Labelled(NamedTuple):
    """Sequences with the patterns that each matches."""

    sequences: Tensor
    """int64 ``[n, length]``."""
    membership: Tensor
    """bool ``[n, patterns]``."""


class PatternDatasetSampler:
    """Pools of sequences for each pattern of a spec, and datasets drawn from them.

    A sequence that matches several patterns is in the pool of the rarest. Nothing that is trained on is judged on,
    and what a subject is accepted by is not what is reported of it: every sequence belongs to one split.
    """

    def __init__(self, spec: GenerationSpec, baseline: Path | None = None) -> None:
        """``baseline``: folder of a ``baseline_dataset.json``, for :attr:`baseline`. Raises :class:`InvalidInput` for
        patterns that match nothing or cannot be told apart."""
        if spec.signature.baseline is not None and baseline is None:
            raise InvalidInput.field("spec.signature.baseline", "names an artifact; its folder must be given too")
        chosen: Tensor | None = None
        if baseline is not None:
            spec, chosen = with_probes(spec, baseline)
        self.spec = spec
        self.patterns = from_specs(spec.patterns, spec.vocab_size, spec.sequence_length)
        count = len(self.patterns)
        for name in ("min_patterns_per_batch", "max_patterns_per_batch"):
            if (getattr(spec, name) or 1) > count:
                raise InvalidInput.field(f"spec.{name}", f"must be at most {count}, the number of patterns")
        self.universe = Universe(spec.vocab_size, spec.sequence_length, self.patterns)
        self.universe.check()
        self.train = Pools.build(self.universe, TRAIN, seed=spec.seed, rarest_first=True)
        self.selection, self.evaluation = (
            Evaluation.build(self.universe, JUDGED, JUDGED_NONE, split, spec.seed) for split in (SELECTION, HELD_OUT)
        )
        """The sequences that subjects are accepted by, and those that their reported accuracy is measured on."""
        if chosen is None:
            chosen = probes(self.universe, spec.signature.probes, spec.seed)
        self.baseline = Labelled(chosen, self.universe.matches(chosen))
        """The signature dataset: the same probes for every subject of the zoo, of the validation split; or those of the
        folder."""

    def check_trainable(self) -> None:
        """Raise :class:`InvalidInput` for a pattern with too few sequences to train subjects with and judge them on.
        Subjects that were trained elsewhere may have such patterns."""
        staged = self.spec.staged
        for i, pattern in enumerate(self.patterns):
            judged = all((evaluation.stratum == i).any() for evaluation in (self.selection, self.evaluation))
            if self.train.count[i] == 0 or not judged:
                few = f"{pattern.name} has {self.universe.counts[i]} sequences, too few to train and judge on"
                raise InvalidInput.field(f"spec.patterns.{i}", f"{few}; leave it out")
            judging, fewest = int((self.selection.stratum == i).sum()), checks.FEWEST_ERRORS
            if staged is not None and checks.gain_required(staged) and judging < fewest:
                few = f"{pattern.name} is judged on {judging} sequences, and no gain on fewer than {fewest} is"
                advice = "leave it out, or set staged.min_degradation_threshold to 0"
                raise InvalidInput.field(f"spec.patterns.{i}", f"{few} significant; {advice}")

    @cached_property
    def validation(self) -> Pools:
        """Sequences that decide when training ends."""
        return Pools.build(self.universe, VALIDATION, 1024, self.spec.seed, rarest_first=True)

    def training(self, index: int) -> tuple[Labelled, Tensor, Tensor]:
        """The dataset of the subject ``index`` in staged training: sequences, the right labels (bool ``[examples]``)
        and those of the first stage."""
        if self.spec.staged is None:
            raise InvalidInput.field("spec.staged", "training sequences of a subject need a spec with `staged`")
        indices = torch.tensor([index])
        candidate = Candidates.draw(self.spec, indices, len(self.patterns))
        examples = Examples.draw(self.spec.seed, "examples", candidate, self.spec.staged.examples, self.train)
        wrong = examples.corrupted(self.spec.seed, indices, self.spec.staged.corruption_rate)
        rows = examples.rows[0]
        return Labelled(self.train.sequences[rows], self.train.membership[rows]), examples.labels[0], wrong[0]

    def benchmark(self, per_pattern: int = JUDGED, none: int = JUDGED_NONE) -> Labelled:
        """Held-out sequences with pattern labels, to evaluate networks that an interpreter has written."""
        held_out = Evaluation.build(self.universe, per_pattern, none, seed=self.spec.seed)
        return Labelled(held_out.sequences, held_out.membership)

    def rows(self, dataset: Labelled, **columns: Tensor) -> list[dict[str, Any]]:
        """Its sequences as text (see :func:`services.zoo.dataset.labelled`), with more ``columns`` ``[n]``."""
        rows = labelled(*dataset, [pattern.name for pattern in self.patterns])
        for name, column in columns.items():
            rows = [row | {name: value} for row, value in zip(rows, column.tolist(), strict=True)]
        return rows

    def save(self, dataset: Labelled, path: Path, **columns: Tensor) -> None:
        """Write :meth:`rows` as JSON, or as parquet if that is the suffix of ``path``."""
        if path.suffix not in (".json", ".parquet"):
            raise InvalidInput.field(path.name, "must end in .json or .parquet")
        rows = self.rows(dataset, **columns)
        if path.suffix == ".parquet":
            parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            about = {"vocab_size": self.spec.vocab_size, "sequence_length": self.spec.sequence_length}
            path.write_text(json.dumps(about | {"sequences": rows}, indent=1), encoding="utf-8")
