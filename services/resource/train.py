"""Training of the encoder through a frozen language model that describes what it reads."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ethogram.errors import InvalidInput
from ethogram.specs.resource import ResourceSpec
from services.resource.augmentation import Augmenter
from services.resource.code import SoftTokenCode
from services.resource.codec import ResourceCodec
from services.resource.data import Table
from services.resource.describe import Describer
from services.resource.export import checkpoint_name, write_checkpoint
from services.resource.model import ResourceEncoder
from services.resource.schema import Schema
from services.resource.texts import SLOTS, Template, slots
from services.runtime import checkpoints
from services.runtime.parallel import ALONE, World
from services.runtime.seeds import generator
from services.runtime.training import Optimization, Progress, Trainer, constant, cosine, steps_of_epochs

MOST_TOKENS = 8
"""Soft tokens of a vector at most."""
CODE_RATE = 0.3
"""Share of the learning rate that an encoder takes which begins as the language model's code, as it is read already."""
VALIDATED = 256
"""Most rows of a validation, all of training: they say when it can end. What is unseen the job measures."""


class ResourceTrainer(Trainer):
    """Trains an encoder on some rows of a table, so that the model behind ``describer`` describes them."""

    spec: ResourceSpec
    monitor = "validation_loss"

    def __init__(
        self, spec: ResourceSpec, table: Table, rows: Tensor, describer: Describer, world: World = ALONE
    ) -> None:
        self.spec, self.table, self.rows, self.describer, self.world = spec, table, rows, describer, world
        self.device = str(describer.device)
        self.step, self.progress = 0, Progress()
        training, copies = spec.training, spec.augmentation.copies
        self.steps = training.steps
        self._samples = len(rows) * copies
        if training.epochs is not None:
            self.steps = steps_of_epochs(training.epochs, self._samples, training.batch_size)
        if training.snapshot_epochs is not None:
            self.snapshots = steps_of_epochs(training.snapshot_epochs, self._samples, training.batch_size)
        self.validate_every = training.validate_every
        check(spec, table.schema, describer.hidden, reads_slots=describer.reads_slots, world=world)
        self.templates = table.schema.templates if spec.augmentation.varies else table.schema.templates[:1]
        for template in self.templates:
            describer.check_longest(template, spec.encoder.tokens)
        self._epoch: tuple[int, Tensor] | None = None
        picked = torch.randperm(len(rows), generator=generator(spec.seed, "validation"))[:VALIDATED]
        self.validation = rows[picked]
        self.augmenter = Augmenter(spec.augmentation, table.schema)
        self.model = ResourceEncoder(
            spec.encoder, table.schema, table.values[rows], describer.tool_vectors(), generator(spec.seed, "init")
        )
        language, self.code = describer.language, None
        if spec.encoder.initialization == "code" and describer.reads_slots:
            self.code = SoftTokenCode.load(language.folder, describer.hidden, language.field)
        if self.code is not None:
            self.model.begin_as(self.code, table.schema.templates[0])
        self.model.to(self.device)
        estimates = list(self.model.completion.parameters())
        apart = {*estimates}
        rest = [parameter for parameter in self.model.parameters() if parameter not in apart]
        # Of other features the weights of numbers are random.
        begins = self.code is not None and spec.encoder.numbers == "digits"
        self.optimization = Optimization(
            [
                {"params": rest, "scale": CODE_RATE if begins else 1.0},
                {"params": estimates},
            ],
            training,
            cosine(self.steps) if training.schedule == "cosine" else constant,
            world,
            weight_decay=training.weight_decay,
        )

    def advance(self) -> dict[str, Tensor]:
        training = self.spec.training
        rng = generator(self.spec.seed, "step", self.step)
        template = self.templates[int(torch.randint(len(self.templates), (), generator=rng))]
        rows = self._batch()
        variants = self.augmenter.draw(self.table.values[rows], rng)
        views = self.augmenter.view(variants.values, rng) if training.retrieval else variants.values
        # Whatever was changed says nothing of the other numbers.
        measured, hidden = self.table.values[rows], self.augmenter.hide(len(rows), rng)
        self.optimization.optimizer.zero_grad()
        metrics: dict[str, Tensor] = {}
        parts = torch.arange(len(rows)).tensor_split(training.accumulation * self.world.size)
        for part in parts[self.world.rank :: self.world.size]:
            values, unknown = variants.values[part], variants.unknown[part]
            terms = self.terms(values, unknown, views[part], template)
            terms["completion"] = self.model.completion.loss(measured[part], hidden[part])
            terms["loss"] = terms["loss"] + terms["completion"]
            share = len(part) / len(rows)
            (terms["loss"] * share).backward()  # type: ignore[no-untyped-call]
            for name, value in terms.items():
                metrics[name] = metrics.get(name, torch.zeros_like(value)) + value.detach() * share
        self.optimization.update(self.step, metrics)
        self.step += 1
        return metrics

    def terms(self, values: Tensor, unknown: Tensor, views: Tensor, template: Template) -> dict[str, Tensor]:
        """The loss and its terms. ``values`` and ``views``: ``[batch, fields]``, the rows and other views of them."""
        weight = self.spec.training.retrieval
        soft = self.embed(values, unknown)
        # The estimates of what is unknown are what the vector has.
        scores = self.describer.scores(soft, self.model.completion(values, unknown), template)
        terms = {"description": scores.loss, "exact_match": scores.exact.float().mean()}
        loss = scores.loss
        if weight:
            other = self.embed(views, unknown)
            same = self.augmenter.alike(values, unknown)
            terms["retrieval"] = contrastive(soft, other, same, self.spec.training.temperature)
            loss = loss + weight * terms["retrieval"]
        return {"loss": loss, **terms}

    def embed(self, values: Tensor, unknown: Tensor) -> Tensor:
        """Soft tokens of vectors that lie on the CPU."""
        soft: Tensor = self.model(values, unknown)
        return soft

    def _batch(self) -> Tensor:
        """Rows of the present step: each epoch goes through all copies of all rows in a new order."""
        start = self.step * self.spec.training.batch_size
        places = torch.arange(start, start + self.spec.training.batch_size)
        chosen = []
        for epoch in torch.unique(places // self._samples).tolist():
            order = self._order(epoch)
            chosen.append(order[places[places // self._samples == epoch] % self._samples])
        return self.rows[torch.cat(chosen) // self.spec.augmentation.copies]

    def _order(self, epoch: int) -> Tensor:
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, torch.randperm(self._samples, generator=generator(self.spec.seed, "epoch", epoch))
        return self._epoch[1]

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Cross-entropy and exact match of rows of training as they are in the table, by each template in turn."""
        values = self.table.values[self.validation]
        losses, exact = [], []
        for index, template in enumerate(self.templates):
            for rows in torch.split(values[index :: len(self.templates)], self.describer.batch):
                if len(rows):
                    scores = self.describer.scores(self.embed(rows, torch.zeros_like(rows).bool()), rows, template)
                    losses.append(float(scores.loss) * len(rows))
                    exact.append(float(scores.exact.sum()))
        return {"validation_loss": sum(losses) / len(values), "validation_exact_match": sum(exact) / len(values)}

    def reached(self, metrics: Mapping[str, float]) -> bool:
        training = self.spec.training
        if self.step * training.batch_size < self._samples:
            # A part of the copies has unknown fields, of which the validation says nothing.
            return False
        exact = training.target_exact_match is None or metrics["validation_exact_match"] >= training.target_exact_match
        return metrics["validation_loss"] < training.target_loss and exact

    def codec(self) -> ResourceCodec:
        """The encoder as it is."""
        language = self.describer.language
        # A relative path means nothing elsewhere.
        name = str(Path(language.name).resolve()) if Path(language.name).exists() else language.name
        about = {
            "table": self.table.digest,
            "language_model": name,
            "language_model_digest": language.digest,
            "language_model_dtype": str(language.model.dtype).removeprefix("torch."),
            "tokenizer_digest": language.tokenizer_digest,
            "step": self.step,
            "epoch": round(self.step * self.spec.training.batch_size / self._samples, 6),
        }
        trained_on = self.table.at(self.rows)
        return ResourceCodec(self.spec, self.table.schema, copy.deepcopy(self.model), about, trained_on)

    def snapshot(self, folder: Path) -> str:
        codec = self.codec()
        codec.save(folder)
        assert self.snapshots is not None and self.spec.training.snapshot_epochs is not None
        # As asked for: of the steps that make an epoch there is seldom a whole number.
        epoch = self.step // self.snapshots * self.spec.training.snapshot_epochs
        write_checkpoint(codec, folder / checkpoint_name(epoch))
        return "resource-encoder"

    def identity(self) -> dict[str, str]:
        language = self.describer.language
        return {
            "table": self.table.digest,
            "language model": language.digest,
            "tokenizer": language.tokenizer_digest,
            **({"code of soft tokens": self.code.digest} if self.code else {}),
        }

    def state(self) -> dict[str, Tensor]:
        model, optimization = self.model.state_dict(), self.optimization.state()
        return checkpoints.part("model", model) | checkpoints.part("optimization", optimization)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        parts = checkpoints.parts(tensors)
        self.model.load_state_dict(parts["model"])
        self.optimization.restore(parts["optimization"])


def check(spec: ResourceSpec, schema: Schema, hidden: int, *, reads_slots: bool, world: World = ALONE) -> None:
    """Raise :class:`InvalidInput` for what a language model of size ``hidden`` cannot be trained with; ``reads_slots``:
    whether it was trained to read vectors."""
    training = spec.training
    if training.batch_size < world.size * training.accumulation:
        raise InvalidInput.field(
            "spec.training.batch_size",
            f"{training.batch_size} rows are too few for {world.size * training.accumulation} parts "
            "(accumulation x processes); take larger batches or fewer parts",
        )
    if spec.encoder.fusion == "attention" and hidden % spec.encoder.heads:
        text = f"the language model's hidden size, {hidden}, does not divide into {spec.encoder.heads} heads"
        raise InvalidInput.field("spec.encoder.heads", text)
    if reads_slots:
        _check_slots(spec.encoder.tokens, schema.templates[0])


def _check_slots(tokens: int, template: Template) -> None:
    """Raise :class:`InvalidInput` for numbers and categories that do not go into the slots of ``tokens``."""
    enough = [count for count in range(1, MOST_TOKENS + 1) if max(slots(template, count)) <= SLOTS]
    if tokens not in enough:
        text = f"{tokens} soft tokens do not hold the {sum(template.places)} digits and labels of a row"
        more = [count for count in enough if count > tokens]
        hint = (
            f"this language model takes at least {more[0]}; take more" if more else "take fewer dimensions or decimals"
        )
        raise InvalidInput.field("spec.encoder.tokens", f"{text}; {hint}")


def contrastive(first: Tensor, second: Tensor, same: Tensor, temperature: float) -> Tensor:
    """InfoNCE (arXiv 1807.03748) of two views ``[batch, tokens, hidden]`` of the same rows, a scalar: the other rows
    are negatives, except those that are the ``same`` ``[batch, batch]``."""
    first, second = (nn.functional.normalize(view.flatten(1), dim=1) for view in (first, second))
    similarity = first @ second.T / temperature
    diagonal = torch.eye(len(first), dtype=torch.bool, device=first.device)
    similarity = similarity.masked_fill(same.to(first.device) & ~diagonal, -torch.inf)
    return nn.functional.cross_entropy(similarity, torch.arange(len(first), device=first.device))
