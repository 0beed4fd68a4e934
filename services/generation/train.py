"""Training of candidates, many at once: in one stage on fresh sequences, or staged, degraded then improved."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ethogram.specs.generation import GenerationSpec, StagedSpec
from services.generation.data import Batches, Candidates, Examples, activations_of, keys, shuffled
from services.generation.population import Dropout, Population, State, cosine, params_of, state_of, with_ones
from services.zoo.pools import Pools
from services.zoo.quantize import rounded
from services.zoo.subjects import Architecture, Params, encode, init

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
    epochs: Tensor
    """Passes over the data, those after the best one included: int64 ``[n]``."""
    loss: Tensor
    """Validation loss of the network that was kept: float32 ``[n]``."""

    def select(self, index: Tensor) -> Trained:
        """Those at ``index``, a mask."""
        params = {name: tensor[index.to(tensor.device)] for name, tensor in self.params.items()}
        return Trained(self.candidates.select(index), self.architecture, params, self.epochs[index], self.loss[index])


@dataclass(frozen=True)
class Degraded:
    """Candidates between the two stages."""

    trained: Trained
    state: State
    """Where the second stage starts."""
    examples: Examples
    judged: Examples
    """Validation sequences."""

    def select(self, index: Tensor) -> Degraded:
        """Those at ``index``, a mask."""
        state = [weight[index.to(weight.device)] for weight in self.state]
        return Degraded(self.trained.select(index), state, self.examples.select(index), self.judged.select(index))


class SubjectModelTrainer:
    """Trains candidates of one spec. Everything it does is a function of the spec and the candidates alone."""

    def __init__(self, spec: GenerationSpec, train: Pools, validation: Pools, device: str = "cpu") -> None:
        """``train``, ``validation``: sequences of these splits."""
        self.spec, self.device = spec, torch.device(device)
        self.stop = threading.Event()
        """Set, training ends with :class:`CancelledError` at the next step."""
        self._train, self._validation = train, validation
        any_shape = Architecture(spec.vocab_size, spec.sequence_length, spec.subject.input_encoding, (), "relu")
        self._table, self._validation_table = (
            _Table(encode(any_shape, pools.sequences, torch.uint8), self.device) for pools in (train, validation)
        )

    def architecture(self, candidates: Candidates) -> Architecture:
        """That of the widest of ``candidates``, which share depth and activation."""
        spec = self.spec
        hidden = (int(candidates.neurons.max()),) * int(candidates.layers[0])
        activation = activations_of(spec)[int(candidates.activation[0])]
        return Architecture(spec.vocab_size, spec.sequence_length, spec.subject.input_encoding, hidden, activation)

    def population(
        self, candidates: Candidates, start: tuple[Architecture, State] | None = None, rates: Tensor | None = None
    ) -> Population:
        """Networks in training: fresh, or from the state of others; ``rates``: a learning rate for each."""
        spec = self.spec
        # The architecture of the first stage: its widest network may be rejected since.
        architecture, state = start or (self.architecture(candidates), None)
        if state is None:
            shared = spec.subject.init == "shared"
            seeds = keys(spec.seed, "init", torch.zeros_like(candidates.indices) if shared else candidates.indices)
            kaiming = spec.subject.weight_init == "kaiming"
            state = state_of(init(architecture, seeds, candidates.neurons, kaiming=kaiming))
        dropout = None
        if spec.subject.dropout.max > 0:
            seeds = keys(spec.seed, "dropped", candidates.indices)
            dropout = Dropout(candidates.dropout.float().to(self.device), seeds.to(self.device))
        widths = candidates.neurons.to(self.device)
        state = [weight.to(self.device) for weight in state]
        rates = rates.to(self.device) if rates is not None else None
        return Population(architecture, state, widths=widths, dropout=dropout, rates=rates)

    def train(self, candidates: Candidates) -> Trained:
        """Train in one stage, on fresh sequences at every step."""
        population = self.population(candidates)
        self._on_fresh(population, candidates, "batches", self.spec.training.steps, candidates.selected)
        return self._trained(candidates, population)

    def branch(self, candidates: Candidates) -> tuple[Trained, Trained, Trained]:
        """Train in one stage, then three branches from there with a fresh optimiser: on the candidate's own patterns,
        on one more (``other``) and on one less (``target``). The three see the same sequences, and differ in the
        labels."""
        assert self.spec.counterfactual is not None
        start, steps = self.population(candidates), self.spec.counterfactual.steps
        self._on_fresh(start, candidates, "batches", self.spec.training.steps, candidates.selected)
        more = candidates.selected.scatter(1, candidates.other.unsqueeze(1), True)
        less = candidates.selected.scatter(1, candidates.target.unsqueeze(1), False)
        branches = []
        for selected in (candidates.selected, more, less):
            relabelled = replace(candidates, selected=selected)
            population = self.population(candidates, (start.architecture, start.state))
            self._on_fresh(population, relabelled, "branches", steps, more)
            branches.append(self._trained(relabelled, population))
        return branches[0], branches[1], branches[2]

    def _on_fresh(self, population: Population, candidates: Candidates, stream: str, steps: int, shown: Tensor) -> None:
        """Train on fresh sequences at every step, drawn for the patterns ``shown`` (bool ``[n, patterns]``) and
        labelled by the candidates' own; ``stream`` names the draw."""
        training = self.spec.training
        size, pools = training.batch_size, self._train
        batches = Batches(keys(self.spec.seed, stream, candidates.indices), shown, size, pools)
        inputs = _Inputs(self._table, len(candidates) * size)
        for first in range(0, steps, _CHUNK):
            count = min(_CHUNK, steps - first)
            drawn = batches.draw(first, count, candidates.selected)
            rows, labels = (tensor.to(self.device) for tensor in drawn)
            targets = labels.float()
            for i in range(count):
                self._check()
                population.step(inputs(rows[i]), targets[i], cosine(first + i, steps, training.learning_rate))

    def _trained(self, candidates: Candidates, population: Population) -> Trained:
        zeros = torch.zeros(len(candidates))
        return Trained(candidates, population.architecture, self._params(population.state), zeros.long(), zeros)

    def degrade(self, candidates: Candidates) -> Degraded:
        """First stage of staged training: some labels of the target pattern are wrong."""
        staged, seed, indices = self._staged, self.spec.seed, candidates.indices
        examples = Examples.draw(seed, "examples", candidates, staged.examples, self._train)
        judged = Examples.draw(seed, "validation", candidates, VALIDATION_EXAMPLES, self._validation)
        # This stage is to learn the wrong labels, so the validation labels are as wrong.
        wrong = [part.corrupted(seed, indices, staged.corruption_rate) for part in (examples, judged)]
        lesson = self._lesson("first stage", staged.epochs, examples.rows, wrong[0], judged.rows, wrong[1])
        population = self.population(candidates, rates=candidates.learning_rate)
        trained, state = self._stage(candidates, population, lesson)
        return Degraded(trained, state, examples, judged)

    def improve(self, degraded: Degraded) -> Trained:
        """Second stage: the same networks train on right labels with a fresh optimiser."""
        candidates, examples, judged = degraded.trained.candidates, degraded.examples, degraded.judged
        epochs = self._staged.improvement_epochs
        lesson = self._lesson("second stage", epochs, examples.rows, examples.labels, judged.rows, judged.labels)
        rates = candidates.learning_rate * self._staged.improvement_lr_factor
        start = (degraded.trained.architecture, degraded.state)
        population = self.population(candidates, start, rates)
        return self._stage(candidates, population, lesson)[0]

    @property
    def _staged(self) -> StagedSpec:
        assert self.spec.staged is not None
        return self.spec.staged

    def _lesson(self, name: str, epochs: int, *tensors: Tensor) -> _Lesson:
        rows, labels, held_out, expected = (tensor.to(self.device) for tensor in tensors)
        inputs = _Inputs(self._validation_table, held_out.numel())(held_out)
        return _Lesson(name, epochs, rows, labels.float(), inputs, expected.float())

    def _stage(self, candidates: Candidates, population: Population, lesson: _Lesson) -> tuple[Trained, State]:
        staged = self._staged
        stopping = _EarlyStopping(population, staged.patience)
        inputs = _Inputs(self._table, len(candidates) * min(staged.batch_size, staged.examples))
        for epoch in range(lesson.epochs):
            active = stopping.active
            # A view while none has stopped.
            rows_left = slice(None) if len(active) == len(candidates) else active
            indices = candidates.indices[active.cpu()]
            orders = shuffled(self.spec.seed, lesson.name, indices, epoch, staged.examples).to(self.device)
            rows, targets = lesson.rows[rows_left].gather(1, orders), lesson.targets[rows_left].gather(1, orders)
            for start in range(0, staged.examples, staged.batch_size):
                self._check()
                batch = slice(start, start + staged.batch_size)
                population.step(inputs(rows[:, batch]), targets[:, batch])
            stopping.update(population.loss(lesson.validation_inputs[rows_left], lesson.validation_targets[rows_left]))
            if not len(stopping.active):
                break
        params, epochs, loss = self._params(stopping.best), stopping.epochs.cpu(), stopping.loss.cpu()
        return Trained(candidates, population.architecture, params, epochs, loss), stopping.best

    def _params(self, state: State) -> Params:
        subject = self.spec.subject
        return rounded(params_of(state), subject.precision, subject.quantization)

    def _check(self) -> None:
        if self.stop.is_set():
            raise CancelledError


class _Lesson(NamedTuple):
    """Data of one stage: what each network trains on, and what decides when it stops."""

    name: str
    epochs: int
    rows: Tensor
    """Of the training pools: int64 ``[models, examples]``."""
    targets: Tensor
    """float32 ``[models, examples]``."""
    validation_inputs: Tensor
    """float32 ``[models, n, input_size + 1]``, with ones."""
    validation_targets: Tensor
    """float32 ``[models, n]``."""


class _Table:
    """Sequences as network inputs with ones, to pick rows of."""

    def __init__(self, inputs: Tensor, device: torch.device) -> None:
        """``inputs``: uint8 ``[rows, input_size]``."""
        # One byte per number: rows are picked at random, and four times as many bytes take four times as long. Whole
        # words of them are picked, which takes a fraction of the time.
        table = with_ones(inputs)
        self.columns = table.shape[1]
        self.words = F.pad(table, (0, -self.columns % 8)).view(torch.int64).squeeze(1).to(device)


class _Inputs:
    """Rows of a table as network inputs, in a buffer of its own."""

    def __init__(self, table: _Table, most: int) -> None:
        """At most ``most`` rows are picked at once."""
        self._table = table
        self._words = table.words.new_empty(most, *table.words.shape[1:])
        self._numbers = torch.empty(most, table.columns, device=table.words.device)

    def __call__(self, rows: Tensor) -> Tensor:
        """``rows``: int64 ``[models, n]``. Returns float32 ``[models, n, input_size + 1]``, which the next call
        overwrites."""
        words, numbers = self._words[: rows.numel()], self._numbers[: rows.numel()]
        torch.index_select(self._table.words, 0, rows.flatten(), out=words)
        picked = words.view(torch.uint8).view(len(words), -1)[:, : self._table.columns]
        return numbers.copy_(picked).view(*rows.shape, -1)


class _EarlyStopping:
    """Keeps the best state of each network of a population, and removes networks that no longer improve."""

    def __init__(self, population: Population, patience: int) -> None:
        self._population, self._patience = population, patience
        models, device = population.models, population.state[0].device
        self.best = [weight.clone() for weight in population.state]
        self.loss = torch.full((models,), torch.inf, device=device)
        self.epochs = torch.zeros(models, dtype=torch.int64, device=device)
        self._epochs_since_best = torch.zeros(models, dtype=torch.int64, device=device)
        self.active = torch.arange(models, device=device)
        """Networks that are still in the population, in its order."""

    def update(self, loss: Tensor) -> None:
        """Note the validation ``loss`` of the active networks after an epoch."""
        self.epochs[self.active] += 1
        better = loss < self.loss[self.active]
        improved = self.active[better]
        for best, weight in zip(self.best, self._population.state, strict=True):
            if len(improved) == len(best):
                best.copy_(weight)
            else:
                best[improved] = weight[better]
        self.loss[improved] = loss[better]
        self._epochs_since_best[self.active] += 1
        self._epochs_since_best[improved] = 0
        remaining = self._epochs_since_best[self.active] < self._patience
        if not remaining.all():
            self.active = self.active[remaining]
            self._population.keep(remaining)
