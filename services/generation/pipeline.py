"""Making a zoo: candidates are trained in fixed blocks, judged, described, and written to disk as they come."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from numpy.typing import NDArray
from pyarrow import parquet
from torch import Tensor

from ethogram.errors import IllegalState, InvalidInput
from ethogram.specs.base import Spec
from ethogram.specs.generation import REGISTERED, GenerationSpec, PartSpec
from services.generation import checks
from services.generation.card import CARD, card
from services.generation.data import Candidates, activations_of
from services.generation.format import TrainingDataFormatter
from services.generation.hub import HubUpload
from services.generation.sampler import PatternDatasetSampler
from services.generation.train import SubjectModelTrainer, Trained
from services.runtime.reading import reading
from services.runtime.run import Run
from services.zoo.dataset import BRANCHES, DATA, Zoo, data_file, read_about, schema, write_about
from services.zoo.signatures import ActivationSignatureExtractor
from services.zoo.statistics import Statistics
from services.zoo.subjects import Architecture, Params, encode, flatten, own_places

# Candidates that train together: at most so many, and so few that what a layer makes of their batches (bytes) stays in
# a core's cache. Rounding depends on the grouping, so this is part of what a seed means.
MOST_TOGETHER = 128
_CACHED = 2**20
# Where shapes differ, so many buckets' worth of candidates are drawn together and then sorted into buckets by shape.
_MOST_SHAPES = 8
# And where widths differ, as many times as many, if the zoo has so many subjects for each: those that are padded to one
# width are of similar width then.
_MOST_WIDTHS, _WORTH_WIDTHS = 4, 1024
# Candidates to a shard of the records.
_SHARD = 1024
# Candidates after which a hopeless spec is given up.
PATIENCE = 512
# Where a run has the probes that the spec names.
BASELINE_INPUT = "signature.baseline"
# Processes take some seconds to start, which is worth it for longer work than this, in seconds of one core.
_WORTH_PROCESSES = 8.0
# What a core takes of a training step, in seconds: for each sequence and parameter, and for each sequence and neuron.
_PER_PARAMETER, _PER_NEURON = 1.5e-10, 4e-9

Row = dict[str, Any]


@dataclass
class Block:
    """What became of some candidates."""

    table: pyarrow.Table
    """Records of those that were accepted, in the order of their index."""
    causes: list[str]
    """Why the others were not."""

    @classmethod
    def of(cls, parts: Sequence[Block]) -> Block:
        """Several parts together."""
        table = pyarrow.concat_tables([part.table for part in parts]).sort_by("index")
        return cls(table, [cause for part in parts for cause in part.causes])

    def means(self) -> dict[str, float]:
        """Of the accepted: held-out accuracy over all strata, and in two stages what the target pattern gained."""
        if not len(self.table):
            return {}
        found = {"accuracy": float(np.mean(self.table["accuracy"].combine_chunks().flatten().to_numpy()))}
        if "improvement" in self.table.column_names:
            found["degraded_accuracy"] = float(
                np.mean(self.table["degraded_accuracy"].combine_chunks().flatten().to_numpy())
            )
            found["improvement"] = float(np.mean(self.table["improvement"].to_numpy()))
        return found


@dataclass
class Progress:
    """What is done: how many were accepted, and why others were not."""

    next_block: int = 0
    accepted: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    shard: int = 0
    """Number of the data file that is being filled."""
    blocks: list[tuple[int, dict[str, int]]] = field(default_factory=list)
    """Of a part of a zoo: accepted and rejected of each block."""

    def add(self, block: Block) -> None:
        """One more is done."""
        causes = Counter(block.causes)
        self.next_block += 1
        self.accepted += len(block.table)
        self.rejected.update(causes)

    @property
    def candidates(self) -> int:
        """How many were judged."""
        return self.accepted + sum(self.rejected.values())


class DatasetGenerationPipeline:
    """Makes the zoo that a spec asks for: the first ``spec.subjects`` candidates, by index, that pass the checks.

    Every candidate is a function of the spec and its index. They train in fixed blocks, on as many threads as torch is
    set to use; the result depends neither on how many, nor on interruptions.
    """

    def __init__(self, spec: GenerationSpec, device: str = "cpu", baseline: Path | None = None) -> None:
        """``baseline``: folder with the probes to take, where ``spec.signature.baseline`` says so. Raises
        :class:`InvalidInput` for a spec that cannot be met, and for probes of another vocabulary or length."""
        self.sampler, self._baseline = PatternDatasetSampler(spec, baseline), baseline
        # With the number of probes that the baseline has.
        self.spec = spec = self.sampler.spec
        self.patterns = self.sampler.patterns
        if spec.counterfactual is not None and spec.most_patterns(len(self.patterns)) == len(self.patterns):
            few = f"must leave one of the {len(self.patterns)} patterns for the counterfactual branch to learn"
            raise InvalidInput.field("spec.max_patterns_per_batch", few)
        self.trainer = SubjectModelTrainer(spec, self.sampler.train, self.sampler.validation, device)
        any_shape = Architecture(spec.vocab_size, spec.sequence_length, spec.subject.input_encoding, (), "relu")
        probes = self.sampler.baseline
        self.probes = probes.sequences
        self.extractor = ActivationSignatureExtractor(
            spec.signature, encode(any_shape, probes.sequences).to(device), probes.membership
        )
        self.formatter = TrainingDataFormatter(spec, self.patterns) if spec.format is not None else None
        self._hub: HubUpload | None = None
        self._questions = encode(any_shape, self.sampler.evaluation.sequences).to(device)
        shapes = spec.subject.layers.size * len(activations_of(spec))
        self.bucket_size = _bucket_size(spec)
        self.block_size = self.bucket_size * min(shapes, _MOST_SHAPES)
        if spec.subject.neurons.size > 1:
            # So that each bucket holds but a part of the widths, in a zoo that is large enough for large blocks.
            self.block_size *= min(_MOST_WIDTHS, max(1, spec.subjects // _WORTH_WIDTHS))
        self._blocks_of_file = -(-_SHARD // self.block_size)
        # Those to train: from the first to before the last, or as many as it takes.
        self._first, self._last = 0, 2**62
        if spec.part is not None:
            self._first = spec.part.first * self._blocks_of_file
            self._last = self._first + spec.part.count * self._blocks_of_file

    def run(self, folder: Path, run: Run | None = None) -> dict[str, Any]:
        """Write the zoo into the new ``folder`` (see :mod:`services.zoo.dataset`); its figures.

        With ``spec.hub`` its files are uploaded as they are made; :meth:`publish` sends the rest. Raises
        :class:`InvalidInput` when hardly any candidate passes.
        """
        run = run or Run()
        (folder / DATA).mkdir(parents=True)
        if self.spec.hub is not None:
            self._hub = HubUpload(self.spec.hub, run.log)
            self._about(folder, {})
            self._hub.open(folder, self.spec)
        progress = self._gathered(folder, run) if self.spec.shards > 1 else None
        if progress is None:
            progress = self._made(folder, run)
        causes = ", ".join(f"{count} {cause}" for cause, count in progress.rejected.most_common()) or "none"
        wanted = self.spec.subjects if self.spec.part is None else progress.accepted
        kept = f", the first {wanted} of them kept" if progress.accepted > wanted else ""
        run.log(f"{progress.accepted} of {progress.candidates} candidates accepted{kept}; rejected: {causes}")
        rejected = dict(progress.rejected.most_common())
        facts: dict[str, Any] = {"subjects": wanted, "candidates": progress.candidates, "rejected": rejected}
        if self.spec.part is not None:
            self._about(folder, facts | {"blocks": progress.blocks})
            return facts
        return self._described(folder, facts)

    def write(self, folder: Path, shards: Iterable[pyarrow.Table], facts: dict[str, Any]) -> dict[str, Any]:
        """Write a zoo of records that come from elsewhere into the new ``folder``; its figures."""
        (folder / DATA).mkdir(parents=True)
        subjects = 0
        for number, shard in enumerate(shards):
            self._write(shard, folder, number)
            subjects += len(shard)
        return self._described(folder, {"subjects": subjects, "candidates": subjects, "rejected": {}} | facts)

    def _described(self, folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
        """Write what goes with the records; their figures."""
        self._about(folder, facts)
        found = Statistics.of(folder)
        (folder / CARD).write_text(card(folder, found))
        return found.figures()

    def publish(self, folder: Path) -> dict[str, Any]:
        """Send what is not on the Hub yet, where ``spec.hub`` asks for it; what is there then. Raises
        :class:`ethogram.errors.Unavailable` without a Hub, and :class:`InvalidInput` without permission."""
        if self._hub is None or self.spec.hub is None:
            return {}
        self._hub.close(folder)
        return {"hub": {"repo": self.spec.hub.repo, "files": self._hub.sent}}

    def _about(self, folder: Path, facts: dict[str, Any]) -> None:
        write_about(folder, self.spec, self.patterns, self.probes, facts)

    def _made(self, folder: Path, run: Run) -> Progress:
        """Train what is asked for."""
        wanted = self.spec.subjects
        if self.spec.part is not None:
            wanted = (self._last - self._first) * self.block_size
        run.stage("generate", wanted, "subjects" if self.spec.part is None else "candidates")
        progress, shard = self._resume(folder, run)
        with closing(self._blocks(progress)) as blocks:
            for block in blocks:
                shard = pyarrow.concat_tables([shard, block.table])
                progress.add(block)
                if self.spec.part is not None:
                    progress.blocks.append((len(block.table), dict(Counter(block.causes))))
                run.advance(progress.candidates if self.spec.part is not None else min(progress.accepted, wanted))
                run.metric(progress.candidates, accepted_share=progress.accepted / progress.candidates, **block.means())
                enough = self._enough(progress)
                if enough or progress.next_block % self._blocks_of_file == 0:
                    extra = 0 if self.spec.part is not None else max(0, progress.accepted - wanted)
                    self._write(shard.slice(0, len(shard) - extra), folder, progress.shard)
                    progress.shard, shard = progress.shard + 1, self._schema.empty_table()
                if not enough:
                    if self.spec.part is None:
                        self._give_up_if_hopeless(progress)
                    if run.checkpoint_due():
                        run.checkpoint(progress.next_block, partial(self._save, folder, progress, shard))
        return progress

    def _gathered(self, folder: Path, run: Run) -> Progress | None:
        """Have jobs of their own make parts, and gather what they made; None where there is no platform.

        How many files it takes is known only when the first are there, so there may be several rounds.
        """
        spec, progress, files = self.spec, Progress(), 0
        while progress.accepted < spec.subjects:
            share = progress.accepted / max(progress.candidates, 1) or 1.0
            missing = (spec.subjects - progress.accepted) / share
            needed = math.ceil(missing / (self._blocks_of_file * self.block_size))
            each = -(-needed // spec.shards)
            parts: dict[str, tuple[str, Spec]] = {}
            for first in range(files, files + needed, each):
                part = PartSpec(first=first, count=min(each, files + needed - first))
                changes = {"part": part, "shards": 1, "hub": None}
                parts[f"files-{first:05}"] = ("generation", spec.model_copy(update=changes))
            children = run.children(parts)
            if children is None:
                return None
            files += needed
            run.stage("gather", spec.subjects, "subjects")
            for name in parts:
                # Parts themselves do not give up: few of some thousand may pass, and many of the next.
                child = children[name]
                if child.state != "SUCCEEDED":
                    raise IllegalState(f"shard {name} ({child.job}) ended {child.state}: {child.error}")
                self._take(run.output(child, "zoo"), folder, progress)
                run.advance(min(progress.accepted, spec.subjects))
            if progress.accepted < spec.subjects:
                self._give_up_if_hopeless(progress)
        return progress

    def _take(self, part: Path, folder: Path, progress: Progress) -> None:
        """Take of a part's records as many as are missing."""
        blocks = read_about(part)[0]["blocks"]
        size, wanted = self._blocks_of_file, self.spec.subjects
        for i, file in enumerate(range(progress.next_block // size, progress.next_block // size + len(blocks) // size)):
            if progress.accepted >= wanted:
                return
            before = progress.accepted
            for accepted, rejected in blocks[i * size : (i + 1) * size]:
                if progress.accepted < wanted:
                    progress.next_block += 1
                    progress.accepted += accepted
                    progress.rejected.update(rejected)
            name = data_file(file)
            if progress.accepted > wanted:
                with reading(part, name, "zoo") as path:
                    self._write(parquet.read_table(path).slice(0, wanted - before), folder, file)
            elif (part / name).exists():
                shutil.copyfile(part / name, folder / name)
                self._upload(folder, name)

    def buckets(self, number: int) -> list[Candidates]:
        """The candidates of a block, as they train together: of one depth and activation, and of similar width."""
        indices = torch.arange(number * self.block_size, (number + 1) * self.block_size)
        candidates = Candidates.draw(self.spec, indices, len(self.patterns))
        shape, found = candidates.layers * 64 + candidates.activation, []
        for one in sorted(set(shape.tolist())):
            same = (shape == one).nonzero().flatten()
            same = same[candidates.neurons[same].argsort(stable=True)]
            found += [candidates.select(part) for part in same.chunk(max(1, round(len(same) / self.bucket_size)))]
        return found

    def bucket(self, candidates: Candidates) -> Block:
        """Train and judge one of the :meth:`buckets`."""
        rows, causes = self._staged(candidates) if self.spec.staged else self._single(candidates)
        return Block(self.table(rows), causes)

    def accuracy(self, params: Params, architecture: Architecture, candidates: Candidates) -> Tensor:
        """On held-out sequences, by stratum: float32 ``[models, patterns + 1]``; the last column is for sequences that
        match nothing."""
        evaluation, selected = self.sampler.evaluation, candidates.selected
        return evaluation.accuracy(params, self._questions, architecture.activation, selected)

    def _single(self, candidates: Candidates) -> tuple[list[Row], list[str]]:
        if self.spec.counterfactual is None:
            branches = [self.trainer.train(candidates)]
        else:
            branches = list(self.trainer.branch(candidates))
        accuracies = [self.accuracy(one.params, one.architecture, one.candidates) for one in branches]
        found = [self._judged(one, accuracy) for one, accuracy in zip(branches, accuracies, strict=True)]
        causes = [next((cause for cause in row if cause is not None), None) for row in zip(*found, strict=True)]
        kept = torch.tensor([cause is None for cause in causes])
        rows, *paired = (self._rows(one, accuracy, kept) for one, accuracy in zip(branches, accuracies, strict=True))
        changed = (candidates.other[kept], candidates.target[kept])
        for branch, others, which in zip(BRANCHES, paired, changed, strict=False):
            for row, other, pattern in zip(rows, others, which.tolist(), strict=True):
                row |= {f"{branch}_{name}": other[name] for name in ("accuracy", "weights", "signature")}
                row[f"{branch}_pattern"] = self._names[pattern]
        return self._written(rows), [cause for cause in causes if cause is not None]

    def _staged(self, candidates: Candidates) -> tuple[list[Row], list[str]]:
        staged = self.spec.staged
        assert staged is not None
        degraded = self.trainer.degrade(candidates)
        first = degraded.trained
        before = self.accuracy(first.params, first.architecture, candidates)
        early = checks.degradation(before, candidates, staged)
        causes = [cause for cause in early if cause is not None]
        going = torch.tensor([cause is None for cause in early])
        if not going.any():
            return [], causes
        degraded, before = degraded.select(going), before[going]
        first, second = degraded.trained, self.trainer.improve(degraded)
        after = self.accuracy(second.params, second.architecture, second.candidates)
        judged = self._judged(second, after)
        improved = checks.improvement(before, after, second.candidates, staged)
        late = [cause or other for cause, other in zip(judged, improved, strict=True)]
        kept = torch.tensor([cause is None for cause in late])
        return self._written(self._pairs(first, second, before, after, kept)), causes + [
            cause for cause in late if cause is not None
        ]

    def _pairs(self, first: Trained, second: Trained, before: Tensor, after: Tensor, kept: Tensor) -> list[Row]:
        """Records of the networks at ``kept`` (bool ``[models]``), after both stages."""
        rows = self._rows(second, after, kept)
        gains = (after - before)[kept].gather(1, second.candidates.target[kept].unsqueeze(1)).squeeze(1)
        for row, i, gain, old in zip(
            rows, kept.nonzero().flatten().tolist(), gains.tolist(), self._rows(first, before, kept), strict=True
        ):
            row |= {
                "target_pattern": self.patterns[int(second.candidates.target[i])].name,
                "improvement": gain,
                "epochs": [int(first.epochs[i]), int(second.epochs[i])],
                "validation_loss": [float(first.loss[i]), float(second.loss[i])],
                "degraded_accuracy": old["accuracy"],
                "degraded_weights": old["weights"],
                "degraded_signature": old["signature"],
            }
        return rows

    def _written(self, rows: list[Row]) -> list[Row]:
        """The records, as text too where that is asked for."""
        return rows if self.formatter is None else [row | self.formatter.columns(row) for row in rows]

    def describe(self, trained: Trained, degraded: Trained | None = None) -> list[Row]:
        """Records of networks that come from elsewhere, whatever the checks would say; ``degraded``: their first
        stages."""
        after = self.accuracy(trained.params, trained.architecture, trained.candidates)
        every = torch.ones(len(after), dtype=torch.bool)
        if degraded is None:
            return self._written(self._rows(trained, after, every))
        before = self.accuracy(degraded.params, degraded.architecture, degraded.candidates)
        return self._written(self._pairs(degraded, trained, before, after, every))

    def table(self, rows: Iterable[Row]) -> pyarrow.Table:
        """Records as a table."""
        return table_of(rows, self._schema)

    def _judged(self, trained: Trained, accuracy: Tensor) -> list[str | None]:
        causes = checks.gate(accuracy, trained.candidates, self.patterns, self.spec.gate)
        whole = checks.finite(trained.params).tolist()
        return [cause if fine else checks.DIVERGED for cause, fine in zip(causes, whole, strict=True)]

    def _rows(self, trained: Trained, accuracy: Tensor, kept: Tensor) -> list[Row]:
        """Records of the networks at ``kept`` (bool ``[models]``)."""
        chosen = trained.select(kept)
        own, architecture, rows = chosen.candidates, trained.architecture, list[Row]()
        if not len(own):
            return rows
        signatures = self.extractor.extract(chosen.params, architecture, own.neurons)
        described = {method: values.cpu().numpy() for method, values in signatures.items()}
        weights = flatten({name: tensor.cpu() for name, tensor in chosen.params.items()}).numpy()
        names = self._names
        for i, figures in enumerate(accuracy[kept].numpy()):
            width = int(own.neurons[i])
            parameters, neurons = _own_places(architecture, width)
            rows.append(
                {
                    "index": int(own.indices[i]),
                    "patterns": [name for name, on in zip(names, own.selected[i].tolist(), strict=True) if on],
                    "layers": int(own.layers[i]),
                    "neurons": width,
                    "activation": architecture.activation,
                    "learning_rate": self._rate(own, i),
                    "dropout": float(own.dropout[i]),
                    "accuracy": figures,
                    "worst_accuracy": figures.min(),
                    "weights": weights[i, parameters],
                    "signature": {method: values[i, neurons].ravel() for method, values in described.items()},
                }
            )
        return rows

    def _rate(self, candidates: Candidates, i: int) -> float:
        return float(candidates.learning_rate[i]) if self.spec.staged else self.spec.training.learning_rate

    @property
    def _schema(self) -> pyarrow.Schema:
        return schema(self.spec, self.extractor.methods)

    def _write(self, shard: pyarrow.Table, folder: Path, number: int) -> None:
        """A data file, if it holds anything."""
        if len(shard):
            parquet.write_table(shard, folder / data_file(number))
            self._upload(folder, data_file(number))

    def _upload(self, folder: Path, name: str) -> None:
        if self._hub is not None:
            self._hub.add(folder, name)

    def _save(self, folder: Path, progress: Progress, shard: pyarrow.Table, target: Path) -> None:
        """Write a checkpoint: the shards so far, and what is there of the next."""
        (target / DATA).mkdir()
        for file in (folder / DATA).iterdir():
            _link(file, target / DATA / file.name)
        parquet.write_table(shard, target / "shard.parquet")
        (target / "progress.json").write_text(json.dumps(vars(progress)))

    def _resume(self, folder: Path, run: Run) -> tuple[Progress, pyarrow.Table]:
        if run.resume is None:
            first = self._first // self._blocks_of_file
            return Progress(next_block=self._first, shard=first), self._schema.empty_table()
        state = json.loads((run.resume / "progress.json").read_text())
        for file in sorted((run.resume / DATA).iterdir()):
            name = f"{DATA}/{file.name}"
            shutil.copyfile(file, folder / name)
            self._upload(folder, name)
        progress = Progress(**state | {"rejected": Counter(state["rejected"])})
        run.log(f"goes on from a checkpoint: {progress.accepted} of {progress.candidates} candidates accepted so far")
        return progress, parquet.read_table(run.resume / "shard.parquet")

    def _enough(self, progress: Progress) -> bool:
        if self.spec.part is not None:
            return progress.next_block >= self._last
        return progress.accepted >= self.spec.subjects

    def _give_up_if_hopeless(self, progress: Progress) -> None:
        """Raise :class:`InvalidInput` when fewer than 2 % of a good number of candidates pass."""
        if progress.candidates < max(PATIENCE, self.block_size) or progress.accepted >= progress.candidates * 0.02:
            return
        causes = ", ".join(f"{cause}: {n}" for cause, n in progress.rejected.most_common(4))
        found = f"only {progress.accepted} of {progress.candidates} candidates"
        if self.spec.staged is None:
            text = f"{found} reach {self.spec.gate} ({causes}); lower it, train for more steps, use wider subjects or "
            raise InvalidInput.field("spec.min_accuracy", f"{text}fewer patterns")
        text = (
            f"{found} pass the checks ({causes}); lower min_degradation_threshold or min_accuracy, or flip more labels"
        )
        raise InvalidInput.field("spec.staged", text)

    def _blocks(self, progress: Progress) -> Generator[Block, None, None]:
        """Blocks in order from where ``progress`` is, until it has enough; a few are in training ahead."""
        workers = torch.get_num_threads() if self.trainer.device.type == "cpu" else 1
        pending: deque[list[Future[Block]]] = deque()
        with self._side_by_side(workers) as submit:
            number = progress.next_block
            while not self._enough(progress):
                share = progress.accepted / max(progress.candidates, 1) or 1.0
                needed = math.ceil((self.spec.subjects - progress.accepted) / (self.block_size * share))
                if self.spec.part is not None:
                    needed = self._last - progress.next_block
                while len(pending) < needed and sum(map(len, pending)) < 2 * workers:
                    pending.append([submit(number, part) for part in range(len(self.buckets(number)))])
                    number += 1
                yield Block.of([part.result() for part in pending.popleft()])

    @contextmanager
    def _side_by_side(self, workers: int) -> Iterator[Callable[[int, int], Future[Block]]]:
        """A way to have a bucket (of a block, by its place there) trained beside others.

        Each on one core: products this small lose more in synchronisation than they gain.
        """
        if workers > 1 and self._seconds > _WORTH_PROCESSES and not REGISTERED.intersection(self._names):
            from services.generation.workers import Workers

            processes = Workers(self.spec, workers, self._baseline)
            try:
                yield processes.submit
            finally:
                processes.close()
            return
        self.trainer.stop.clear()
        pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
        try:
            yield lambda block, part: pool.submit(self.bucket, self.buckets(block)[part])
        finally:
            self.trainer.stop.set()
            pool.shutdown(cancel_futures=True)

    @property
    def _names(self) -> list[str]:
        return [pattern.name for pattern in self.patterns]

    @property
    def _seconds(self) -> float:
        """About how long one core would train."""
        spec, subject = self.spec, self.spec.subject
        hidden = (subject.neurons.max,) * subject.layers.max
        widest = Architecture(spec.vocab_size, spec.sequence_length, subject.input_encoding, hidden, "relu")
        if spec.staged is None:
            branches = 3 * spec.counterfactual.steps if spec.counterfactual is not None else 0
            seen = (spec.training.steps + branches) * spec.training.batch_size
        else:
            seen = (spec.staged.epochs + spec.staged.improvement_epochs) * spec.staged.examples
        networks = (self._last - self._first) * self.block_size if spec.part is not None else spec.subjects
        return networks * seen * (widest.size * _PER_PARAMETER + widest.neurons * _PER_NEURON)


def _link(source: Path, target: Path) -> None:
    """The same file under another name; a copy where that is on another disk."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@lru_cache(maxsize=1024)
def _own_places(architecture: Architecture, width: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where a network of ``width`` neurons a layer has its parameters in :func:`flatten` of a wider architecture, and
    its neurons in the wider one's signatures."""
    last = sum(architecture.hidden)
    starts = range(0, last, architecture.hidden[0])
    neurons = [start + n for start in starts for n in range(width)] + [last]
    return own_places(architecture, width).numpy(), np.array(neurons)


def _bucket_size(spec: GenerationSpec) -> int:
    batch = spec.staged.batch_size if spec.staged else spec.training.batch_size
    fitting = _CACHED // (4 * batch * spec.subject.neurons.max)
    return min(MOST_TOGETHER, max(16, 1 << (max(fitting, 1).bit_length() - 1)))


def table_of(rows: Iterable[Row], columns: pyarrow.Schema) -> pyarrow.Table:
    """Records as a table."""
    rows = list(rows)
    return pyarrow.table([_column([row[name] for row in rows], kind) for name, kind in _fields(columns)], columns)


def _fields(columns: pyarrow.Schema) -> list[tuple[str, Any]]:
    return [(one.name, one.type) for one in columns]


def _column(values: list[Any], kind: Any) -> pyarrow.Array:
    if pyarrow.types.is_struct(kind):
        parts = [_column([value[one.name] for value in values], one.type) for one in kind]
        return pyarrow.StructArray.from_arrays(parts, fields=list(kind))
    if pyarrow.types.is_list(kind) and pyarrow.types.is_floating(kind.value_type):
        # Arrow reads long lists number by number.
        offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
        flat = np.concatenate([np.zeros(0, np.float32), *(np.asarray(value, np.float32) for value in values)])
        return pyarrow.ListArray.from_arrays(offsets, pyarrow.array(flat))
    return pyarrow.array(values, kind)


def generate(spec: GenerationSpec, run: Run | None = None) -> Zoo:
    """Make the zoo that ``spec`` asks for, in memory."""
    run = run or Run()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "zoo"
        DatasetGenerationPipeline(spec, run.device, run.inputs.get(BASELINE_INPUT)).run(folder, run)
        return Zoo.load(folder)
