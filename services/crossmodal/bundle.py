"""The trained codec as one thing that is saved, served and used: it needs no zoo and no training code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ethogram.errors import InvalidInput
from ethogram.specs.crossmodal import CrossmodalSpec
from ethogram.specs.generation import SignatureSpec
from services.crossmodal import checks
from services.crossmodal.canonical import Canonicalizer
from services.crossmodal.data import Preprocessor, Subjects
from services.crossmodal.model import EncoderDecoder
from services.crossmodal.steering import (
    DIRECTIONS,
    Direction,
    Edit,
    Mode,
    classifier_normals,
    mean_differences,
)
from services.crossmodal.tokenizer import Tokenizer
from services.zoo.dataset import Zoo
from services.zoo.layout import Layout
from services.zoo.patterns import Pattern, membership
from services.zoo.pools import Evaluation
from services.zoo.reading import reading
from services.zoo.signatures import ActivationSignatureExtractor
from services.zoo.subjects import Architecture, Params, encode, flatten, unflatten

FORMAT = 3


Part = Literal["encoder", "decoder"]
PARTS: tuple[Part, ...] = ("encoder", "decoder")


class Behavior(NamedTuple):
    """One behaviour that a codec can steer."""

    name: str
    description: str
    positives: int
    """Training subjects that have it."""


class Codec:
    """Networks to latents and back, and edits of their behaviour.

    Networks come as stacked parameters (see :mod:`services.zoo.subjects`), one batch axis first, all of one of the
    shapes that the codec was trained on; ``activation`` says which is meant where shapes differ in it alone. Every
    method takes any batch size from 1, computes on ``device`` without gradients, and treats each row by itself. Wrong
    input raises :class:`InvalidInput` that names the field.
    """

    def __init__(
        self,
        spec: CrossmodalSpec,
        *,
        signature: SignatureSpec,
        patterns: Sequence[Pattern],
        positives: Sequence[int],
        probes: Tensor,
        preprocessor: Preprocessor,
        evaluation: Evaluation,
        model: EncoderDecoder,
        fixed: Mapping[Direction, Tensor],
        device: str = "cpu",
    ) -> None:
        self.spec, self.signature, self.device = spec, signature, device
        self.patterns, self.positives = tuple(patterns), tuple(positives)
        self.probes, self.preprocessor, self.evaluation = probes, preprocessor, evaluation
        self.layout = preprocessor.layout
        self.model = model.to(device).eval().requires_grad_(False)
        self.directions: dict[Direction, Tensor] = {"learned": model.directions}
        """Of each kind, what is added to a latent to gain each behaviour, ``[behaviors, latent]``."""
        self.directions |= {kind: tensor.to(device) for kind, tensor in fixed.items()}

    @classmethod
    def of(
        cls,
        spec: CrossmodalSpec,
        zoo: Zoo,
        preprocessor: Preprocessor,
        model: EncoderDecoder,
        subjects: Subjects,
    ) -> Codec:
        """The codec of a model trained on ``subjects``, with what it must carry from its zoo."""
        with torch.no_grad():
            latents = model.encoder(model.encoder.features(subjects.inputs, subjects.shape), subjects.shape)
        return cls(
            spec,
            signature=zoo.spec.signature,
            patterns=zoo.patterns,
            positives=subjects.labels.sum(0).tolist(),
            probes=zoo.probes,
            preprocessor=preprocessor,
            evaluation=Evaluation.build(zoo.universe),
            model=model,
            fixed={
                "mean_difference": mean_differences(latents, subjects.labels),
                "classifier_normal": classifier_normals(latents, subjects.labels),
            },
            device=str(model.directions.device),
        )

    @property
    def latent_dim(self) -> int:
        """Length of a latent."""
        return self.spec.codec.latent_dim

    @cached_property
    def behaviors(self) -> list[Behavior]:
        """What can be added and removed, in the order of ``directions``."""
        return [Behavior(p.name, p.description, n) for p, n in zip(self.patterns, self.positives, strict=True)]

    @property
    def signature_shape(self) -> tuple[int, int]:
        """(neurons, values) of one signature."""
        return self.layout.neurons, self.preprocessor.extractor.values

    def latents(self, inputs: Tensor, shape: Tensor) -> Tensor:
        """Latents ``[batch, latent]`` of the encoder's flat inputs ``[batch, inputs]`` of networks of the shapes
        ``shape`` (int64 ``[batch]``)."""
        self._need("encoder")
        found: Tensor = self.model.encoder(self.model.encoder.features(inputs, shape), shape)
        return found

    @torch.no_grad()
    def encode(self, networks: Params, activation: str | None = None) -> Tensor:
        """Latents ``[batch, latent]`` of networks: their signatures are taken on the codec's own probes."""
        vectors, shape = self._vectors(networks, activation)
        return self.latents(self.preprocessor(vectors, shape).inputs, shape)

    @torch.no_grad()
    def encode_signatures(self, signatures: Tensor) -> Tensor:
        """Latents of signatures ``[batch, neurons, values]``, taken on the codec's probes, of a codec for networks of
        one shape whose encoder takes nothing else."""
        if self.spec.codec.inputs != "signature":
            raise InvalidInput.field(
                "signatures", f"this model's encoder takes {self.spec.codec.inputs}; send networks"
            )
        if len(self.layout.shapes) > 1 or self.preprocessor.canonicalizer is not None:
            raise InvalidInput.field("signatures", "this model must see the networks themselves; send networks")
        checked = checks.batch(signatures, self.signature_shape, "signatures").to(self.device).flatten(1)
        return self.latents(checked, torch.zeros(len(checked), dtype=torch.int64, device=self.device))

    @torch.no_grad()
    def decode(self, latents: Tensor, shape: Architecture | None = None) -> Params:
        """Networks of latents ``[batch, latent]``; ``shape``: theirs, of a codec that knows several."""
        self._need("decoder")
        checked = checks.batch(latents, (self.latent_dim,), "latents").to(self.device)
        if shape is None and len(self.layout.shapes) > 1:
            raise InvalidInput.field("shape", f"this model knows {len(self.layout.shapes)} shapes; say which")
        if shape is not None and shape not in self.layout.shapes:
            raise InvalidInput.field("shape", "an architecture that the model was not trained on")
        which = 0 if shape is None else self.layout.shapes.index(shape)
        shapes = torch.full((len(checked),), which, device=self.device)
        return self._networks(self.model.decoder(checked, shapes), which)

    @torch.no_grad()
    def steer(
        self,
        networks: Params,
        edits: Sequence[Edit | tuple[str, ...]],
        mode: Mode = "residual",
        strength: float = 1.0,
        *,
        direction: Direction = "learned",
        activation: str | None = None,
    ) -> tuple[Params, Tensor]:
        """Networks after ``edits``, all applied to each, and their latents ``[batch, latent]`` after the edit.

        ``strength`` scales the direction; 1 is what it was trained for, 0 with ``residual`` returns the very same
        weights.
        """
        self._need("decoder")
        mode, shift = checks.mode(mode), checks.strength(strength) * self.shift(edits, direction)
        vectors, shape = self._vectors(networks, activation)
        prepared = self.preprocessor(vectors, shape)
        latents = self.latents(prepared.inputs, shape)
        steered = latents + shift
        decoded, moved = self.model.decoder(latents, shape), self.model.decoder(steered, shape)
        # The difference is undone, not the sum: the source's own weights stay what they are to the bit.
        weights = prepared.undo(moved) if mode == "direct" else vectors + prepared.undo(moved - decoded)
        return self._networks(weights, int(shape[0])), steered

    def shift(self, edits: Sequence[Edit | tuple[str, ...]], direction: Direction = "learned") -> Tensor:
        """The sum of the edits' directions of one kind, ``[latent]``."""
        directions = self.directions[checks.direction(direction)]
        names = [behavior.name for behavior in self.behaviors]
        signs = torch.zeros(len(names), device=self.device)
        for edit in checks.edits(edits, names):
            for name, sign in edit.signs.items():
                signs[names.index(name)] = sign
        return signs @ directions

    @torch.no_grad()
    def evaluate(self, networks: Params, activation: str | None = None) -> tuple[Tensor, Tensor]:
        """How networks behave on held-out sequences, as two float32 tensors.

        ``recall`` ``[batch, behaviors]``: share of the sequences with the behaviour that the network answers yes to;
        ``false_positive_rate`` ``[batch]``: that share of the sequences without any behaviour.
        """
        yes = self.yes(*self._vectors(networks, activation))
        shares = self.evaluation.by_stratum(yes.cpu()).to(self.device)
        return shares[:, :-1], shares[:, -1]

    @cached_property
    def evaluation_inputs(self) -> Tensor:
        """The evaluation set as network inputs, examples as columns: ``[input_size, n]``."""
        return encode(self.layout.envelope, self.evaluation.sequences.to(self.device)).T.contiguous()

    def yes(self, vectors: Tensor, shape: Tensor) -> Tensor:
        """Predicted classes of networks ``[models, size]`` on the evaluation set: bool ``[models, n]``."""
        return self.layout.answers(vectors.unsqueeze(1), shape, self.evaluation_inputs).squeeze(1) > 0

    def _vectors(self, networks: Params, activation: str | None) -> tuple[Tensor, Tensor]:
        """``networks`` checked, as float32 vectors on the device, and their shape, int64 ``[batch]``."""
        checked, which = checks.networks(networks, self.layout, activation)
        vectors = self.layout.pad(flatten(checked).to(self.device), which)
        return vectors, torch.full((len(vectors),), which, device=self.device)

    def _need(self, part: Part) -> None:
        if not hasattr(self.model, part):
            raise InvalidInput.field("model", f"the codec was loaded without its {part}")

    def _networks(self, vectors: Tensor, which: int) -> Params:
        return unflatten(self.layout.strip(vectors, which), self.layout.shapes[which])

    def save(self, folder: Path) -> None:
        """Write ``config.json`` and ``encoder``, ``decoder``, ``directions`` and ``sequences`` as safetensors, and
        ``references`` where networks are canonicalised. Each file says which run it is of."""
        folder.mkdir(parents=True, exist_ok=True)
        states = {name: getattr(self.model, name).state_dict() for name in PARTS}
        digest = hashlib.sha256(self.spec.model_dump_json().encode())
        for state in states.values():
            for value in state.values():
                digest.update(value.cpu().contiguous().numpy().tobytes())
        run = {"run": digest.hexdigest()[:16]}
        for name, state in states.items():
            tensors = {key: value.contiguous() for key, value in state.items()}
            save_file(tensors, folder / f"{name}.safetensors", run)
        directions: dict[str, Tensor] = {kind: tensor.contiguous() for kind, tensor in self.directions.items()}
        save_file(directions, folder / "directions.safetensors", run)
        sequences = {"probes": self.probes, "evaluation": self.evaluation.sequences, "stratum": self.evaluation.stratum}
        save_file({key: value.contiguous() for key, value in sequences.items()}, folder / "sequences.safetensors", run)
        canonicalizer = self.preprocessor.canonicalizer
        if canonicalizer is not None:
            references = [flatten(network)[0].contiguous() for network in canonicalizer.references]
            save_file({str(i): flat for i, flat in enumerate(references)}, folder / "references.safetensors", run)
        config = {
            "format": FORMAT,
            **run,
            "spec": self.spec.model_dump(mode="json"),
            "shapes": [shape._asdict() for shape in self.layout.shapes],
            "signature": self.signature.model_dump(mode="json"),
            "canonical": canonicalizer is not None,
            "behaviors": [
                {"kind": p.kind, "token": p.token, **b._asdict()}
                for p, b in zip(self.patterns, self.behaviors, strict=True)
            ],
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2))

    @classmethod
    def load(cls, folder: Path, device: str = "cpu", parts: Sequence[Part] = PARTS) -> Codec:
        """Read what :meth:`save` wrote, of encoder and decoder only ``parts``: a call that needs another one raises
        :class:`InvalidInput`. So does a file that is missing, wrong, or of another run."""
        with _reading(folder, "config.json") as path:
            config = json.loads(path.read_text())
            if config["format"] != FORMAT:
                raise InvalidInput.field(path.name, f"has format {config['format']}; this version reads {FORMAT}")
            spec = CrossmodalSpec.model_validate(config["spec"])
            signature = SignatureSpec.model_validate(config["signature"])
            shapes = [Architecture(**{**shape, "hidden": tuple(shape["hidden"])}) for shape in config["shapes"]]
            layout = Layout(shapes)
            patterns = [Pattern(entry["kind"], entry["token"]) for entry in config["behaviors"]]
            positives = [int(entry["positives"]) for entry in config["behaviors"]]
            run = config["run"]
        with _reading(folder, "sequences.safetensors") as path:
            sequences = _load(path, run)
            probes, asked = sequences["probes"], sequences["evaluation"]
            evaluation = Evaluation(asked, membership(patterns, asked), sequences["stratum"])
            inputs = encode(layout.envelope, probes)
            extractor = ActivationSignatureExtractor(signature, inputs, membership(patterns, probes))
        canonicalizer = None
        if config["canonical"]:
            with _reading(folder, "references.safetensors") as path:
                flat = _load(path, run)
                references = [unflatten(flat[str(i)].unsqueeze(0), shape) for i, shape in enumerate(shapes)]
                canonicalizer = Canonicalizer(layout, inputs, references)
        preprocessor = Preprocessor(spec.codec.inputs, layout, extractor, canonicalizer)
        model = EncoderDecoder(spec.codec, Tokenizer.of(spec.codec, preprocessor), len(patterns), torch.Generator())
        for name in PARTS:
            if name not in parts:
                delattr(model, name)
                continue
            with _reading(folder, f"{name}.safetensors") as path:
                getattr(model, name).load_state_dict(_load(path, run))
        with _reading(folder, "directions.safetensors") as path:
            directions = _load(path, run)
            model.load_state_dict({"directions": directions["learned"]}, strict=False)
            fixed: dict[Direction, Tensor] = {kind: directions[kind] for kind in DIRECTIONS if kind != "learned"}
            for kind, tensor in fixed.items():
                if tensor.shape != model.directions.shape:
                    raise ValueError(f"{kind} has shape {list(tensor.shape)}")
        return cls(
            spec,
            signature=signature,
            patterns=patterns,
            positives=positives,
            probes=probes,
            preprocessor=preprocessor,
            evaluation=evaluation,
            model=model,
            fixed=fixed,
            device=device,
        )


def _load(path: Path, run: str) -> dict[str, Tensor]:
    """The tensors of a file of a run. Raises :class:`InvalidInput` for one of another run."""
    with safe_open(path, "pt") as file:
        own = (file.metadata() or {}).get("run")
    if own != run:
        raise InvalidInput.field(path.name, f"is of another run ({own}) than config.json ({run}); take both of one")
    return load_file(path)


_reading = partial(reading, what="codec")
