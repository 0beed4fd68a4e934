"""Training of sparse models on a store of activations."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ethogram.errors import InvalidInput
from ethogram.specs.clt import CltSpec, SaeSpec, SparseTrainingSpec
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
from services.runtime.tracking import tracked

REPORT_EVERY = 50
"""Steps between metrics."""
SMALLEST_ROW = 1e-4
"""Norm of a row, in the model's units, that has a direction."""
SMALLEST_BEGINNING = 0.01
"""What features read at first, where no size of theirs would explain anything."""
REVIVED_LEAD = 1.1
"""Value of a revived feature on its row, as a multiple of the least that is active there."""


def train(trainer: SparseTrainer, run: Run | None = None) -> SparseModel:
    """Take the steps of ``trainer`` and return its model.

    Goes on from ``run.resume`` where there is one, with the same batches and the same result, to the bit, as an
    uninterrupted run on the same machine. With a world of several processes each calls this, and the first one's
    ``run`` is told and says what to go on from. Raises :class:`InvalidInput` for a loss that is not finite.
    """
    run, spec, first = run or Run(), trainer.spec, trainer.world.first
    if run.resume is not None and first:
        trainer.load(run.resume)
    trainer.share()
    run.stage("train", trainer.steps)
    run.advance(trainer.step)
    with tracked(spec.wandb if first else None, spec.model_dump(mode="json"), run, trainer.tracking) as log:
        trainer.tracking = log.id
        while trainer.step < trainer.steps:
            values = trainer.advance()
            step, last = trainer.step, trainer.step == trainer.steps
            told: dict[str, float] = {}
            if step % REPORT_EVERY == 0 or last:
                told = {name: float(value) for name, value in values.items()}
            # The first alone is asked: the others would measure the same.
            if first and (step % spec.training.validate_every == 0 or last):
                told |= trainer.validate()
                log.histogram(step, "density", trainer.density)
            if told:
                trainer.course.append({"step": step, **told})
                run.metric(step, **told)
                log(step, told)
            run.advance(step)
            if first and spec.training.snapshots and step % spec.training.snapshots == 0:
                with tempfile.TemporaryDirectory() as scratch:
                    trainer.finished().save(Path(scratch, "model"), trainer.about)
                    run.artifact(f"snapshot-{step}", "sparse-model", Path(scratch, "model"))
            if run.checkpoint_due():
                run.checkpoint(step, trainer.save)
    return trainer.finished()


class SparseTrainer:
    """The state of a training run on the training rows of a store.

    Batches and all that is random follow from the step, so there is no cursor and no generator to keep. Use it as a
    context manager: the loader reads ahead in a thread.

    ``dictionary``: what the decoder is tied to. Raises :class:`InvalidInput` for hook points that do not fit.
    """

    def __init__(
        self,
        spec: SaeSpec | CltSpec,
        store: ActivationStore,
        device: str = "cpu",
        world: World = ALONE,
        dictionary: SparseModel | None = None,
    ) -> None:
        self.spec, self.store, self.device, self.world, self.step = spec, store, device, world, 0
        self.streams = streams_of(spec, store)
        training = spec.training
        self.steps = training.steps
        if training.epochs is not None:
            self.steps = max(1, round(training.epochs * store.rows("train") / training.batch_size))
        if world.size > training.batch_size:
            raise InvalidInput.field("spec.training.batch_size", f"is less than the {world.size} processes")
        if not store.rows("validation"):
            text = "the store has no validation rows, so recording was not finished; the command that began it goes on"
            raise InvalidInput.field("activations", text)
        check_heads(spec, self.streams)
        if (spec.model.dictionary is None) != (dictionary is None):
            text = "is asked for, and not given" if dictionary is None else "is given, and not asked for"
            raise InvalidInput.field("spec.model.dictionary", text)
        hooks = list(dict.fromkeys([*self.streams.sources, *self.streams.targets]))
        self._places = [[hooks.index(hook) for hook in side] for side in (self.streams.sources, self.streams.targets)]
        self._batches = Batches(store, hooks, training.batch_size, seed=spec.seed)
        scales = scales_of(spec, store, self.streams)
        words = None
        if dictionary is not None:
            scales = scales[0], [dictionary_scale(dictionary, self.streams, store)]
            words = dictionary.decoders[0].detach()
        self.model = SparseModel(spec.model, self.streams, scales, generator(spec.seed, "init"), words).to(device)
        self.model.train()
        self._begin_on_rows()
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, lr=training.learning_rate, fused=True)
        self.asleep = [torch.zeros(count, dtype=torch.int64, device=device) for count in self.model.features]
        """Rows since each feature was active."""
        self.density = torch.zeros(sum(self.model.features))
        """Share of the rows of the last validation in which each feature is active."""
        self.course: list[dict[str, float]] = []
        """What was told of the training so far, each with its ``step``."""
        self.tracking: str | None = None
        """Id of the run at Weights & Biases."""
        self.saved: int | None = None

    def __enter__(self) -> SparseTrainer:
        return self

    def __exit__(self, *_: object) -> None:
        self._batches.close()

    @torch.no_grad()
    def _begin_on_rows(self) -> None:
        """Have each feature read in the direction of a training row, and what an autoencoder's writes be the same.

        Streams are far from isotropic: of features in random directions most are never among the largest of any row,
        and die at once.
        """
        wanted, batches, step = max(self.model.features), list[list[Tensor]](), 0
        while sum(len(batch[0]) for batch in batches) < wanted:
            batches.append(self._sides(self._batches.at(step))[0])
            step += 1
        for s, (encoder, words) in enumerate(zip(self.model.encoders, self.model.decoders, strict=True)):
            rows = torch.cat([batch[s] for batch in batches])[: len(encoder)]
            # A row at the mean has no direction.
            known = rows.norm(dim=1) > SMALLEST_ROW
            encoder[known] = torch.nn.functional.normalize(rows[known], dim=1)
            if self.streams.kind == "sae":
                words.copy_(encoder)
        if bool(self.model.decoders[0].any()):
            self._begin_in_size()

    @torch.no_grad()
    def _begin_in_size(self) -> None:
        """Have what the features write at first, of an autoencoder or with a dictionary, be as large as explains most:
        rows are alike, and so are features that read them, of which many are active together."""
        model = self.model
        inputs, targets = self._sides(self._batches.at(0, rank=0, size=self.world.size))
        (found,) = model.decode(model.encode(inputs), inputs)
        along, size = float((found * targets[0]).sum()), float(found.square().sum())
        factor = along / size if along > 0 else SMALLEST_BEGINNING
        model.encoders[0] *= factor
        for thresholds in model.log_thresholds:
            # As many are active as before.
            thresholds += math.log(factor)
        # What was seen is no part of the training.
        model.threshold.zero_()
        model.batches.zero_()

    @property
    def about(self) -> dict[str, object]:
        """What a model's file says of its training."""
        return {
            "spec": self.spec.model_dump(mode="json"),
            "source": self.store.manifest.source.model_dump(),
            "step": self.step,
            "wandb": self.tracking,
        }

    @property
    def dead(self) -> list[Tensor]:
        """Features that have not been active for ``dead_after`` rows, of each source: bool ``[features]``."""
        return [rows >= self.spec.training.dead_after for rows in self.asleep]

    def _sides(self, streams: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        sources, targets = ([streams[place].to(self.device) for place in places] for places in self._places)
        return self.model.scaled(sources, "read"), self.model.scaled(targets, "write")

    def advance(self) -> dict[str, Tensor]:
        """One optimiser step. Returns the loss and its terms.

        Raises :class:`InvalidInput` before anything is changed when the loss or its gradient is not finite.
        """
        batch = self._batches.at(self.step, rank=self.world.rank, size=self.world.size)
        return self.learn(*self._sides(batch))

    def learn(self, inputs: list[Tensor], targets: list[Tensor]) -> dict[str, Tensor]:
        """The same with this process's part of a batch, in the model's units."""
        training, world = self.spec.training, self.world
        self.optimizer.zero_grad()
        values, code, found = terms(
            self.model, inputs, targets, self.spec.loss, self.dead, bfloat16=training.precision == "bfloat16"
        )
        share = len(inputs[0]) / training.batch_size
        (values["loss"] * share).backward()  # type: ignore[no-untyped-call]
        told = {name: value.detach() * share for name, value in values.items()}
        counts = [own.counts().to(self.device) for own in code]
        told["active"] = torch.stack([one.sum() for one in counts]).sum() / (training.batch_size * len(counts))
        fired = [(one > 0).float() for one in counts]
        for parameter in self.parameters:
            # All processes must send the same: a term may not reach a parameter in one of them.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        world.add([*[p.grad for p in self.parameters if p.grad is not None], *told.values(), *fired])
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        if not bool(torch.isfinite(told["loss"] + norm)):
            raise self._diverged(float(told["loss"]))
        for group in self.optimizer.param_groups:
            group["lr"] = training.learning_rate * schedule(self.step, self.steps, training)
        self.optimizer.step()
        self.model.unit_words()
        self.step += 1
        for rows, active in zip(self.asleep, fired, strict=True):
            rows += training.batch_size
            rows[active > 0] = 0
        # Not while the rate falls: they would not learn any more.
        if (
            training.revive_every is not None
            and self.step % training.revive_every == 0
            and self.steps - self.step > falling(self.steps, training)
        ):
            self._revive(inputs, targets, found)
        return told

    def _diverged(self, value: float) -> InvalidInput:
        text = f"the loss became {value:g} at step {self.step + 1}; lower the learning rate"
        return InvalidInput.field("spec.training.learning_rate", f"{text} ({checkpoints.last_good(self.saved)})")

    @torch.no_grad()
    def _revive(self, inputs: Sequence[Tensor], targets: Sequence[Tensor], found: Sequence[Tensor]) -> None:
        """Set some dead features on rows with large errors (after Bricken et al. 2023, "Towards Monosemanticity",
        appendix): each reads a row of its own so that it is active there, and begins to write as at the start of
        training: nothing, or in an autoencoder what it reads. Where the words are a dictionary's, its row is the one
        whose error is most like its word.

        A few at a time: rows are alike, and what is active for one takes the place of others in many.
        """
        errors = torch.stack([(t - f).square().sum(1) for t, f in zip(targets, found, strict=True)]).sum(0)
        draws = generator(self.spec.seed, "revive", self.step)
        for s, asleep in enumerate(self.dead):
            which = asleep.nonzero().squeeze(1)[: min(len(errors), max(1, self.model.k[s] // 2))]
            if not len(which):
                continue
            encoder, bias, words = self.model.encoders[s], self.model.encoder_biases[s], self.model.decoders[s]
            left = torch.cat([targets[t] - found[t] for t in self.streams.written(s)], 1)
            if words.requires_grad:
                # Two of one row would be the same feature for good.
                rows = torch.multinomial(errors.square().cpu() + 1e-12, len(which), generator=draws).to(self.device)
            else:
                rows = (left @ words[which].T).argmax(0)
            seen = inputs[s][rows]
            value = torch.maximum(left[rows].norm(dim=1), REVIVED_LEAD * self.model.least_active(s, seen))
            # A small row may not make a large feature.
            norm = seen.norm(dim=1).clamp_min(0.1 * float(inputs[s].norm(dim=1).mean()) + SMALLEST_ROW)
            read = torch.nn.functional.normalize(seen, dim=1)
            encoder[which] = (value / norm).unsqueeze(1) * read
            bias[which] = 0
            changed = [encoder, bias]
            if words.requires_grad:
                words[which] = read if self.streams.kind == "sae" else 0
                changed.append(words)
            if self.model.log_thresholds:
                self.model.log_thresholds[s][which] = math.log(FIRST_THRESHOLD)
                changed.append(self.model.log_thresholds[s])
            for parameter in changed:
                moments = self.optimizer.state[parameter]
                moments["exp_avg"][which] = 0
                # Of 0 the first steps would be several times as long as the others': Adam takes it for a beginning's
                # at the first step alone.
                squares = moments["exp_avg_sq"]
                squares[which] = squares[~asleep].mean(0) if bool((~asleep).any()) else squares.mean()
            self.asleep[s][which] = 0
        # Others would draw from other rows.
        self._take(self.world.broadcast(self.state(), self.device))

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Figures on the validation rows, see :func:`services.clt.sparse.evaluate.evaluate`."""
        figures, self.density = evaluate(self.model, self.store, self.spec.training.validation_rows)
        told = {f"validation_{name}": figures[name] for name in ("fvu", "l0", "cosine", "mse")}
        told["dead"] = float(sum(int(one.sum()) for one in self.dead)) / sum(self.model.features)
        return told

    def finished(self) -> SparseModel:
        """The model as it is now, ready for evaluation."""
        self.model.eval()
        read, write = ([scale.copied() for scale in self.model.scales(side)] for side in ("read", "write"))
        model = SparseModel(
            self.spec.model,
            self.streams,
            (read, write),
            torch.Generator(),
            self.model.decoders[0].detach().cpu() if self.spec.model.dictionary is not None else None,
        )
        model.load_state_dict({name: value.clone() for name, value in self.model.state_dict().items()})
        self.model.train()
        return model.to(self.device).eval().requires_grad_(False)

    def share(self) -> None:
        """Take the state of the first process, which may have a checkpoint."""
        if self.world.size > 1:
            self._take(self.world.broadcast(self.state(), self.device))

    def state(self) -> dict[str, Tensor]:
        """All that a step changes."""
        tensors = checkpoints.part("model", self.model.state_dict())
        tensors |= checkpoints.part("optimizer", checkpoints.moments(self.optimizer))
        tensors |= checkpoints.part("asleep", {str(s): rows for s, rows in enumerate(self.asleep)})
        return tensors | {"step": torch.tensor(self.step)}

    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state`."""
        parts = checkpoints.parts(tensors)
        self.model.load_state_dict(parts["model"])
        checkpoints.set_moments(self.optimizer, parts.get("optimizer", {}))
        for s in range(len(self.asleep)):
            self.asleep[s] = parts["asleep"][str(s)].to(self.device).clone()
        self.step = int(tensors["step"])

    def save(self, folder: Path) -> None:
        """Write the state into ``folder``, without pickle."""
        about = {**self.about, "store": self.store.digest, "processes": self.world.size, "course": self.course}
        checkpoints.write(folder, self.state(), about)
        self.saved = self.step

    def load(self, folder: Path) -> None:
        """Go on from what :meth:`save` wrote. Raises :class:`InvalidInput` for a checkpoint of another spec, store or
        number of processes, and for one that cannot be read."""
        with checkpoints.reading(folder, self.device) as (about, tensors):
            checkpoints.same(
                {
                    "with another spec; start afresh": (about["spec"], self.spec.model_dump(mode="json")),
                    "on another store; start afresh": (about["store"], self.store.digest),
                    f"of {about['processes']} processes; take as many, or start afresh": (
                        about["processes"],
                        self.world.size,
                    ),
                }
            )
            self._take(tensors)
            self.course, self.tracking = about["course"], about["wandb"]
        self.saved = self.step


def schedule(step: int, steps: int, training: SparseTrainingSpec) -> float:
    """The learning rate of a step (from 0) as a share of its peak."""
    rise = min(1.0, (step + 1) / (training.warm_up + 1))
    return rise * min(1.0, (steps - step) / max(1, falling(steps, training)))


def falling(steps: int, training: SparseTrainingSpec) -> int:
    """Steps at the end over which the learning rate falls."""
    return math.ceil(training.decay * steps)


def check_heads(spec: SaeSpec | CltSpec, streams: Streams) -> None:
    """Raise :class:`InvalidInput` for heads that a target's channels do not divide into."""
    for target, width in zip(streams.targets, streams.target_widths, strict=True):
        if spec.loss.group_heads and width % spec.loss.heads:
            text = f"the {width} channels of {target} do not divide into {spec.loss.heads} heads"
            raise InvalidInput.field("spec.loss.heads", text)


def dictionary_scale(dictionary: SparseModel, streams: Streams, store: ActivationStore) -> Scale:
    """In whose units a dictionary writes. Raises :class:`InvalidInput` for one of another stream or network."""
    if dictionary.streams.kind != "sae" or dictionary.streams.targets != streams.targets:
        has = f"a {dictionary.streams.kind} of {', '.join(dictionary.streams.targets)}"
        raise InvalidInput.field("spec.model.dictionary", f"is {has}; take an autoencoder of {streams.targets[0]}")
    source = dictionary.about.get("source")
    if isinstance(source, Mapping):
        store.require(str(source.get("digest")), "spec.model.dictionary")
    return dictionary.scales("write")[0].copied()
