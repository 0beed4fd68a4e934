"""Training of sparse models on a store of activations."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ethogram.errors import InvalidInput
from ethogram.specs.clt import CltSpec, SaeSpec
from services.clt.activations.loader import Batches
from services.clt.activations.store import ActivationStore
from services.clt.sparse.evaluate import evaluate
from services.clt.sparse.losses import terms
from services.clt.sparse.model import FIRST_THRESHOLD, Scale, SparseModel, Streams
from services.clt.sparse.streams import scales_of, streams_of
from services.runtime import checkpoints
from services.runtime.parallel import ALONE, World
from services.runtime.run import Run
from services.runtime.seeds import generator
from services.runtime.training import (
    Optimization,
    Progress,
    Trainer,
    fit,
    linear,
    restored_if_refused,
    steps_of_epochs,
)

SMALLEST_ROW = 1e-4
"""Norm of a row, in the model's units, that has a direction."""
SMALLEST_SCALE = 0.01
"""First scale of the encoder where no positive one would explain anything."""
REVIVED_LEAD = 1.1
"""Value of a revived feature on its row, as a multiple of the least that is active there."""


def train(trainer: SparseTrainer, run: Run | None = None) -> SparseModel:
    """Run :func:`services.runtime.training.fit` and return the trained model."""
    run = run or Run()
    for text in trainer.too_short() if run.resume is None else ():
        run.log(text, "warning")
    fit(trainer, run, trainer.world)
    return trainer.finished()


class SparseTrainer(Trainer):
    """Trains a sparse model on the training rows of a store. A context manager: the loader reads ahead in a thread.

    ``dictionary``: the model whose decoder is used, and not trained. Raises :class:`InvalidInput` for a spec that does
    not fit the store or the dictionary.
    """

    spec: SaeSpec | CltSpec
    monitor = "validation_fvu"
    report_every = 50

    def __init__(
        self,
        spec: SaeSpec | CltSpec,
        store: ActivationStore,
        device: str = "cpu",
        world: World = ALONE,
        dictionary: SparseModel | None = None,
    ) -> None:
        self.spec, self.store, self.device, self.world = spec, store, device, world
        self.step, self.progress = 0, Progress()
        self.streams = streams_of(spec, store)
        training = spec.training
        self.steps, self.validate_every, self.snapshots = training.steps, training.validate_every, training.snapshots
        rows, batch_size = store.rows("train"), training.batch_size
        if training.epochs is not None:
            self.steps = steps_of_epochs(training.epochs, rows, batch_size)
        if training.snapshot_epochs is not None:
            self.snapshots = steps_of_epochs(training.snapshot_epochs, rows, batch_size)
        self._falling = math.ceil(training.decay * self.steps)
        if world.size > training.batch_size:
            raise InvalidInput.field("spec.training.batch_size", f"is less than the number of processes, {world.size}")
        if not store.rows("validation"):
            text = "the store has no validation rows: its recording was interrupted; the same command resumes it"
            raise InvalidInput.field("activations", text)
        check_heads(spec, self.streams)
        if (spec.model.dictionary is None) != (dictionary is None):
            text = "is set, but none was given" if dictionary is None else "is not set, but one was given"
            raise InvalidInput.field("spec.model.dictionary", text)
        hooks = list(dict.fromkeys([*self.streams.sources, *self.streams.targets]))
        self._columns = [[hooks.index(hook) for hook in side] for side in (self.streams.sources, self.streams.targets)]
        self._batches = Batches(store, hooks, training.batch_size, seed=spec.seed)
        scales = scales_of(spec, store, self.streams)
        decoder = None
        if dictionary is not None:
            scales = scales[0], [dictionary_scale(dictionary, self.streams, store)]
            decoder = dictionary.decoders[0].detach()
        self.model = SparseModel(spec.model, self.streams, scales, generator(spec.seed, "init"), decoder).to(device)
        self.model.train()
        self.optimization = Optimization(
            [{"params": [parameter for parameter in self.model.parameters() if parameter.requires_grad]}],
            training,
            linear(self.steps, self._falling),
            world,
        )
        self.rows_since_fired = [torch.zeros(count, dtype=torch.int64, device=device) for count in self.model.features]
        """Rows since each feature was active, ``[features]`` of each source."""
        self.figures: dict[str, float] = {}
        """Figures of the last validation, see :func:`services.clt.sparse.evaluate.evaluate`."""
        self.density = torch.zeros(sum(self.model.features))
        """Share of the rows of the last validation in which each feature is active, ``[features]``."""

    def __enter__(self) -> SparseTrainer:
        return self

    def __exit__(self, *_: object) -> None:
        self._batches.close()

    @torch.no_grad()
    def start(self) -> None:
        """Set each feature's encoder direction to a training row, and in an autoencoder its decoder direction too.

        Streams are far from isotropic: most random directions would never be among the largest of any row, and die at
        once.
        """
        count, batches, step = max(self.model.features), list[list[Tensor]](), 0
        while sum(len(batch[0]) for batch in batches) < count:
            batches.append(self._sides(self._batches.at(step))[0])
            step += 1
        for s, (encoder, decoder) in enumerate(zip(self.model.encoders, self.model.decoders, strict=True)):
            rows = torch.cat([batch[s] for batch in batches])[: len(encoder)]
            # A row at the mean has no direction.
            has_direction = rows.norm(dim=1) > SMALLEST_ROW
            encoder[has_direction] = torch.nn.functional.normalize(rows[has_direction], dim=1)
            if self.streams.kind == "sae":
                decoder.copy_(encoder)
        if bool(self.model.decoders[0].any()):
            self._scale_encoder()

    @torch.no_grad()
    def _scale_encoder(self) -> None:
        """Give the first reconstructions of an autoencoder, or with a dictionary, the least-squares scale: rows are
        alike, so that many features that read them are active together."""
        model = self.model
        inputs, targets = self._sides(self._batches.at(0))
        (reconstruction,) = model.decode(model.encode(inputs), inputs)
        dot, square = float((reconstruction * targets[0]).sum()), float(reconstruction.square().sum())
        factor = dot / square if dot > 0 else SMALLEST_SCALE
        model.encoders[0] *= factor
        for thresholds in model.log_thresholds:
            # So that as many features are active as before.
            thresholds += math.log(factor)
        # This batch is not part of the training.
        model.threshold.zero_()
        model.batches.zero_()

    @property
    def about(self) -> dict[str, object]:
        """The record of the training in the model's file."""
        return {
            "spec": self.spec.model_dump(mode="json"),
            "source": self.store.manifest.source.model_dump(),
            "step": self.step,
            "wandb": self.progress.wandb,
        }

    @property
    def dead(self) -> list[Tensor]:
        """Which features have not been active for ``dead_after`` rows, bool ``[features]`` of each source."""
        return [rows >= self.spec.training.dead_after for rows in self.rows_since_fired]

    def too_short(self) -> list[str]:
        """Which fields of the spec have no effect, because the training is too short for them."""
        training, found = self.spec.training, list[str]()
        rows = f"no feature can be dead by then: training.dead_after is {training.dead_after} rows"
        if self.spec.loss.auxk and (self.steps - 1) * training.batch_size < training.dead_after:
            found.append(f"spec.loss.auxk: has no effect, because {rows}, and the training has {self.steps} steps")
        if training.revive_every is not None:
            last = (self.steps - self._falling - 1) // training.revive_every * training.revive_every
            why = rows if last > 0 else "nothing is revived once the learning rate falls"
            if last <= 0 or last * training.batch_size < training.dead_after:
                found.append(f"spec.training.revive_every: has no effect, because {why}")
        return found

    def _sides(self, streams: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        sources, targets = ([streams[column].to(self.device) for column in columns] for columns in self._columns)
        return self.model.scaled(sources, "read"), self.model.scaled(targets, "write")

    def advance(self) -> dict[str, Tensor]:
        """Take one step. Returns the loss, its terms, and the mean number of ``active`` features per row."""
        batch = self._batches.at(self.step, rank=self.world.rank, size=self.world.size)
        return self.learn(*self._sides(batch))

    def learn(self, inputs: list[Tensor], targets: list[Tensor]) -> dict[str, Tensor]:
        """Take one step with this process's part of a batch, in the model's units, ``[rows, width]`` each."""
        with restored_if_refused([self.model.threshold, self.model.batches]):
            metrics, reconstructions = self._learn(inputs, targets)
        self.model.normalize_decoder()
        self.step += 1
        training = self.spec.training
        due = training.revive_every is not None and self.step % training.revive_every == 0
        # Not while the learning rate falls: revived features would not learn any more.
        if due and self.steps - self.step > self._falling:
            self._revive(inputs, targets, reconstructions)
        return metrics

    def _learn(self, inputs: list[Tensor], targets: list[Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
        training = self.spec.training
        self.optimization.optimizer.zero_grad()
        share = len(inputs[0]) / training.batch_size
        values, code, reconstructions = terms(
            *(self.model, inputs, targets, self.spec.loss, self.dead),
            bfloat16=training.precision == "bfloat16",
            world=self.world,
            share=share,
        )
        (values["loss"] * share).backward()  # type: ignore[no-untyped-call]
        metrics = {name: value.detach() * share for name, value in values.items()}
        counts = [features.counts().to(self.device) for features in code]
        metrics["active"] = torch.stack([count.sum() for count in counts]).sum() / (training.batch_size * len(counts))
        fired = [(count > 0).float() for count in counts]
        for parameter in self.optimization.parameters:
            # All processes must send the same tensors: a term may not reach a parameter in one of them.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.optimization.update(self.step, metrics, fired)
        for rows, active in zip(self.rows_since_fired, fired, strict=True):
            rows += training.batch_size
            rows[active > 0] = 0
        return metrics, reconstructions

    @torch.no_grad()
    def _revive(self, inputs: Sequence[Tensor], targets: Sequence[Tensor], reconstructions: Sequence[Tensor]) -> None:
        """Point some dead features at rows with large errors (after Bricken et al. 2023, "Towards Monosemanticity",
        appendix).

        Each reads a row of its own, so that it is active there, and writes as at the start of training: nothing, or in
        an autoencoder the direction that it reads. Where the decoder is a dictionary's, its row is the one whose error
        is most like the feature's decoder direction. A few at a time: rows are alike, and a feature that is active in
        one row displaces others in many. The rows are those of the whole batch, so that all processes do the same.
        """
        inputs, targets, reconstructions = (
            [self.world.gather(rows.detach()) for rows in side] for side in (inputs, targets, reconstructions)
        )
        errors = torch.stack([(t - f).square().sum(1) for t, f in zip(targets, reconstructions, strict=True)]).sum(0)
        sampling = generator(self.spec.seed, "revive", self.step)
        for s, dead in enumerate(self.dead):
            which = dead.nonzero().squeeze(1)[: min(len(errors), max(1, self.model.k[s] // 2))]
            if not len(which):
                continue
            encoder, bias, decoder = self.model.encoders[s], self.model.encoder_biases[s], self.model.decoders[s]
            residual = torch.cat([targets[t] - reconstructions[t] for t in self.streams.written(s)], 1)
            if decoder.requires_grad:
                # Two features of one row would stay the same feature.
                rows = torch.multinomial(errors.square().cpu() + 1e-12, len(which), generator=sampling).to(self.device)
            else:
                rows = (residual @ decoder[which].T).argmax(0)
            read_rows = inputs[s][rows]
            value = torch.maximum(residual[rows].norm(dim=1), REVIVED_LEAD * self.model.least_active(s, read_rows))
            # A small row may not make a large feature.
            norm = read_rows.norm(dim=1).clamp_min(0.1 * float(inputs[s].norm(dim=1).mean()) + SMALLEST_ROW)
            direction = torch.nn.functional.normalize(read_rows, dim=1)
            encoder[which] = (value / norm).unsqueeze(1) * direction
            bias[which] = 0
            changed = [encoder, bias]
            if decoder.requires_grad:
                decoder[which] = direction if self.streams.kind == "sae" else 0
                changed.append(decoder)
            if self.model.log_thresholds:
                self.model.log_thresholds[s][which] = math.log(FIRST_THRESHOLD)
                changed.append(self.model.log_thresholds[s])
            for parameter in changed:
                moments = self.optimization.optimizer.state[parameter]
                moments["exp_avg"][which] = 0
                # With 0 the first steps would be several times too long: Adam corrects for it only at step 0.
                squares = moments["exp_avg_sq"]
                squares[which] = squares[~dead].mean(0) if bool((~dead).any()) else squares.mean()
            self.rows_since_fired[s][which] = 0

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Measure the validation rows, see :func:`services.clt.sparse.evaluate.evaluate`."""
        self.figures, self.density = evaluate(self.model, self.store, self.spec.training.validation_rows)
        metrics = {f"validation_{name}": self.figures[name] for name in ("fvu", "l0", "cosine", "mse")}
        return metrics | self.dead_figure

    @property
    def dead_figure(self) -> dict[str, float]:
        """Share of the features that are dead, as ``dead``; empty before ``dead_after`` rows, when none can be dead."""
        if self.step * self.spec.training.batch_size < self.spec.training.dead_after:
            return {}
        return {"dead": sum(int(dead.sum()) for dead in self.dead) / sum(self.model.features)}

    def finished(self) -> SparseModel:
        """A copy of the model for evaluation."""
        return copy.deepcopy(self.model).eval().requires_grad_(False)

    def histograms(self) -> dict[str, Tensor]:
        return {"density": self.density}

    def snapshot(self, folder: Path) -> str:
        self.finished().save(folder, self.about)
        return "sparse-model"

    def identity(self) -> dict[str, str]:
        return {"store": self.store.digest}

    def state(self) -> dict[str, Tensor]:
        tensors = checkpoints.part("model", self.model.state_dict())
        tensors |= checkpoints.part("optimization", self.optimization.state())
        fired = {str(s): rows for s, rows in enumerate(self.rows_since_fired)}
        return tensors | checkpoints.part("rows_since_fired", fired)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        parts = checkpoints.parts(tensors)
        self.model.load_state_dict(parts["model"])
        self.optimization.restore(parts["optimization"])
        fired = parts["rows_since_fired"]
        self.rows_since_fired = [fired[str(s)].to(self.device).clone() for s in range(len(self.rows_since_fired))]


def check_heads(spec: SaeSpec | CltSpec, streams: Streams) -> None:
    """Raise :class:`InvalidInput` unless each target's channels divide into the heads of the loss."""
    for target, width in zip(streams.targets, streams.target_widths, strict=True):
        if spec.loss.group_heads and width % spec.loss.heads:
            text = f"the {width} channels of {target} do not divide into {spec.loss.heads} heads"
            raise InvalidInput.field("spec.loss.heads", text)


def dictionary_scale(dictionary: SparseModel, streams: Streams, store: ActivationStore) -> Scale:
    """The map to a dictionary's units. Raises :class:`InvalidInput` for a dictionary of another stream or network."""
    if dictionary.streams.kind != "sae" or dictionary.streams.targets != streams.targets:
        has = f"a {dictionary.streams.kind} of {', '.join(dictionary.streams.targets)}"
        raise InvalidInput.field("spec.model.dictionary", f"is {has}; take an autoencoder of {streams.targets[0]}")
    source = dictionary.about.get("source")
    if isinstance(source, Mapping):
        store.require(str(source.get("digest")), "spec.model.dictionary")
    return dictionary.scales("write")[0].copied()
