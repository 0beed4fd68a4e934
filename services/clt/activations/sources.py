"""Where activations come from: a policy on random instances, or a language model on texts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor, nn

from ethogram.errors import InvalidInput
from ethogram.specs.clt import ActivationsSpec, LanguageModelSpec
from services.clt.activations.hooks import (
    HookPoint,
    Pair,
    SourceKind,
    language_points,
    listed,
    mlp_pairs,
    named_pairs,
    policy_points,
    unknown_point,
)
from services.clt.policy.model import AttentionPolicy
from services.clt.policy.tsp import instances
from services.language.models import load_language_model
from services.language.texts import Texts
from services.runtime.reading import first_line
from services.runtime.seeds import generator

CHUNK = 1024
"""Instances that are drawn together."""
ROW_COLUMNS = ("instance", "position")
"""Columns of a store that are not hook points."""
# Number of texts to tokenise at once.
_TEXTS = 256
_FIELD = "spec.language_model"


class ActivationSource(ABC):
    """A model with its hook points, and the instances to run it on."""

    kind: SourceKind
    model: nn.Module
    digest: str
    """SHA-256 of the model's architecture and weights."""
    name: str
    positions: int
    """Number of positions of an instance."""
    first: int = 0
    """The first position to record."""

    @abstractmethod
    def points(self) -> dict[str, HookPoint]:
        """All hook points, by name."""

    @abstractmethod
    def chunks(self, first: int) -> Iterator[Tensor]:
        """Chunks of :data:`CHUNK` instances, from number ``first`` on: ``[instances, positions, ...]``. If the
        instances end, a shorter chunk, which may be empty, is the last."""

    @abstractmethod
    def forward(self, instances: Tensor, points: Sequence[HookPoint]) -> None:
        """Run a forward pass that reaches all ``points``."""

    @abstractmethod
    def example(self) -> Tensor:
        """Two or three instances, unlike the number of positions, for a trial run."""

    def trial(self, instances: Tensor, points: Sequence[HookPoint]) -> None:
        """As :meth:`forward`, but :class:`InvalidInput` says what the model cannot process."""
        self.forward(instances, points)

    def left_out(self) -> str:
        """What of the data so far has no part in the instances; empty if nothing."""
        return ""

    def unused(self) -> list[str]:
        """Fields of the spec that were set, and have no effect on these data."""
        return []

    def select(
        self, hooks: Sequence[str], pairs: Sequence[str]
    ) -> tuple[list[tuple[str, HookPoint]], list[tuple[str, Pair]]]:
        """The hook points of ``hooks`` and ``pairs`` (``SOURCE->TARGET`` or a set), each once, with the first field
        that names it, and the pairs with their fields. Without either, input and output of each MLP.

        Raises :class:`InvalidInput` for unknown hook points, and if the model has no MLP.
        """
        points = self.points()
        ends = named_pairs(pairs, self.kind, list(points), "spec.pairs.{}")
        requested = [(f"spec.hooks.{number}", name) for number, name in enumerate(hooks)]
        if not hooks and not pairs:
            ends = [("spec.hooks", pair) for pair in mlp_pairs(self.kind, list(points))]
        requested += [(field, name) for field, pair in ends for name in pair]
        if not requested:
            text = "no module of the model has the usual name of an MLP, so name the hooks or pairs to record"
            raise InvalidInput.field("spec.hooks", f"{text}; {listed(list(points))}")
        selected: dict[str, tuple[str, HookPoint]] = {}
        for field, name in requested:
            if name not in points:
                raise InvalidInput.field(field, unknown_point(name, list(points)))
            if name in ROW_COLUMNS:
                raise InvalidInput.field(field, f"{name} is the name of a column of every store; hook another module")
            selected.setdefault(name, (field, points[name]))
        return list(selected.values()), ends


class PolicySource(ActivationSource):
    """A policy on the instances of a spec: ``cities`` in their order, or random ones; chunk ``c`` is drawn from
    ``generator(seed, "instances", c)``."""

    kind = "policy"

    def __init__(
        self,
        policy: AttentionPolicy,
        spec: ActivationsSpec,
        cities: Tensor | None = None,
        name: str = "policy",
        device: str = "cpu",
    ) -> None:
        """Raises :class:`InvalidInput` for more instances than there are ``cities``."""
        if cities is not None and len(cities) < spec.instances:
            text = f"there are {len(cities)} in cities, not {spec.instances}; ask for at most as many"
            raise InvalidInput.field("spec.instances", text)
        self.model: AttentionPolicy = policy.to(device).eval()
        self.digest, self.name, self.device, self._spec, self._cities = policy.digest, name, device, spec, cities
        self.positions = (spec.nodes or policy.nodes) if cities is None else cities.shape[1]

    def points(self) -> dict[str, HookPoint]:
        return policy_points(self.model)

    def chunks(self, first: int) -> Iterator[Tensor]:
        for number in count(first):
            if self._cities is not None:
                yield self._cities[number * CHUNK : (number + 1) * CHUNK]
            else:
                draws = generator(self._spec.seed, "instances", number)
                yield instances(CHUNK, self.positions, draws, self._spec.distribution)

    def forward(self, instances: Tensor, points: Sequence[HookPoint]) -> None:
        policy = self.model
        policy.decoder.memory(policy.encoder(instances.to(self.device)))

    def example(self) -> Tensor:
        return next(self.chunks(0))[:2]


class LanguageModelSource(ActivationSource):
    """A causal language model on texts, joined with the end-of-text token and cut into sequences."""

    kind = "language_model"

    def __init__(self, spec: LanguageModelSpec, device: str) -> None:
        """Raises :class:`InvalidInput` for a model that ``transformers`` cannot load without running its code, and for
        a context that is too long for it."""
        self.spec, self.device, self.name = spec, device, spec.model
        self._loaded = load_language_model(spec.model, device, field=f"{_FIELD}.model")
        self.model: Any = self._loaded.model
        self.positions, self.first = spec.context, int(spec.skip_first)
        self._texts = Texts(spec.dataset, spec.config, spec.split, spec.column, _FIELD)
        self._check()
        self.digest = self._loaded.digest

    def _check(self) -> None:
        # XLNet has -1 and some have none.
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None) or -1
        if 0 < limit < self.spec.context:
            raise InvalidInput.field(f"{_FIELD}.context", f"the model has {limit} positions; ask for at most as many")
        with self._processing("model", "give a model that processes text alone"):
            self.forward(torch.zeros(1, 2, dtype=torch.long), [])

    @contextmanager
    def _processing(self, field: str, hint: str) -> Iterator[None]:
        """Raise what goes wrong in a forward pass as :class:`InvalidInput` of ``field``."""
        try:
            yield
            if self.device != "cpu":
                # Until here for what went wrong on the device.
                torch.accelerator.synchronize()
        except Exception as error:
            text = f"the model fails in a forward pass ({type(error).__name__}: {first_line(error)}); {hint}"
            raise InvalidInput.field(f"{_FIELD}.{field}", text) from error

    def points(self) -> dict[str, HookPoint]:
        return language_points(self.model)

    def chunks(self, first: int) -> Iterator[Tensor]:
        # Where a chunk begins is known only from the texts before it.
        sequences = islice(self._sequences(_TEXTS), first * CHUNK, None)
        while True:
            yield torch.tensor(list(islice(sequences, CHUNK)))

    def _sequences(self, texts_at_once: int) -> Iterator[list[int]]:
        context, end, rest, texts = self.spec.context, self._loaded.end_of_text, list[int](), iter(self._texts)
        while batch := list(islice(texts, texts_at_once)):
            for tokens in self._loaded.tokenize(batch):
                rest += [*tokens, end]
            whole = len(rest) // context * context
            yield from (rest[start : start + context] for start in range(0, whole, context))
            rest = rest[whole:]

    def forward(self, instances: Tensor, points: Sequence[HookPoint]) -> None:
        # Skip the logits if possible: those of a large vocabulary take more memory than everything else.
        model = self.model.base_model if self._in_base(points) else self.model
        model(input_ids=instances.to(self.device), use_cache=False)

    def _in_base(self, points: Sequence[HookPoint]) -> bool:
        return all(point.module.startswith(f"{self.model.base_model_prefix}.") for point in points)

    def trial(self, instances: Tensor, points: Sequence[HookPoint]) -> None:
        if self._loaded.missing and not self._in_base(points):
            text = f"{self.name} has no weights for {self._loaded.missing[0]}"
            raise InvalidInput.field("spec.hooks", f"{text}; hook modules of {self.model.base_model_prefix} alone")
        with self._processing("context", f"it processes 2 tokens, but not {self.positions}; ask for fewer"):
            self.forward(instances, points)

    def example(self) -> Tensor:
        size = 3 if self.positions == 2 else 2
        sequences = list(islice(self._sequences(1), size)) or [[0] * self.positions]
        return torch.tensor((sequences * size)[:size])

    def left_out(self) -> str:
        return self._texts.left_out()

    def unused(self) -> list[str]:
        return [f"{_FIELD}.{name}" for name in self._texts.unused()]


def open_source(
    spec: ActivationsSpec, device: str, policy: AttentionPolicy | None, name: str = "", cities: Tensor | None = None
) -> ActivationSource:
    """The source of ``spec``. ``policy``: the model, unless the spec names a language model; ``name``: its name in the
    store; ``cities``: the instances, if the spec names some."""
    if spec.language_model is not None:
        return LanguageModelSource(spec.language_model, device)
    if policy is None:
        raise InvalidInput.field("spec.policy", "there is no policy to record")
    return PolicySource(policy, spec, cities, name or "policy", device)
