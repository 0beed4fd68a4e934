"""Where activations come from: a policy on random instances, or a language model on texts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
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
    parse_pair,
    policy_points,
    unknown_point,
)
from services.clt.policy.model import AttentionPolicy
from services.clt.policy.tsp import instances
from services.language.models import load_language_model
from services.language.texts import Texts
from services.runtime.seeds import generator

CHUNK = 1024
"""Instances that are drawn together."""
ROW_COLUMNS = ("instance", "position")
"""Columns of a store beside the hook points."""
# Texts that are tokenised together.
_TEXTS = 256
_FIELD = "spec.language_model"


class ActivationSource(ABC):
    """A model with its hook points, and the instances that go through it."""

    kind: SourceKind
    model: nn.Module
    digest: str
    """SHA-256 of the model's architecture and weights."""
    name: str
    positions: int
    """Positions of an instance."""
    first: int = 0
    """The first position that is recorded."""

    @abstractmethod
    def points(self) -> dict[str, HookPoint]:
        """All hook points, by name."""

    @abstractmethod
    def chunks(self, first: int) -> Iterator[Tensor]:
        """Instances by :data:`CHUNK`, from chunk ``first`` on: ``[instances, positions, ...]``; the last may be
        shorter."""

    @abstractmethod
    def forward(self, instances: Tensor, points: Sequence[HookPoint]) -> None:
        """Run a forward pass that meets all ``points``."""

    @abstractmethod
    def example(self) -> Tensor:
        """Two instances."""

    def select(self, hooks: Sequence[str], pairs: Sequence[str]) -> tuple[list[tuple[str, HookPoint]], list[Pair]]:
        """The points that ``hooks`` and ``pairs`` (``SOURCE->TARGET``) name, each once and with the field that names it
        first, and the pairs. With neither, what enters and leaves each MLP.

        Raises :class:`InvalidInput` for a name that the model does not have, and where it has no MLP.
        """
        points = self.points()
        ends = [parse_pair(pair, f"spec.pairs.{number}") for number, pair in enumerate(pairs)]
        requested = [(f"spec.hooks.{number}", name) for number, name in enumerate(hooks)]
        requested += [(f"spec.pairs.{number}", name) for number, pair in enumerate(ends) for name in pair]
        if not requested:
            ends = mlp_pairs(self.kind, list(points))
            requested = [("spec.hooks", name) for pair in ends for name in pair]
        if not requested:
            text = "the model has no modules called mlp, so name the hooks or pairs to record"
            raise InvalidInput.field("spec.hooks", f"{text}; {listed(list(points))}")
        selected: dict[str, tuple[str, HookPoint]] = {}
        for field, name in requested:
            if name not in points:
                raise unknown_point(field, name, list(points))
            if name in ROW_COLUMNS:
                raise InvalidInput.field(field, f"{name} is the name of a column of every store; hook another module")
            selected.setdefault(name, (field, points[name]))
        return list(selected.values()), ends


class PolicySource(ActivationSource):
    """A policy on uniform cities; chunk ``c`` is drawn from ``generator(seed, "instances", c)``."""

    kind = "policy"

    def __init__(
        self,
        policy: AttentionPolicy,
        nodes: int | None = None,
        seed: int = 0,
        name: str = "policy",
        device: str = "cpu",
    ) -> None:
        self.model: AttentionPolicy = policy.to(device).eval()
        self.digest, self.name, self.device, self._seed = policy.digest, name, device, seed
        self.positions = nodes or policy.nodes

    def points(self) -> dict[str, HookPoint]:
        return policy_points(self.model)

    def chunks(self, first: int) -> Iterator[Tensor]:
        while True:
            yield instances(CHUNK, self.positions, generator(self._seed, "instances", first))
            first += 1

    def forward(self, instances: Tensor, points: Sequence[HookPoint]) -> None:
        policy = self.model
        policy.decoder.memory(policy.encoder(instances.to(self.device)))

    def example(self) -> Tensor:
        return next(self.chunks(0))[:2]


class LanguageModelSource(ActivationSource):
    """A causal language model on texts, which are joined with the end-of-text token and cut into sequences."""

    kind = "language_model"

    def __init__(self, spec: LanguageModelSpec, device: str) -> None:
        """Raises :class:`InvalidInput` for what ``transformers`` cannot load without code of its own, and for a context
        that the model does not have."""
        self.spec, self.device, self.name = spec, device, spec.model
        loaded = load_language_model(spec.model, device, field=f"{_FIELD}.model")
        self.model: Any = loaded.model
        self.tokenizer = loaded.tokenizer
        self.positions, self.first = spec.context, int(spec.skip_first)
        self._check()
        self.digest = loaded.digest

    def _check(self) -> None:
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and self.spec.context > limit:
            raise InvalidInput.field(f"{_FIELD}.context", f"the model has {limit} positions; ask for at most as many")
        if self.tokenizer.eos_token_id is None:
            raise InvalidInput.field(f"{_FIELD}.model", "its tokenizer has no token for the end of a text")

    def points(self) -> dict[str, HookPoint]:
        return language_points(self.model)

    def chunks(self, first: int) -> Iterator[Tensor]:
        sequences, number = self._sequences(), 0
        # Where a chunk begins is known only from the texts before it.
        while chunk := list(islice(sequences, CHUNK)):
            if number >= first:
                yield torch.tensor(chunk)
            number += 1

    def _sequences(self) -> Iterator[list[int]]:
        spec, context, rest = self.spec, self.spec.context, list[int]()
        texts = iter(Texts(spec.dataset, spec.config, spec.split, spec.column, _FIELD))
        while batch := list(islice(texts, _TEXTS)):
            for tokens in self.tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
                rest += [*tokens, self.tokenizer.eos_token_id]
            whole = len(rest) // context * context
            yield from (rest[start : start + context] for start in range(0, whole, context))
            rest = rest[whole:]

    def forward(self, instances: Tensor, points: Sequence[HookPoint]) -> None:
        # Logits of a large vocabulary take more memory than all else.
        prefix = f"{self.model.base_model_prefix}."
        inner = all(point.module.startswith(prefix) for point in points)
        (self.model.base_model if inner else self.model)(input_ids=instances.to(self.device), use_cache=False)

    def example(self) -> Tensor:
        return torch.zeros(2, self.positions, dtype=torch.long)


def open_source(spec: ActivationsSpec, device: str, policy: AttentionPolicy | None, name: str = "") -> ActivationSource:
    """The source that ``spec`` names; ``policy``: where it is one, and ``name`` its name for people."""
    if spec.language_model is not None:
        return LanguageModelSource(spec.language_model, device)
    if policy is None:
        raise InvalidInput.field("spec.policy", "there is no policy to record")
    return PolicySource(policy, spec.nodes, spec.seed, name or "policy", device)
