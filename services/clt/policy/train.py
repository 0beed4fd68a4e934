"""Training of the policy by REINFORCE, on fresh instances at every step."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from ethogram.errors import InvalidInput
from ethogram.specs.clt import PolicySpec, PolicyTrainingSpec
from services.clt.policy.decode import construct, greedy, gumbel, tables, tour_log_likelihood
from services.clt.policy.model import AttentionPolicy
from services.clt.policy.tsp import instances, lengths
from services.runtime import checkpoints
from services.runtime.devices import uses_bfloat16
from services.runtime.run import Run
from services.runtime.seeds import generator
from services.runtime.tracking import tracked

REPORT_EVERY = 20
"""Steps between metrics."""
SIGNIFICANCE = 0.05
"""Of the test by which a rollout baseline is replaced (Kool et al. 2019)."""


def train_policy(spec: PolicySpec, run: Run | None = None) -> AttentionPolicy:
    """Train a policy; see :class:`PolicyTrainer`, which has its course too."""
    return run_training(PolicyTrainer(spec, (run or Run()).device), run).finished()


def run_training(trainer: PolicyTrainer, run: Run | None = None) -> PolicyTrainer:
    """All steps of ``trainer`` that are not done yet.

    Goes on from ``run.resume`` where there is one, with the same result, to the bit, as an uninterrupted run on the
    same machine. Raises :class:`InvalidInput` for a loss that becomes NaN.
    """
    run = run or Run()
    spec = trainer.spec
    if run.resume is not None:
        trainer.load(run.resume)
    run.stage("train", spec.training.steps)
    run.advance(trainer.step)
    with tracked(spec.wandb, spec.model_dump(mode="json"), run, trainer.tracking) as log:
        trainer.tracking = log.id
        while not trainer.done:
            values = trainer.advance()
            told = {}
            if trainer.step % REPORT_EVERY == 0 or trainer.done:
                told = {name: float(value) for name, value in values.items()}
            if trainer.step % spec.training.validate_every == 0 or trainer.done:
                told |= trainer.validate()
            if told:
                trainer.course.append({"step": trainer.step, **told})
                run.metric(trainer.step, **told)
                log(trainer.step, told)
            run.advance(trainer.step)
            if run.checkpoint_due():
                run.checkpoint(trainer.step, trainer.save)
    return trainer


class PolicyTrainer:
    """The state of a training run: the policy, the baseline's policy, the optimiser, and the number of steps done.

    Everything random in a step is drawn from a generator of that step, so there is no generator state to keep.
    """

    def __init__(self, spec: PolicySpec, device: str = "cpu") -> None:
        self.spec, self.device, self.step = spec, device, 0
        self.saved: int | None = None
        """Step of the last checkpoint."""
        self.course: list[dict[str, float]] = []
        """What was told of the training so far, each with its ``step``."""
        self.tracking: str | None = None
        """Id of the run at Weights & Biases."""
        training = spec.training
        self.policy = AttentionPolicy(spec.model, spec.nodes)
        initialize(self.policy, generator(spec.seed, "init"))
        self.policy.to(device).train()
        self.policy.chooses_start = training.baseline == "rollout"
        self.frozen: AttentionPolicy | None = None
        """The best policy so far, of a rollout baseline."""
        if self.policy.chooses_start:
            self.frozen = frozen(self.policy)
        self.parameters = list(self.policy.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=training.learning_rate, weight_decay=training.weight_decay, fused=True
        )
        self.bfloat16 = uses_bfloat16(training.precision, device)
        self.validation = instances(training.validation, spec.nodes, generator(spec.seed, "validation"), device=device)

    @property
    def done(self) -> bool:
        """Whether training is at its end."""
        return self.step >= self.spec.training.steps

    def advance(self) -> dict[str, Tensor]:
        """One optimiser step. Returns the loss, the mean length of the tours drawn, and an estimate of their entropy in
        nats.

        Raises :class:`InvalidInput` before weights are changed when the loss or its gradient is not finite.
        """
        training, nodes, seed = self.spec.training, self.spec.nodes, self.spec.seed
        cities = instances(training.batch_size, nodes, generator(seed, "instances", self.step), device=self.device)
        count = nodes if self.frozen is None else 1
        noise = gumbel(len(cities), count, nodes, generator(seed, "tours", self.step), self.device)
        # A step that is refused leaves the running means as they were.
        before = [buffer.clone() for buffer in self.policy.buffers()]
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.bfloat16):
            # Once: what draws and what learns must agree on the normalisation.
            stream = self.policy.encoder(cities).float()
        known = tables(self.policy, stream)
        start = torch.arange(nodes, device=self.device).expand(len(cities), nodes) if self.frozen is None else None
        tours = construct(known.detached(), start, noise)
        length = lengths(cities, tours)
        best = self.frozen
        baseline = length.mean(1, keepdim=True) if best is None else lengths(cities, greedy(best, cities))
        likelihood = tour_log_likelihood(known, tours, self.policy.chooses_start)
        loss = ((length - baseline) * likelihood).mean()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        if not bool(torch.isfinite(loss + norm)):
            with torch.no_grad():
                for buffer, value in zip(self.policy.buffers(), before, strict=True):
                    buffer.copy_(value)
            raise self._diverged(float(loss.detach()))
        for group in self.optimizer.param_groups:
            group["lr"] = training.learning_rate * schedule(self.step, training)
        self.optimizer.step()
        self.step += 1
        return {"loss": loss.detach(), "length": length.mean(), "entropy": -likelihood.detach().mean()}

    def _diverged(self, loss: float) -> InvalidInput:
        text = f"the loss became {loss:g} or its gradient infinite at step {self.step + 1}; lower the learning rate"
        return InvalidInput.field("spec.training.learning_rate", f"{text} ({checkpoints.last_good(self.saved)})")

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The mean length of greedy tours of fixed instances, one of each. A rollout baseline is replaced if the policy
        is better than it beyond chance, on instances that are used just once."""
        self.policy.eval()
        values = {"validation_length": float(lengths(self.validation, greedy(self.policy, self.validation)).mean())}
        if self.frozen is not None:
            draws = generator(self.spec.seed, "challenge", self.step)
            cities = instances(len(self.validation), self.spec.nodes, draws, device=self.device)
            ours, theirs = (lengths(cities, greedy(policy, cities)).flatten() for policy in (self.policy, self.frozen))
            if better(ours, theirs):
                self.frozen = frozen(self.policy)
        self.policy.train()
        return values

    def finished(self) -> AttentionPolicy:
        """A copy of the policy as it is now, for evaluation."""
        return frozen(self.policy)

    def save(self, folder: Path) -> None:
        """Write the state into ``folder``, without pickle."""
        tensors = checkpoints.part("policy", self.policy.state_dict())
        if self.frozen is not None:
            # Before the first replacement both are of one memory.
            tensors |= checkpoints.part("frozen", {n: v.clone() for n, v in self.frozen.state_dict().items()})
        tensors |= checkpoints.part("optimizer", checkpoints.moments(self.optimizer))
        about = {"spec": self.spec.model_dump(mode="json"), "step": self.step, "course": self.course}
        checkpoints.write(folder, tensors, {**about, "wandb": self.tracking})
        self.saved = self.step

    def load(self, folder: Path) -> None:
        """Go on from what :meth:`save` wrote. Raises :class:`InvalidInput` for a checkpoint of another spec, and for
        one that cannot be read."""
        with checkpoints.reading(folder, self.device) as (about, tensors):
            checkpoints.same({"with another spec; start afresh": (PolicySpec.model_validate(about["spec"]), self.spec)})
            parts = checkpoints.parts(tensors)
            self.policy.load_state_dict(parts["policy"])
            if self.frozen is not None:
                self.frozen.load_state_dict(parts["frozen"])
            checkpoints.set_moments(self.optimizer, parts.get("optimizer", {}))
            self.step, self.course, self.tracking = int(about["step"]), about["course"], about["wandb"]
        self.saved = self.step


def initialize(policy: AttentionPolicy, draws: torch.Generator) -> None:
    """Draw the weights: uniform within one over the root of the inputs, the placeholder within 1."""
    with torch.no_grad():
        for module in policy.modules():
            if isinstance(module, nn.Linear):
                bound = 1 / math.sqrt(module.in_features)
                for parameter in module.parameters():
                    parameter.uniform_(-bound, bound, generator=draws)
        policy.decoder.placeholder.uniform_(-1, 1, generator=draws)


def frozen(policy: AttentionPolicy) -> AttentionPolicy:
    """A copy for evaluation."""
    return copy.deepcopy(policy).eval().requires_grad_(False)


def better(ours: Tensor, theirs: Tensor) -> bool:
    """Whether lengths are smaller than others of the same instances, by a one-sided paired t-test."""
    from scipy.stats import ttest_rel

    if not bool((ours != theirs).any()):
        return False
    found = ttest_rel(ours.cpu().double().numpy(), theirs.cpu().double().numpy(), alternative="less")
    return bool(found.pvalue < SIGNIFICANCE)


def schedule(step: int, training: PolicyTrainingSpec) -> float:
    """The learning rate of a step (from 0) as a share of its peak."""
    rise = min(1.0, (step + 1) / (training.warm_up + 1))
    return rise * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / training.steps)))
