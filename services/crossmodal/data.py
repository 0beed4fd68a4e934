"""What training reads: subjects as vectors, who is held out, and fresh sequences with exact labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ethogram.errors import InvalidInput
from ethogram.specs.crossmodal import CrossmodalSpec
from services.crossmodal.canonical import Canonicalizer, Transform
from services.runtime.seeds import generator
from services.zoo.dataset import Zoo
from services.zoo.layout import Layout
from services.zoo.pools import Pools, bits
from services.zoo.signatures import ActivationSignatureExtractor
from services.zoo.subjects import Architecture, encode, unflatten
from services.zoo.universe import TRAIN, Universe

POOL = 4096
"""Most sequences kept of each group of a pool."""


class Subjects(NamedTuple):
    """Networks as the model sees them, and what is known of them; the first axis is the subjects'."""

    inputs: Tensor
    """What the encoder takes, flat: float32 ``[subjects, inputs]``."""
    weights: Tensor
    """Networks as vectors ``[subjects, size]``, canonical where that is asked for."""
    shape: Tensor
    """Which of the layout's shapes each has: int64 ``[subjects]``."""
    labels: Tensor
    """Own patterns: bool ``[subjects, patterns]``."""

    def at(self, index: Tensor) -> Subjects:
        """The subjects at ``index``."""
        return Subjects(*(tensor[index] for tensor in self))


class Prepared(NamedTuple):
    """Networks on the way into the encoder."""

    inputs: Tensor
    weights: Tensor
    transform: Transform | None
    """What made ``weights`` canonical; None where nothing was asked for."""

    def undo(self, vectors: Tensor) -> Tensor:
        """Vectors in the model's form, back in the networks' own."""
        return vectors if self.transform is None else self.transform.undo(vectors)


class Preprocessor:
    """From networks to what the encoder takes: canonical form, signatures on the codec's own probes, weights."""

    def __init__(
        self,
        inputs: Literal["signature", "weights", "both"],
        layout: Layout,
        extractor: ActivationSignatureExtractor,
        canonicalizer: Canonicalizer | None,
    ) -> None:
        self.inputs, self.layout, self.extractor, self.canonicalizer = inputs, layout, extractor, canonicalizer

    @classmethod
    def of(cls, spec: CrossmodalSpec, zoo: Zoo, train: Tensor) -> Preprocessor:
        """As ``spec`` asks for; references for canonical form are the first of the subjects ``train`` (int64) of each
        shape."""
        wanted = spec.codec.canonicalize
        canonicalizer = None
        if wanted if wanted is not None else zoo.spec.subject.init == "independent":
            references = []
            for which, shape in enumerate(zoo.layout.shapes):
                own = train[zoo.shape[train] == which]
                references.append(unflatten(zoo.layout.strip(zoo.weights[own[:1]], which), shape))
            canonicalizer = Canonicalizer(zoo.layout, zoo.extractor.inputs, references)
        return cls(spec.codec.inputs, zoo.layout, zoo.extractor, canonicalizer)

    def __call__(self, vectors: Tensor, shape: Tensor) -> Prepared:
        """``vectors``: networks ``[models, size]`` of the shapes ``shape``, int64 ``[models]``."""
        transform = None if self.canonicalizer is None else self.canonicalizer.transform(vectors, shape)
        weights = vectors if transform is None else transform.apply(vectors)
        if self.inputs == "weights":
            return Prepared(weights, weights, transform)
        signatures = self.layout.signatures(weights, shape, self.extractor).flatten(1)
        inputs = signatures if self.inputs == "signature" else torch.cat([signatures, weights], 1)
        return Prepared(inputs, weights, transform)

    def present(self, shape: Tensor) -> tuple[Tensor, Tensor]:
        """Which entries of the inputs and of the weights networks of the shapes ``shape`` have: bool ``[models, ...]``
        each."""
        weights = self.layout.present.to(shape.device)[shape]
        neurons = self.layout.present_neurons.to(shape.device)[shape]
        signatures = neurons.repeat_interleave(self.extractor.values, 1)
        parts = {"weights": [weights], "signature": [signatures], "both": [signatures, weights]}[self.inputs]
        return torch.cat(parts, 1), weights

    def subjects(self, zoo: Zoo, index: Tensor, device: str = "cpu") -> Subjects:
        """The subjects at ``index`` (int64) of a zoo."""
        shape = zoo.shape[index]
        prepared = self(zoo.weights[index], shape)
        parts = (prepared.inputs, prepared.weights, shape, zoo.labels[index])
        return Subjects(*(part.to(device) for part in parts))


class Split(NamedTuple):
    """Positions of a zoo's subjects, int64, ascending."""

    train: Tensor
    validation: Tensor
    held_out: Tensor


def split_subjects(labels: Tensor, shape: Tensor, spec: CrossmodalSpec) -> Split:
    """Set aside the shares ``held_out`` and ``validation`` of the subjects, at least one each, stratified: of each set
    of behaviours as near to its share as can be. Of several shapes one subject each is always trained on.

    ``labels``: bool ``[subjects, patterns]``; ``shape``: which shape each has, int64 ``[subjects]``.
    """
    order = torch.randperm(len(labels), generator=generator(spec.seed, "held-out"))
    kept = torch.zeros(len(labels), dtype=torch.bool)
    if len(shapes := torch.unique(shape)) > 1:
        kept[order[torch.stack([(shape[order] == one).nonzero()[0, 0] for one in shapes])]] = True
    order = order[bits(labels[order]).argsort(stable=True)]
    order, always = order[~kept[order]], order[kept[order]]
    held_out, order = _every(order, spec.held_out * len(labels))
    validation, train = _every(order, spec.validation * len(labels))
    return Split(*(part.sort().values for part in (torch.cat([train, always]), validation, held_out)))


def _every(order: Tensor, wanted: float) -> tuple[Tensor, Tensor]:
    """About ``wanted`` of ``order``, at least one and evenly spaced; and the others."""
    count = min(max(1, round(wanted)), len(order))
    taken = torch.zeros(len(order), dtype=torch.bool)
    taken[((torch.arange(count) + 0.5) * len(order) / count).long()] = True
    return order[taken], order[~taken]


def check(zoo: Zoo, spec: CrossmodalSpec) -> None:
    """Raise :class:`InvalidInput` for a zoo from which nothing can be learned."""
    if len(zoo.patterns) < 2:
        text = "steering needs a zoo with at least two behaviours; make one with more patterns"
        raise InvalidInput.field("zoo.patterns", text)
    if zoo.labels.shape != (len(zoo), len(zoo.patterns)) or not zoo.labels.any():
        raise InvalidInput.field("zoo.labels", "the zoo has no behaviour labels; generate it with patterns")
    for name in ("weights", "signatures"):
        finite = getattr(zoo, name).flatten(1).isfinite().all(1)
        if not bool(finite.all()):
            bad = zoo.index[~finite]
            text = f"subject {int(bad[0])} holds NaN or infinity; leave such out, of which there are {len(bad)}"
            raise InvalidInput.field(f"zoo.{name}", text)
    train, validation, held_out = split_subjects(zoo.labels, zoo.shape, spec)
    if len(validation) == 0 or len(held_out) == 0:
        text = f"its {len(zoo)} subjects have {len(zoo.layout.shapes)} shapes, so none can be held out; add subjects"
        raise InvalidInput.field("zoo", text)
    if len(train) < 2:
        raise InvalidInput.field(
            "spec.held_out",
            f"with the validation share this leaves {len(train)} of {len(zoo)} subjects to train on; needs 2",
        )
    for pattern, on in zip(zoo.patterns, zoo.labels[train].any(0).tolist(), strict=True):
        if not on:
            text = f"no subject to train on has {pattern.name}; make the zoo with more subjects, or without the pattern"
            raise InvalidInput.field("zoo.labels", text)
    _check_distinct(zoo)


def _check_distinct(zoo: Zoo) -> None:
    """Raise :class:`InvalidInput` where two subjects are one network: they could be on both sides of the split."""
    first: dict[tuple[int, bytes], int] = {}
    repeats: list[tuple[int, int]] = []
    for place, (shape, weights) in enumerate(zip(zoo.shape.tolist(), zoo.weights.numpy(), strict=True)):
        known = first.setdefault((shape, weights.tobytes()), place)
        if known != place:
            repeats.append((known, place))
    if repeats:
        one, other = zoo.index[list(repeats[0])].tolist()
        raise InvalidInput.field(
            "zoo.weights",
            f"subjects {one} and {other} are the same network; leave repeats out, of which there are {len(repeats)}",
        )


@dataclass(frozen=True)
class Queries:
    """Training sequences on which decoded networks are run, by group (see :class:`services.zoo.pools.Pools`)."""

    pools: Pools
    inputs: Tensor
    """The rows of ``pools`` as network inputs ``[rows, input_size]``."""
    near: Tensor
    """Groups of near misses that are not empty: int64."""

    @classmethod
    def build(cls, universe: Universe, architecture: Architecture, seed: int) -> Queries:
        """Draw the pools from the universe's training split."""
        pools = Pools.build(universe, TRAIN, POOL, seed)
        patterns = len(universe.patterns)
        for p in (pools.count[:patterns] == 0).nonzero().flatten().tolist():
            name = universe.patterns[p].name
            raise InvalidInput.field("zoo.patterns", f"no training sequence matches {name}; leave it out of the zoo")
        near = (pools.count[patterns + 1 :] > 0).nonzero().flatten() + patterns + 1
        return cls(pools, encode(architecture, pools.sequences), near)

    def draw(self, pattern: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Rows ``[subjects, count]`` for edits of some patterns each (``pattern``: int64 ``[subjects, edited]``).

        A quarter matches the edited patterns; of the others about five in eight match a random pattern, one in eight is
        a near miss (half of them of an edited pattern) and a quarter matches nothing: the places where an edit can do
        harm.
        """
        subjects, patterns = len(pattern), self.pools.membership.shape[1]
        own = count // 4
        rest = count - own
        near, none = rest // 8, rest // 4
        anywhere = torch.randint(patterns, (subjects, rest - near - none), generator=generator)
        groups = [_repeated(pattern, own), anywhere]
        if len(self.near):
            misses = self.near[torch.randint(len(self.near), (subjects, near), generator=generator)]
            closest = _repeated(pattern, near // 2) + patterns + 1
            closest = torch.where(self.pools.count[closest] > 0, closest, misses[:, : near // 2])
            groups.append(torch.cat([closest, misses[:, near // 2 :]], 1))
        groups.append(torch.full((subjects, count - sum(group.shape[1] for group in groups)), patterns))
        group = torch.cat(groups, 1)
        place = torch.rand(group.shape, generator=generator, dtype=torch.float64) * self.pools.count[group]
        return self.pools.start[group] + place.long().minimum(self.pools.count[group] - 1)

    def network_inputs(self, rows: Tensor) -> Tensor:
        """Inputs ``[subjects, input_size, n]`` of rows ``[subjects, n]``, examples as columns."""
        taken = self.inputs.index_select(0, rows.flatten())
        return taken.view(*rows.shape, -1).transpose(1, 2)


def _repeated(pattern: Tensor, count: int) -> Tensor:
    """``count`` columns, those of ``pattern`` ``[subjects, edited]`` over and over."""
    return pattern[:, torch.arange(count) % pattern.shape[1]]
