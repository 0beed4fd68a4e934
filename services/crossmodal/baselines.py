"""Other ways to make the edits of a codec, to compare it with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ethogram.specs.edits import LOOKUPS, Edit
from services.crossmodal.codec import Codec
from services.crossmodal.data import Queries, Subjects
from services.crossmodal.steering import mean_differences
from services.runtime.seeds import generator
from services.runtime.training import Adam, Optimization, Progress, Trainer, constant, fit

WAYS = (*LOOKUPS, "task_arithmetic", "fine_tuning")
FINE_STEPS, FINE_RATE, FINE_QUERIES = 100, 1e-2, 128
"""Steps, learning rate and sequences per step of short fine-tuning."""


class Baselines:
    """Edits subjects in other ways:

    - ``same_label``: of the training networks with exactly the requested behaviours, that whose latent is nearest to
      the steered one;
    - ``nearest_train``: the training network whose latent is nearest to the steered one;
    - ``centroid``: the decoded mean latent of the training networks with those behaviours;
    - ``task_arithmetic``: the source plus the difference of the mean weights with and without the behaviour (Ilharco et
      al. 2022, arXiv 2212.04089);
    - ``fine_tuning``: the source trained for ``FINE_STEPS`` steps on the exact labels after the edit, which no other
      way is given.
    """

    def __init__(self, codec: Codec, train: Subjects, queries: Queries) -> None:
        """``train``: the subjects that the codec was trained on."""
        self._codec, self._train, self._queries = codec, train, queries
        with torch.no_grad():
            self._latents = codec.latents(train.inputs, train.shape)
        self._differences = mean_differences(train.weights, train.labels)

    def edit(
        self, subjects: Subjects, latents: Tensor, edit: Edit, *, tune: bool = True
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """By name, the edited weights ``[subjects, size]`` of ``subjects``, and for which of them there are any, bool
        ``[subjects]``; ``latents``: theirs, ``[subjects, latent]``. ``tune``: whether ``fine_tuning``, which takes
        longest, is among them."""
        codec, train, shape = self._codec, self._train, subjects.shape
        signs = codec.signs([edit])
        labels = subjects.labels & ~(signs < 0) | (signs > 0)
        count = labels.sum(1, keepdim=True)
        with torch.no_grad():
            steered = latents + signs @ codec.directions["learned"]
            alike = (labels.float() @ train.labels.float().T == count) & (train.labels.sum(1) == count)
            centroid = alike.float() @ self._latents / alike.sum(1, keepdim=True).clamp_min(1)
            same_shape = shape.unsqueeze(1) == train.shape
            distance = torch.cdist(steered, self._latents).masked_fill(~same_shape, torch.inf)
            partner, nearest = distance.masked_fill(~alike, torch.inf).argmin(1), distance.argmin(1)
            present = codec.layout.present.to(codec.device)[shape]
            comparable = same_shape.any(1)
            edited = {
                "same_label": (train.weights[partner], (alike & same_shape).any(1)),
                "nearest_train": (train.weights[nearest], comparable),
                "centroid": (codec.model.decoder(centroid, shape), alike.any(1)),
                "task_arithmetic": (subjects.weights + (signs @ self._differences) * present, comparable),
            }
        if tune:
            edited["fine_tuning"] = (fine_tuned(codec, self._queries, subjects, labels, edit), comparable)
        return edited


class FineTuning(Trainer):
    """Short training of subjects towards other behaviours, each as if alone, by plain Adam on training sequences.

    The subjects' weights after :func:`fit` are ``edited``, ``[subjects, size]``.
    """

    monitor, validate_last = "loss", False

    def __init__(self, codec: Codec, queries: Queries, subjects: Subjects, labels: Tensor, edit: Edit) -> None:
        """``labels``: the behaviours to have, bool ``[subjects, patterns]``, after ``edit``."""
        self.spec, self.device = codec.spec.model_copy(update={"wandb": None}), codec.device
        self.step, self.steps, self.validate_every = 0, FINE_STEPS, FINE_STEPS + 1
        self.progress = Progress()
        self._codec, self._queries, self._shape = codec, queries, subjects.shape
        self._labels, self._present = labels, codec.layout.present.to(codec.device)[subjects.shape]
        self._patterns = codec.signs([edit]).cpu().nonzero().squeeze(1).expand(len(labels), -1)
        self._generator = generator(codec.spec.seed, "fine-tuning", edit.label, edit.operation)
        self.edited = subjects.weights.clone().requires_grad_()
        self.optimization = Optimization([{"params": [self.edited]}], codec.spec.training, constant)
        # Not clipped: the norm of all subjects' gradients would couple them.
        self.optimization.optimizer = Adam([self.edited], FINE_RATE)

    def advance(self) -> dict[str, Tensor]:
        rows = self._queries.draw(self._patterns, FINE_QUERIES, self._generator)
        inputs = self._queries.network_inputs(rows).to(self.device)
        targets = self._queries.pools.labels(rows, self._labels.cpu()).to(self.device).float()
        logits = self._codec.layout.logits(self.edited.unsqueeze(1), self._shape, inputs).squeeze(1)
        # A sum over the subjects: each is trained as if alone.
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1).sum()
        (self.edited.grad,) = torch.autograd.grad(loss, [self.edited])
        self.edited.grad *= self._present
        self.optimization.optimizer.step()
        self.step += 1
        return {"loss": loss.detach()}

    def validate(self) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, Tensor]:
        return {"edited": self.edited.detach()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.edited.data.copy_(tensors["edited"])


def fine_tuned(codec: Codec, queries: Queries, subjects: Subjects, labels: Tensor, edit: Edit) -> Tensor:
    """Each subject's weights ``[subjects, size]`` after :class:`FineTuning`, with the same arguments."""
    trainer = FineTuning(codec, queries, subjects, labels, edit)
    fit(trainer)
    return trainer.edited.detach()
