"""Training of the encoder-decoder, through the networks that it decodes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ethogram.errors import InvalidInput
from ethogram.specs.crossmodal import CrossmodalSpec
from services.crossmodal import losses
from services.crossmodal.bundle import Codec
from services.crossmodal.data import Queries, Subjects, check, split_subjects
from services.crossmodal.model import EncoderDecoder
from services.crossmodal.steering import answers, choose, edited, toggle
from services.runtime.run import Run
from services.runtime.seeds import generator
from services.zoo.dataset import Zoo

WARM_UP = 100
"""Steps over which the learning rate rises; it then falls along a cosine to a hundredth."""
REPORT_EVERY = 20
"""Steps between metrics."""


def train(spec: CrossmodalSpec, zoo: Zoo, run: Run | None = None) -> Codec:
    """Train a codec on the subjects of ``zoo`` that ``spec`` does not hold out.

    Goes on from ``run.resume`` where there is one, with the same result, to the bit, as an uninterrupted run on the
    same machine. Raises :class:`InvalidInput` for a zoo that cannot be learned from, and for a loss that becomes NaN.
    """
    run = run or Run()
    check(zoo, spec.held_out)
    trainer = Trainer(spec, zoo, run.device)
    if run.resume is not None:
        trainer.load(run.resume)
    run.stage("train", spec.training.steps)
    run.advance(trainer.step)
    saved = trainer.step
    while trainer.step < spec.training.steps:
        values = trainer.advance(saved)
        if trainer.step % REPORT_EVERY == 0 or trainer.step == spec.training.steps:
            run.metric(trainer.step, **{name: float(value) for name, value in values.items()})
        run.advance(trainer.step)
        if run.checkpoint_due():
            run.checkpoint(trainer.step, trainer.save)
            saved = trainer.step
    return Codec.of(spec, zoo, trainer.model, trainer.positives)


class Trainer:
    """The state of a training run: the model, the optimiser, and the number of steps done.

    Everything random in a step is drawn from a generator of that step, so there is no generator state to keep.
    """

    def __init__(self, spec: CrossmodalSpec, zoo: Zoo, device: str = "cpu") -> None:
        self.spec, self.device, self.step = spec, device, 0
        self.architecture = zoo.architecture
        self.subjects = Subjects.of(zoo, split_subjects(len(zoo), spec.held_out, spec.seed).train, device)
        self.positives: list[int] = self.subjects.labels.sum(0).tolist()
        self.queries = Queries.build(zoo.universe, zoo.architecture, spec.seed)
        subjects, inputs = self.subjects.signatures.shape
        components = min(spec.codec.signature_components, subjects, inputs)
        outputs, behaviors = self.subjects.weights.shape[1], self.subjects.labels.shape[1]
        draws = generator(spec.seed, "init")
        self.model = EncoderDecoder(
            spec.codec, draws, inputs=inputs, components=components, outputs=outputs, behaviors=behaviors
        )
        self.model.encoder.fit(self.subjects.signatures.cpu())
        self.model.decoder.fit(self.subjects.weights.cpu())
        self.model.to(device)
        groups: list[dict[str, Any]] = [
            {"params": [*self.model.encoder.parameters(), *self.model.decoder.parameters()]},
            {"params": [self.model.directions], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=spec.training.learning_rate,
            weight_decay=spec.training.weight_decay,
            fused=True,
        )
        self._prepare()

    def _prepare(self) -> None:
        """What follows from the standardisation, which is part of the model's state."""
        sizes = [(fan_in + 1) * fan_out for fan_in, fan_out in self.architecture.layers]
        layer = torch.arange(len(sizes), device=self.device).repeat_interleave(torch.tensor(sizes, device=self.device))
        with torch.no_grad():
            self.features = self.model.encoder.features(self.subjects.signatures)
            self.weighting = losses.layer_weights(self.subjects.weights - self.model.decoder.mean, layer)

    def advance(self, last_checkpoint: int = 0) -> dict[str, Tensor]:
        """One optimiser step. Returns the loss terms.

        Raises :class:`InvalidInput` before anything is changed when the loss or its gradient is not finite.
        """
        terms = self.terms(self._batch(), generator(self.spec.seed, "step", self.step))
        loss = terms["loss"]
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if not bool(torch.isfinite(loss + norm)):
            raise InvalidInput.field(
                "spec.training.learning_rate",
                f"the loss became {float(loss.detach()):g} at step {self.step + 1}; lower the learning rate. "
                f"The last good checkpoint is of step {last_checkpoint}",
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.spec.training.learning_rate * schedule(self.step, self.spec.training.steps)
        self.optimizer.step()
        self.step += 1
        return {name: value.detach() for name, value in terms.items()}

    def terms(self, batch: Tensor, draws: torch.Generator) -> dict[str, Tensor]:
        """The loss and its terms on the subjects at ``batch`` (int64): each gains or loses one behaviour."""
        weight, model = self.spec.loss, self.model
        source, labels = self.subjects.weights[batch], self.subjects.labels[batch]
        pattern = choose(labels.cpu(), draws)
        rows = self.queries.draw(pattern, self.spec.training.queries, draws)
        inputs = self.queries.network_inputs(rows).to(self.device)
        selected, sign = toggle(labels, pattern.to(self.device))
        before, after = (self.queries.pools.labels(rows, chosen.cpu()).to(self.device) for chosen in (labels, selected))

        latents = model.encoder.layers(self.features[batch])
        steered = latents + sign.unsqueeze(1) * model.directions[pattern.to(self.device)]
        decoded, moved = model.decoder(torch.cat([latents, steered])).chunk(2)
        variants = [decoded, edited(source, decoded, moved, "residual")]
        if weight.direct:
            variants.append(moved)
        logits = answers(torch.stack(variants, 1), inputs, self.architecture).unbind(1)
        with torch.no_grad():
            own = answers(source.unsqueeze(1), inputs, self.architecture).squeeze(1)

        terms = {
            "reconstruction": losses.reconstruction(decoded, source, self.weighting),
            "behavior": losses.behavior(logits[0], own),
            "contrastive": losses.contrastive(latents, labels, weight.temperature),
            "steering": losses.steering(logits[1], own, before, after, weight.locality),
        }
        if weight.direct:
            terms["direct"] = losses.steering(logits[2], own, before, after, weight.locality)
        return {"loss": torch.stack([getattr(weight, name) * term for name, term in terms.items()]).sum(), **terms}

    def _batch(self) -> Tensor:
        """The subjects of this step: each epoch goes once through all of them in an order of its own."""
        count = len(self.subjects.labels)
        size = min(self.spec.training.batch_size, count)
        epoch, place = divmod(self.step, count // size)
        order = torch.randperm(count, generator=generator(self.spec.seed, "epoch", epoch))
        return order[place * size : (place + 1) * size].to(self.device)

    def save(self, folder: Path) -> None:
        """Write the state into ``folder``, without pickle."""
        state = self.optimizer.state_dict()["state"]
        moments = {f"{i}.{name}": value for i, entry in state.items() for name, value in entry.items()}
        save_file(
            {name: value.contiguous() for name, value in self.model.state_dict().items()}, folder / "model.safetensors"
        )
        save_file(moments, folder / "optimizer.safetensors")
        (folder / "state.json").write_text(json.dumps({"step": self.step, "spec": self.spec.model_dump(mode="json")}))

    def load(self, folder: Path) -> None:
        """Go on from what :meth:`save` wrote. Raises :class:`InvalidInput` for the checkpoint of another spec."""
        state = json.loads((folder / "state.json").read_text())
        if CrossmodalSpec.model_validate(state["spec"]) != self.spec:
            raise InvalidInput.field("checkpoint", "was written by a run with another spec; start afresh")
        self.model.load_state_dict(load_file(folder / "model.safetensors", device=self.device))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in load_file(folder / "optimizer.safetensors", device=self.device).items():
            index, key = name.split(".")
            moments.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.step = state["step"]
        self._prepare()


def schedule(step: int, steps: int) -> float:
    """The learning rate of a step (from 0) as a share of its peak."""
    fall = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / WARM_UP) * (0.01 + 0.99 * fall)
