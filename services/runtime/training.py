"""The training loop: one :func:`fit` for every trainer, and the optimiser that they share.

A system writes a :class:`Trainer`: what one step and one validation are, and what its state is. :func:`fit` does the
rest: resuming, sharing between processes, progress, history, metrics, Weights & Biases, snapshots, checkpoints, early
stopping and divergence.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from inspect import unwrap
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from ethogram.errors import InvalidInput, Violation
from ethogram.specs.base import OptimizationSpec, TrainedSpec
from services.runtime import checkpoints
from services.runtime.parallel import ALONE, World
from services.runtime.reading import reading_checkpoint
from services.runtime.run import Run
from services.runtime.tensors import write_tensors
from services.runtime.tracking import Log, histogram, tracked

STATE, ABOUT = "state.safetensors", "state.json"
LEARNING_RATE = "spec.training.learning_rate"
MAX_NORM = 1.0
"""Gradients are clipped to this norm."""
MOST_NAMED = 3
"""Fields of a spec that an error names."""

Decay = Callable[[int], float]
"""Learning rate of a step (from 0) as a share of its peak, after the warm-up."""


class Diverged(InvalidInput):
    """A loss, a gradient or a validation metric is NaN or infinite; weights are as before the step."""

    def __init__(self, step: int, name: str, value: float, note: str = "") -> None:
        text = f"the {name} became {value:g} at step {step}; lower the learning rate{note}"
        super().__init__(f"{LEARNING_RATE}: {text}", [Violation(LEARNING_RATE, text)])
        self.cause = (step, name, value)


@contextmanager
def restored_if_refused(buffers: Iterable[Tensor]) -> Iterator[None]:
    """Run a step whose forward pass changes ``buffers``, e.g. running means, and undo that if it diverges."""
    pairs = [(buffer, buffer.clone()) for buffer in buffers]
    try:
        yield
    except Diverged:
        for buffer, value in pairs:
            buffer.copy_(value)
        raise


def cosine(steps: int) -> Decay:
    """Half a cosine from 1 to a hundredth at the last of ``steps``."""
    return lambda step: 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps))


def linear(steps: int, falling: int) -> Decay:
    """1, and a straight line to 0 over the last ``falling`` of ``steps``."""
    return lambda step: min(1.0, (steps - step) / max(1, falling))


def constant(step: int) -> float:
    """1 at every step."""
    return 1.0


def steps_of_epochs(epochs: float, rows: int, batch_size: int) -> int:
    """Optimiser steps of ``epochs`` passes over ``rows`` training rows, at least 1."""
    return max(1, round(epochs * rows / batch_size))


class Adam(torch.optim.Adam):
    """PyTorch's Adam, but that it does not load PyTorch's compiler, which takes longer than many a training."""

    add_param_group = unwrap(torch.optim.Adam.add_param_group)
    zero_grad = unwrap(torch.optim.Adam.zero_grad)
    state_dict = unwrap(torch.optim.Adam.state_dict)
    load_state_dict = unwrap(torch.optim.Adam.load_state_dict)
    step = torch.no_grad()(unwrap(torch.optim.Adam.step))


class Optimization:
    """AdamW with clipped gradients and a schedule, for every process of ``world``.

    ``groups``: parameter groups as torch takes them; ``scale`` of one multiplies its learning rate. ``matrices``:
    parameters that Muon (Jordan 2024) trains instead, which takes fewer steps for the matrices of a transformer; its
    updates are as large as AdamW's. ``plateau``: halve the learning rate after so many validations in a row in which
    the monitored metric has not fallen.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        training: OptimizationSpec,
        decay: Decay,
        world: World = ALONE,
        *,
        weight_decay: float = 0.0,
        matrices: Sequence[Tensor] = (),
        plateau: int | None = None,
    ) -> None:
        self.training, self.decay, self.world, self.plateau = training, decay, world, plateau
        self.halvings = 0
        rate = training.learning_rate
        self.optimizer = Adam(groups, lr=rate, weight_decay=weight_decay, decoupled_weight_decay=True, fused=True)
        self.optimizers: list[torch.optim.Optimizer] = [self.optimizer]
        if matrices:
            muon = torch.optim.Muon(matrices, lr=rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            self.optimizers.append(muon)
        rows = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        self.parameters = [parameter for group in rows for parameter in group["params"]]

    def rate(self, step: int) -> float:
        """The learning rate of a step (from 0)."""
        rise = min(1.0, (step + 1) / (self.training.warm_up + 1))
        return self.training.learning_rate * (rise * self.decay(step)) * 0.5**self.halvings

    def update(self, step: int, metrics: Mapping[str, Tensor], sums: Sequence[Tensor] = ()) -> None:
        """Take step ``step`` (from 0) along the gradients of this process's part of the ``loss`` in ``metrics``.

        Gradients, ``metrics`` and ``sums`` become their sums over the processes. Raises :class:`Diverged` in all of
        them, before weights are changed, where the loss or a gradient is NaN or infinite.
        """
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        # The metrics too, so that all processes stop for the loss of one.
        self.world.add([*gradients, *metrics.values(), *sums])
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, MAX_NORM)
        loss = metrics["loss"]
        if not bool(torch.isfinite(loss + norm)):
            name, value = ("gradient", norm) if bool(torch.isfinite(loss)) else ("loss", loss)
            raise Diverged(step + 1, name, float(value))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate(step) * group.get("scale", 1.0)
            optimizer.step()

    def after_validation(self, stale: int) -> None:
        """Apply the plateau schedule. ``stale``: validations since the monitored metric was lowest."""
        if self.plateau is not None and stale and stale % self.plateau == 0:
            self.halvings += 1

    def state(self) -> dict[str, Tensor]:
        """The moments of each parameter, ``<parameter>.<name>``, and the number of ``halvings``."""
        tensors, before = {"halvings": torch.tensor(self.halvings)}, 0
        for optimizer in self.optimizers:
            for index, entry in optimizer.state_dict()["state"].items():
                tensors |= {f"{before + index}.{name}": value for name, value in entry.items()}
            before += sum(len(group["params"]) for group in optimizer.param_groups)
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state`. Raises :class:`ValueError` for moments of other parameters."""
        moments = checkpoints.parts(tensors)
        self.halvings = int(moments.pop("halvings")[""])
        before = 0
        for optimizer in self.optimizers:
            count = sum(len(group["params"]) for group in optimizer.param_groups)
            state = {int(name) - before: row for name, row in moments.items() if before <= int(name) < before + count}
            for index, row in state.items():
                weight = self.parameters[before + index]
                if any(moment.ndim and moment.shape != weight.shape for moment in row.values()):
                    # torch takes it all the same.
                    raise ValueError(f"the moments of parameter {before + index} are of another shape")
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
            before += count


@dataclass
class Progress:
    """What :func:`fit` keeps of a training beside the state of the trainer."""

    history: list[dict[str, float]] = field(default_factory=list)
    """Metrics and validations, each row with its ``step``."""
    histograms: list[dict[str, Any]] = field(default_factory=list)
    """What Weights & Biases gets beside the history: rows of ``step`` and histograms by name."""
    wandb: str | None = None
    """Id of the run at Weights & Biases."""
    lowest: float = math.inf
    """The monitored metric at its best validation."""
    best_step: int = 0
    """The step of the best validation."""
    stale: int = 0
    """Validations since then."""
    reached: bool = False
    """Whether the last validation reached the trainer's target."""


class Trainer(Protocol):
    """One training: subclass it, set the attributes without a default, and call :func:`fit`.

    Everything random in a step follows from the seed and the step, so that there is no generator to keep. Frozen
    backbones are no part of :meth:`state`: their digests belong to :meth:`identity`.
    """

    spec: TrainedSpec
    device: str
    optimization: Optimization
    step: int
    """Optimiser steps taken."""
    steps: int
    """Optimiser steps of the whole training."""
    validate_every: int
    """Steps between validations; those of an epoch where each is validated."""
    progress: Progress
    monitor: str
    """The validation metric to minimise, by which early stopping, the best weights and the plateau schedule go."""
    report_every: int = 20
    """Steps between rows of metrics."""
    validate_last: bool = True
    """Whether the last step is validated, whatever its number."""
    patience: int | None = None
    """Early stopping: training ends after so many validations in a row in which the metric has not fallen."""
    keep_best: bool = False
    """Whether the weights of the best validation are those at the end."""
    snapshots: int | None = None
    """Steps between snapshots, each an artifact ``snapshot-<step>``."""

    def advance(self) -> dict[str, Tensor]:
        """Take one optimiser step and count it. Returns the ``loss`` and other metrics, scalars.

        Raises :class:`Diverged` before weights are changed.
        """
        ...

    def validate(self) -> dict[str, float]:
        """Validation metrics; called in the first process alone."""
        ...

    def reached(self, metrics: Mapping[str, float]) -> bool:
        """Whether a validation with these metrics has reached the target, so that training ends."""
        return False

    def state(self) -> dict[str, Tensor]:
        """All tensors that steps change or that the training data decide."""
        ...

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state`."""
        ...

    def identity(self) -> dict[str, str]:
        """Digests of the data and of frozen models, by name. A checkpoint is only resumed with the same digests, spec
        and number of processes."""
        return {}

    def start(self) -> None:
        """Prepare a training that does not resume, e.g. initialise weights from data."""
        return None

    def weights(self) -> dict[str, Tensor]:
        """What is kept of the best validation, as copies. By default the whole state."""
        return {name: tensor.clone() for name, tensor in self.state().items()}

    def take_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`weights`."""
        self.restore(tensors)

    def histograms(self) -> dict[str, Tensor]:
        """Distributions of the last validation, for Weights & Biases."""
        return {}

    def snapshot(self, folder: Path) -> str:
        """Write the model as it is into the new ``folder``. Returns the type of the artifact."""
        raise RuntimeError(f"{type(self).__name__} takes no snapshots")


def fit(trainer: Trainer, run: Run | None = None, world: World = ALONE) -> None:
    """Take the steps of ``trainer`` that are left.

    Resumes from ``run.resume`` if there is one; the result is bit-equal to that of an uninterrupted run on the same
    machine. With several processes each calls this with its own trainer, and the ``run`` of the first one reports,
    keeps checkpoints and has the one to resume from. Raises :class:`Diverged`, and :class:`InvalidInput` for the
    checkpoint of another training.
    """
    run, spec, progress = run or Run(), trainer.spec, trainer.progress
    saved, best = _begin(trainer, run, world)
    if saved is not None:
        run.log(f"resumed from the checkpoint of step {saved}")
    if saved is None and trainer.snapshots is not None and trainer.snapshots > trainer.steps:
        text = f"there is one every {trainer.snapshots} steps, and the training has {trainer.steps}"
        run.log(f"no snapshot is taken: {text}", "warning")
    run.stage("train", trainer.steps)
    run.advance(trainer.step)
    with tracked(spec.wandb if world.first else None, spec.model_dump(mode="json"), run, progress.wandb) as log:
        progress.wandb = log.id or progress.wandb
        # A resumed run logs to the same one, which may lack what a killed attempt had not sent.
        for row in sorted([*progress.history, *progress.histograms], key=itemgetter("step")):
            log(row["step"], {name: value for name, value in row.items() if name != "step"})
        while trainer.step < trainer.steps and not (progress.reached or _patience_ended(trainer)):
            try:
                metrics = _metrics(trainer, world, log)
            except Diverged as error:
                if not world.first:
                    raise
                kept = "there is no checkpoint" if saved is None else f"the last good checkpoint is of step {saved}"
                raise Diverged(*error.cause, f" ({kept})") from None
            step = trainer.step
            if trainer.keep_best and progress.best_step == step:
                best = trainer.weights()
            if metrics:
                progress.history.append({"step": step, **metrics})
                run.metric(step, **metrics)
                log(step, metrics)
            run.advance(step)
            if world.first and trainer.snapshots and step % trainer.snapshots == 0:
                with tempfile.TemporaryDirectory() as scratch:
                    folder = Path(scratch, "model")
                    run.artifact(f"snapshot-{step}", trainer.snapshot(folder), folder)
            if run.checkpoint_due():
                run.checkpoint(step, partial(write_checkpoint, trainer, world, best))
                saved = step
    if progress.reached:
        run.log(f"reached the target at step {trainer.step}")
    elif trainer.step < trainer.steps:
        metric = trainer.monitor.replace("_", " ")
        run.log(f"stopped at step {trainer.step}: the {metric} has not fallen since step {progress.best_step}")
    if best:
        trainer.take_weights(best)


def _patience_ended(trainer: Trainer) -> bool:
    return trainer.patience is not None and trainer.progress.stale >= trainer.patience


def _metrics(trainer: Trainer, world: World, log: Log) -> dict[str, float]:
    """Take a step. Returns the metrics that are due after it."""
    values = trainer.advance()
    step, last, progress = trainer.step, trainer.step == trainer.steps, trainer.progress
    reported = step % trainer.report_every == 0 or last
    metrics = {name: float(value) for name, value in values.items()} if reported else {}
    if step % trainer.validate_every == 0 or (last and trainer.validate_last):
        # All processes go by the first one's validation, so that they stop together.
        measured = world.share_object(trainer.validate() if world.first else {})
        value = measured[trainer.monitor]
        if not math.isfinite(value):
            raise Diverged(step, trainer.monitor.replace("_", " "), value)
        if value < progress.lowest:
            progress.lowest, progress.best_step, progress.stale = value, step, 0
        else:
            progress.stale += 1
        progress.reached = trainer.reached(measured)
        trainer.optimization.after_validation(progress.stale)
        if log.id is not None and (distributions := trainer.histograms()):
            histograms = {name: histogram(values) for name, values in distributions.items()}
            progress.histograms.append({"step": step, **histograms})
            log(step, histograms)
        metrics |= measured
    return metrics


def share(trainer: Trainer, world: World) -> None:
    """Give every process the state of the first one."""
    if world.size > 1:
        trainer.restore(world.broadcast(trainer.state(), trainer.device))


def _begin(trainer: Trainer, run: Run, world: World) -> tuple[int | None, dict[str, Tensor]]:
    """Start or resume in the first process, and copy its state to the others. Returns the step of the checkpoint, if
    there is one, and the best weights so far."""
    saved, best = None, dict[str, Tensor]()
    if world.first and run.resume is not None:
        best = read_checkpoint(trainer, world, run.resume)
        saved = trainer.step
    elif world.first and trainer.step == 0:
        trainer.start()
    trainer.step, kept = world.share_object((trainer.step, asdict(trainer.progress)))
    if not world.first:
        vars(trainer.progress).update(kept)
    share(trainer, world)
    return saved, world.broadcast(best, trainer.device)


def write_checkpoint(trainer: Trainer, world: World, best: Mapping[str, Tensor], folder: Path) -> None:
    """Write the state of a training and its ``best`` weights into ``folder``, without pickle."""
    tensors = checkpoints.part("state", trainer.state()) | checkpoints.part("best", best)
    about = {
        "spec": trainer.spec.model_dump(mode="json"),
        "identity": trainer.identity(),
        "processes": world.size,
        "step": trainer.step,
        "progress": asdict(trainer.progress),
    }
    write_tensors(folder / STATE, tensors)
    (folder / ABOUT).write_text(json.dumps(about), encoding="utf-8")


def read_checkpoint(trainer: Trainer, world: World, folder: Path) -> dict[str, Tensor]:
    """Restore the state that :func:`write_checkpoint` wrote. Returns the best weights.

    Raises :class:`InvalidInput` for a checkpoint of another training, and for one that cannot be read.
    """
    with reading_checkpoint():
        # Copies are aligned in memory, which a file's tensors need not be; MKL rounds differently where they are not.
        tensors = {name: value.clone() for name, value in load_file(folder / STATE, device=trainer.device).items()}
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        _check(trainer, world, about)
        parts = checkpoints.parts(tensors)
        trainer.restore(parts["state"])
        trainer.step = int(about["step"])
        vars(trainer.progress).update(asdict(Progress(**about["progress"])))
        return parts.get("best", {})


def _check(trainer: Trainer, world: World, about: Mapping[str, Any]) -> None:
    """Raise :class:`InvalidInput`, which names the differences, for a checkpoint of another training."""
    # Validated, so that a field that was added since has its default.
    then, now = type(trainer.spec).model_validate(about["spec"]), trainer.spec
    identity, processes = trainer.identity(), about["processes"]
    if then != now:
        names = list(_differing(then.model_dump(), now.model_dump()))
        more = ", ..." if len(names) > MOST_NAMED else ""
        text = f"was written with another spec ({', '.join(names[:MOST_NAMED])}{more}); start afresh"
    elif about["identity"] != identity:
        names = [name for name in identity if about["identity"].get(name) != identity[name]]
        text = f"was written with another {' and '.join(names)}; start afresh"
    elif processes != world.size:
        text = f"was written by a run of {processes} processes; take as many, or start afresh"
    else:
        return
    raise InvalidInput.field("checkpoint", text)


def _differing(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterable[str]:
    """Dotted paths of the values that differ."""
    for name, value in now.items():
        former = then.get(name)
        if isinstance(former, Mapping) and isinstance(value, Mapping):
            yield from _differing(former, value, f"{prefix}{name}.")
        elif former != value:
            yield prefix + name
