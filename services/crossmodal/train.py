"""Training of the encoder-decoder, through the networks that it decodes."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ethogram.errors import InvalidInput
from ethogram.specs.crossmodal import CrossmodalSpec
from services.crossmodal import losses
from services.crossmodal.codec import Codec
from services.crossmodal.data import Preprocessor, Queries, Subjects, check, split_subjects
from services.crossmodal.findings import warning
from services.crossmodal.model import EncoderDecoder, perceptron
from services.crossmodal.sampler import BehaviorAwareBatchSampler
from services.crossmodal.steering import choose, edited, toggle
from services.runtime import checkpoints
from services.runtime.devices import uses_bfloat16
from services.runtime.parallel import ALONE, World
from services.runtime.run import Run
from services.runtime.seeds import generator
from services.runtime.training import Optimization, Progress, Trainer, constant, cosine, fit
from services.zoo.dataset import Zoo
from services.zoo.oracle import ambiguity

MAX_VALIDATED = 512
"""Most subjects in a validation."""


def train(spec: CrossmodalSpec, zoo: Zoo, run: Run | None = None, world: World = ALONE) -> Codec:
    """Train a codec on the subjects of ``zoo`` that ``spec`` does not hold out.

    Raises :class:`InvalidInput` for an unsuitable zoo, and as :func:`services.runtime.training.fit` does.
    """
    run = run or Run()
    check(zoo, spec)
    if run.resume is None and spec.codec.inputs == "signature" and (why := ambiguity(zoo.extractor, zoo.layout)):
        run.log(warning(why), "warning")
    trainer = CodecTrainer(spec, zoo, run.device, world)
    fit(trainer, run, world)
    return trainer.codec()


class CodecTrainer(Trainer):
    """Trains the encoder-decoder, of which the running mean of the parameters is kept."""

    spec: CrossmodalSpec
    monitor = "validation_loss"

    def __init__(self, spec: CrossmodalSpec, zoo: Zoo, device: str = "cpu", world: World = ALONE) -> None:
        self.spec, self.zoo, self.device, self.world = spec, zoo, device, world
        self.step, self.progress = 0, Progress()
        training = spec.training
        self.steps, self.validate_every, self.patience = training.steps, training.validate_every, training.patience
        # With early stopping the best model is kept, and the last one may be it.
        self.keep_best = self.validate_last = training.patience is not None
        split = split_subjects(zoo.labels, zoo.shape, spec)
        self.preprocessor = Preprocessor.of(spec, zoo, split.train)
        self.layout = zoo.layout
        self.subjects = self.preprocessor.subjects(zoo, split.train, device)
        self.validation = self.preprocessor.subjects(zoo, split.validation[:MAX_VALIDATED], device)
        self.sampler = BehaviorAwareBatchSampler(
            self.subjects.labels, training.batch_size, spec.seed, [pattern.name for pattern in zoo.patterns]
        )
        micro_batch_count = training.accumulation * world.size
        if self.sampler.pairs_of_batch < micro_batch_count:
            raise InvalidInput.field(
                "spec.training.batch_size",
                f"a batch has {self.sampler.pairs_of_batch} pairs of subjects, too few for {micro_batch_count} parts "
                "(accumulation x processes); take larger batches or fewer parts",
            )
        self.queries = Queries.build(zoo.universe, zoo.layout.envelope, spec.seed)
        init = generator(spec.seed, "init")
        self.model = EncoderDecoder(spec.codec, self.preprocessor, len(zoo.patterns), init).to(device)
        self.present = self.preprocessor.present(self.subjects.shape)
        self.model.fit(self.subjects, self.present)
        latent, width = spec.codec.latent_dim, spec.loss.projection
        self.projection = (perceptron([latent, latent, width], init) if width else nn.Identity()).to(device)
        decayed = (self.model.encoder, self.model.decoder, self.projection)
        self.optimization = Optimization(
            [
                {"params": [parameter for module in decayed for parameter in module.parameters()]},
                # Directions have no weight decay: a behaviour that is hard to change needs a long one.
                {"params": [self.model.directions], "weight_decay": 0.0},
            ],
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
        """Compute what depends on the standardisation, which is part of the model's state."""
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
            # The mean is short at first, so that it forgets the initial parameters.
            decay = min(training.ema, self.step / (self.step + 9))
            torch._foreach_lerp_(self.mean, [p.detach() for p in self.optimization.parameters], 1 - decay)
        return metrics

    def terms(self, subjects: Subjects, features: Tensor, rng: torch.Generator, progress: float) -> dict[str, Tensor]:
        """The loss and its terms, each of which is computed only if it has a weight.

        ``features``: of the encoder (:meth:`services.crossmodal.model.Encoder.features`); ``rng``: for the behaviours
        that each subject gains or loses, and for the sequences; ``progress``: from 0 to 1, for the schedules.
        """
        weight, model = self.spec.loss, self.model
        gamma = between(weight.gamma, weight.gamma_end, progress)
        source, labels, shape = subjects.weights, subjects.labels, subjects.shape
        edits = weight.steering > 0 or weight.direct > 0
        terms: dict[str, Tensor] = {}
        patterns = choose(labels.cpu(), self.spec.training.several, rng).to(self.device)
        labels_after, signs = toggle(labels, patterns)
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.bfloat16):
            latents = self._encode(features, shape)
            moved = [latents, latents + signs @ model.directions] if edits else [latents]
            decodings = self._decode(torch.cat(moved), shape.repeat(len(moved)))
            projected = self.projection(latents)
        decoded, steered = decodings.float().chunk(2) if edits else (decodings.float(), decodings)
        if weight.reconstruction:
            form, standard = weight.reconstruction_form, model.decoder.standard
            terms["reconstruction"] = (
                losses.reconstruction(decoded, source, self.weighting)
                if form == "normalized"
                else losses.elementwise(standard(decoded), standard(source), model.decoder.present[shape], form)
            )
        variants = {"behavior": decoded, "steering": edited(source, decoded, steered, "residual"), "direct": steered}
        networks = {name: vectors for name, vectors in variants.items() if getattr(weight, name)}
        if networks:
            rows = self.queries.draw(patterns.cpu(), self.spec.training.queries, rng)
            inputs = self.queries.network_inputs(rows).to(self.device)
            with torch.no_grad():
                source_logits = self.layout.logits(source.unsqueeze(1), shape, inputs).squeeze(1)
            answers = self.layout.logits(torch.stack(list(networks.values()), 1), shape, inputs).unbind(1)
            logits = dict(zip(networks, answers, strict=True))
            if weight.behavior:
                terms["behavior"] = losses.behavior(logits.pop("behavior"), source_logits)
            if logits:
                pools, sets = self.queries.pools, (labels, labels_after)
                before, after = (pools.labels(rows, behaviors.cpu()).to(self.device) for behaviors in sets)
                for name, edit_logits in logits.items():
                    labeled = (edit_logits, source_logits, before, after)
                    terms[name] = losses.steering(*labeled, weight.locality, mend=weight.mend)
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

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The validation loss and its terms, of the running mean."""
        with self._running_mean():
            # Always at the schedules' end: values of different objectives could not be compared.
            rng = generator(self.spec.seed, "validation")
            terms = self.terms(self.validation, self.validation_features, rng, progress=1.0)
        return {f"validation_{name}": float(value) for name, value in terms.items()}

    @contextmanager
    def _running_mean(self) -> Iterator[None]:
        """Use the running mean as the model's parameters."""
        parameters = self.optimization.parameters
        current = [parameter.detach().clone() for parameter in parameters]
        with torch.no_grad():
            torch._foreach_copy_(parameters, self.mean)
            yield
            torch._foreach_copy_(parameters, current)

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
        return {
            "weighting": self.weighting,
            **checkpoints.part("model", self.model.state_dict()),
            **checkpoints.part("projection", self.projection.state_dict()),
            **checkpoints.part("mean", self.weights()),
            **checkpoints.part("optimization", self.optimization.state()),
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        parts = checkpoints.parts(tensors)
        self.model.load_state_dict(parts["model"])
        self.projection.load_state_dict(parts.get("projection", {}))
        self.take_weights(parts["mean"])
        self.optimization.restore(parts["optimization"])
        self._prepare()
        self.weighting = tensors["weighting"]


def micro_batches(batch: Tensor, count: int) -> list[Tensor]:
    """Split a batch into ``count`` micro-batches of similar size; buddies stay together."""
    return [pairs.flatten() for pairs in batch.view(-1, 2).tensor_split(count)]


def between(start: float, end: float | None, progress: float) -> float:
    """Linear interpolation from ``start`` to ``end`` by ``progress`` from 0 to 1; ``start`` if ``end`` is None."""
    return start if end is None else start + (end - start) * progress


def check_compiler(device: str) -> None:
    """Raise :class:`InvalidInput` where ``torch.compile`` cannot work."""
    if torch.device(device).type == "cpu" and not any(map(shutil.which, ("g++", "clang++", os.environ.get("CXX", "")))):
        raise InvalidInput.field("spec.training.compile", "needs a C++ compiler on this machine: g++ or clang++")
