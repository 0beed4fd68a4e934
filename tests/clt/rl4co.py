"""Checkpoints of rl4co's attention models, from the names and shapes that its source gives, and what they compute.

Nothing here goes by the importer. The names are those of ``AttentionModelPolicy``, ``GraphAttentionNetwork``,
``Normalization``, ``TSPContext`` and ``PointerAttention`` (before: ``LogitAttention``); :func:`tours` follows their
forward passes, one city after the other, in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

HEADS, LAYERS, WIDTH, HIDDEN = 2, 2, 16, 24

# Of a policy with embed_dim 16, feedforward_hidden 24 and one encoder layer.
EMBEDDING = {
    "encoder.init_embedding.init_embed.weight": (16, 2),
    "encoder.init_embedding.init_embed.bias": (16,),
}
LAYER = {
    "encoder.net.layers.{}.0.module.Wqkv.weight": (48, 16),
    "encoder.net.layers.{}.0.module.Wqkv.bias": (48,),
    "encoder.net.layers.{}.0.module.out_proj.weight": (16, 16),
    "encoder.net.layers.{}.0.module.out_proj.bias": (16,),
    "encoder.net.layers.{}.2.module.0.weight": (24, 16),
    "encoder.net.layers.{}.2.module.0.bias": (24,),
    "encoder.net.layers.{}.2.module.2.weight": (16, 24),
    "encoder.net.layers.{}.2.module.2.bias": (16,),
}
# Beside those: nn.BatchNorm1d has all, nn.InstanceNorm1d(affine=True) the first four, and "layer" no module at all.
NORMALIZERS = {
    "encoder.net.layers.{}.1.normalizer.weight": (16,),
    "encoder.net.layers.{}.1.normalizer.bias": (16,),
    "encoder.net.layers.{}.3.normalizer.weight": (16,),
    "encoder.net.layers.{}.3.normalizer.bias": (16,),
    "encoder.net.layers.{}.1.normalizer.running_mean": (16,),
    "encoder.net.layers.{}.1.normalizer.running_var": (16,),
    "encoder.net.layers.{}.1.normalizer.num_batches_tracked": (),
    "encoder.net.layers.{}.3.normalizer.running_mean": (16,),
    "encoder.net.layers.{}.3.normalizer.running_var": (16,),
    "encoder.net.layers.{}.3.normalizer.num_batches_tracked": (),
}
DECODER = {
    "decoder.context_embedding.W_placeholder": (32,),
    "decoder.context_embedding.project_context.weight": (16, 32),
    "decoder.pointer.project_out.weight": (16, 16),
    "decoder.project_node_embeddings.weight": (48, 16),
    "decoder.project_fixed_context.weight": (16, 16),
}
# The same weights under the names of other versions: an MLP of its own in the encoder, and a pointer of another name.
OTHER_NAMES = {
    "module.0.": "module.lins.0.",
    "module.2.": "module.lins.1.",
    "decoder.pointer.": "decoder.logit_attention.",
}


def state_dict(normalization: str, *, other_names: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the names of a Lightning module, with the entries of a rollout baseline."""
    norms = {"batch": 10, "instance": 4, "layer": 0}[normalization]
    per_layer = LAYER | dict(list(NORMALIZERS.items())[:norms])
    shapes = {name.format(number): shape for number in range(LAYERS) for name, shape in per_layer.items()}
    draws = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in (EMBEDDING | shapes | DECODER).items():
        # Larger ones would saturate the logits, and then all cities are alike.
        value = torch.randn(shape, generator=draws) * (0.8 / shape[1] ** 0.5 if len(shape) == 2 else 0.2)
        if "fixed_context" in name:
            # So that tours with and without the mean of the cities differ.
            value = 4 * value
        if name.endswith(("running_var", "normalizer.weight")):
            value = value.abs() + 0.5
        if name.endswith("num_batches_tracked"):
            value = torch.tensor(7)
        if other_names:
            for own, other in OTHER_NAMES.items():
                name = name.replace(own, other)
        state[f"policy.{name}"] = value
    return state | {"baseline.baseline.policy.encoder.init_embedding.init_embed.weight": torch.zeros(16, 2)}


class Linear:
    """Rows times a weight of the state dict, and its bias if it has one."""

    def __init__(self, state: Mapping[str, NDArray[Any]], name: str) -> None:
        self.weight, self.bias = state[f"{name}.weight"], state.get(f"{name}.bias", 0.0)

    def __call__(self, rows: NDArray[Any]) -> NDArray[Any]:
        out: NDArray[Any] = rows @ self.weight.T + self.bias
        return out


def softmax(scores: NDArray[Any]) -> NDArray[Any]:
    powers: NDArray[Any] = np.exp(scores - scores.max(-1, keepdims=True))
    powers /= powers.sum(-1, keepdims=True)
    return powers


def normalized(state: Mapping[str, NDArray[Any]], name: str, rows: NDArray[Any], normalization: str) -> NDArray[Any]:
    scaled: NDArray[Any]
    if normalization == "layer":
        scaled = (rows - rows.mean()) / np.sqrt(rows.var(ddof=1) + 1e-5)
        return scaled
    mean, variance = rows.mean(0), rows.var(0)
    if normalization == "batch":
        mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    scaled = (rows - mean) / np.sqrt(variance + 1e-5) * state[f"{name}.weight"] + state[f"{name}.bias"]
    return scaled


def encode(state: Mapping[str, NDArray[Any]], cities: NDArray[Any], normalization: str) -> NDArray[Any]:
    """Embeddings of the cities of one instance, ``[cities, width]``."""
    rows = Linear(state, "encoder.init_embedding.init_embed")(cities)
    depth = WIDTH // HEADS
    for number in range(LAYERS):
        layer = f"encoder.net.layers.{number}"
        query, key, value = np.split(Linear(state, f"{layer}.0.module.Wqkv")(rows), 3, 1)
        heads = []
        for head in range(HEADS):
            own = slice(head * depth, (head + 1) * depth)
            heads.append(softmax(query[:, own] @ key[:, own].T / np.sqrt(depth)) @ value[:, own])
        rows = rows + Linear(state, f"{layer}.0.module.out_proj")(np.concatenate(heads, 1))
        rows = normalized(state, f"{layer}.1.normalizer", rows, normalization)
        hidden = np.maximum(Linear(state, f"{layer}.2.module.0")(rows), 0)
        rows = rows + Linear(state, f"{layer}.2.module.2")(hidden)
        rows = normalized(state, f"{layer}.3.normalizer", rows, normalization)
    return rows


def tours(
    state: Mapping[str, Tensor], cities: Tensor, normalization: str, *, graph_context: bool, starts: bool
) -> Tensor:
    """Greedy tours ``[instances, tours, cities]`` of the policy of a :func:`state_dict` (without ``other_names``): with
    ``starts`` one from each city (``multistart_greedy``), else one from the city that it chooses."""
    plain = {name.removeprefix("policy."): value.double().numpy() for name, value in state.items()}
    found = []
    for points in cities.double().numpy():
        rows = encode(plain, points, normalization)
        given: list[int | None] = [*range(len(points))] if starts else [None]
        found.append([tour(plain, rows, start, graph_context) for start in given])
    return torch.tensor(found)


def tour(state: Mapping[str, NDArray[Any]], rows: NDArray[Any], start: int | None, graph_context: bool) -> list[int]:
    keys, values, logit_keys = np.split(Linear(state, "decoder.project_node_embeddings")(rows), 3, 1)
    fixed = Linear(state, "decoder.project_fixed_context")(rows.mean(0)) if graph_context else 0.0
    context = Linear(state, "decoder.context_embedding.project_context")
    depth, visited = WIDTH // HEADS, [] if start is None else [start]
    while len(visited) < len(rows):
        if visited:
            query = context(np.concatenate([rows[visited[0]], rows[visited[-1]]])) + fixed
        else:
            query = context(state["decoder.context_embedding.W_placeholder"]) + fixed
        left = np.array([city not in visited for city in range(len(rows))])
        heads = []
        for head in range(HEADS):
            own = slice(head * depth, (head + 1) * depth)
            scores = np.where(left, keys[:, own] @ query[own] / np.sqrt(depth), -np.inf)
            heads.append(softmax(scores) @ values[:, own])
        glimpse = Linear(state, "decoder.pointer.project_out")(np.concatenate(heads))
        logits = 10 * np.tanh(logit_keys @ glimpse / np.sqrt(WIDTH))
        first, *others = np.sort(logits[left])[::-1]
        # Float32 must find the same one.
        assert not others or first - others[0] > 1e-5
        visited.append(int(np.where(left, logits, -np.inf).argmax()))
    return visited


class Module(nn.Module):
    """A module with attributes, for a policy that is pickled among the settings, as ``save_hyperparameters`` does."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


def policy_module(normalization: str, *, graph_context: bool, older: bool = False) -> Module:
    """The parts of a pickled ``AttentionModelPolicy`` that say what it is like."""
    norms: dict[str, Any] = {"batch": nn.BatchNorm1d(WIDTH), "instance": nn.InstanceNorm1d(WIDTH, affine=True)}
    normalizer = Module(normalizer=norms.get(normalization, normalization))
    layers = nn.Sequential(nn.Sequential(nn.Identity(), normalizer))
    attention = {"num_heads": HEADS, "mask_inner": True}
    decoder: dict[str, Any] = {"num_heads": HEADS, "use_graph_context": graph_context}
    encoder = Module(net=Module(layers=layers))
    if older:
        pointer = Module(**attention, tanh_clipping=10.0)
        return Module(encoder=encoder, decoder=Module(**decoder, logit_attention=pointer))
    decoder |= {"pointer": Module(**attention)}
    return Module(encoder=encoder, decoder=Module(**decoder), tanh_clipping=10.0, temperature=1.0, mask_logits=True)
