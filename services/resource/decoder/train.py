"""Training of the hierarchical decoder, end to end, on generated task texts."""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ethogram.errors import InvalidInput
from ethogram.specs.resource import DecoderSpec
from services.resource.decoder.model import HierarchicalDecoder
from services.resource.decoder.tasks import TaskTexts
from services.resource.export import Export
from services.runtime import checkpoints
from services.runtime.devices import uses_bfloat16
from services.runtime.parallel import ALONE, World
from services.runtime.seeds import generator
from services.runtime.training import Optimization, Progress, Trainer, cosine


class DecoderTrainer(Trainer):
    """Trains a decoder on texts that are drawn for each step."""

    spec: DecoderSpec
    monitor = "validation_loss"

    def __init__(
        self, spec: DecoderSpec, export: Export, texts: TaskTexts, device: str = "cpu", world: World = ALONE
    ) -> None:
        self.spec, self.texts, self.device, self.world = spec, texts, device, world
        self.step, self.progress = 0, Progress()
        self.steps, self.validate_every = spec.training.steps, spec.training.validate_every
        if spec.training.batch_size < world.size:
            text = f"{spec.training.batch_size} texts are too few for {world.size} processes; take larger batches"
            raise InvalidInput.field("spec.training.batch_size", text)
        self.digest = export.digest
        self.bfloat16 = uses_bfloat16(spec.training.precision, device)
        self.tools = torch.empty(len(export.weights), dtype=torch.long)
        for index, ids in enumerate(export.masks.values()):
            self.tools[ids] = index
        self.model = HierarchicalDecoder(
            spec.model, export.weights, self.tools, texts.words(), generator(spec.seed, "init")
        ).to(device)
        self.optimization = Optimization(
            [{"params": list(self.model.parameters())}],
            spec.training,
            cosine(self.steps),
            world,
            weight_decay=spec.training.weight_decay,
        )

    def advance(self) -> dict[str, Tensor]:
        texts, wanted = self.draw(self.spec.training.batch_size, "step", self.step)
        part = slice(self.world.rank, None, self.world.size)
        self.optimization.optimizer.zero_grad()
        terms = self.terms(texts[part], wanted[part])
        share = len(texts[part]) / len(texts)
        (terms["loss"] * share).backward()  # type: ignore[no-untyped-call]
        metrics = {name: value.detach() * share for name, value in terms.items()}
        self.optimization.update(self.step, metrics)
        self.step += 1
        return metrics

    def draw(self, count: int, *purpose: str | int) -> tuple[list[str], Tensor]:
        """Texts, and the configuration of each, ``[count]``."""
        rng = generator(self.spec.seed, *purpose)
        chosen = torch.randint(len(self.tools), (count,), generator=rng)
        seeds = torch.randint(2**62, (count,), generator=rng)
        pairs = zip(chosen.tolist(), seeds.tolist(), strict=True)
        return [self.texts.draw(row, random.Random(seed)) for row, seed in pairs], chosen

    def terms(self, texts: list[str], wanted: Tensor) -> dict[str, Tensor]:
        """The loss, and its terms of the tool and of the configuration among those of the right tool."""
        wanted = wanted.to(self.device)
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.bfloat16):
            choice = self.model(self.model.tokenize(texts).to(self.device))
        tools = self.tools.to(self.device)[wanted]
        masked = choice.configurations.float().masked_fill(~self.model.mask[tools], -torch.inf)
        tool = nn.functional.cross_entropy(choice.tools.float(), tools)
        configuration = nn.functional.cross_entropy(masked, wanted)
        return {"loss": tool + configuration, "tool": tool, "configuration": configuration}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Losses, and the share of held-out texts for which tool and configuration are right."""
        texts, wanted = self.draw(self.spec.training.validation, "validation")
        terms = self.terms(texts, wanted)
        accuracy = float((self.model.choose(texts)[1] == wanted).float().mean())
        return {f"validation_{name}": float(value) for name, value in terms.items()} | {"validation_accuracy": accuracy}

    def reached(self, metrics: Mapping[str, float]) -> bool:
        target = self.spec.training.target_accuracy
        return target is not None and metrics["validation_accuracy"] >= target

    def identity(self) -> dict[str, str]:
        return {"export": self.digest}

    def state(self) -> dict[str, Tensor]:
        model, optimization = self.model.state_dict(), self.optimization.state()
        return checkpoints.part("model", model) | checkpoints.part("optimization", optimization)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        parts = checkpoints.parts(tensors)
        self.model.load_state_dict(parts["model"])
        self.optimization.restore(parts["optimization"])
