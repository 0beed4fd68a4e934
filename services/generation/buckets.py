"""Candidates in blocks and buckets: trained together, checked, and described as records.

A block is a fixed range of candidate indices. Its buckets are those of one depth and activation, and of similar width,
which train together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from torch import Tensor

from ethogram.errors import InvalidInput
from ethogram.specs.generation import GenerationSpec, StagedSpec
from services.generation import checks
from services.generation.data import Candidates, activations_of
from services.generation.format import TrainingDataFormatter
from services.generation.sampler import PatternDatasetSampler
from services.generation.train import SubjectModelTrainer, Trained
from services.zoo.dataset import BRANCHES, positive_columns, prefixed, record_of, schema
from services.zoo.layout import Layout
from services.zoo.signatures import ActivationSignatureExtractor
from services.zoo.subjects import encode, flatten
from services.zoo.universe import HELD_OUT, SELECTION

# Candidates that train together: at most so many, and so few that what a layer makes of their batches (bytes) stays in
# a core's cache. Rounding depends on the grouping, so this is part of what a seed means.
MOST_TOGETHER = 128
CACHE_BYTES = 2**20
# Where shapes differ, a block has this many buckets' worth of candidates at most, which are then sorted by shape ...
MOST_SHAPES = 8
# ... and where widths differ, up to so many times as many, if the zoo has so many subjects for each: those that are
# padded to one width are of similar width then.
MOST_WIDTHS, SUBJECTS_PER_WIDTH = 4, 1024

Row = dict[str, Any]
"""One record, by column."""


@dataclass
class Block:
    """What became of some candidates."""

    table: pyarrow.Table
    """Records of those that were accepted, in the order of their index."""
    causes: list[str]
    """Why the others were rejected."""

    @classmethod
    def merge(cls, blocks: Sequence[Block]) -> Block:
        """Several as one."""
        table = pyarrow.concat_tables([block.table for block in blocks]).sort_by("index")
        return cls(table, [cause for block in blocks for cause in block.causes])

    def means(self) -> dict[str, float]:
        """Of the accepted: held-out accuracy over all strata, and in two stages what the target pattern gained."""
        if not len(self.table):
            return {}
        lists = [name for name in ("accuracy", "degraded_accuracy") if name in self.table.column_names]
        means = {name: float(np.nanmean(self.table[name].combine_chunks().flatten().to_numpy())) for name in lists}
        if "improvement" in self.table.column_names:
            means["improvement"] = float(np.mean(self.table["improvement"].to_numpy()))
        return means


class BucketTrainer:
    """Draws, trains and describes the candidates of one spec. Each is a function of the spec and its index."""

    def __init__(
        self,
        spec: GenerationSpec,
        device: str = "cpu",
        baseline: Path | None = None,
        *,
        sampler: PatternDatasetSampler | None = None,
    ) -> None:
        """``baseline``: folder with the probes to take, where ``spec.signature.baseline`` says so; ``sampler``: that of
        the spec, where it exists already. Raises :class:`InvalidInput` for a spec that cannot be met, and for probes of
        another vocabulary or length."""
        self.sampler = sampler or PatternDatasetSampler(spec, baseline)
        # With the number of probes that the baseline has.
        self.spec = spec = self.sampler.spec
        self.patterns = self.sampler.patterns
        self.names = [pattern.name for pattern in self.patterns]
        if spec.counterfactual is not None and spec.most_patterns(len(self.patterns)) == len(self.patterns):
            few = f"must leave one of the {len(self.patterns)} patterns for the counterfactual branch to learn"
            raise InvalidInput.field("spec.max_patterns_per_batch", few)
        self.subject_trainer = SubjectModelTrainer(spec, self.sampler.train, self.sampler.validation, device)
        any_shape = self.subject_trainer.shape
        self.probes, membership = self.sampler.baseline
        probe_inputs = encode(any_shape, self.probes).to(device)
        self.extractor = ActivationSignatureExtractor(spec.signature, probe_inputs, membership)
        self.schema = schema(spec, self.extractor.methods)
        self._formatter = TrainingDataFormatter(spec, self.patterns) if spec.format is not None else None
        self._judges = {
            split: (evaluation, encode(any_shape, evaluation.sequences).to(device))
            for split, evaluation in ((SELECTION, self.sampler.selection), (HELD_OUT, self.sampler.evaluation))
        }
        shapes = spec.subject.layers.size * len(activations_of(spec))
        self._bucket_size = _bucket_size(spec)
        self.block_size = self._bucket_size * min(shapes, MOST_SHAPES)
        if spec.subject.neurons.size > 1:
            # So that each bucket holds but a part of the widths, in a zoo that is large enough for large blocks.
            self.block_size *= min(MOST_WIDTHS, max(1, spec.subjects // SUBJECTS_PER_WIDTH))

    def buckets(self, block: int) -> list[Candidates]:
        """The candidates of a block, as they train together: of one depth and activation, and of similar width."""
        return self.group(self.candidates(torch.arange(block * self.block_size, (block + 1) * self.block_size)))

    def candidates(self, indices: Tensor) -> Candidates:
        """Those at ``indices`` ``[n]``."""
        return Candidates.draw(self.spec, indices, len(self.patterns))

    def group(self, candidates: Candidates) -> list[Candidates]:
        """``candidates`` in the groups of :meth:`buckets`."""
        shapes, buckets = candidates.layers * 64 + candidates.activation, []
        for shape in sorted(set(shapes.tolist())):
            rows = (shapes == shape).nonzero().flatten()
            rows = rows[candidates.neurons[rows].argsort(stable=True)]
            count = max(1, round(len(rows) / self._bucket_size))
            buckets += [candidates.select(chunk) for chunk in rows.chunk(count)]
        return buckets

    def train(self, candidates: Candidates) -> Block:
        """Train and check one of the :meth:`buckets`."""
        staged = self.spec.staged
        rows, causes = self._single(candidates) if staged is None else self._staged(candidates, staged)
        return Block(self.table(rows), causes)

    def table(self, rows: list[Row]) -> pyarrow.Table:
        """Records as a table, with prompts and completions where the spec asks for them."""
        if self._formatter is not None:
            rows = [row | self._formatter.columns(row) for row in rows]
        return pyarrow.Table.from_pylist(rows, self.schema)

    def two_stages(self, candidates: Candidates, *, corrupted: bool) -> tuple[Tensor, Tensor]:
        """Train in both stages, whatever the checks say of the first. Held-out accuracies, float32 ``[models, 3]``: on
        the target pattern after each stage, and the mean over all other strata after the first; and whether the checks
        pass, bool ``[models]``."""
        assert self.spec.staged is not None
        first = self.subject_trainer.degrade(candidates, corrupted=corrupted)
        second = self.subject_trainer.improve(first)
        before = self.correct(first.trained, SELECTION)
        early = checks.degradation(before, candidates, self.spec.staged, self.sampler.selection)
        late = self._late(before, second, self.spec.staged)
        accuracy = torch.stack([self.accuracy(stage, HELD_OUT) for stage in (first.trained, second)], 1)
        target = candidates.target.view(-1, 1, 1).expand(-1, 2, 1)
        elsewhere = accuracy.scatter(2, target, torch.nan)[:, :1].nanmean(2)
        passed = torch.tensor([causes == (None, None) for causes in zip(early, late, strict=True)])
        return torch.cat([accuracy.gather(2, target).squeeze(2), elsewhere], 1), passed

    @property
    def on_cpu(self) -> bool:
        """Whether it trains on the CPU."""
        return self.subject_trainer.device.type == "cpu"

    def predictions(self, trained: Trained, split: int) -> Tensor:
        """Which sequences of ``split``, ``SELECTION`` (decides what is accepted) or ``HELD_OUT`` (is reported), are
        answered yes: bool ``[models, n]``."""
        evaluation, inputs = self._judges[split]
        return evaluation.predictions(trained.params, inputs, trained.architecture.activation)

    def correct(self, trained: Trained, split: int) -> Tensor:
        """Which of these :meth:`predictions` are right: bool ``[models, n]``."""
        return self.predictions(trained, split) == self._judges[split][0].labels(trained.candidates.selected)

    def accuracy(self, trained: Trained, split: int) -> Tensor:
        """Shares of :meth:`correct` by stratum: float32 ``[models, patterns + 1]``; the last column is for sequences
        that match nothing."""
        return self._judges[split][0].by_stratum(self.correct(trained, split))

    def _single(self, candidates: Candidates) -> tuple[list[Row], list[str]]:
        trainer = self.subject_trainer
        branches = [trainer.train(candidates)] if self.spec.counterfactual is None else trainer.branch(candidates)
        gates = [self._gate(branch, self.accuracy(branch, SELECTION)) for branch in branches]
        causes = [next(filter(None, row), None) for row in zip(*gates, strict=True)]
        kept = torch.tensor([cause is None for cause in causes])
        rows, *others = (self._rows(branch, kept) for branch in branches)
        changed = (candidates.other[kept], candidates.target[kept])
        for name, branch_rows, patterns in zip(BRANCHES, others, changed, strict=False):
            for row, branch_row, pattern in zip(rows, branch_rows, patterns.tolist(), strict=True):
                row |= prefixed(f"{name}_", branch_row) | {f"{name}_pattern": self.names[pattern]}
        return rows, list(filter(None, causes))

    def _staged(self, candidates: Candidates, staged: StagedSpec) -> tuple[list[Row], list[str]]:
        degraded = self.subject_trainer.degrade(candidates)
        before = self.correct(degraded.trained, SELECTION)
        early = checks.degradation(before, candidates, staged, self.sampler.selection)
        passed = torch.tensor([cause is None for cause in early])
        if not passed.any():
            return [], list(filter(None, early))
        degraded, before = degraded.select(passed), before[passed]
        improved = self.subject_trainer.improve(degraded)
        late = self._late(before, improved, staged)
        kept = torch.tensor([cause is None for cause in late])
        rows, first = self._rows(improved, kept), degraded.trained
        for row, i, other in zip(rows, kept.nonzero().flatten(), self._rows(first, kept), strict=True):
            target = int(first.candidates.target[i])
            row |= {
                "target_pattern": self.names[target],
                "improvement": float(row["accuracy"][target] - other["accuracy"][target]),
            }
            row |= {metric: other[metric] + row[metric] for metric in first.metrics}
            row |= prefixed("degraded_", other)
        return rows, list(filter(None, early + late))

    def _late(self, before: Tensor, improved: Trained, staged: StagedSpec) -> list[str | None]:
        """Why each network is rejected after the second stage; ``before``: :meth:`correct` after the first."""
        selection, after = self.sampler.selection, self.correct(improved, SELECTION)
        gate = self._gate(improved, selection.by_stratum(after))
        improvement = checks.improvement(before, after, improved.candidates, staged, selection)
        return [cause or other for cause, other in zip(gate, improvement, strict=True)]

    def _gate(self, trained: Trained, accuracy: Tensor) -> list[str | None]:
        """Why each network is rejected, whatever its stages: it diverged, or fails on a stratum."""
        causes = checks.gate(accuracy, trained.candidates, self.names, self.spec.gate)
        finite = flatten(trained.params).isfinite().all(1).tolist()
        return [cause if fine else checks.DIVERGED for cause, fine in zip(causes, finite, strict=True)]

    def _rows(self, trained: Trained, kept: Tensor) -> list[Row]:
        """Records of the networks at ``kept`` (bool ``[models]``), with their held-out accuracy."""
        chosen = trained.select(kept)
        candidates, architecture, rows = chosen.candidates, trained.architecture, list[Row]()
        if not len(candidates):
            return rows
        signatures = self.extractor.extract(chosen.params, architecture, candidates.neurons)
        signature_rows = {method: values.cpu().numpy() for method, values in signatures.items()}
        weights = flatten({name: tensor.cpu() for name, tensor in chosen.params.items()}).numpy()
        # Records are without the padding to the widest.
        widths = {architecture.hidden[0], *candidates.neurons.tolist()}
        layout = Layout([architecture._replace(hidden=(width,) * len(architecture.hidden)) for width in widths])
        narrow = zip(layout.shapes, layout.positions, layout.neuron_positions, strict=True)
        by_width = {shape.hidden[0]: (shape, own.numpy(), neurons.numpy()) for shape, own, neurons in narrow}
        evaluation, predictions = self.sampler.evaluation, self.predictions(chosen, HELD_OUT)
        accuracies = evaluation.by_stratum(predictions == evaluation.labels(candidates.selected)).numpy()
        for i, (accuracy, yes_share) in enumerate(zip(accuracies, evaluation.by_stratum(predictions), strict=True)):
            shape, parameters, neurons = by_width[int(candidates.neurons[i])]
            rate = float(candidates.learning_rate[i])
            signature = {method: values[i, neurons].ravel() for method, values in signature_rows.items()}
            network = {"accuracy": accuracy, "weights": weights[i, parameters], "signature": signature}
            index, patterns = int(candidates.indices[i]), compress(self.names, candidates.selected[i])
            dropout = float(candidates.dropout[i])
            row = record_of(index, patterns, shape, network, learning_rate=rate, dropout=dropout)
            row |= {name: [values[i].item()] for name, values in chosen.metrics.items()}
            rows.append(row | positive_columns(yes_share, self.names, self.spec))
        return rows


def _bucket_size(spec: GenerationSpec) -> int:
    batch = spec.staged.batch_size if spec.staged else spec.training.batch_size
    fitting = CACHE_BYTES // (4 * batch * spec.subject.neurons.max)
    return min(MOST_TOGETHER, max(16, 1 << (max(fitting, 1).bit_length() - 1)))
