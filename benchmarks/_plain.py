"""Staged training of subjects one at a time in plain PyTorch: what a careful script does, tensors in memory."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterable
from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

from ethogram.specs.generation import GenerationSpec
from services.generation import checks
from services.generation.buckets import BucketTrainer
from services.generation.data import Candidates, Examples, keys, shuffled
from services.generation.train import VALIDATION_EXAMPLES
from services.zoo.pools import Evaluation
from services.zoo.subjects import init, unflatten

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}
Labelled = tuple[Tensor, Tensor]
"""Of each network, inputs ``[models, n, input_size]`` and labels ``[models, n]``, both float32."""


class Record(NamedTuple):
    """An accepted subject."""

    candidate: int
    accuracy: list[float]
    """Held-out, by stratum."""
    weights: list[float]


class PlainLoop:
    """The same candidates, the same data and the same checks as the product's; another way of training.

    Networks train one at a time; data are drawn and checks are made for a bucket of them at once, as the product does.
    """

    def __init__(self, spec: GenerationSpec) -> None:
        assert spec.staged is not None
        assert spec.gate == 0, "there is no gate here"
        self._spec, self._staged, self._trainer = spec, spec.staged, BucketTrainer(spec)
        self._sampler = self._trainer.sampler

    def subjects(self, indices: Tensor) -> list[Record]:
        """Train, check and describe the candidates at ``indices``; the accepted ones."""
        buckets = self._trainer.group(self._trainer.candidates(indices))
        return sorted(record for bucket in buckets for record in self._bucket(bucket))

    def _bucket(self, candidates: Candidates) -> list[Record]:
        seed, staged, sampler, indices = self._spec.seed, self._staged, self._sampler, candidates.indices
        training = Examples.draw(seed, "examples", candidates, staged.examples, sampler.train)
        validation = Examples.draw(seed, "validation", candidates, VALIDATION_EXAMPLES, sampler.validation)
        inputs = self._inputs(sampler.train.sequences[training.rows])
        held_out = self._inputs(sampler.validation.sequences[validation.rows])
        wrong, wrong_answers = (
            examples.corrupted(seed, indices, staged.corruption_rate).float() for examples in (training, validation)
        )
        networks = self._networks(candidates)
        self._stage("first stage", networks, candidates, (inputs, wrong), (held_out, wrong_answers))
        before = self._correct(networks, candidates, sampler.selection)
        causes = checks.degradation(before, candidates, staged, sampler.selection)
        kept = torch.tensor([cause is None for cause in causes])
        networks, candidates, before = list(compress(networks, kept)), candidates.select(kept), before[kept]
        if not networks:
            return []
        right = (inputs[kept], training.labels[kept].float()), (held_out[kept], validation.labels[kept].float())
        self._stage("second stage", networks, candidates, *right)
        after = self._correct(networks, candidates, sampler.selection)
        causes = checks.improvement(before, after, candidates, staged, sampler.selection)
        kept = torch.tensor([cause is None for cause in causes])
        return self._records(list(compress(networks, kept)), candidates.select(kept)) if kept.any() else []

    def _networks(self, candidates: Candidates) -> list[nn.Sequential]:
        """Their starts."""
        spec, architecture = self._spec, self._trainer.subject_trainer.architecture(candidates)
        seeds, kaiming = keys(spec.seed, "init", candidates.indices), spec.subject.weight_init == "kaiming"
        params, networks = init(architecture, seeds, candidates.neurons, kaiming=kaiming), []
        for i, width in enumerate(candidates.neurons.tolist()):
            shape, layers = architecture._replace(hidden=(width,) * len(architecture.hidden)), list[nn.Module]()
            for layer, (fan_in, fan_out) in enumerate(shape.layers):
                linear = nn.Linear(fan_in, fan_out)
                linear.weight.data.copy_(params[f"layers.{layer}.weight"][i, :fan_out, :fan_in])
                linear.bias.data.copy_(params[f"layers.{layer}.bias"][i, :fan_out])
                layers += [linear, _ACTIVATIONS[shape.activation]()]
            networks.append(nn.Sequential(*layers[:-1]))
        return networks

    def _stage(
        self, name: str, networks: list[nn.Sequential], candidates: Candidates, training: Labelled, validation: Labelled
    ) -> None:
        """Train them, one after the other, in one of the two stages."""
        staged, rates, epochs = self._staged, candidates.learning_rate, self._staged.epochs
        if name == "second stage":
            rates, epochs = rates * staged.improvement_lr_factor, staged.improvement_epochs
        draws = (shuffled(self._spec.seed, name, candidates.indices, epoch, staged.examples) for epoch in range(epochs))
        orders = torch.stack(list(draws), 1)
        for network, rate, *data in zip(networks, rates.tolist(), orders, *training, *validation, strict=True):
            self._train(network, rate, *data)

    def _train(self, network: nn.Sequential, rate: float, orders: Iterable[Tensor], *data: Tensor) -> None:
        """Train for an epoch in each of ``orders``, stop early, and keep the best. ``data``: inputs and labels, of
        training and of validation."""
        staged, (inputs, targets, held_out, answers) = self._staged, data
        # Of its three ways, the fastest on networks this small.
        optimizer = torch.optim.Adam(network.parameters(), lr=rate, fused=True)
        best, best_state, since = float("inf"), network.state_dict(), 0
        for order in orders:
            batches = (torch.split(tensor[order], staged.batch_size) for tensor in (inputs, targets))
            for batch, expected in zip(*batches, strict=True):
                optimizer.zero_grad()
                loss = F.binary_cross_entropy_with_logits(network(batch).squeeze(1), expected)
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

    def _correct(self, networks: list[nn.Sequential], candidates: Candidates, evaluation: Evaluation) -> Tensor:
        """Which of their answers are right: bool ``[models, n]``."""
        inputs = self._inputs(evaluation.sequences)
        with torch.no_grad():
            answers = torch.stack([network(inputs).squeeze(1) > 0 for network in networks])
        return answers == evaluation.labels(candidates.selected)

    def _records(self, networks: list[nn.Sequential], candidates: Candidates) -> list[Record]:
        evaluation, records = self._sampler.evaluation, list[Record]()
        accuracies = evaluation.by_stratum(self._correct(networks, candidates, evaluation)).tolist()
        for i, (network, accuracy) in enumerate(zip(networks, accuracies, strict=True)):
            weights = parameters_to_vector(network.parameters()).detach().unsqueeze(0)
            architecture = self._trainer.subject_trainer.architecture(candidates.select(torch.tensor([i])))
            self._trainer.extractor.extract(unflatten(weights, architecture), architecture)
            records.append(Record(int(candidates.indices[i]), accuracy, weights[0].tolist()))
        return records

    def _inputs(self, sequences: Tensor) -> Tensor:
        """``[..., length]`` to ``[..., input_size]``."""
        if self._spec.subject.input_encoding == "index":
            return sequences.float()
        return F.one_hot(sequences, self._spec.vocab_size).flatten(-2).float()


def _work(spec: str, indices: list[int]) -> tuple[float, list[Record]]:
    torch.set_num_threads(1)
    loop = PlainLoop(GenerationSpec.model_validate_json(spec))
    loop.subjects(torch.tensor(indices[:1]))
    began = time.monotonic()
    records = loop.subjects(torch.tensor(indices))
    return time.monotonic() - began, records


def plain_loop(spec: GenerationSpec, candidates: int) -> tuple[float, list[Record]]:
    """Seconds and the accepted records of the first ``candidates``, on as many processes as torch has threads. No
    start of a process is in the seconds."""
    workers = torch.get_num_threads()
    shares = [list(range(first, candidates, workers)) for first in range(workers)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        parts = pool.starmap(_work, [(spec.model_dump_json(), share) for share in shares])
    return max(seconds for seconds, _ in parts), sorted(record for _, records in parts for record in records)
