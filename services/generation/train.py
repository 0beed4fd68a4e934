"""Make a zoo: train candidates in fixed blocks, keep those that pass the quality gate."""

from __future__ import annotations

import json
import math
import threading
from collections import Counter, deque
from collections.abc import Generator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ethogram.errors import InvalidInput
from ethogram.specs.generation import GenerationSpec
from services.generation.data import Batches, select_patterns
from services.generation.population import Population, cosine
from services.runtime.run import Run
from services.runtime.seeds import generator
from services.zoo.dataset import Zoo
from services.zoo.patterns import from_specs
from services.zoo.pools import Evaluation, Pools, probes
from services.zoo.signatures import raw
from services.zoo.subjects import Architecture, Params, encode, forward, init
from services.zoo.universe import Universe

# Candidates that train together, few enough for their activations to stay in a core's cache. Rounding depends on the
# grouping, so this is part of what a seed means.
BLOCK = 32
# Candidates after which a hopeless spec is given up.
PATIENCE = 512
# Steps whose batches are drawn at once.
_CHUNK = 16


@dataclass(frozen=True)
class Block:
    """A block of trained candidates."""

    indices: Tensor
    params: Params
    selected: Tensor
    accuracy: Tensor
    """Held-out accuracy by stratum: float32 ``[models, patterns + 1]``; the last column is for sequences that match
    nothing."""


@dataclass
class Progress:
    """What is done: the accepted so far, and why others were not."""

    next_block: int = 0
    accepted: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    kept: list[dict[str, Tensor]] = field(default_factory=list)

    def add(self, block: Block, causes: list[str | None]) -> None:
        """Take the candidates of ``block`` that have no cause against them."""
        passed = torch.tensor([cause is None for cause in causes])
        everything = {"index": block.indices, "labels": block.selected, "accuracy": block.accuracy, **block.params}
        self.kept.append({name: tensor[passed] for name, tensor in everything.items()})
        self.accepted += int(passed.sum())
        self.rejected.update(cause for cause in causes if cause is not None)
        self.next_block += 1

    def gathered(self) -> dict[str, Tensor]:
        """All that was accepted, stacked."""
        return {name: torch.cat([part[name] for part in self.kept]) for name in self.kept[0]}

    def give_up_if_hopeless(self, spec: GenerationSpec) -> None:
        """Raise :class:`InvalidInput` when fewer than 2 % of a good number of candidates pass."""
        candidates = self.next_block * BLOCK
        if candidates >= PATIENCE and self.accepted < candidates * 0.02:
            causes = ", ".join(f"{cause}: {n}" for cause, n in self.rejected.most_common(4))
            raise InvalidInput.field(
                "spec.min_accuracy",
                f"only {self.accepted} of {candidates} candidates reach {spec.min_accuracy} ({causes}); "
                "lower it, train for more steps, use wider subjects or fewer patterns",
            )

    def save(self, folder: Path) -> None:
        """Write a checkpoint."""
        save_file(self.gathered(), folder / "accepted.safetensors")
        state = {"next_block": self.next_block, "accepted": self.accepted, "rejected": dict(self.rejected)}
        (folder / "progress.json").write_text(json.dumps(state))

    @classmethod
    def load(cls, folder: Path) -> Progress:
        """Read a checkpoint."""
        state = json.loads((folder / "progress.json").read_text())
        kept = [load_file(folder / "accepted.safetensors")]
        return cls(state["next_block"], state["accepted"], Counter(state["rejected"]), kept)


class Factory:
    """Everything that the candidates of one spec share."""

    def __init__(self, spec: GenerationSpec, device: str = "cpu") -> None:
        """Raises :class:`InvalidInput` for a spec that cannot be met."""
        self.spec, self.device = spec, torch.device(device)
        self.stop = threading.Event()
        self.patterns = from_specs(spec.patterns, spec.vocab_size, spec.sequence_length)
        for name in ("min_patterns_per_batch", "max_patterns_per_batch"):
            if getattr(spec, name) > len(self.patterns):
                raise InvalidInput.field(f"spec.{name}", f"only {len(self.patterns)} patterns are enabled")
        self.architecture = Architecture.of(spec)
        self.universe = Universe(spec.vocab_size, spec.sequence_length, self.patterns)
        self.universe.check()
        self.pools = Pools.build(self.universe, seed=spec.seed)
        self.evaluation = Evaluation.build(self.universe, 256, 512, seed=spec.seed)
        for i, pattern in enumerate(self.patterns):
            if self.pools.count[i] == 0 or not (self.evaluation.stratum == i).any():
                few = f"{pattern.name} has {self.universe.counts[i]} sequences, too few to train and judge on"
                raise InvalidInput.field(f"spec.patterns.{i}", f"{few}; leave it out")
        # One byte per input: rows are picked at random, and four times as many bytes take four times as long.
        self.table = encode(self.architecture, self.pools.sequences, torch.uint8).to(self.device)
        self.questions = encode(self.architecture, self.evaluation.sequences).to(self.device)

    def train_block(self, number: int) -> Block:
        """Train candidates ``number * BLOCK ..``."""
        spec = self.spec
        indices = torch.arange(number * BLOCK, (number + 1) * BLOCK)
        selected = select_patterns(
            spec.seed, indices, len(self.patterns), spec.min_patterns_per_batch, spec.max_patterns_per_batch
        )
        names: list[tuple[int, ...]] = [()] if spec.subject.init == "shared" else [(int(i),) for i in indices]
        start = init(self.architecture, BLOCK, [generator(spec.seed, "init", *name) for name in names])
        population = Population(self.architecture, {name: tensor.to(self.device) for name, tensor in start.items()})
        self._train(population, Batches(spec.seed, indices, selected, spec.training.batch_size, self.pools))
        params = population.params
        answers = forward(params, self.questions, self.architecture.activation).cpu() > 0
        accuracy = self.evaluation.by_stratum(answers == self.evaluation.labels(selected))
        return Block(indices, {name: tensor.cpu() for name, tensor in params.items()}, selected, accuracy)

    def _train(self, population: Population, batches: Batches) -> None:
        training, width = self.spec.training, self.architecture.input_size
        picked = torch.empty(BLOCK * training.batch_size, width, dtype=torch.uint8, device=self.device)
        inputs = torch.empty(BLOCK, training.batch_size, width, device=self.device)
        for first in range(0, training.steps, _CHUNK):
            if self.stop.is_set():
                raise CancelledError
            count = min(_CHUNK, training.steps - first)
            rows, labels = (tensor.to(self.device) for tensor in batches.draw(first, count))
            targets = labels.to(inputs.dtype)
            for i in range(count):
                torch.index_select(self.table, 0, rows[i].flatten(), out=picked)
                inputs.copy_(picked.view_as(inputs))
                population.step(inputs, targets[i], cosine(first + i, training.steps, training.learning_rate))

    def judge(self, block: Block) -> list[str | None]:
        """Why each candidate is rejected, or None: the stratum on which it does worst, below ``min_accuracy``."""
        finite = torch.stack([tensor.flatten(1).isfinite().all(1) for tensor in block.params.values()]).all(0)
        worst, strata = block.accuracy.min(1)
        names = [*(pattern.name for pattern in self.patterns), "others"]
        causes: list[str | None] = []
        for i, stratum in enumerate(strata.tolist()):
            if not finite[i]:
                causes.append("diverged")
            elif worst[i] >= self.spec.min_accuracy:
                causes.append(None)
            else:
                missed = stratum < len(self.patterns) and bool(block.selected[i, stratum])
                causes.append(f"{'misses' if missed else 'false alarms on'} {names[stratum]}")
        return causes


def generate(spec: GenerationSpec, run: Run | None = None) -> Zoo:
    """Make the zoo that ``spec`` asks for: the first ``spec.subjects`` candidates, by index, that pass the gate.

    Candidates train in fixed blocks, on as many threads as torch is set to use; the result does not depend on how
    many. Raises :class:`InvalidInput` before any training for a spec that cannot be met, and later when hardly any
    candidate passes.
    """
    return produce(spec, run or Run())[0]


def produce(spec: GenerationSpec, run: Run) -> tuple[Zoo, Counter[str]]:
    """:func:`generate`, with the number of rejected candidates by cause beside the zoo."""
    run.stage("generate", spec.subjects, "subjects")
    factory = Factory(spec, run.device)
    progress = Progress.load(run.resume) if run.resume else Progress()
    run.advance(min(progress.accepted, spec.subjects))
    with closing(_blocks(factory, progress)) as blocks:
        for block in blocks:
            progress.add(block, factory.judge(block))
            candidates = progress.next_block * BLOCK
            run.advance(min(progress.accepted, spec.subjects))
            run.metric(candidates, accepted_share=progress.accepted / candidates)
            if progress.accepted < spec.subjects:
                progress.give_up_if_hopeless(spec)
                if run.checkpoint_due():
                    run.checkpoint(progress.next_block, progress.save)
    causes = ", ".join(f"{count} {cause}" for cause, count in progress.rejected.most_common()) or "none"
    run.log(f"{progress.accepted} of {progress.next_block * BLOCK} candidates accepted; rejected: {causes}")
    kept = progress.gathered()
    count = spec.subjects
    params = {name: kept[name][:count] for name in factory.architecture.shapes}
    chosen = probes(factory.universe, spec.signature.probes, spec.seed)
    inputs = encode(factory.architecture, chosen)
    signatures = raw(params, inputs, factory.architecture.activation)
    zoo = Zoo(spec, kept["index"][:count], params, kept["labels"][:count], kept["accuracy"][:count], chosen, signatures)
    return zoo, progress.rejected


def _blocks(factory: Factory, progress: Progress) -> Generator[Block, None, None]:
    """Trained blocks in order from where ``progress`` is, until it has enough; a few are in training ahead."""
    workers = torch.get_num_threads() if factory.device.type == "cpu" else 1
    # One torch thread for each block: products this small lose more in synchronisation than they gain.
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    pending: deque[Future[Block]] = deque()
    try:
        number = progress.next_block
        while progress.accepted < factory.spec.subjects:
            share = progress.accepted / max(progress.next_block * BLOCK, 1) or 1.0
            needed = math.ceil((factory.spec.subjects - progress.accepted) / (BLOCK * share))
            while len(pending) < min(2 * workers, needed):
                pending.append(pool.submit(factory.train_block, number))
                number += 1
            yield pending.popleft().result()
    finally:
        factory.stop.set()
        pool.shutdown(cancel_futures=True)
