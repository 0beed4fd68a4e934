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

from ethogram.errors import InvalidInput
from ethogram.specs.generation import REGISTERED, GenerationSpec
from services.generation import checks
from services.generation.data import Candidates, activations_of
from services.generation.sampler import PatternDatasetSampler
from services.generation.train import SubjectModelTrainer, Trained
from services.runtime.run import Run
from services.zoo.dataset import DATA, Zoo, data_file, schema, write_about
from services.zoo.signatures import ActivationSignatureExtractor
from services.zoo.statistics import Statistics
from services.zoo.subjects import Architecture, Params, encode, flatten, forward, own_places

# Candidates that train together: at most so many, and so few that what a layer makes of their batches (bytes) stays in
# a core's cache. Rounding depends on the grouping, so this is part of what a seed means.
MOST_TOGETHER = 128
_CACHED = 2**20
# Where shapes differ, so many buckets' worth of candidates are drawn together and then sorted into buckets by shape.
_MOST_SHAPES = 8
# Candidates to a shard of the records.
_SHARD = 1024
# Candidates after which a hopeless spec is given up.
PATIENCE = 512
# Processes take some seconds to start, which is worth it for longer work than this, in seconds of one core.
_WORTH_PROCESSES = 30.0
# Of a training step, for each parameter and sequence; and what a core does of it.
_FLOP, _FLOP_PER_SECOND = 6, 1.5e10

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


@dataclass
class Progress:
    """What is done: how many were accepted, and why others were not."""

    next_block: int = 0
    accepted: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    shard: int = 0
    """Number of the shard that is being filled."""

    @property
    def candidates(self) -> int:
        """How many were judged."""
        return self.accepted + sum(self.rejected.values())


class DatasetGenerationPipeline:
    """Makes the zoo that a spec asks for: the first ``spec.subjects`` candidates, by index, that pass the checks.

    Every candidate is a function of the spec and its index. They train in fixed blocks, on as many threads as torch is
    set to use; the result depends neither on how many, nor on interruptions.
    """

    def __init__(self, spec: GenerationSpec, device: str = "cpu") -> None:
        """Raises :class:`InvalidInput` for a spec that cannot be met."""
        self.spec = spec
        self.sampler = PatternDatasetSampler(spec)
        self.patterns = self.sampler.patterns
        self.trainer = SubjectModelTrainer(spec, self.sampler.train, self.sampler.validation, device)
        any_shape = Architecture(spec.vocab_size, spec.sequence_length, spec.subject.input_encoding, (), "relu")
        baseline = self.sampler.baseline
        self.probes = baseline.sequences
        self.extractor = ActivationSignatureExtractor(
            spec.signature, encode(any_shape, baseline.sequences).to(device), baseline.membership
        )
        self._questions = encode(any_shape, self.sampler.evaluation.sequences).to(device)
        shapes = spec.subject.layers.size * len(activations_of(spec))
        self.bucket_size = _bucket_size(spec)
        self.block_size = self.bucket_size * min(shapes, _MOST_SHAPES)

    def run(self, folder: Path, run: Run | None = None) -> dict[str, Any]:
        """Write the zoo into the new ``folder`` (see :mod:`services.zoo.dataset`); its figures.

        Raises :class:`InvalidInput` when hardly any candidate passes.
        """
        run = run or Run()
        wanted = self.spec.subjects
        run.stage("generate", wanted, "subjects")
        (folder / DATA).mkdir(parents=True)
        progress, shard = self._resume(folder, run)
        run.advance(min(progress.accepted, wanted))
        with closing(self._blocks(progress)) as blocks:
            for block in blocks:
                shard = pyarrow.concat_tables([shard, block.table])
                progress.next_block += 1
                progress.accepted += len(block.table)
                progress.rejected.update(block.causes)
                run.advance(min(progress.accepted, wanted))
                run.metric(progress.candidates, accepted_share=progress.accepted / progress.candidates)
                enough = progress.accepted >= wanted
                if enough or progress.next_block % -(-_SHARD // self.block_size) == 0:
                    self._write(shard.slice(0, len(shard) - max(0, progress.accepted - wanted)), folder, progress.shard)
                    progress.shard, shard = progress.shard + 1, self._schema.empty_table()
                if not enough:
                    self._give_up_if_hopeless(progress)
                    if run.checkpoint_due():
                        run.checkpoint(progress.next_block, partial(self._save, folder, progress, shard))
        causes = ", ".join(f"{count} {cause}" for cause, count in progress.rejected.most_common()) or "none"
        run.log(f"{progress.accepted} of {progress.candidates} candidates accepted; rejected: {causes}")
        facts = {"subjects": wanted, "rejected": dict(progress.rejected.most_common())}
        write_about(folder, self.spec, self.patterns, self.probes, facts)
        return Statistics.of(folder).figures()

    def block(self, number: int) -> Block:
        """Train and judge candidates ``number * block_size ..``."""
        return Block.of([self.bucket(bucket) for bucket in self.buckets(number)])

    def buckets(self, number: int) -> list[Candidates]:
        """The candidates of a block, as they train together: of one depth and activation, and of similar width."""
        indices = torch.arange(number * self.block_size, (number + 1) * self.block_size)
        candidates = Candidates.draw(self.spec, indices, len(self.patterns))
        shape, found = candidates.layers * 64 + candidates.activation, []
        for one in sorted(set(shape.tolist())):
            same = (shape == one).nonzero().flatten()
            same = same[candidates.neurons[same].argsort(stable=True)]
            found += [candidates.select(part) for part in same.chunk(-(-len(same) // self.bucket_size))]
        return found

    def bucket(self, candidates: Candidates) -> Block:
        """Train and judge one of the :meth:`buckets`."""
        rows, causes = self._staged(candidates) if self.spec.staged else self._single(candidates)
        return Block(table_of(rows, self._schema), causes)

    def accuracy(self, params: Params, architecture: Architecture, candidates: Candidates) -> Tensor:
        """On held-out sequences, by stratum: float32 ``[models, patterns + 1]``; the last column is for sequences that
        match nothing."""
        evaluation = self.sampler.evaluation
        answers = forward(params, self._questions, architecture.activation).cpu() > 0
        return evaluation.by_stratum(answers == evaluation.labels(candidates.selected))

    def _single(self, candidates: Candidates) -> tuple[list[Row], list[str]]:
        trained = self.trainer.train(candidates)
        accuracy = self.accuracy(trained.params, trained.architecture, candidates)
        causes = self._judged(trained, accuracy)
        kept = torch.tensor([cause is None for cause in causes])
        return self._rows(trained, accuracy, kept), [cause for cause in causes if cause is not None]

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
        return rows, causes + [cause for cause in late if cause is not None]

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
        return schema(self.extractor.methods, self.spec.staged is not None)

    def _write(self, shard: pyarrow.Table, folder: Path, number: int) -> None:
        """A shard, if it holds anything."""
        if len(shard):
            parquet.write_table(shard, folder / data_file(number))

    def _save(self, folder: Path, progress: Progress, shard: pyarrow.Table, target: Path) -> None:
        """Write a checkpoint: the shards so far, and what is there of the next."""
        (target / DATA).mkdir()
        for file in (folder / DATA).iterdir():
            os.link(file, target / DATA / file.name)
        parquet.write_table(shard, target / "shard.parquet")
        state = {"next_block": progress.next_block, "accepted": progress.accepted, "shard": progress.shard}
        (target / "progress.json").write_text(json.dumps(state | {"rejected": dict(progress.rejected)}))

    def _resume(self, folder: Path, run: Run) -> tuple[Progress, pyarrow.Table]:
        if run.resume is None:
            return Progress(), self._schema.empty_table()
        state = json.loads((run.resume / "progress.json").read_text())
        for file in (run.resume / DATA).iterdir():
            shutil.copyfile(file, folder / DATA / file.name)
        progress = Progress(state["next_block"], state["accepted"], Counter(state["rejected"]), state["shard"])
        return progress, parquet.read_table(run.resume / "shard.parquet")

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
            while progress.accepted < self.spec.subjects:
                share = progress.accepted / max(progress.candidates, 1) or 1.0
                needed = math.ceil((self.spec.subjects - progress.accepted) / (self.block_size * share))
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

            processes = Workers(self.spec, workers)
            try:
                yield processes.submit
            finally:
                processes.close()
            return
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
        size = Architecture(spec.vocab_size, spec.sequence_length, subject.input_encoding, hidden, "relu").size
        if spec.staged is None:
            seen = spec.training.steps * spec.training.batch_size
        else:
            seen = (spec.staged.epochs + spec.staged.improvement_epochs) * spec.staged.examples
        return spec.subjects * seen * size * _FLOP / _FLOP_PER_SECOND


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
    """Make the zoo that ``spec`` asks for, of subjects of one shape, in memory."""
    Architecture.of(spec)
    run = run or Run()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "zoo"
        DatasetGenerationPipeline(spec, run.device).run(folder, run)
        return Zoo.load(folder)
