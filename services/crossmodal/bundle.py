"""The trained codec as one thing that is saved, served and used: it needs no zoo and no training code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ethogram.errors import InvalidInput
from ethogram.specs.crossmodal import CrossmodalSpec
from services.crossmodal import checks
from services.crossmodal.model import EncoderDecoder
from services.crossmodal.steering import SIGNS, Edit, Mode, answers, edited
from services.zoo.dataset import Zoo
from services.zoo.patterns import Pattern, membership
from services.zoo.pools import Evaluation
from services.zoo.reading import reading
from services.zoo.signatures import raw
from services.zoo.subjects import Architecture, Params, encode, flatten, unflatten

FORMAT = 1


class Behavior(NamedTuple):
    """One behaviour that a codec can steer."""

    name: str
    description: str
    positives: int
    """Training subjects that have it."""


class Codec:
    """Networks to latents and back, and edits of their behaviour.

    Networks come as stacked parameters (see :mod:`services.zoo.subjects`), one batch axis first, of the architecture
    that the codec was trained on. Every method takes any batch size from 1, computes on ``device`` without gradients,
    and treats each row by itself. Wrong input raises :class:`InvalidInput` that names the field.
    """

    def __init__(
        self,
        spec: CrossmodalSpec,
        architecture: Architecture,
        *,
        patterns: Sequence[Pattern],
        positives: Sequence[int],
        probes: Tensor,
        evaluation: Evaluation,
        model: EncoderDecoder,
        device: str = "cpu",
    ) -> None:
        self.spec, self.architecture, self.device = spec, architecture, device
        self.patterns, self.positives = tuple(patterns), tuple(positives)
        self.probes, self.evaluation = probes, evaluation
        self.model = model.to(device).eval().requires_grad_(False)

    @classmethod
    def of(cls, spec: CrossmodalSpec, zoo: Zoo, model: EncoderDecoder, positives: Sequence[int]) -> Codec:
        """The codec of a trained model, with what it must carry from its zoo."""
        return cls(
            spec,
            zoo.architecture,
            patterns=zoo.patterns,
            positives=positives,
            probes=zoo.probes,
            evaluation=Evaluation.build(zoo.universe),
            model=model,
            device=str(model.directions.device),
        )

    @property
    def latent_dim(self) -> int:
        """Length of a latent."""
        return self.spec.codec.latent_dim

    @property
    def directions(self) -> Tensor:
        """What is added to a latent to gain each behaviour, ``[behaviors, latent]``."""
        return self.model.directions

    @cached_property
    def behaviors(self) -> list[Behavior]:
        """What can be added and removed, in the order of ``directions``."""
        return [Behavior(p.name, p.description, n) for p, n in zip(self.patterns, self.positives, strict=True)]

    @torch.no_grad()
    def encode(self, networks: Params) -> Tensor:
        """Latents ``[batch, latent]`` of networks: their signatures are taken on the codec's own probes."""
        return self._latents(self._networks(networks))

    @torch.no_grad()
    def encode_signatures(self, signatures: Tensor) -> Tensor:
        """Latents of raw signatures ``[batch, probes, neurons]``, taken on the codec's probes."""
        shape = (len(self.probes), self.architecture.neurons)
        latents: Tensor = self.model.encoder(checks.batch(signatures, shape, "signatures").to(self.device).flatten(1))
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Params:
        """Networks of latents ``[batch, latent]``."""
        checked = checks.batch(latents, (self.latent_dim,), "latents").to(self.device)
        return unflatten(self.model.decoder(checked), self.architecture)

    @torch.no_grad()
    def steer(
        self,
        networks: Params,
        edits: Sequence[Edit | tuple[str, str]],
        mode: Mode = "residual",
        strength: float = 1.0,
    ) -> tuple[Params, Tensor]:
        """Networks after ``edits``, all applied to each, and their latents ``[batch, latent]`` after the edit.

        ``strength`` scales the direction; 1 is what it was trained for, 0 with ``residual`` returns the very same
        weights.
        """
        mode, shift = checks.mode(mode), checks.strength(strength) * self.direction(edits)
        params = self._networks(networks)
        latents = self._latents(params)
        steered = latents + shift
        weights = edited(flatten(params), self.model.decoder(latents), self.model.decoder(steered), mode)
        return unflatten(weights, self.architecture), steered

    def direction(self, edits: Sequence[Edit | tuple[str, str]]) -> Tensor:
        """The sum of the edits' directions, ``[latent]``."""
        names = [behavior.name for behavior in self.behaviors]
        signs, columns = [], []
        for operation, name in checks.edits(edits, names):
            signs.append(SIGNS[operation])
            columns.append(names.index(name))
        return torch.tensor(signs, device=self.device) @ self.directions[columns]

    @torch.no_grad()
    def evaluate(self, networks: Params) -> tuple[Tensor, Tensor]:
        """How networks behave on held-out sequences, as two float32 tensors.

        ``recall`` ``[batch, behaviors]``: share of the sequences with the behaviour that the network answers yes to;
        ``false_positive_rate`` ``[batch]``: that share of the sequences without any behaviour.
        """
        weights = flatten(self._networks(networks)).unsqueeze(1)
        inputs = encode(self.architecture, self.evaluation.sequences.to(self.device))
        yes = answers(weights, inputs.T, self.architecture).squeeze(1) > 0
        shares = self.evaluation.by_stratum(yes.cpu()).to(self.device)
        return shares[:, :-1], shares[:, -1]

    def _latents(self, params: Params) -> Tensor:
        inputs = encode(self.architecture, self.probes.to(self.device))
        latents: Tensor = self.model.encoder(raw(params, inputs, self.architecture.activation).flatten(1))
        return latents

    def _networks(self, networks: Params) -> Params:
        """``networks`` checked, as float32 on the device."""
        checked = checks.networks(networks, self.architecture.shapes)
        return {name: tensor.to(self.device) for name, tensor in checked.items()}

    def save(self, folder: Path) -> None:
        """Write ``config.json`` and ``encoder``, ``decoder``, ``directions`` and ``sequences`` as safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("encoder", "decoder"):
            state = getattr(self.model, name).state_dict()
            save_file({key: value.contiguous() for key, value in state.items()}, folder / f"{name}.safetensors")
        save_file({"learned": self.directions.contiguous()}, folder / "directions.safetensors")
        sequences = {"probes": self.probes, "evaluation": self.evaluation.sequences, "stratum": self.evaluation.stratum}
        save_file({key: value.contiguous() for key, value in sequences.items()}, folder / "sequences.safetensors")
        config = {
            "format": FORMAT,
            "spec": self.spec.model_dump(mode="json"),
            "architecture": self.architecture._asdict(),
            "signature": "raw",
            "behaviors": [
                {"kind": p.kind, "token": p.token, **b._asdict()}
                for p, b in zip(self.patterns, self.behaviors, strict=True)
            ],
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2))

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> Codec:
        """Read what :meth:`save` wrote. Raises :class:`InvalidInput` naming the file that is missing or wrong."""
        with _reading(folder, "config.json") as path:
            config = json.loads(path.read_text())
            if config["format"] != FORMAT:
                raise InvalidInput.field(path.name, f"has format {config['format']}; this version reads {FORMAT}")
            spec = CrossmodalSpec.model_validate(config["spec"])
            shape = config["architecture"]
            architecture = Architecture(**{**shape, "hidden": tuple(shape["hidden"])})
            patterns = [Pattern(entry["kind"], entry["token"]) for entry in config["behaviors"]]
            positives = [int(entry["positives"]) for entry in config["behaviors"]]
        with _reading(folder, "encoder.safetensors") as path:
            encoder = load_file(path)
            inputs, components = encoder["components"].shape
            model = EncoderDecoder(
                spec.codec,
                torch.Generator(),
                inputs=inputs,
                components=components,
                outputs=architecture.size,
                behaviors=len(patterns),
            )
            model.encoder.load_state_dict(encoder)
        with _reading(folder, "decoder.safetensors") as path:
            model.decoder.load_state_dict(load_file(path))
        with _reading(folder, "directions.safetensors") as path:
            model.load_state_dict({"directions": load_file(path)["learned"]}, strict=False)
        with _reading(folder, "sequences.safetensors") as path:
            sequences = load_file(path)
            probes, asked = sequences["probes"], sequences["evaluation"]
            evaluation = Evaluation(asked, membership(patterns, asked), sequences["stratum"])
        return cls(
            spec,
            architecture,
            patterns=patterns,
            positives=positives,
            probes=probes,
            evaluation=evaluation,
            model=model,
            device=device,
        )


_reading = partial(reading, what="codec")
