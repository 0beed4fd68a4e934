"""Training of candidates, many at once: in one stage on fresh sequences, or staged, degraded then improved."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ethogram.specs.generation import GenerationSpec, StagedSpec
from services.generation.data import Batches, Candidates, Examples, activations_of, keys, shuffled
from services.generation.population import Dropout, Population, State, cosine, params_of, state_of, with_ones
from services.zoo.pools import Pools
from services.zoo.quantize import rounded
from services.zoo.subjects import Architecture, Params, encode, init, select

# Steps whose batches are drawn at once.
_CHUNK = 16
# Validation sequences that decide when a stage ends.
VALIDATION_EXAMPLES = 128


@dataclass(frozen=True)
class Trained:
    """Candidates of one depth and activation after a stage of training."""

    candidates: Candidates
    architecture: Architecture
    """Of the widest."""
    params: Params
    """Rounded as the spec says; narrower networks are padded with zeros."""
    metrics: dict[str, Tensor]
    """By name, ``[n]``: ``validation_loss`` of the network that was kept, before rounding. Of a stage also ``epochs``,
    its passes over the data, those after the best one included; on fresh sequences ``training_loss``, on the last
    batch."""

    def select(self, index: Tensor) -> Trained:
        """Those at ``index``, a mask."""
        params = select(self.params, index.to(next(iter(self.params.values())).device))
        metrics = {name: values[index] for name, values in self.metrics.items()}
        return Trained(self.candidates.select(index), self.architecture, params, metrics)


@dataclass(frozen=True)
class Degraded:
    """Candidates between the two stages."""

    trained: Trained
    state: State
    """Where the second stage starts."""
    data: list[Examples]
    """What to train on, and validation sequences."""

    def select(self, index: Tensor) -> Degraded:
        """Those at ``index``, a mask."""
        state = [weight[index.to(weight.device)] for weight in self.state]
        return Degraded(self.trained.select(index), state, [examples.select(index) for examples in self.data])


class SubjectModelTrainer:
    """Trains candidates of one spec. Everything it does is a function of the spec and the candidates alone."""

    def __init__(self, spec: GenerationSpec, train: Pools, validation: Pools, device: str = "cpu") -> None:
        """``train``, ``validation``: sequences of these splits."""
        self.spec, self.device = spec, torch.device(device)
        self.stop = threading.Event()
        """When set, training ends with :class:`CancelledError` at the next step."""
        self._train, self._validation = train, validation
        self.shape = Architecture(spec.vocab_size, spec.sequence_length, spec.subject.input_encoding, (), "relu")
        """What candidates of any architecture share."""
        self._table, self._validation_table = (
            _Table(encode(self.shape, pools.sequences, torch.uint8), self.device) for pools in (train, validation)
        )

    def architecture(self, candidates: Candidates) -> Architecture:
        """The architecture of the widest of ``candidates``, which share depth and activation."""
        hidden = (int(candidates.neurons.max()),) * int(candidates.layers[0])
        return self.shape._replace(hidden=hidden, activation=activations_of(self.spec)[int(candidates.activation[0])])

    def _population(
        self, candidates: Candidates, start: tuple[Architecture, State] | None = None, rates: Tensor | None = None
    ) -> Population:
        """Networks in training: fresh, or from the state of others; ``rates``: a learning rate for each."""
        subject, seed, indices = self.spec.subject, self.spec.seed, candidates.indices
        # The architecture of the first stage: its widest network may be rejected since.
        architecture, state = start or (self.architecture(candidates), None)
        if state is None:
            seeds = keys(seed, "init", torch.zeros_like(indices) if subject.init == "shared" else indices)
            kaiming = subject.weight_init == "kaiming"
            state = state_of(init(architecture, seeds, candidates.neurons, kaiming=kaiming))
        dropout = None
        if subject.dropout.max > 0:
            masks = keys(seed, "dropped", indices).to(self.device)
            dropout = Dropout(candidates.dropout.float().to(self.device), masks)
        widths = candidates.neurons.to(self.device)
        state = [weight.to(self.device) for weight in state]
        # As float32 first: they come in float64, which an Apple GPU does not have.
        rates = rates.to(state[0].dtype).to(self.device) if rates is not None else None
        return Population(architecture, state, widths=widths, dropout=dropout, rates=rates)

    def train(self, candidates: Candidates) -> Trained:
        """Train in one stage, on fresh sequences at every step."""
        population = self._population(candidates, rates=self._own_rates(candidates))
        return self._on_fresh(population, candidates, "batches", candidates.selected)

    def branch(self, candidates: Candidates) -> list[Trained]:
        """Train in one stage, then three branches from there with a fresh optimiser: on the candidate's own patterns,
        on one more (``other``) and on one less (``target``). The three see the same sequences, and differ in the
        labels."""
        assert self.spec.counterfactual is not None
        steps, rates = self.spec.counterfactual.steps, self._own_rates(candidates)
        start = self._population(candidates, rates=rates)
        self._on_fresh(start, candidates, "batches", candidates.selected)
        more = candidates.selected.scatter(1, candidates.other.unsqueeze(1), True)
        less = candidates.selected.scatter(1, candidates.target.unsqueeze(1), False)
        branches = []
        for selected in (candidates.selected, more, less):
            relabelled = replace(candidates, selected=selected)
            population = self._population(candidates, (start.architecture, start.state), rates)
            branches.append(self._on_fresh(population, relabelled, "branches", more, steps))
        return branches

    def _on_fresh(
        self, population: Population, candidates: Candidates, stream: str, shown: Tensor, steps: int | None = None
    ) -> Trained:
        """Train on fresh sequences at every step, drawn for the patterns ``shown`` (bool ``[n, patterns]``) and
        labelled by the candidates' own. ``stream`` names the draw; ``steps``: those of the spec's training if None."""
        training, steps = self.spec.training, steps or self.spec.training.steps
        # The populations of candidates that draw their own rates have them.
        peak = training.learning_rate if isinstance(training.learning_rate, float) else 1.0
        batches = Batches(keys(self.spec.seed, stream, candidates.indices), shown, training.batch_size, self._train)
        pick = self._table.picker(len(candidates) * training.batch_size)
        for first in range(0, steps, _CHUNK):
            count = min(_CHUNK, steps - first)
            rows, labels = (tensor.to(self.device) for tensor in batches.draw(first, count, candidates.selected))
            targets = labels.float()
            for i in range(count):
                self._check()
                population.step(pick(rows[i]), targets[i], cosine(first + i, steps, peak))
        judged = Examples.draw(self.spec.seed, "validation", candidates, VALIDATION_EXAMPLES, self._validation)
        inputs = self._validation_table.picker(judged.rows.numel())(judged.rows.to(self.device))
        metrics = {
            "training_loss": population.loss(pick(rows[-1]), targets[-1]).cpu(),
            "validation_loss": population.loss(inputs, judged.labels.to(self.device).float()).cpu(),
        }
        return Trained(candidates, population.architecture, self._params(population.state), metrics)

    def _own_rates(self, candidates: Candidates) -> Tensor | None:
        """Peak rates of candidates that draw their own; None where one number is that of all."""
        return None if isinstance(self.spec.training.learning_rate, float) else candidates.learning_rate

    def degrade(self, candidates: Candidates, *, corrupted: bool = True) -> Degraded:
        """First stage of staged training: some labels of the target pattern are wrong, unless not ``corrupted``."""
        staged, seed = self._staged, self.spec.seed
        data = [
            Examples.draw(seed, "examples", candidates, staged.examples, self._train),
            Examples.draw(seed, "validation", candidates, VALIDATION_EXAMPLES, self._validation),
        ]
        # This stage is to learn the wrong labels, so the validation labels are as wrong.
        rate, indices = staged.corruption_rate if corrupted else 0.0, candidates.indices
        wrong = [replace(examples, labels=examples.corrupted(seed, indices, rate)) for examples in data]
        population = self._population(candidates, rates=candidates.learning_rate)
        return Degraded(*self._stage("first stage", candidates, population, wrong, epochs=staged.epochs), data)

    def improve(self, degraded: Degraded) -> Trained:
        """Second stage: the same networks train on right labels with a fresh optimiser."""
        staged, candidates = self._staged, degraded.trained.candidates
        rates = candidates.learning_rate * staged.improvement_lr_factor
        population = self._population(candidates, (degraded.trained.architecture, degraded.state), rates)
        epochs = staged.improvement_epochs
        return self._stage("second stage", candidates, population, degraded.data, epochs=epochs)[0]

    @property
    def _staged(self) -> StagedSpec:
        assert self.spec.staged is not None
        return self.spec.staged

    def _stage(
        self, name: str, candidates: Candidates, population: Population, data: list[Examples], *, epochs: int
    ) -> tuple[Trained, State]:
        """Train until the validation loss no longer improves. Returns the best networks, and their state before
        rounding. ``name``: of the draw; ``data``: as in :class:`Degraded`."""
        (examples, judged), staged = data, self._staged
        stopping = _EarlyStopping(population, staged.patience)
        rows, targets = examples.rows.to(self.device), examples.labels.to(self.device).float()
        held_out, expected = judged.rows.to(self.device), judged.labels.to(self.device).float()
        held_out_inputs = self._validation_table.picker(held_out.numel())(held_out)
        pick = self._table.picker(len(candidates) * min(staged.batch_size, staged.examples))
        for epoch in range(epochs):
            active = stopping.active
            # A view while none has stopped.
            left = slice(None) if len(active) == len(candidates) else active
            indices = candidates.indices[active.cpu()]
            orders = shuffled(self.spec.seed, name, indices, epoch, staged.examples).to(self.device)
            ordered_rows, ordered_targets = rows[left].gather(1, orders), targets[left].gather(1, orders)
            for start in range(0, staged.examples, staged.batch_size):
                self._check()
                batch = slice(start, start + staged.batch_size)
                population.step(pick(ordered_rows[:, batch]), ordered_targets[:, batch])
            stopping.update(population.loss(held_out_inputs[left], expected[left]))
            if not len(stopping.active):
                break
        best, metrics = stopping.best, {"epochs": stopping.epochs.cpu(), "validation_loss": stopping.loss.cpu()}
        return Trained(candidates, population.architecture, self._params(best), metrics), best

    def _params(self, state: State) -> Params:
        subject = self.spec.subject
        return rounded(params_of(state), subject.precision, subject.quantization)

    def _check(self) -> None:
        if self.stop.is_set():
            raise CancelledError


class _Table:
    """Sequences as network inputs with ones, to pick rows of."""

    def __init__(self, inputs: Tensor, device: torch.device) -> None:
        """``inputs``: uint8 ``[rows, input_size]``."""
        # One byte per number: rows are picked at random, and four times as many bytes take four times as long. Whole
        # words of them are picked, which takes a fraction of the time.
        table = with_ones(inputs)
        self._columns = table.shape[1]
        padded = F.pad(table, (0, -self._columns % 8))
        self._row_bytes = padded.shape[1]
        self._words = padded.view(torch.int64).squeeze(1).to(device)

    def picker(self, most: int) -> Callable[[Tensor], Tensor]:
        """A function from rows, int64 ``[models, n]``, at most ``most`` at once, to their inputs, float32 ``[models, n,
        input_size + 1]``, in a buffer that its next call overwrites."""
        word_buffer = self._words.new_empty(most, *self._words.shape[1:])
        # Whole words become numbers: a copy of some of their bytes takes several times as long.
        buffer = torch.empty(most, self._row_bytes, device=self._words.device)

        def pick(rows: Tensor) -> Tensor:
            words, numbers = word_buffer[: rows.numel()], buffer[: rows.numel()]
            torch.index_select(self._words, 0, rows.flatten(), out=words)
            numbers.copy_(words.view(torch.uint8).view(len(words), -1))
            return numbers.view(*rows.shape, -1)[..., : self._columns]

        return pick


class _EarlyStopping:
    """Keeps the best state of each network of a population, and removes networks that no longer improve."""

    def __init__(self, population: Population, patience: int) -> None:
        self._population, self._patience = population, patience
        self.best = [weight.clone() for weight in population.state]
        self.active = torch.arange(len(self.best[0]), device=self.best[0].device)
        """Networks that are still in the population, in its order."""
        self.loss = torch.full_like(self.active, torch.inf, dtype=torch.float32)
        self.epochs, self._epochs_since_best = torch.zeros_like(self.active), torch.zeros_like(self.active)

    def update(self, loss: Tensor) -> None:
        """Note the validation ``loss`` of the active networks after an epoch."""
        self.epochs[self.active] += 1
        self._epochs_since_best[self.active] += 1
        better = loss < self.loss[self.active]
        improved = self.active[better]
        for best, weight in zip(self.best, self._population.state, strict=True):
            if len(weight) == len(best):
                torch.where(better.view(-1, 1, 1), weight, best, out=best)
            else:
                best[improved] = weight[better]
        self.loss[improved] = loss[better]
        self._epochs_since_best[improved] = 0
        remaining = self._epochs_since_best[self.active] < self._patience
        if not remaining.all():
            self.active = self.active[remaining]
            self._population.keep(remaining)
