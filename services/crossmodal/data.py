"""Training data: subjects as vectors, the split, and fresh sequences with exact labels."""

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
from services.zoo.oracle import varies
from services.zoo.pools import Pools, bits
from services.zoo.signatures import ActivationSignatureExtractor
from services.zoo.subjects import Architecture, encode, unflatten
from services.zoo.universe import TRAIN, Universe

POOL = 4096
"""Most sequences kept of each group of a pool."""


class Subjects(NamedTuple):
    """Networks as the model sees them, and their labels; the first axis is the subjects'."""

    inputs: Tensor
    """What the encoder takes, flat: float32 ``[subjects, inputs]``."""
    weights: Tensor
    """Networks as vectors ``[subjects, size]``, canonical if the codec canonicalises."""
    shape: Tensor
    """Which of the layout's shapes each has: int64 ``[subjects]``."""
    labels: Tensor
    """Behaviours: bool ``[subjects, patterns]``."""

    def at(self, index: Tensor) -> Subjects:
        """The subjects at ``index``."""
        return Subjects(*(tensor[index] for tensor in self))


class Prepared(NamedTuple):
    """The encoder's inputs and the weights of networks, as in :class:`Subjects`."""

    inputs: Tensor
    weights: Tensor
    transform: Transform | None
    """What made ``weights`` canonical; None if the codec does not canonicalise."""

    def undo(self, vectors: Tensor) -> Tensor:
        """Vectors in the model's form, back in the networks' own."""
        return vectors if self.transform is None else self.transform.undo(vectors)


@dataclass(frozen=True)
class Preprocessor:
    """From networks to the encoder's inputs: canonical form, signatures on the codec's own probes, weights."""

    inputs: Literal["signature", "weights", "both"]
    layout: Layout
    extractor: ActivationSignatureExtractor
    canonicalizer: Canonicalizer | None

    @classmethod
    def of(cls, spec: CrossmodalSpec, zoo: Zoo, train: Tensor) -> Preprocessor:
        """The preprocessor of ``spec``; the reference of each shape is the first of the subjects ``train`` (int64)."""
        canonicalize = spec.codec.canonicalize
        canonicalizer = None
        if canonicalize if canonicalize is not None else zoo.spec.subject.init == "independent":
            references = []
            for which, shape in enumerate(zoo.layout.shapes):
                first = train[zoo.shape[train] == which][:1]
                references.append(unflatten(zoo.layout.strip(zoo.weights[first], which), shape))
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
        """Which entries of the inputs and of the weights networks have: bool ``[models, ...]`` each; ``shape`` as
        above."""
        weights = self.layout.present.to(shape.device)[shape]
        neurons = self.layout.present_neurons.to(shape.device)[shape]
        signatures = neurons.repeat_interleave(self.extractor.values, 1)
        inputs = {"weights": [weights], "signature": [signatures], "both": [signatures, weights]}[self.inputs]
        return torch.cat(inputs, 1), weights

    def subjects(self, zoo: Zoo, index: Tensor, device: str = "cpu") -> Subjects:
        """The subjects at ``index`` (int64) of a zoo."""
        shape = zoo.shape[index]
        inputs, weights, _ = self(zoo.weights[index], shape)
        return Subjects(*(tensor.to(device) for tensor in (inputs, weights, shape, zoo.labels[index])))


class Split(NamedTuple):
    """Positions of a zoo's subjects, int64, ascending."""

    train: Tensor
    validation: Tensor
    held_out: Tensor


def split_subjects(labels: Tensor, shape: Tensor, spec: CrossmodalSpec) -> Split:
    """Set aside the shares ``held_out`` and ``validation`` of the subjects, at least one each, stratified by their sets
    of behaviours. Of several shapes, one subject each is always trained on.

    ``labels``: bool ``[subjects, patterns]``; ``shape``: which shape each has, int64 ``[subjects]``.
    """
    order = torch.randperm(len(labels), generator=generator(spec.seed, "held-out"))
    kept = torch.zeros(len(labels), dtype=torch.bool)
    if len(shapes := torch.unique(shape)) > 1:
        kept[order[torch.stack([(shape[order] == which).nonzero()[0, 0] for which in shapes])]] = True
    order = order[bits(labels[order]).argsort(stable=True)]
    order, always = order[~kept[order]], order[kept[order]]
    held_out, order = _evenly(order, spec.held_out * len(labels))
    validation, train = _evenly(order, spec.validation * len(labels))
    return Split(*(part.sort().values for part in (torch.cat([train, always]), validation, held_out)))


def _evenly(order: Tensor, number: float) -> tuple[Tensor, Tensor]:
    """About ``number`` of ``order``, at least one and evenly spaced; and the others."""
    count = min(max(1, round(number)), len(order))
    taken = torch.zeros(len(order), dtype=torch.bool)
    taken[((torch.arange(count) + 0.5) * len(order) / count).long()] = True
    return order[taken], order[~taken]


def check(zoo: Zoo, spec: CrossmodalSpec) -> None:
    """Raise :class:`InvalidInput` for a zoo from which no codec can be trained."""
    if len(zoo.patterns) < 2:
        text = "steering needs a zoo with at least two behaviours; make one with more patterns"
        raise InvalidInput.field("zoo.patterns", text)
    if zoo.labels.shape != (len(zoo), len(zoo.patterns)) or not zoo.labels.any():
        raise InvalidInput.field("zoo.labels", "the zoo has no behaviour labels; generate it with patterns")
    for name in ("weights", "signatures"):
        finite = getattr(zoo, name).flatten(1).isfinite().all(1)
        if not bool(finite.all()):
            bad = zoo.index[~finite]
            text = f"subject {int(bad[0])} holds NaN or infinity; leave out all such subjects ({len(bad)} in the zoo)"
            raise InvalidInput.field(f"zoo.{name}", text)
    if spec.codec.inputs == "signature" and not varies(zoo.extractor):
        methods = ", ".join(zoo.extractor.methods)
        text = f"the zoo's signature ({methods}) does not change with small changes of the weights; set both"
        raise InvalidInput.field("spec.codec.inputs", text)
    train, validation, held_out = split_subjects(zoo.labels, zoo.shape, spec)
    if len(validation) == 0 or len(held_out) == 0:
        text = f"its {len(zoo)} subjects have {len(zoo.layout.shapes)} shapes, so none can be held out; add subjects"
        raise InvalidInput.field("zoo", text)
    if len(train) < 2:
        text = f"with the validation share this leaves {len(train)} of {len(zoo)} subjects to train on; needs 2"
        raise InvalidInput.field("spec.held_out", text)
    for pattern, trained in zip(zoo.patterns, zoo.labels[train].any(0).tolist(), strict=True):
        if not trained:
            text = f"no subject to train on has {pattern.name}; make the zoo with more subjects, or without the pattern"
            raise InvalidInput.field("zoo.labels", text)
    # Equal networks could be on both sides of the split.
    first: dict[tuple[int, bytes], int] = {}
    networks = enumerate(zip(zoo.shape.tolist(), (weights.tobytes() for weights in zoo.weights.numpy()), strict=True))
    if repeats := [(first[network], i) for i, network in networks if first.setdefault(network, i) != i]:
        subject, copy = zoo.index[list(repeats[0])].tolist()
        text = f"subjects {subject} and {copy} are the same network; leave out all repeats ({len(repeats)} in the zoo)"
        raise InvalidInput.field("zoo.weights", text)


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
        """Rows ``[subjects, count]`` for edits of ``pattern`` (int64 ``[subjects, edited]``).

        A quarter matches the edited patterns. Of the others, where an edit can do harm, about five in eight match a
        random pattern, one in eight is a near miss (half of them of an edited pattern) and a quarter matches nothing.
        """
        subjects, patterns = len(pattern), self.pools.membership.shape[1]
        matching = count // 4
        rest = count - matching
        near, none = rest // 8, rest // 4
        anywhere = torch.randint(patterns, (subjects, rest - near - none), generator=generator)
        groups = [_repeated(pattern, matching), anywhere]
        if len(self.near):
            misses = self.near[torch.randint(len(self.near), (subjects, near), generator=generator)]
            closest = _repeated(pattern, near // 2) + patterns + 1
            closest = torch.where(self.pools.count[closest] > 0, closest, misses[:, : near // 2])
            groups += [closest, misses[:, near // 2 :]]
        groups.append(torch.full((subjects, count - sum(group.shape[1] for group in groups)), patterns))
        group = torch.cat(groups, 1)
        count_of_group = self.pools.count[group]
        index = torch.rand(group.shape, generator=generator, dtype=torch.float64) * count_of_group
        return self.pools.start[group] + index.long().minimum(count_of_group - 1)

    def network_inputs(self, rows: Tensor) -> Tensor:
        """Inputs ``[subjects, input_size, n]`` of rows ``[subjects, n]``, examples as columns."""
        taken = self.inputs.index_select(0, rows.flatten())
        return taken.view(*rows.shape, -1).transpose(1, 2)


def _repeated(pattern: Tensor, count: int) -> Tensor:
    """``count`` columns, those of ``pattern`` ``[subjects, edited]`` over and over."""
    return pattern[:, torch.arange(count) % pattern.shape[1]]
