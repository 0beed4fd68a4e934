"""Staged training of subjects one at a time in plain PyTorch: what a careful script does, tensors in memory."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ethogram.specs.generation import GenerationSpec
from services.generation import checks
from services.generation.buckets import BucketTrainer
from services.generation.data import Candidates, Examples, keys, shuffled
from services.generation.train import VALIDATION_EXAMPLES
from services.zoo.subjects import flatten, init, unflatten

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}


class Record(NamedTuple):
    """An accepted subject."""

    candidate: int
    accuracy: list[float]
    """Held-out, by stratum."""
    weights: list[float]


class PlainLoop:
    """The same candidates, the same data and the same checks as the product's; another way of training."""

    def __init__(self, spec: GenerationSpec) -> None:
        self._trainer = BucketTrainer(spec)
        self._spec, self._sampler = spec, self._trainer.sampler

    def subject(self, index: int) -> Record | None:
        """Train, check and describe one."""
        spec, staged = self._spec, self._spec.staged
        assert staged is not None
        indices = torch.tensor([index])
        own = Candidates.draw(spec, indices, len(self._trainer.patterns))
        network = self._network(own)
        train = Examples.draw(spec.seed, "examples", own, staged.examples, self._sampler.train)
        judge = Examples.draw(spec.seed, "validation", own, VALIDATION_EXAMPLES, self._sampler.validation)
        rate = float(own.learning_rate[0])
        wrong, expected = (one.corrupted(spec.seed, indices, staged.corruption_rate) for one in (train, judge))
        inputs = self._inputs(self._sampler.train.sequences[train.rows[0]])
        questions = self._inputs(self._sampler.validation.sequences[judge.rows[0]])
        first = (shuffled(spec.seed, "first stage", indices, e, staged.examples)[0] for e in range(staged.epochs))
        self._stage(network, (inputs, wrong[0].float()), (questions, expected[0].float()), rate, first)
        before = self._accuracy(network, own)
        if checks.degradation(before, own, staged)[0] is not None:
            return None
        rate *= staged.improvement_lr_factor
        epochs = range(staged.improvement_epochs)
        second = (shuffled(spec.seed, "second stage", indices, e, staged.examples)[0] for e in epochs)
        self._stage(network, (inputs, train.labels[0].float()), (questions, judge.labels[0].float()), rate, second)
        after = self._accuracy(network, own)
        if checks.improvement(before, after, own, staged)[0] is not None:
            return None
        weights = parameters_to_vector(network.parameters()).detach().unsqueeze(0)
        architecture = self._trainer.subject_trainer.architecture(own)
        self._trainer.extractor.extract(unflatten(weights, architecture), architecture)
        return Record(index, after[0].tolist(), weights[0].tolist())

    def _network(self, own: Candidates) -> nn.Sequential:
        spec, architecture = self._spec, self._trainer.subject_trainer.architecture(own)
        params = init(architecture, keys(spec.seed, "init", own.indices), kaiming=spec.subject.weight_init == "kaiming")
        layers: list[nn.Module] = []
        for fan_in, fan_out in architecture.layers:
            layers += [nn.Linear(fan_in, fan_out), _ACTIVATIONS[architecture.activation]()]
        network = nn.Sequential(*layers[:-1])
        vector_to_parameters(flatten(params)[0], network.parameters())
        return network

    def _stage(
        self,
        network: nn.Sequential,
        lesson: tuple[Tensor, Tensor],
        judge: tuple[Tensor, Tensor],
        rate: float,
        orders: Iterable[Tensor],
    ) -> None:
        staged, (inputs, targets), (questions, answers) = self._spec.staged, lesson, judge
        assert staged is not None
        optimizer = torch.optim.Adam(network.parameters(), lr=rate)
        best, best_state, since = float("inf"), network.state_dict(), 0
        for order in orders:
            for start in range(0, len(inputs), staged.batch_size):
                batch = order[start : start + staged.batch_size]
                optimizer.zero_grad()
                loss = F.binary_cross_entropy_with_logits(network(inputs[batch]).squeeze(1), targets[batch])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            with torch.no_grad():
                validation = float(F.binary_cross_entropy_with_logits(network(questions).squeeze(1), answers))
            since += 1
            if validation < best:
                best, since = validation, 0
                best_state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
            if since >= staged.patience:
                break
        network.load_state_dict(best_state)

    def _accuracy(self, network: nn.Sequential, own: Candidates) -> Tensor:
        evaluation = self._sampler.evaluation
        with torch.no_grad():
            answers = network(self._inputs(evaluation.sequences)).T > 0
        return evaluation.by_stratum(answers == evaluation.labels(own.selected))

    def _inputs(self, sequences: Tensor) -> Tensor:
        spec = self._spec
        if spec.subject.input_encoding == "index":
            return sequences.float()
        return F.one_hot(sequences, spec.vocab_size).flatten(1).float()


def _work(spec: str, first: int, step: int, count: int) -> tuple[float, list[Record]]:
    torch.set_num_threads(1)
    loop = PlainLoop(GenerationSpec.model_validate_json(spec))
    loop.subject(first)
    began = time.monotonic()
    found = [loop.subject(index) for index in range(first, first + step * count, step)]
    return time.monotonic() - began, [record for record in found if record is not None]


def plain_loop(spec: GenerationSpec, candidates: int) -> tuple[float, list[Record]]:
    """Seconds and the accepted records of the first ``candidates``, on as many processes as torch has threads."""
    workers = torch.get_num_threads()
    count = -(-candidates // workers)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        parts = pool.starmap(_work, [(spec.model_dump_json(), first, workers, count) for first in range(workers)])
    return max(seconds for seconds, _ in parts), sorted(record for _, records in parts for record in records)
