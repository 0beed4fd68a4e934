"""Training of the encoder-decoder, through the networks that it decodes."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ethogram.errors import InvalidInput
from ethogram.specs.crossmodal import CrossmodalSpec
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
from services.runtime.training import Optimization, Progress, Trainer, constant, cosine, fit
from services.zoo.dataset import Zoo

MAX_VALIDATED = 512
"""Most subjects of a validation."""


def train(spec: CrossmodalSpec, zoo: Zoo, run: Run | None = None, world: World = ALONE) -> Codec:
    """Train a codec on the subjects of ``zoo`` that ``spec`` does not hold out, see
    :func:`services.runtime.training.fit`. Raises :class:`InvalidInput` for a zoo that cannot be learned from too."""
    run = run or Run()
    check(zoo, spec)
    trainer = CodecTrainer(spec, zoo, run.device, world)
    fit(trainer, run, world)
    return trainer.codec()


class CodecTrainer(Trainer):
    """Trains the encoder-decoder; what is kept is the running mean of its parameters."""

    spec: CrossmodalSpec
    monitor = "validation_loss"

    def __init__(self, spec: CrossmodalSpec, zoo: Zoo, device: str = "cpu", world: World = ALONE) -> None:
        self.spec, self.zoo, self.device, self.world = spec, zoo, device, world
        self.step, self.progress = 0, Progress()
        training = spec.training
        self.steps, self.validate_every, self.patience = training.steps, training.validate_every, training.patience
        # With early stopping the best model is kept, which the last may be.
        self.keep_best = self.validate_last = training.patience is not None
        split = split_subjects(zoo.labels, zoo.shape, spec)
        self.preprocessor = Preprocessor.of(spec, zoo, split.train)
        self.layout = zoo.layout
        self.subjects = self.preprocessor.subjects(zoo, split.train, device)
        self.validation = self.preprocessor.subjects(zoo, split.validation[:MAX_VALIDATED], device)
        self.sampler = BehaviorAwareBatchSampler(
            self.subjects.labels, training.batch_size, spec.seed, [pattern.name for pattern in zoo.patterns]
        )
        parts = training.accumulation * world.size
        if self.sampler.pairs_of_batch < parts:
            raise InvalidInput.field(
                "spec.training.batch_size",
                f"a batch's {self.sampler.pairs_of_batch} pairs of subjects are fewer than the {parts} parts that "
                f"accumulation and processes ask for; take larger batches or fewer parts",
            )
        self.queries = Queries.build(zoo.universe, zoo.layout.envelope, spec.seed)
        init = generator(spec.seed, "init")
        tokenizer = Tokenizer.of(spec.codec, self.preprocessor)
        self.model = EncoderDecoder(spec.codec, tokenizer, len(zoo.patterns), init).to(device)
        self.present = self.preprocessor.present(self.subjects.shape)
        self.model.fit(self.subjects, self.present)
        wide = spec.loss.projection
        self.projection = perceptron([spec.codec.latent_dim, spec.codec.latent_dim, wide], init) if wide else None
        head = list(self.projection.to(device).parameters()) if self.projection else []
        groups: list[dict[str, Any]] = [
            {"params": [*self.model.encoder.parameters(), *self.model.decoder.parameters(), *head]},
            # Directions have no weight decay: a behaviour that is hard to change needs a long one.
            {"params": [self.model.directions], "weight_decay": 0.0},
        ]
        self.optimization = Optimization(
            groups,
            training,
            cosine(training.steps) if training.schedule == "cosine" else constant,
            world,
            weight_decay=training.weight_decay,
            plateau=training.plateau_patience if training.schedule == "plateau" else None,
        )
        self.mean = [parameter.detach().clone() for parameter in self.optimization.parameters]
        self.bfloat16 = uses_bfloat16(training.precision, device)
        self._encode: Any = self.model.encoder
        self._decode: Any = self.model.decoder
        if training.compile:
            check_compiler(device)
            self._encode, self._decode = torch.compile(self._encode), torch.compile(self._decode)
        self._prepare()

    def _prepare(self) -> None:
        """Compute what follows from the standardisation, which is part of the model's state."""
        sizes = [(fan_in + 1) * fan_out for fan_in, fan_out in self.layout.envelope.layers]
        layer = torch.arange(len(sizes), device=self.device).repeat_interleave(torch.tensor(sizes, device=self.device))
        with torch.no_grad():
            encoder = self.model.encoder
            self.features = encoder.features(self.subjects.inputs)
            self.validation_features = encoder.features(self.validation.inputs)
            deviations = (self.subjects.weights - self.model.decoder.standard.mean) * self.present[1]
            self.weighting = losses.layer_weights(deviations, layer)

    def advance(self) -> dict[str, Tensor]:
        training = self.spec.training
        batch = self.sampler.batch(self.step).to(self.device)
        self.optimization.optimizer.zero_grad()
        metrics: dict[str, Tensor] = {}
        for number, rows in enumerate(micro_batches(batch, training.accumulation * self.world.size)):
            if number % self.world.size != self.world.rank:
                continue
            rng = generator(self.spec.seed, "step", self.step, number)
            terms = self.terms(self.subjects.at(rows), self.features[rows], rng, self.step / training.steps)
            share = len(rows) / len(batch)
            (terms["loss"] * share).backward()  # type: ignore[no-untyped-call]
            for name, value in terms.items():
                metrics[name] = metrics.get(name, torch.zeros_like(value)) + value.detach() * share
        self.optimization.update(self.step, metrics)
        self.step += 1
        with torch.no_grad():
            # A short memory first, so that the beginning is forgotten.
            decay = min(training.ema, self.step / (self.step + 9))
            torch._foreach_lerp_(self.mean, [p.detach() for p in self.optimization.parameters], 1 - decay)
        return metrics

    def terms(self, subjects: Subjects, features: Tensor, rng: torch.Generator, progress: float) -> dict[str, Tensor]:
        """The loss and its terms on some subjects, of whom each gains or loses behaviours. ``features``: of the encoder
        (:meth:`services.crossmodal.model.Encoder.features`); ``progress``: from 0 to 1, where the schedules of the loss
        are. Terms without weight are not computed."""
        weight, model = self.spec.loss, self.model
        gamma = between(weight.gamma, weight.gamma_end, progress)
        source, labels, shape = subjects.weights, subjects.labels, subjects.shape
        edits = weight.steering > 0 or weight.direct > 0
        terms: dict[str, Tensor] = {}
        patterns = choose(labels.cpu(), self.spec.training.several, rng).to(self.device)
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
            rows = self.queries.draw(patterns.cpu(), self.spec.training.queries, rng)
            inputs = self.queries.network_inputs(rows).to(self.device)
            with torch.no_grad():
                own = self.layout.logits(source.unsqueeze(1), shape, inputs).squeeze(1)
            variants = {"behavior": decoded} if weight.behavior else {}
            if moved is not None and weight.steering:
                variants["steering"] = edited(source, decoded, moved, "residual")
            if moved is not None and weight.direct:
                variants["direct"] = moved
            logits = self.layout.logits(torch.stack(list(variants.values()), 1), shape, inputs).unbind(1)
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
        """The validation loss and its terms, of the running mean."""
        with self._running_mean():
            # At the schedules' end throughout: values of different objectives could not be compared.
            rng = generator(self.spec.seed, "validation")
            terms = self.terms(self.validation, self.validation_features, rng, progress=1.0)
        return {f"validation_{name}": float(value) for name, value in terms.items()}

    @contextmanager
    def _running_mean(self) -> Iterator[None]:
        """The model with the running mean for its parameters."""
        parameters = self.optimization.parameters
        current = [parameter.detach().clone() for parameter in parameters]
        with torch.no_grad():
            _copy(parameters, self.mean)
            yield
            _copy(parameters, current)

    def codec(self) -> Codec:
        """The codec of the running mean."""
        with self._running_mean():
            model = copy.deepcopy(self.model)
        codec = Codec.of(self.spec, self.zoo, self.preprocessor, model, self.subjects)
        codec.history = self.progress.history
        return codec

    def identity(self) -> dict[str, str]:
        return {"zoo": self.zoo.digest}

    def weights(self) -> dict[str, Tensor]:
        return {str(i): tensor.clone() for i, tensor in enumerate(self.mean)}

    def take_weights(self, tensors: Mapping[str, Tensor]) -> None:
        self.mean = [tensors[str(i)] for i in range(len(self.mean))]

    def state(self) -> dict[str, Tensor]:
        tensors = checkpoints.part("model", self.model.state_dict())
        if self.projection is not None:
            tensors |= checkpoints.part("projection", self.projection.state_dict())
        tensors |= checkpoints.part("mean", self.weights())
        tensors |= checkpoints.part("optimization", self.optimization.state())
        return tensors | {"weighting": self.weighting}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        parts = checkpoints.parts(tensors)
        self.model.load_state_dict(parts["model"])
        if self.projection is not None:
            self.projection.load_state_dict(parts["projection"])
        self.take_weights(parts["mean"])
        self.optimization.restore(parts["optimization"])
        self._prepare()
        self.weighting = tensors["weighting"]


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def micro_batches(batch: Tensor, parts: int) -> list[Tensor]:
    """A batch in ``parts`` parts of similar size, cut between buddies."""
    return [part.flatten() for part in batch.view(-1, 2).tensor_split(parts)]


def between(start: float, end: float | None, progress: float) -> float:
    """On the straight line from ``start`` to ``end`` over ``progress`` from 0 to 1; ``start`` where there is no end."""
    return start if end is None else start + (end - start) * progress


def check_compiler(device: str) -> None:
    """Raise :class:`InvalidInput` where ``torch.compile`` cannot work."""
    if torch.device(device).type == "cpu" and not any(map(shutil.which, ("g++", "clang++", os.environ.get("CXX", "")))):
        raise InvalidInput.field("spec.training.compile", "needs a C++ compiler on this machine: g++ or clang++")
