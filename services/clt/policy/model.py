"""The attention model for the travelling salesman problem (Kool et al. 2019, arXiv 1803.08475).

Cities are points of the unit square, ``[batch, nodes, 2]``. Each layer of the encoder is attention and an MLP, each
with a residual connection and normalisation after it. The decoder builds a tour city by city: a query of the
tour's first and last city attends to the cities that are left, and the result, the glimpse, is compared with each.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ethogram.errors import InvalidInput
from ethogram.specs.clt import PolicyModelSpec
from services.runtime.reading import reading
from services.runtime.tensors import write_tensors

FORMAT = 1
CONFIG, WEIGHTS = "policy.json", "policy.safetensors"


class Attention(nn.Module):
    """Multi-head self-attention of all cities."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, stream: Tensor) -> Tensor:
        """``[batch, nodes, width]`` to the same."""
        batch, nodes, width = stream.shape
        heads = self.qkv(stream).view(batch, nodes, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        # In bfloat16 the gradient of so small an attention takes ten times as long on a CPU.
        with torch.autocast(stream.device.type, enabled=False):
            mixed = F.scaled_dot_product_attention(query.float(), key.float(), value.float())
        attended: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, nodes, width))
        return attended


class BatchNorm(nn.BatchNorm1d):
    """Normalisation of each channel over all cities of all instances."""

    def forward(self, stream: Tensor) -> Tensor:
        """``[batch, nodes, width]`` to the same."""
        return super().forward(stream.flatten(0, 1)).view_as(stream)


class InstanceNorm(nn.InstanceNorm1d):
    """Normalisation of each channel over the cities of an instance."""

    def forward(self, stream: Tensor) -> Tensor:
        """``[batch, nodes, width]`` to the same."""
        return super().forward(stream.transpose(1, 2)).transpose(1, 2)


class LayerNorm(nn.Module):
    """Normalisation over all cities and channels of an instance, without parameters, as in rl4co."""

    def forward(self, stream: Tensor) -> Tensor:
        """``[batch, nodes, width]`` to the same."""
        variance, mean = torch.var_mean(stream, (1, 2), keepdim=True)
        return (stream - mean) / (variance + 1e-5).sqrt()


def norm(spec: PolicyModelSpec) -> nn.Module:
    """The normalisation that ``spec`` names."""
    if spec.normalization == "layer":
        return LayerNorm()
    return BatchNorm(spec.hidden_dim) if spec.normalization == "batch" else InstanceNorm(spec.hidden_dim, affine=True)


class Layer(nn.Module):
    """Attention and an MLP, each with a residual connection and normalisation after it."""

    def __init__(self, spec: PolicyModelSpec) -> None:
        super().__init__()
        width = spec.hidden_dim
        self.attention = Attention(width, spec.heads)
        self.norm1 = norm(spec)
        self.mlp = nn.Sequential(nn.Linear(width, spec.feed_forward), nn.ReLU(), nn.Linear(spec.feed_forward, width))
        self.norm2 = norm(spec)

    def forward(self, stream: Tensor) -> Tensor:
        """``[batch, nodes, width]`` to the same."""
        stream = self.norm1(stream + self.attention(stream))
        stream = self.norm2(stream + self.mlp(stream))
        return stream


class PolicyEncoder(nn.Module):
    """Cities to their embeddings."""

    def __init__(self, spec: PolicyModelSpec) -> None:
        super().__init__()
        self.embed = nn.Linear(2, spec.hidden_dim)
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec.layers))

    def forward(self, cities: Tensor) -> Tensor:
        """``[batch, nodes, 2]`` to ``[batch, nodes, width]``."""
        stream: Tensor = self.embed(cities)
        for layer in self.layers:
            stream = layer(stream)
        return stream


class Memory(NamedTuple):
    """What the decoder computes once per instance."""

    first: Tensor
    """Query term of each city as the tour's first, ``[batch, nodes, width]``."""
    last: Tensor
    """Query term of each city as the tour's last, same shape."""
    fixed: Tensor
    """Query term of every step, ``[batch, 1, width]``."""
    start: Tensor
    """Query term of an empty tour, in place of first and last, ``[width]``."""
    key: Tensor
    """``[batch, heads, nodes, width / heads]``."""
    value: Tensor
    """Same shape as ``key``."""
    compare: Tensor
    """Keys that the glimpse is compared with, ``[batch, nodes, width]``."""


class PolicyDecoder(nn.Module):
    """Logits of the next city of a tour."""

    def __init__(self, spec: PolicyModelSpec) -> None:
        super().__init__()
        width = spec.hidden_dim
        self.heads, self.clipping, self.graph_context = spec.heads, spec.clipping, spec.graph_context
        self.placeholder = nn.Parameter(torch.empty(2 * width).uniform_(-1, 1))
        self.context = nn.Linear(2 * width, width, bias=False)
        self.project = nn.Linear(width, 3 * width, bias=False)
        self.fixed = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def memory(self, stream: Tensor) -> Memory:
        """Memory of the encoder's output ``[batch, nodes, width]``."""
        batch, nodes, width = stream.shape
        key, value, compare = self.project(stream).chunk(3, -1)
        first, last = self.context.weight.chunk(2, 1)
        mean = self.fixed(stream.mean(1, keepdim=True)) if self.graph_context else stream.new_zeros(batch, 1, width)
        key, value = (vectors.view(batch, nodes, self.heads, -1).transpose(1, 2) for vectors in (key, value))
        return Memory(stream @ first.T, stream @ last.T, mean, self.context(self.placeholder), key, value, compare)

    def logits(self, memory: Memory, query: Tensor, left: Tensor) -> Tensor:
        """Logits of the next city, ``[batch, queries, nodes]``. ``query``: ``[batch, queries, width]``; ``left``: the
        cities that are not yet in the tour, bool ``[batch, queries, nodes]``."""
        batch, queries, width = query.shape
        heads = query.view(batch, queries, self.heads, -1).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(heads, memory.key, memory.value, attn_mask=left.unsqueeze(1))
        glimpse = self.out(mixed.transpose(1, 2).reshape(batch, queries, width))
        compatibility = glimpse @ memory.compare.transpose(1, 2) / math.sqrt(width)
        return (self.clipping * torch.tanh(compatibility.float())).masked_fill(~left, float("-inf"))


class AttentionPolicy(nn.Module):
    """A policy trained on instances of ``nodes`` cities; it takes any other number too."""

    def __init__(self, spec: PolicyModelSpec, nodes: int) -> None:
        super().__init__()
        self.spec, self.nodes = spec, nodes
        self.chooses_start = False
        """Whether it was trained to choose the first city too; otherwise that is given."""
        self.encoder, self.decoder = PolicyEncoder(spec), PolicyDecoder(spec)

    @property
    def digest(self) -> str:
        """SHA-256 of architecture and weights."""
        # As of a version that knew no other normalisation, so that its stores stay those of its policies.
        spec = self.spec.model_dump_json(exclude={"normalization"} if self.spec.normalization == "batch" else None)
        digest = hashlib.sha256(f"{spec}{self.chooses_start}".encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: Path, about: Mapping[str, object] | None = None) -> None:
        """Write ``policy.json`` and ``policy.safetensors``; ``about`` is kept in the former."""
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / WEIGHTS, self.state_dict())
        config = {
            "format": FORMAT,
            "model": self.spec.model_dump(mode="json"),
            "nodes": self.nodes,
            "chooses_start": self.chooses_start,
            "about": dict(about or {}),
        }
        (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path | str, device: str = "cpu") -> AttentionPolicy:
        """Read what :meth:`save` wrote, ready for evaluation. Raises :class:`InvalidInput` where it cannot."""
        folder = Path(folder)
        with reading(folder, CONFIG, "policy", "policy") as path:
            config = json.loads(path.read_text(encoding="utf-8"))
            if config["format"] != FORMAT:
                raise InvalidInput.field(
                    "policy", f"{path} has format {config['format']!r}; this version reads {FORMAT}"
                )
            policy = cls(PolicyModelSpec.model_validate(config["model"]), int(config["nodes"]))
            policy.load_state_dict(load_file(folder / WEIGHTS))
            policy.chooses_start = bool(config["chooses_start"])
        return policy.to(device).eval().requires_grad_(False)
