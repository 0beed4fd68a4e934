"""Training of the policy by REINFORCE, on fresh instances at every step."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ethogram.errors import InvalidInput
from ethogram.specs.clt import MAX_NODES, NODES, PolicySpec
from services.clt.policy.decode import construct, greedy, gumbel, log_likelihood, tables
from services.clt.policy.model import AttentionPolicy
from services.clt.policy.tsp import digest, drawn, instances, lengths
from services.runtime import checkpoints
from services.runtime.devices import uses_bfloat16
from services.runtime.run import Run
from services.runtime.seeds import generator
from services.runtime.training import Optimization, Progress, Trainer, cosine, fit, restored_if_refused

SIGNIFICANCE = 0.05
"""Level of the test by which a rollout baseline is replaced (Kool et al. 2019)."""


def train_policy(spec: PolicySpec, run: Run | None = None) -> AttentionPolicy:
    """Train a policy with :func:`services.runtime.training.fit`."""
    run = run or Run()
    trainer = PolicyTrainer(spec, run.device)
    fit(trainer, run)
    return trainer.finished()


class PolicyTrainer(Trainer):
    """Trains a policy by REINFORCE (Kool et al. 2019, arXiv 1803.08475).

    The baseline is the mean length of the tours from all cities (POMO, Kwon et al. 2020, arXiv 2010.16011), or the
    greedy rollout of the best policy so far, which validations replace. ``cities``: the instances of a spec that names
    some, ``[instances, nodes, 2]``. Raises :class:`InvalidInput` where they do not suffice.
    """

    spec: PolicySpec
    monitor = "validation_length"

    def __init__(self, spec: PolicySpec, device: str = "cpu", cities: Tensor | None = None) -> None:
        self.spec, self.device, self.step, self.progress = spec, device, 0, Progress()
        training = spec.training
        self.steps, self.validate_every, self.snapshots = training.steps, training.validate_every, training.snapshots
        self.nodes = (spec.nodes or NODES) if cities is None else cities.shape[1]
        self._given = None if cities is None else cities[held_out(spec, cities) :]
        self._digest = None if cities is None else digest(cities)
        self.policy = AttentionPolicy(spec.model, self.nodes)
        initialize(self.policy, generator(spec.seed, "init"))
        self.policy.to(device).train()
        self.policy.chooses_start = training.baseline == "rollout"
        self.baseline = frozen(self.policy) if self.policy.chooses_start else None
        """The best policy so far, for a rollout baseline."""
        self.optimization = Optimization(
            [{"params": list(self.policy.parameters())}],
            training,
            cosine(training.steps),
            weight_decay=training.weight_decay,
        )
        self.bfloat16 = uses_bfloat16(training.precision, device)
        self.validation = self._instances(training.validation, "validation")
        if cities is not None:
            self.validation = cities[: training.validation].to(device)

    def _instances(self, count: int, *purpose: str | int) -> Tensor:
        draws = generator(self.spec.seed, *purpose)
        if self._given is not None:
            return drawn(self._given, count, draws, self.device)
        return instances(count, self.nodes, draws, self.spec.distribution, self.device)

    def advance(self) -> dict[str, Tensor]:
        """Take one step. Returns the loss, the mean length of the sampled tours, and an estimate of their entropy in
        nats."""
        with restored_if_refused(self.policy.buffers()):
            metrics = self._learn()
        self.step += 1
        return metrics

    def _learn(self) -> dict[str, Tensor]:
        nodes, seed = self.nodes, self.spec.seed
        batch_size = self.spec.training.batch_size
        cities = self._instances(batch_size, "instances", self.step)
        count = nodes if self.baseline is None else 1
        noise = gumbel(batch_size, count, nodes, generator(seed, "tours", self.step), self.device)
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.bfloat16):
            # Once: sampling and learning must agree on the normalisation.
            stream = self.policy.encoder(cities).float()
        known = tables(self.policy, stream)
        start = torch.arange(nodes, device=self.device).expand(batch_size, nodes) if self.baseline is None else None
        tours = construct(known, start, noise)
        length = lengths(cities, tours)
        expected = length.mean(1, keepdim=True)
        if self.baseline is not None:
            expected = lengths(cities, greedy(self.baseline, cities))
        likelihood = log_likelihood(known, tours, self.policy.chooses_start)
        loss = ((length - expected) * likelihood).mean()
        self.optimization.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        metrics = {"loss": loss.detach(), "length": length.mean(), "entropy": -likelihood.detach().mean()}
        self.optimization.update(self.step, metrics)
        return metrics

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The mean length of greedy tours of fixed instances, one tour each.

        Replaces a rollout baseline if the policy is significantly better on instances that are used only once.
        """
        self.policy.eval()
        length = float(lengths(self.validation, greedy(self.policy, self.validation)).mean())
        if self.baseline is not None:
            cities = self._instances(len(self.validation), "challenge", self.step)
            new, old = (lengths(cities, greedy(policy, cities)).flatten() for policy in (self.policy, self.baseline))
            if better(new, old):
                self.baseline = frozen(self.policy)
        self.policy.train()
        return {"validation_length": length}

    def finished(self) -> AttentionPolicy:
        """A copy of the policy as it is now, for evaluation."""
        return frozen(self.policy)

    def snapshot(self, folder: Path) -> str:
        self.finished().save(folder, {"spec": self.spec.model_dump(mode="json"), "step": self.step})
        return "policy"

    def identity(self) -> dict[str, str]:
        return {} if self._digest is None else {"cities": self._digest}

    def state(self) -> dict[str, Tensor]:
        tensors = checkpoints.part("policy", self.policy.state_dict())
        if self.baseline is not None:
            tensors |= checkpoints.part("baseline", self.baseline.state_dict())
        return tensors | checkpoints.part("optimization", self.optimization.state())

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        parts = checkpoints.parts(tensors)
        self.policy.load_state_dict(parts["policy"])
        if self.baseline is not None:
            self.baseline.load_state_dict(parts["baseline"])
        self.optimization.restore(parts["optimization"])


def held_out(spec: PolicySpec, cities: Tensor) -> int:
    """How many of ``cities`` no training may use. Raises :class:`InvalidInput` where none is left, and for more cities
    per instance than a policy can be trained on."""
    count = spec.training.validation + spec.evaluation
    if len(cities) <= count:
        text = f"has {len(cities)} instances, and training.validation and evaluation hold out {count}"
        raise InvalidInput.field("spec.cities", f"{text}; give more, or hold out fewer")
    if cities.shape[1] > MAX_NODES:
        text = f"has instances of {cities.shape[1]} cities; policies are trained on at most {MAX_NODES}"
        raise InvalidInput.field("spec.cities", text)
    return count


def initialize(policy: AttentionPolicy, generator: torch.Generator) -> None:
    """Draw the weights uniformly, within 1 / sqrt(inputs) of 0, and the placeholder within 1."""
    with torch.no_grad():
        for module in policy.modules():
            if isinstance(module, nn.Linear):
                bound = 1 / math.sqrt(module.in_features)
                for parameter in module.parameters():
                    parameter.uniform_(-bound, bound, generator=generator)
        policy.decoder.placeholder.uniform_(-1, 1, generator=generator)


def frozen(policy: AttentionPolicy) -> AttentionPolicy:
    """A copy for evaluation."""
    return copy.deepcopy(policy).eval().requires_grad_(False)


def better(new: Tensor, old: Tensor) -> bool:
    """Whether tour lengths are smaller than ``old`` ones of the same instances, by a one-sided paired t-test."""
    from scipy.stats import ttest_rel

    if torch.equal(new, old):
        return False
    test = ttest_rel(new.cpu().double().numpy(), old.cpu().double().numpy(), alternative="less")
    return bool(test.pvalue < SIGNIFICANCE)
