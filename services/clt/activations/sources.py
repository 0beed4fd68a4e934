"""Where activations come from: a policy on random instances, or a language model on texts."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ethogram.errors import InvalidInput
from ethogram.specs.clt import ActivationsSpec, LanguageModelSpec
from services.artifacts.hub import fetch
from services.clt.activations.hooks import HookPoint
from services.clt.activations.texts import texts
from services.clt.policy.model import AttentionPolicy
from services.clt.policy.tsp import instances
from services.runtime.seeds import generator

CHUNK = 1024
"""Instances that are drawn together."""
# Texts that are tokenised together.
_TEXTS = 256
_FIELD = "spec.language_model"
# What transformers raises for files that are missing, broken, or hold something else.
_LOADING = (OSError, ValueError, TypeError, AttributeError, LookupError, ImportError, RuntimeError, SafetensorError)


class ActivationSource(ABC):
    """A model, and the instances that go through it."""

    kind: Literal["policy", "language_model"]
    model: nn.Module
    digest: str
    name: str
    positions: int
    """Positions of an instance."""
    first: int = 0
    """The first of them that is kept."""

    @abstractmethod
    def chunks(self, first: int) -> Iterator[Tensor]:
        """Instances by :data:`CHUNK`, from chunk ``first`` on: ``[instances, positions, ...]``; the last may be
        shorter."""

    @abstractmethod
    def forward(self, instances: Tensor, points: Sequence[HookPoint]) -> None:
        """Have the model meet all ``points``."""

    @abstractmethod
    def example(self) -> Tensor:
        """Two instances."""


class PolicySource(ActivationSource):
    """A policy on uniform cities; chunk ``c`` is drawn from ``generator(seed, "instances", c)``."""

    kind = "policy"

    def __init__(self, policy: AttentionPolicy, nodes: int | None, seed: int, name: str, device: str) -> None:
        self.model: AttentionPolicy = policy.to(device).eval()
        self.digest, self.name, self.device, self._seed = policy.digest, name, device, seed
        self.positions = nodes or policy.nodes

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
    """A causal language model on texts, which are joined with the token of their end and cut."""

    kind = "language_model"

    def __init__(self, spec: LanguageModelSpec, device: str) -> None:
        """Raises :class:`InvalidInput` for what ``transformers`` cannot load without code of its own, and for a context
        that the model does not have."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.spec, self.device, self.name = spec, device, spec.model
        folder = _folder(spec.model)
        safe: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, **safe)
            model: Any = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, dtype="auto", **safe)
        except _LOADING as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            text = f"{spec.model} cannot be loaded as a causal language model with safetensors weights ({why})"
            raise InvalidInput.field(f"{_FIELD}.model", text) from None
        self.model: Any = model.eval().requires_grad_(False)
        self.model.to(device)
        self.positions, self.first = spec.context, int(spec.skip_first)
        self._check()
        self.digest = _digest(self.model)

    def _check(self) -> None:
        most = getattr(self.model.config, "max_position_embeddings", None)
        if most is not None and self.spec.context > most:
            raise InvalidInput.field(f"{_FIELD}.context", f"the model has {most} positions; ask for at most as many")
        if self.tokenizer.eos_token_id is None:
            raise InvalidInput.field(f"{_FIELD}.model", "its tokenizer has no token for the end of a text")
        tokens, known = len(self.tokenizer), self.model.get_input_embeddings().num_embeddings
        if tokens > known:
            text = f"its tokenizer has {tokens} tokens and the model {known}; give a model with its own tokenizer"
            raise InvalidInput.field(f"{_FIELD}.model", text)

    def chunks(self, first: int) -> Iterator[Tensor]:
        made: list[list[int]] = []
        number = 0
        for sequence in self._sequences():
            made.append(sequence)
            if len(made) == CHUNK:
                # Where a chunk begins is known only from the texts before it.
                if number >= first:
                    yield torch.tensor(made)
                made, number = [], number + 1
        if made and number >= first:
            yield torch.tensor(made)

    def _sequences(self) -> Iterator[list[int]]:
        context, left = self.spec.context, list[int]()
        for some in _batched(texts(self.spec), _TEXTS):
            for tokens in self.tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]:
                left += [*tokens, self.tokenizer.eos_token_id]
            whole = len(left) // context * context
            yield from (left[start : start + context] for start in range(0, whole, context))
            left = left[whole:]

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


def _folder(model: str) -> Path:
    """The model's folder: here, or in the Hub's cache."""
    place = Path(model)
    if place.exists():
        return place
    if place.is_absolute() or model.count("/") > 1:
        raise InvalidInput.field(f"{_FIELD}.model", f"{model} is not there")
    include = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    described = f"{model}, which is no folder here"
    return fetch(model, "model", include, ["*/*"], field=f"{_FIELD}.model", described=described)


def _digest(model: nn.Module) -> str:
    """Hash of a language model's configuration and weights."""
    config: Any = model.config
    found = hashlib.sha256(config.to_json_string().encode())
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _batched(items: Iterator[str], size: int) -> Iterator[list[str]]:
    some: list[str] = []
    for item in items:
        some.append(item)
        if len(some) == size:
            yield some
            some = []
    if some:
        yield some
