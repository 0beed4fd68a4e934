"""The trained codec: networks to latents and back, and edits of their behaviour. Needs no zoo and no training code."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ethogram.errors import InvalidInput
from ethogram.specs.crossmodal import CrossmodalSpec
from ethogram.specs.edits import Behavior, Direction, Edit, EditLike, Mode, Steering, Strength
from services.crossmodal import checks
from services.crossmodal.codec_files import PARTS, Contents, Part, read, write
from services.crossmodal.data import Prepared, Preprocessor, Subjects
from services.crossmodal.model import Encoder, EncoderDecoder
from services.crossmodal.steering import (
    LOCAL_GATE,
    TARGET_GATE,
    Probe,
    Scores,
    classifier_normals,
    mean_differences,
    score,
    signs,
)
from services.zoo.dataset import Zoo
from services.zoo.pools import Evaluation
from services.zoo.subjects import Architecture, Params, activations, encode, flatten, unflatten
from services.zoo.universe import SELECTION

__all__ = ["AUTO", "Batch", "Behavior", "Codec", "Effect"]

CHUNK = 256
"""Networks that go through encoder or decoder at once, which bounds a transformer's memory."""
AUTO = (1.0, 1.25, 0.75, 1.5, 0.5, 2.0)
"""Strengths that ``auto`` chooses from."""
MIN_RECALL = 0.5
"""Minimum recall on a behaviour's sequences for a network to count as having it."""
MIN_EXCLUSIVE = 8
"""Fewest sequences that match one behaviour alone for these to decide who has it."""


class Batch(NamedTuple):
    """Checked input: what :class:`Codec` takes without checking it again."""

    rows: Tensor
    """Flat networks, flat signatures or latents, float32 ``[batch, size]``, on any device."""
    shape: int
    """Which of the codec's shapes the networks have."""


class Effect(NamedTuple):
    """What an edit does to each of a batch of networks."""

    networks: Params
    """After the edit."""
    latents: Tensor
    """After the edit, ``[batch, latent]``."""
    strength: Tensor
    """What the directions were multiplied by, ``[batch]``."""
    had: Tensor
    """Behaviours that each network has on the support set; of a behaviour without sequences there, by the linear probe
    on its latent: bool ``[batch, behaviors]``."""
    predicted: Tensor
    """Probability of each behaviour by the linear probe on the latent, before and after: ``[batch, 2, behaviors]``."""
    recall: Tensor
    """Measured: share of the held-out sequences with each behaviour that are answered yes, before and after:
    ``[batch, 2, behaviors]``; NaN of a behaviour without such sequences."""
    false_positive_rate: Tensor
    """The same of the sequences without any behaviour: ``[batch, 2]``."""
    scores: Scores
    """Target and local, ``[batch]`` each, by the behaviours that the network had; target is NaN where the edit decides
    no sequence."""


class Codec:
    """Networks to latents and back, and edits of their behaviour.

    Networks come as stacked parameters (see :mod:`services.zoo.subjects`), one batch axis first, all of one of the
    shapes that the codec was trained on; ``activation`` says which is meant where shapes differ in it alone. Every
    method takes any batch size from 1, computes on ``device`` without gradients, and treats each row by itself. Wrong
    input raises :class:`InvalidInput` that names the field.
    """

    def __init__(self, contents: Contents, device: str = "cpu") -> None:
        self.contents, self.device = contents, device
        self.spec, self.zoo, self.preprocessor = contents.spec, contents.zoo, contents.preprocessor
        self.patterns, self.positives = contents.patterns, contents.positives
        self.signature, self.probes = contents.signature, contents.probes
        self.evaluation, self.support = contents.evaluation, contents.support
        self.history: list[dict[str, float]] = []
        """Loss, terms and validations of its training, each row with its ``step``; not kept in its files."""
        self.probe = Probe(*(tensor.to(device) for tensor in contents.probe))
        self.layout = contents.preprocessor.layout
        self.model = contents.model.to(device).eval().requires_grad_(False)
        self.directions: dict[Direction, Tensor] = {"learned": self.model.directions}
        """Of each kind, what is added to a latent to gain each behaviour, ``[behaviors, latent]``."""
        self.directions |= {kind: tensor.to(device) for kind, tensor in contents.fixed.items()}

    @classmethod
    def of(
        cls, spec: CrossmodalSpec, zoo: Zoo, preprocessor: Preprocessor, model: EncoderDecoder, subjects: Subjects
    ) -> Codec:
        """The codec of a model trained on ``subjects`` of ``zoo``."""
        latents = encoded(model.encoder, subjects.inputs, subjects.shape)
        contents = Contents(
            spec,
            zoo=zoo.digest,
            signature=zoo.spec.signature,
            patterns=tuple(zoo.patterns),
            positives=tuple(subjects.labels.sum(0).tolist()),
            probes=zoo.probes,
            preprocessor=preprocessor,
            # An encoder sees the answers on the probes, which in a zoo from elsewhere are of any split.
            evaluation=Evaluation.build(zoo.universe, without=zoo.probes),
            support=Evaluation.build(zoo.universe, split=SELECTION, without=zoo.probes),
            model=model,
            probe=Probe.fit(latents, subjects.labels).calibrated(latents, subjects.labels),
            fixed={
                "mean_difference": mean_differences(latents, subjects.labels),
                "classifier_normal": classifier_normals(latents, subjects.labels),
            },
        )
        return cls(contents, str(model.directions.device))

    def save(self, folder: Path) -> None:
        """Write the files of the codec, see :mod:`services.crossmodal.codec_files`."""
        for part in PARTS:
            self._need(part)
        write(self.contents, folder)

    @classmethod
    def load(cls, folder: Path | str, device: str = "cpu", parts: Sequence[Part] = PARTS) -> Codec:
        """Read what :meth:`save` wrote, of encoder and decoder only ``parts``: a call that needs the other one raises
        :class:`InvalidInput`. So does a file that is missing, wrong, or of another run."""
        return cls(read(Path(folder), parts), device)

    def check_zoo(self, zoo: Zoo) -> None:
        """Raise :class:`InvalidInput` for a zoo that the codec was not trained on."""
        if zoo.digest != self.zoo:
            raise InvalidInput.field("zoo", "is not the zoo that the codec was trained on; give that one")

    @property
    def latent_dim(self) -> int:
        """Length of a latent."""
        return self.spec.codec.latent_dim

    @cached_property
    def behaviors(self) -> list[Behavior]:
        """What can be added and removed, in the order of ``directions``."""
        return [Behavior(p.name, p.description, n) for p, n in zip(self.patterns, self.positives, strict=True)]

    @property
    def course(self) -> list[dict[str, float]]:
        """The former name of ``history``."""
        warnings.warn("Codec.course is now Codec.history", DeprecationWarning, stacklevel=2)
        return self.history

    @property
    def signature_shape(self) -> tuple[int, int]:
        """Neurons and values of a signature."""
        return self.layout.neurons, self.preprocessor.extractor.values

    def latents(self, inputs: Tensor, shape: Tensor) -> Tensor:
        """Latents ``[batch, latent]`` of the encoder's flat inputs ``[batch, inputs]`` of networks of the shapes
        ``shape`` (int64 ``[batch]``)."""
        self._need("encoder")
        return encoded(self.model.encoder, inputs, shape)

    @torch.no_grad()
    def decodings(self, latents: Tensor, shape: Tensor) -> Tensor:
        """Networks in the model's form ``[batch, size]`` of latents ``[batch, latent]``; ``shape`` as above."""
        self._need("decoder")
        chunks = zip(torch.split(latents, CHUNK), torch.split(shape, CHUNK), strict=True)
        return torch.cat([self.model.decoder(rows, shapes) for rows, shapes in chunks])

    def check_networks(self, networks: Params, activation: str | None = None) -> Batch:
        """``networks`` as rows for :meth:`encode`, :meth:`steer`, :meth:`effect` and :meth:`evaluate`."""
        checked, which = checks.networks(networks, self.layout, activation)
        return Batch(flatten(checked), which)

    def check_signatures(self, signatures: Tensor) -> Batch:
        """``signatures`` as rows for :meth:`encode_signatures`."""
        if self.spec.codec.inputs != "signature":
            text = f"this model's encoder takes {self.spec.codec.inputs}; send networks"
            raise InvalidInput.field("signatures", text)
        if len(self.layout.shapes) > 1 or self.preprocessor.canonicalizer is not None:
            raise InvalidInput.field("signatures", "this model must see the networks themselves; send networks")
        return Batch(checks.batch(signatures, self.signature_shape, "signatures").flatten(1), 0)

    def check_latents(self, latents: Tensor, shape: Architecture | None = None) -> Batch:
        """``latents`` as rows for :meth:`decode`."""
        checked = checks.batch(latents, (self.latent_dim,), "latents")
        if shape is None and len(self.layout.shapes) > 1:
            raise InvalidInput.field("shape", f"this model knows {len(self.layout.shapes)} shapes; say which")
        if shape is not None and shape not in self.layout.shapes:
            raise InvalidInput.field("shape", "an architecture that the model was not trained on")
        return Batch(checked, 0 if shape is None else self.layout.shapes.index(shape))

    def check_edits(self, edits: Sequence[Edit]) -> None:
        """Raise :class:`InvalidInput` unless the edits are of behaviours that this codec has, each at most once."""
        checks.edits(edits, [behavior.name for behavior in self.behaviors])

    @torch.no_grad()
    def encode(self, networks: Params | Batch, activation: str | None = None) -> Tensor:
        """Latents ``[batch, latent]`` of networks: their signatures are taken on the codec's own probes."""
        return self._encoded(*self._vectors(networks, activation))[1]

    @torch.no_grad()
    def encode_signatures(self, signatures: Tensor | Batch) -> Tensor:
        """Latents of signatures ``[batch, neurons, values]``, taken on the codec's probes, of a codec for networks of
        one shape whose encoder takes nothing else."""
        batch = signatures if isinstance(signatures, Batch) else self.check_signatures(signatures)
        rows, shape = self._on_device(batch)
        return checks.finite(self.latents(rows, shape), "signatures")

    @torch.no_grad()
    def decode(self, latents: Tensor | Batch, shape: Architecture | None = None) -> Params:
        """Networks of latents ``[batch, latent]``; ``shape``: theirs, of a codec that knows several."""
        batch = latents if isinstance(latents, Batch) else self.check_latents(latents, shape)
        return self._networks(checks.finite(self.decodings(*self._on_device(batch)), "latents"), batch.shape)

    @torch.no_grad()
    def steer(
        self,
        networks: Params | Batch,
        edits: Sequence[EditLike],
        mode: Mode = "residual",
        strength: Strength = 1.0,
        *,
        direction: Direction = "learned",
        activation: str | None = None,
    ) -> tuple[Params, Tensor]:
        """Networks after ``edits``, all applied to each, and their latents ``[batch, latent]`` after the edit.

        ``strength`` scales the direction; 1 is what it was trained for, 0 with ``residual`` returns the very same
        weights, ``auto`` takes for each network whichever of ``AUTO`` does best on the support set (sequences that are
        neither trained nor judged on).
        """
        steered = self._steer(networks, activation, Steering.of(edits, mode, strength, direction))
        return self._networks(steered.vectors, int(steered.shape[0])), steered.latents

    @torch.no_grad()
    def effect(
        self,
        networks: Params | Batch,
        edits: Sequence[EditLike],
        mode: Mode = "residual",
        strength: Strength = 1.0,
        *,
        direction: Direction = "learned",
        activation: str | None = None,
    ) -> Effect:
        """What ``edits`` do to networks: predicted from their latents, and measured on held-out sequences. Arguments as
        in :meth:`steer`."""
        steered = self._steer(networks, activation, Steering.of(edits, mode, strength, direction))
        source, edited = (self.yes(vectors, steered.shape) for vectors in (steered.source, steered.vectors))
        shares = torch.stack([self.evaluation.by_stratum(predictions) for predictions in (source, edited)], 1)
        predicted = torch.stack([torch.sigmoid(self.probe(z)) for z in (steered.before, steered.latents)], 1)
        before, after = map(self.evaluation.labels, (steered.had, steered.requested))
        return Effect(
            self._networks(steered.vectors, int(steered.shape[0])),
            steered.latents,
            steered.strength,
            steered.had,
            predicted,
            shares[:, :, :-1],
            shares[:, :, -1],
            score(edited, source, before, after),
        )

    def _steer(self, networks: Params | Batch, activation: str | None, steering: Steering) -> _Steered:
        edits, mode, strength, direction = steering
        self.check_edits(edits)
        vectors, shape = self._vectors(networks, activation)
        self._need("decoder")
        change = self.signs(edits)
        prepared, latents = self._encoded(vectors, shape)
        source_decoded = self.decodings(latents, shape)
        shift = change @ self.directions[direction]

        def moved(strength: Tensor) -> tuple[Tensor, Tensor]:
            steered = latents + strength.unsqueeze(1) * shift
            decoded = self.decodings(steered, shape)
            # The difference is undone, not the sum: the source's own weights stay what they are to the bit.
            weights = prepared.undo(decoded) if mode == "direct" else vectors + prepared.undo(decoded - source_decoded)
            return checks.finite(weights, "networks"), checks.finite(steered, "networks")

        source = self.yes(vectors, shape, self.support)
        decisive = self._decisive
        had = source.float() @ decisive.T / decisive.sum(1).clamp_min(1) >= MIN_RECALL
        # Where all sequences of a behaviour are probes, the support set has none: the latent decides.
        had = torch.where(decisive.any(1), had, self.probe(latents) > 0)
        requested = had & ~(change < 0) | (change > 0)
        if strength == "auto":
            before, after = map(self.support.labels, (had, requested))
            choices, margins = torch.tensor(AUTO, device=self.device), []
            for choice in choices:
                weights, _ = moved(choice.expand(len(vectors)))
                scores = score(self.yes(weights, shape, self.support), source, before, after)
                margins.append(torch.minimum(scores.target - TARGET_GATE, scores.local - LOCAL_GATE))
            # Of equal strengths the first, which is nearest to 1. Where nothing is to change, nothing does.
            best = choices[torch.stack(margins).argmax(0)]
            strengths = torch.where((before == after).all(1), 0.0, best)
        else:
            strengths = torch.full((len(vectors),), strength, device=self.device)
        return _Steered(vectors, shape, latents, *moved(strengths), strengths, had, requested)

    @torch.no_grad()
    def evaluate(self, networks: Params | Batch, activation: str | None = None) -> tuple[Tensor, Tensor]:
        """``recall`` ``[batch, behaviors]`` and ``false_positive_rate`` ``[batch]`` of networks, as in
        :class:`Effect`."""
        shares = self.evaluation.by_stratum(self.yes(*self._vectors(networks, activation)))
        return shares[:, :-1], shares[:, -1]

    @cached_property
    def evaluation_inputs(self) -> Tensor:
        """The evaluation set as network inputs, examples as columns: ``[input_size, n]``."""
        return self._inputs(self.evaluation)

    @cached_property
    def _support_inputs(self) -> Tensor:
        return self._inputs(self.support)

    @cached_property
    def _decisive(self) -> Tensor:
        """Sequences of the support set on which it is measured who has each behaviour, 0 or 1 ``[behaviors, n]``: those
        that match it alone, or, where there are fewer than ``MIN_EXCLUSIVE``, all that match it. (Most sorted sequences
        begin with A, say, and a network with ``starts_with(A)`` answers yes to them.)"""
        member = self.support.membership
        alone = member & (member.sum(1, keepdim=True) == 1)
        return torch.where(alone.sum(0) < MIN_EXCLUSIVE, member, alone).T.float().to(self.device)

    def _inputs(self, held_out: Evaluation) -> Tensor:
        return encode(self.layout.envelope, held_out.sequences.to(self.device)).T.contiguous()

    def yes(self, vectors: Tensor, shape: Tensor, held_out: Evaluation | None = None) -> Tensor:
        """Predicted classes of networks ``[models, size]`` on the evaluation set, or on the support set if that is
        ``held_out``: bool ``[models, n]``."""
        inputs = self._support_inputs if held_out is self.support else self.evaluation_inputs
        return self.layout.logits(vectors.unsqueeze(1), shape, inputs).squeeze(1) > 0

    def signs(self, edits: Sequence[Edit]) -> Tensor:
        """-1 for behaviours that the edits remove, 1 for those that they add: ``[behaviors]``."""
        return signs(edits, [behavior.name for behavior in self.behaviors]).to(self.device)

    def _on_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Rows on the device, and the shape of each, int64 ``[batch]``."""
        return batch.rows.to(self.device), torch.full((len(batch.rows),), batch.shape, device=self.device)

    def _vectors(self, networks: Params | Batch, activation: str | None) -> tuple[Tensor, Tensor]:
        """``networks`` checked, as float32 vectors on the device, and their shape, int64 ``[batch]``."""
        batch = networks if isinstance(networks, Batch) else self.check_networks(networks, activation)
        (rows, shapes), which = self._on_device(batch), batch.shape
        vectors = self.layout.pad(rows, which)
        # Checked first: signatures of infinite activations may be NaN, or look like ordinary numbers.
        inputs, shape = self.preprocessor.extractor.inputs.to(self.device), self.layout.shapes[which]
        for layer in activations(unflatten(self.layout.strip(vectors, which), shape), inputs, shape.activation):
            checks.finite(layer, "networks")
        return vectors, shapes

    def _encoded(self, vectors: Tensor, shape: Tensor) -> tuple[Prepared, Tensor]:
        """``vectors`` on the way into the encoder, and their latents."""
        prepared = self.preprocessor(vectors, shape)
        latents = self.latents(checks.finite(prepared.inputs, "networks"), shape)
        return prepared, checks.finite(latents, "networks")

    def _need(self, part: Part) -> None:
        if not hasattr(self.model, part):
            raise InvalidInput.field("model", f"the codec was loaded without its {part}")

    def _networks(self, vectors: Tensor, which: int) -> Params:
        return unflatten(self.layout.strip(vectors, which), self.layout.shapes[which])


@torch.no_grad()
def encoded(encoder: Encoder, inputs: Tensor, shape: Tensor) -> Tensor:
    """Latents of flat inputs, see :meth:`Codec.latents`."""
    chunks = zip(torch.split(inputs, CHUNK), torch.split(shape, CHUNK), strict=True)
    return torch.cat([encoder(encoder.features(rows), shapes) for rows, shapes in chunks])


class _Steered(NamedTuple):
    """Networks before and after an edit."""

    source: Tensor
    """Vectors before, ``[batch, size]``."""
    shape: Tensor
    before: Tensor
    """Latents before."""
    vectors: Tensor
    latents: Tensor
    strength: Tensor
    had: Tensor
    requested: Tensor
    """Behaviours that the edit asks for: bool ``[batch, behaviors]``."""
