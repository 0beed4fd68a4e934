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
from services.zoo.pools import Evaluation
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
        assert spec.staged is not None
        self._spec, self._staged, self._trainer = spec, spec.staged, BucketTrainer(spec)
        self._sampler = self._trainer.sampler

    def subject(self, index: int) -> Record | None:
        """Train, check and describe one; None where a check fails."""
        seed, staged, indices = self._spec.seed, self._staged, torch.tensor([index])
        candidate = Candidates.draw(self._spec, indices, len(self._trainer.patterns))
        network = self._network(candidate)
        training = Examples.draw(seed, "examples", candidate, staged.examples, self._sampler.train)
        validation = Examples.draw(seed, "validation", candidate, VALIDATION_EXAMPLES, self._sampler.validation)
        inputs = self._inputs(self._sampler.train.sequences[training.rows[0]])
        held_out = self._inputs(self._sampler.validation.sequences[validation.rows[0]])

        def stage(name: str, targets: Tensor, answers: Tensor, epochs: int, rate: float) -> Tensor:
            """Train with these labels; which answers on the selection set are right."""
            orders = (shuffled(seed, name, indices, epoch, staged.examples)[0] for epoch in range(epochs))
            self._train(network, (inputs, targets[0].float()), (held_out, answers[0].float()), rate, orders)
            return self._correct(network, candidate, selection)

        rate, selection = float(candidate.learning_rate[0]), self._sampler.selection
        targets, answers = (
            examples.corrupted(seed, indices, staged.corruption_rate) for examples in (training, validation)
        )
        before = stage("first stage", targets, answers, staged.epochs, rate)
        if checks.degradation(before, candidate, staged, selection)[0] is not None:
            return None
        rate *= staged.improvement_lr_factor
        after = stage("second stage", training.labels, validation.labels, staged.improvement_epochs, rate)
        if checks.improvement(before, after, candidate, staged, selection)[0] is not None:
            return None
        weights = parameters_to_vector(network.parameters()).detach().unsqueeze(0)
        architecture = self._trainer.subject_trainer.architecture(candidate)
        self._trainer.extractor.extract(unflatten(weights, architecture), architecture)
        evaluation = self._sampler.evaluation
        accuracy = evaluation.by_stratum(self._correct(network, candidate, evaluation))
        return Record(index, accuracy[0].tolist(), weights[0].tolist())

    def _network(self, candidate: Candidates) -> nn.Sequential:
        spec, architecture = self._spec, self._trainer.subject_trainer.architecture(candidate)
        seeds = keys(spec.seed, "init", candidate.indices)
        params = init(architecture, seeds, kaiming=spec.subject.weight_init == "kaiming")
        layers: list[nn.Module] = []
        for fan_in, fan_out in architecture.layers:
            layers += [nn.Linear(fan_in, fan_out), _ACTIVATIONS[architecture.activation]()]
        network = nn.Sequential(*layers[:-1])
        vector_to_parameters(flatten(params)[0], network.parameters())
        return network

    def _train(
        self,
        network: nn.Sequential,
        training: tuple[Tensor, Tensor],
        validation: tuple[Tensor, Tensor],
        rate: float,
        orders: Iterable[Tensor],
    ) -> None:
        """Train for an epoch in each of ``orders``, stop early, and keep the best."""
        staged, (inputs, targets), (held_out, answers) = self._staged, training, validation
        # Of its three ways, the fastest on networks this small.
        optimizer = torch.optim.Adam(network.parameters(), lr=rate, fused=True)
        best, best_state, since = float("inf"), network.state_dict(), 0
        for order in orders:
            for batch in torch.split(order, staged.batch_size):
                optimizer.zero_grad()
                loss = F.binary_cross_entropy_with_logits(network(inputs[batch]).squeeze(1), targets[batch])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            with torch.no_grad():
                held_out_loss = float(F.binary_cross_entropy_with_logits(network(held_out).squeeze(1), answers))
            since += 1
            if held_out_loss < best:
                best, since = held_out_loss, 0
                best_state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
            if since >= staged.patience:
                break
        network.load_state_dict(best_state)

    def _correct(self, network: nn.Sequential, candidate: Candidates, evaluation: Evaluation) -> Tensor:
        with torch.no_grad():
            answers: Tensor = network(self._inputs(evaluation.sequences)).T > 0
        return answers == evaluation.labels(candidate.selected)

    def _inputs(self, sequences: Tensor) -> Tensor:
        if self._spec.subject.input_encoding == "index":
            return sequences.float()
        return F.one_hot(sequences, self._spec.vocab_size).flatten(1).float()


def _work(spec: str, first: int, step: int, count: int) -> tuple[float, list[Record]]:
    torch.set_num_threads(1)
    loop = PlainLoop(GenerationSpec.model_validate_json(spec))
    loop.subject(first)
    began = time.monotonic()
    records = [loop.subject(index) for index in range(first, first + step * count, step)]
    return time.monotonic() - began, [record for record in records if record is not None]


def plain_loop(spec: GenerationSpec, candidates: int) -> tuple[float, list[Record]]:
    """Seconds and the accepted records of the first ``candidates``, on as many processes as torch has threads."""
    workers = torch.get_num_threads()
    count = -(-candidates // workers)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        parts = pool.starmap(_work, [(spec.model_dump_json(), first, workers, count) for first in range(workers)])
    return max(seconds for seconds, _ in parts), sorted(record for _, records in parts for record in records)
