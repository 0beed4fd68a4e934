"""The streams of a store that a spec names, and the units in which a model takes them."""

from __future__ import annotations

import torch
from torch import Tensor

from ethogram.errors import InvalidInput
from ethogram.specs.clt import CltSpec, SaeSpec
from services.clt.activations.hooks import check_pair
from services.clt.activations.loader import chunks
from services.clt.activations.store import VALIDATION, ActivationStore
from services.clt.sparse.model import Scale, Streams

SMALLEST = 1e-6
"""Share of the mean variance below which a direction counts as constant."""
CONSTANT = 1e-6
"""Share of a stream's root mean square below which its standard deviation is rounding in float32."""
# Validation rows that are compared at once.
_ROWS = 2048


def streams_of(spec: SaeSpec | CltSpec, store: ActivationStore) -> Streams:
    """The streams of a spec. Raises :class:`InvalidInput` that names the field of a hook point that the store lacks, or
    of a target that does not come after its source."""
    widths = store.widths
    if isinstance(spec, SaeSpec):
        store.require_hooks([spec.hook], "spec.hook")
        return Streams("sae", [spec.hook], [spec.hook], [widths[spec.hook]], [widths[spec.hook]])
    sources, targets = spec.sources, spec.targets
    if not sources:
        pairs = store.mlp_pairs()
        sources, targets = [source for source, _ in pairs], [target for _, target in pairs]
        if not pairs:
            text = "no module's input and output are both in the store; name sources and targets"
            raise InvalidInput.field("spec.sources", f"{text} among: {', '.join(widths)}")
    for side, hooks in (("sources", sources), ("targets", targets)):
        for number, hook in enumerate(hooks):
            store.require_hooks([hook], f"spec.{side}.{number}")
            if number and store.hooks.index(hook) <= store.hooks.index(hooks[number - 1]):
                text = f"{hook} does not come after {hooks[number - 1]}; name them in the order of the model"
                raise InvalidInput.field(f"spec.{side}.{number}", text)
    for number, (source, target) in enumerate(zip(sources, targets, strict=True)):
        check_pair(store.hooks, source, target, f"spec.targets.{number}")
    return Streams(spec.kind, sources, targets, [widths[hook] for hook in sources], [widths[hook] for hook in targets])


def scales_of(spec: SaeSpec | CltSpec, store: ActivationStore, streams: Streams) -> tuple[list[Scale], list[Scale]]:
    """The maps of sources and of targets to the model's units, from the statistics of the training rows. Raises
    :class:`InvalidInput` that names the field of a stream that does not vary, or of a way that does not fit it."""
    _check_varying(spec, store, streams)
    read = [_scale(store, hook, spec.training.normalize, source=True) for hook in streams.sources]
    if streams.kind == "sae":
        return read, [scale.copied() for scale in read]
    return read, [_scale(store, hook, spec.training.normalize, source=False) for hook in streams.targets]


def _check_varying(spec: SaeSpec | CltSpec, store: ActivationStore, streams: Streams) -> None:
    for side, hooks in (("sources", streams.sources), ("targets", streams.targets)):
        for number, hook in enumerate(hooks):
            statistics = store.statistics(hook)
            variance, mean = statistics.std.square().mean(), statistics.mean.square().mean()
            if variance.sqrt() <= CONSTANT * (variance + mean).sqrt():
                named = f"spec.{side}.{number}" if getattr(spec, side, None) else f"spec.{side}"
                text = f"{hook} is the same in all {statistics.rows} training rows, so there is nothing to learn"
                field = "spec.hook" if isinstance(spec, SaeSpec) else named
                raise InvalidInput.field(field, f"{text}; name other hook points")
    limit, same = spec.training.validation_rows, set(streams.targets)
    first = dict(zip(streams.targets, store.read(VALIDATION, 0, streams.targets, 0, 1), strict=True))
    for chunk in chunks(store, streams.targets, VALIDATION, limit, _ROWS):
        rows_of = dict(zip(streams.targets, chunk, strict=True))
        same = {hook for hook in same if bool((rows_of[hook] == first[hook]).all())}
        if not same:
            return
    few = limit < store.rows(VALIDATION)
    field, hint = ("spec.training.validation_rows", "take more") if few else ("activations", "record more instances")
    text = f"{min(same)} is the same in all {min(limit, store.rows(VALIDATION))} validation rows"
    raise InvalidInput.field(field, f"{text}, so nothing can be measured; {hint}")


def _scale(store: ActivationStore, hook: str, form: str, *, source: bool) -> Scale:
    statistics = store.statistics(hook)
    mean, deviation = statistics.mean.double(), statistics.std.double()
    spread = deviation.square().mean().sqrt().clamp_min(1e-12)
    if form == "none":
        # The mean square of the whole is still 1, so that losses and learning rates of different streams compare.
        return Scale(torch.zeros_like(mean), 1 / (deviation.square() + mean.square()).mean().sqrt().clamp_min(1e-12))
    if form == "standardize":
        return Scale(mean, 1 / deviation.clamp_min(spread * SMALLEST**0.5))
    if form == "whiten" and source:
        return Scale(mean, _whitening(statistics.covariance, hook))
    return Scale(mean, 1 / spread)


def _whitening(covariance: Tensor | None, hook: str) -> Tensor:
    """The symmetric matrix that takes a stream to unit covariance (ZCA, Bell and Sejnowski 1997)."""
    if covariance is None:
        raise InvalidInput.field("spec.training.normalize", f"{hook} is too wide to be whitened; take standardize")
    values, vectors = torch.linalg.eigh(covariance.double())
    least = values.mean() * SMALLEST
    matrix: Tensor = (vectors * values.clamp_min(least).rsqrt()) @ vectors.T
    return matrix
