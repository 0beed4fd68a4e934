"""Training of the encoder-decoder, through the networks that it decodes."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ethogram.errors import InvalidInput
from ethogram.specs.crossmodal import CodecTrainingSpec, CrossmodalSpec
from services.crossmodal import losses
from services.crossmodal.codec import Codec
from services.crossmodal.data import Preprocessor, Queries, Subjects, check, split_subjects
from services.crossmodal.model import EncoderDecoder, perceptron
from services.crossmodal.sampler import BehaviorAwareBatchSampler
from services.crossmodal.steering import choose, edited, toggle
from services.crossmodal.tokenizer import Tokenizer
from services.runtime import checkpoints
from services.runtime.devices import uses_bfloat16
from services.runtime.parallel import ALONE, World
from services.runtime.run import Run
from services.runtime.seeds import generator
from services.runtime.tracking import tracked
from services.zoo.dataset import Zoo

REPORT_EVERY = 20
"""Steps between metrics."""
MAX_VALIDATED = 512
"""Most subjects of a validation."""


def train(spec: CrossmodalSpec, zoo: Zoo, run: Run | None = None, world: World = ALONE) -> Codec:
    """Train a codec on the subjects of ``zoo`` that ``spec`` does not hold out.

    Goes on from ``run.resume`` where there is one, with the same result, to the bit, as an uninterrupted run on the
    same machine. With a ``world`` of several processes each calls this, and the first one's ``run`` is told and says
    what to go on from. Raises :class:`InvalidInput` for a zoo that cannot be learned from, and for a loss that becomes
    NaN.
    """
    run = run or Run()
    check(zoo, spec)
    trainer = Trainer(spec, zoo, run.device, world)
    if run.resume is not None and world.first:
        trainer.load(run.resume)
    trainer.share()
    run.stage("train", spec.training.steps)
    run.advance(trainer.step)
    with tracked(spec.wandb if world.first else None, spec.model_dump(mode="json"), run) as log:
        while not trainer.done:
            values = trainer.advance()
            told = {}
            if trainer.step % REPORT_EVERY == 0 or trainer.done:
                told = {name: float(value) for name, value in values.items()}
            # With patience the best model is kept, which the last may be.
            last = trainer.done and spec.training.patience is not None
            if trainer.step % spec.training.validate_every == 0 or last:
                told |= trainer.validate()
            if told:
                trainer.course.append({"step": trainer.step, **told})
                run.metric(trainer.step, **told)
                log(trainer.step, told)
            run.advance(trainer.step)
            if run.checkpoint_due():
                run.checkpoint(trainer.step, trainer.save)
    if trainer.step < spec.training.steps:
        run.log(f"stopped at step {trainer.step}: the validation loss has not fallen since step {trainer.best_step}")
    return trainer.codec()


class Trainer:
    """The state of a training run: the model, its running mean, the optimiser, and the number of steps done.

    Everything random in a step is drawn from a generator of that step, so there is no generator state to keep.
    """

    def __init__(self, spec: CrossmodalSpec, zoo: Zoo, device: str = "cpu", world: World = ALONE) -> None:
        self.spec, self.zoo, self.device, self.world, self.step = spec, zoo, device, world, 0
        self.saved: int | None = None
        """Step of the last checkpoint."""
        self.course: list[dict[str, float]] = []
        """What was told of the training so far, each with its ``step``."""
        split = split_subjects(zoo.labels, zoo.shape, spec)
        self.preprocessor = Preprocessor.of(spec, zoo, split.train)
        self.layout = zoo.layout
        self.subjects = self.preprocessor.subjects(zoo, split.train, device)
        self.validation = self.preprocessor.subjects(zoo, split.validation[:MAX_VALIDATED], device)
        self.sampler = BehaviorAwareBatchSampler(
            self.subjects.labels, spec.training.batch_size, spec.seed, [pattern.name for pattern in zoo.patterns]
        )
        parts = spec.training.accumulation * world.size
        if self.sampler.pairs_of_batch < parts:
            raise InvalidInput.field(
                "spec.training.batch_size",
                f"a batch's {self.sampler.pairs_of_batch} pairs of subjects are fewer than the {parts} parts that "
                f"accumulation and processes ask for; take larger batches or fewer parts",
            )
        self.queries = Queries.build(zoo.universe, zoo.layout.envelope, spec.seed)
        draws = generator(spec.seed, "init")
        tokenizer = Tokenizer.of(spec.codec, self.preprocessor)
        self.model = EncoderDecoder(spec.codec, tokenizer, len(zoo.patterns), draws).to(device)
        self.present = self.preprocessor.present(self.subjects.shape)
        self.model.fit(self.subjects, self.present)
        wide = spec.loss.projection
        self.projection = perceptron([spec.codec.latent_dim, spec.codec.latent_dim, wide], draws) if wide else None
        # Directions have no weight decay: a behaviour that is hard to change needs a long one.
        heads = list(self.projection.to(device).parameters()) if self.projection else []
        self.parameters = [*self.model.encoder.parameters(), *self.model.decoder.parameters(), *heads]
        groups: list[dict[str, Any]] = [
            {"params": self.parameters},
            {"params": [self.model.directions], "weight_decay": 0.0},
        ]
        self.parameters = [*self.parameters, self.model.directions]
        self.optimizer = torch.optim.AdamW(
            groups, lr=spec.training.learning_rate, weight_decay=spec.training.weight_decay, fused=True
        )
        self.mean = [parameter.detach().clone() for parameter in self.parameters]
        self.best: list[Tensor] = []
        self.best_loss, self.best_step, self.stale, self.halvings, self.since_halving = math.inf, 0, 0, 0, 0
        self.bfloat16 = uses_bfloat16(spec.training.precision, device)
        self._encode: Any = self.model.encoder
        self._decode: Any = self.model.decoder
        if spec.training.compile:
            check_compiler(device)
            self._encode, self._decode = torch.compile(self._encode), torch.compile(self._decode)
        self._prepare()

    def _prepare(self) -> None:
        """What follows from the standardisation, which is part of the model's state."""
        sizes = [(fan_in + 1) * fan_out for fan_in, fan_out in self.layout.envelope.layers]
        layer = torch.arange(len(sizes), device=self.device).repeat_interleave(torch.tensor(sizes, device=self.device))
        with torch.no_grad():
            encoder = self.model.encoder
            self.features = encoder.features(self.subjects.inputs)
            self.validation_features = encoder.features(self.validation.inputs)
            deviations = (self.subjects.weights - self.model.decoder.standard.mean) * self.present[1]
            self.weighting = losses.layer_weights(deviations, layer)

    @property
    def done(self) -> bool:
        """Whether training is at its end."""
        patience = self.spec.training.patience
        return self.step >= self.spec.training.steps or (patience is not None and self.stale >= patience)

    def advance(self) -> dict[str, Tensor]:
        """One optimiser step. Returns the loss and its terms.

        Raises :class:`InvalidInput` before anything is changed when the loss or its gradient is not finite.
        """
        training = self.spec.training
        batch = self.sampler.batch(self.step).to(self.device)
        self.optimizer.zero_grad()
        values: dict[str, Tensor] = {}
        for number, part in enumerate(micro_batches(batch, training.accumulation * self.world.size)):
            if number % self.world.size != self.world.rank:
                continue
            draws = generator(self.spec.seed, "step", self.step, number)
            terms = self.terms(self.subjects.at(part), self.features[part], draws, self.step / training.steps)
            share = len(part) / len(batch)
            (terms["loss"] * share).backward()  # type: ignore[no-untyped-call]
            for name, value in terms.items():
                values[name] = values.get(name, torch.zeros_like(value)) + value.detach() * share
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        # The values too: what one process must stop for, all must.
        self.world.add([*gradients, *values.values()])
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        if not bool(torch.isfinite(values["loss"] + norm)):
            raise self._diverged("loss", float(values["loss"]), self.step + 1)
        rate = training.learning_rate * schedule(self.step, training) * 0.5**self.halvings
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.step += 1
        with torch.no_grad():
            # A short memory first, so that the beginning is forgotten.
            decay = min(training.ema, self.step / (self.step + 9))
            torch._foreach_lerp_(self.mean, [p.detach() for p in self.parameters], 1 - decay)
        return values

    def _diverged(self, what: str, value: float, step: int) -> InvalidInput:
        text = f"the {what} became {value:g} at step {step}; lower the learning rate"
        # The first process alone keeps checkpoints.
        if self.world.first:
            text += f" ({checkpoints.last_good(self.saved)})"
        return InvalidInput.field("spec.training.learning_rate", text)

    def terms(self, subjects: Subjects, features: Tensor, draws: torch.Generator, progress: float) -> dict[str, Tensor]:
        """The loss and its terms on some subjects, of whom each gains or loses behaviours. ``features``: of the encoder
        (:meth:`services.crossmodal.model.Encoder.features`); ``progress``: from 0 to 1, where the schedules of the loss
        are. Terms without weight are not computed."""
        weight, model = self.spec.loss, self.model
        gamma = between(weight.gamma, weight.gamma_end, progress)
        source, labels, shape = subjects.weights, subjects.labels, subjects.shape
        edits = weight.steering > 0 or weight.direct > 0
        terms: dict[str, Tensor] = {}
        patterns = choose(labels.cpu(), self.spec.training.several, draws).to(self.device)
        selected, signs = toggle(labels, patterns)
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.bfloat16):
            latents = self._encode(features, shape)
            asked = [latents, latents + signs @ model.directions] if edits else [latents]
            decodings = self._decode(torch.cat(asked), shape.repeat(len(asked)))
            projected = latents if self.projection is None else self.projection(latents)
        decoded, moved = decodings.float().chunk(2) if edits else (decodings.float(), None)
        if weight.reconstruction:
            terms["reconstruction"] = self._reconstruction(decoded, source, shape)
        if weight.behavior or edits:
            rows = self.queries.draw(patterns.cpu(), self.spec.training.queries, draws)
            inputs = self.queries.network_inputs(rows).to(self.device)
            with torch.no_grad():
                own = self.layout.answers(source.unsqueeze(1), shape, inputs).squeeze(1)
            variants = {"behavior": decoded} if weight.behavior else {}
            if moved is not None and weight.steering:
                variants["steering"] = edited(source, decoded, moved, "residual")
            if moved is not None and weight.direct:
                variants["direct"] = moved
            logits = self.layout.answers(torch.stack(list(variants.values()), 1), shape, inputs).unbind(1)
            answered = dict(zip(variants, logits, strict=True))
            if weight.behavior:
                terms["behavior"] = losses.behavior(answered.pop("behavior"), own)
            if edits:
                pools = self.queries.pools
                before, after = (pools.labels(rows, chosen.cpu()).to(self.device) for chosen in (labels, selected))
                for name, said in answered.items():
                    terms[name] = losses.steering(said, own, before, after, weight.locality, mend=weight.mend)
        if weight.variance:
            terms["variance"] = losses.variance(latents.float())
        rest = torch.stack([getattr(weight, name) * term for name, term in terms.items()]).sum() if terms else 0.0
        if gamma:
            terms["contrastive"] = losses.contrastive(
                projected.float(),
                labels,
                between(weight.temperature, weight.temperature_end, progress),
                graded=weight.contrastive == "graded",
            )
            rest = gamma * terms["contrastive"] + (1 - gamma) * rest
        return {"loss": torch.as_tensor(rest), **terms}

    def _reconstruction(self, decoded: Tensor, source: Tensor, shape: Tensor) -> Tensor:
        form, decoder = self.spec.loss.reconstruction_form, self.model.decoder
        if form == "normalized":
            return losses.reconstruction(decoded, source, self.weighting)
        standard = decoder.standard
        return losses.elementwise(standard(decoded), standard(source), decoder.present[shape], form)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The validation loss and its terms, of the running mean; what stopping and the plateau schedule go by.

        Raises :class:`InvalidInput` when the loss is not finite.
        """
        terms: dict[str, Tensor] = {}
        if self.world.first:
            with self._kept():
                draws = generator(self.spec.seed, "validation")
                # At the schedules' end throughout: values of different objectives could not be compared.
                terms = self.terms(self.validation, self.validation_features, draws, progress=1.0)
        terms = self.world.broadcast(terms, self.device)
        values = {f"validation_{name}": float(value) for name, value in terms.items()}
        if not math.isfinite(values["validation_loss"]):
            raise self._diverged("validation loss", values["validation_loss"], self.step)
        if values["validation_loss"] < self.best_loss:
            self.best_loss, self.best_step = values["validation_loss"], self.step
            self.stale = self.since_halving = 0
            if self.spec.training.patience is not None:
                self.best = [tensor.clone() for tensor in self.mean]
        else:
            self.stale, self.since_halving = self.stale + 1, self.since_halving + 1
            if self.spec.training.schedule == "plateau" and self.since_halving >= self.spec.training.plateau_patience:
                self.halvings, self.since_halving = self.halvings + 1, 0
        return values

    @contextmanager
    def _kept(self, values: list[Tensor] | None = None) -> Iterator[None]:
        """The model with the running mean, or ``values``, for its parameters."""
        current = [parameter.detach().clone() for parameter in self.parameters]
        with torch.no_grad():
            _copy(self.parameters, values or self.mean)
            yield
            _copy(self.parameters, current)

    def codec(self) -> Codec:
        """What the run has learned: the best model where training may stop early, else the running mean."""
        with self._kept(self.best or None):
            state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        model = EncoderDecoder(
            self.spec.codec, Tokenizer.of(self.spec.codec, self.preprocessor), len(self.zoo.patterns), torch.Generator()
        )
        model.load_state_dict(state)
        codec = Codec.of(self.spec, self.zoo, self.preprocessor, model.to(self.device), self.subjects)
        codec.course = self.course
        return codec

    def share(self) -> None:
        """Take the state of the first process: others would fit another standardisation to the bit, and may not have
        its checkpoint."""
        if self.world.size > 1:
            self._restore(self.world.broadcast(self._state(), self.device))

    def save(self, folder: Path) -> None:
        """Write the state into ``folder``, without pickle."""
        about = {
            "spec": self.spec.model_dump(mode="json"),
            "zoo": self.zoo.digest,
            "processes": self.world.size,
            "course": self.course,
        }
        checkpoints.write(folder, self._state(), about)
        self.saved = self.step

    def load(self, folder: Path) -> None:
        """Go on from what :meth:`save` wrote. Raises :class:`InvalidInput` for a checkpoint of another spec, zoo or
        number of processes, and for one that cannot be read."""
        with checkpoints.reading(folder, self.device) as (about, tensors):
            checkpoints.same(
                {
                    "with another spec; start afresh": (CrossmodalSpec.model_validate(about["spec"]), self.spec),
                    "on other networks; start afresh": (about["zoo"], self.zoo.digest),
                    f"of {about['processes']} processes; take as many, or start afresh": (
                        about["processes"],
                        self.world.size,
                    ),
                }
            )
            self._restore(tensors)
            self.course = about["course"]
        self.saved = self.step

    def _state(self) -> dict[str, Tensor]:
        """All that a step changes or that is fitted."""
        tensors = checkpoints.part("model", self.model.state_dict())
        if self.projection is not None:
            tensors |= checkpoints.part("projection", self.projection.state_dict())
        for name, kept in (("mean", self.mean), ("best", self.best)):
            tensors |= checkpoints.part(name, {str(i): value for i, value in enumerate(kept)})
        tensors |= checkpoints.part("optimizer", checkpoints.moments(self.optimizer))
        counters = {name: getattr(self, name) for name in _COUNTERS}
        tensors |= {f"counters.{name}": torch.tensor(value, dtype=torch.float64) for name, value in counters.items()}
        return tensors | {"weighting": self.weighting}

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`_state`."""
        parts = checkpoints.parts(tensors)
        self.model.load_state_dict(parts["model"])
        if self.projection is not None:
            self.projection.load_state_dict(parts["projection"])
        self.mean, self.best = (
            [parts.get(name, {})[str(i)] for i in range(len(parts.get(name, {})))] for name in ("mean", "best")
        )
        checkpoints.set_moments(self.optimizer, parts.get("optimizer", {}))
        for name in _COUNTERS:
            setattr(self, name, type(getattr(self, name))(parts["counters"][name]))
        self._prepare()
        self.weighting = tensors["weighting"]


_COUNTERS = ("step", "best_loss", "best_step", "stale", "halvings", "since_halving")


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def micro_batches(batch: Tensor, parts: int) -> list[Tensor]:
    """A batch in ``parts`` parts of similar size, cut between buddies."""
    return [part.flatten() for part in batch.view(-1, 2).tensor_split(parts)]


def between(start: float, end: float | None, progress: float) -> float:
    """On the straight line from ``start`` to ``end`` over ``progress`` from 0 to 1; ``start`` where there is no end."""
    return start if end is None else start + (end - start) * progress


def schedule(step: int, training: CodecTrainingSpec) -> float:
    """The learning rate of a step (from 0) as a share of its peak, but for what a plateau takes off."""
    rise = min(1.0, (step + 1) / (training.warm_up + 1))
    if training.schedule != "cosine":
        return rise
    return rise * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / training.steps)))


def check_compiler(device: str) -> None:
    """Raise :class:`InvalidInput` where ``torch.compile`` cannot work."""
    if torch.device(device).type == "cpu" and not any(map(shutil.which, ("g++", "clang++", os.environ.get("CXX", "")))):
        raise InvalidInput.field("spec.training.compile", "needs a C++ compiler on this machine: g++ or clang++")
