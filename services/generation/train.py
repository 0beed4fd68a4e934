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
    """Where the second stage goes on."""
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
        """Networks in training: fresh, or from where others were; ``rates``: learning rates of their own."""
        spec = self.spec
        # Not of those that are left, but of those that began: the widest may have gone.
        architecture, state = start or (self.architecture(candidates), None)
        if state is None:
            shared = spec.subject.init == "shared"
            draws = keys(spec.seed, "init", torch.zeros_like(candidates.indices) if shared else candidates.indices)
            kaiming = spec.subject.weight_init == "kaiming"
            state = state_of(init(architecture, draws, candidates.neurons, kaiming=kaiming))
        dropout = None
        if spec.subject.dropout.max > 0:
            own = keys(spec.seed, "dropped", candidates.indices)
            dropout = Dropout(candidates.dropout.float().to(self.device), own.to(self.device))
        widths = candidates.neurons.to(self.device)
        state = [weight.to(self.device) for weight in state]
        rates = rates.to(self.device) if rates is not None else None
        return Population(architecture, state, widths=widths, dropout=dropout, rates=rates)

    def train(self, candidates: Candidates) -> Trained:
        """Train in one stage, on fresh sequences at every step."""
        population = self.population(candidates)
        self._fresh(population, candidates, "batches", self.spec.training.steps, candidates.selected)
        return self._once(candidates, population)

    def branch(self, candidates: Candidates) -> tuple[Trained, Trained, Trained]:
        """Train in one stage, then on from there, with a fresh optimiser, to what each was to learn, to one pattern
        more (``other``) and to one less (``target``). The three see the same sequences, and differ in the labels."""
        assert self.spec.counterfactual is not None
        start, steps = self.population(candidates), self.spec.counterfactual.steps
        self._fresh(start, candidates, "batches", self.spec.training.steps, candidates.selected)
        more = candidates.selected.scatter(1, candidates.other.unsqueeze(1), True)
        less = candidates.selected.scatter(1, candidates.target.unsqueeze(1), False)
        branches = []
        for selected in (candidates.selected, more, less):
            own = replace(candidates, selected=selected)
            population = self.population(candidates, (start.architecture, start.state))
            self._fresh(population, own, "branches", steps, more)
            branches.append(self._once(own, population))
        return branches[0], branches[1], branches[2]

    def _fresh(self, population: Population, candidates: Candidates, stream: str, steps: int, shown: Tensor) -> None:
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

    def _once(self, candidates: Candidates, population: Population) -> Trained:
        nothing = torch.zeros(len(candidates))
        params = self._params(population.state)
        return Trained(candidates, population.architecture, params, nothing.long(), nothing)

    def degrade(self, candidates: Candidates) -> Degraded:
        """First stage of staged training: some labels of the target pattern are wrong."""
        staged, seed, indices = self._staged, self.spec.seed, candidates.indices
        examples = Examples.draw(seed, "examples", candidates, staged.examples, self._train)
        judged = Examples.draw(seed, "validation", candidates, VALIDATION_EXAMPLES, self._validation)
        # What wrong labels teach is what it must get right now, so the validation labels are as wrong.
        wrong = [one.corrupted(seed, indices, staged.corruption_rate) for one in (examples, judged)]
        lesson = self._lesson("first stage", staged.epochs, examples.rows, wrong[0], judged.rows, wrong[1])
        population = self.population(candidates, rates=candidates.learning_rate)
        trained, state = self._stage(candidates, population, lesson)
        return Degraded(trained, state, examples, judged)

    def improve(self, degraded: Degraded) -> Trained:
        """Second stage: the same networks go on with right labels and a fresh optimiser."""
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
        rows, labels, asked, expected = (tensor.to(self.device) for tensor in tensors)
        questions = _Inputs(self._validation_table, asked.numel())(asked)
        return _Lesson(name, epochs, rows, labels.float(), questions, expected.float())

    def _stage(self, candidates: Candidates, population: Population, lesson: _Lesson) -> tuple[Trained, State]:
        staged = self._staged
        watch = _EarlyStopping(population, staged.patience)
        inputs = _Inputs(self._table, len(candidates) * min(staged.batch_size, staged.examples))
        for epoch in range(lesson.epochs):
            active = watch.active
            # A view where nobody has stopped yet.
            own = slice(None) if len(active) == len(candidates) else active
            indices = candidates.indices[active.cpu()]
            orders = shuffled(self.spec.seed, lesson.name, indices, epoch, staged.examples).to(self.device)
            rows, targets = lesson.rows[own].gather(1, orders), lesson.targets[own].gather(1, orders)
            for start in range(0, staged.examples, staged.batch_size):
                self._check()
                batch = slice(start, start + staged.batch_size)
                population.step(inputs(rows[:, batch]), targets[:, batch])
            watch.see(population.loss(lesson.questions[own], lesson.answers[own]))
            if not len(watch.active):
                break
        params, epochs, loss = self._params(watch.best), watch.epochs.cpu(), watch.loss.cpu()
        return Trained(candidates, population.architecture, params, epochs, loss), watch.best

    def _params(self, state: State) -> Params:
        subject = self.spec.subject
        return rounded(params_of(state), subject.precision, subject.quantization)

    def _check(self) -> None:
        if self.stop.is_set():
            raise CancelledError


class _Lesson(NamedTuple):
    """What a stage teaches each network, and what decides when it ends."""

    name: str
    epochs: int
    rows: Tensor
    """Of the training pools: int64 ``[models, examples]``."""
    targets: Tensor
    """float32 ``[models, examples]``."""
    questions: Tensor
    """float32 ``[models, n, input_size + 1]``, with ones."""
    answers: Tensor
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
    """Rows of a table as network inputs, in room of its own."""

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
    """Keeps the best state of each network of a population, and takes those out that no longer get better."""

    def __init__(self, population: Population, patience: int) -> None:
        self._population, self._patience = population, patience
        models, device = population.models, population.state[0].device
        self.best = [weight.clone() for weight in population.state]
        self.loss = torch.full((models,), torch.inf, device=device)
        self.epochs = torch.zeros(models, dtype=torch.int64, device=device)
        self._since = torch.zeros(models, dtype=torch.int64, device=device)
        self.active = torch.arange(models, device=device)
        """Networks that are still in the population, in its order."""

    def see(self, loss: Tensor) -> None:
        """An epoch is over; ``loss`` of the active networks."""
        self.epochs[self.active] += 1
        better = loss < self.loss[self.active]
        found = self.active[better]
        for best, weight in zip(self.best, self._population.state, strict=True):
            if len(found) == len(best):
                best.copy_(weight)
            else:
                best[found] = weight[better]
        self.loss[found] = loss[better]
        self._since[self.active] += 1
        self._since[found] = 0
        going = self._since[self.active] < self._patience
        if not going.all():
            self.active = self.active[going]
            self._population.keep(going)
