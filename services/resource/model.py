"""The encoder: a configuration becomes soft tokens in the embedding space of a frozen language model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ethogram.specs.resource import EncoderSpec
from services.resource.numbers import Features
from services.resource.schema import Schema


class ResourceEncoder(nn.Module):
    """Stream A, the tool: its name in the model's frozen token embeddings, and an indicator, since names of the same
    words have the same mean; and stream B, an MLP of the numbers, fused by self-attention over both."""

    tool_vectors: Tensor

    def __init__(
        self, spec: EncoderSpec, schema: Schema, values: Tensor, tool_vectors: Tensor, generator: torch.Generator
    ) -> None:
        """``values``: of the training rows, ``[rows, fields]``; ``tool_vectors``: mean token embedding of each tool's
        name, ``[tools, hidden]``."""
        super().__init__()
        self.spec, self.schema = spec, schema
        hidden = tool_vectors.shape[1]
        self.features = Features(spec.numbers, schema.dimensions[1:], values[:, 1:])
        self.register_buffer("tool_vectors", tool_vectors.clone())
        width, out = self.features.width, spec.tokens * hidden
        # What is linear in the digits holds for digits that were never together.
        self.direct = nn.Linear(width, out)
        self.mlp = None
        if spec.numbers != "xval":
            self.mlp = nn.Sequential(nn.Linear(width, spec.hidden_dim), nn.GELU(), nn.Linear(spec.hidden_dim, out))
        self.tool = nn.Linear(hidden + len(tool_vectors), hidden)
        self.attention = (
            nn.MultiheadAttention(hidden, spec.heads, batch_first=True) if spec.fusion == "attention" else None
        )
        self.norm = nn.LayerNorm(hidden)
        self.gain = nn.Parameter(tool_vectors.std().clamp_min(1e-3).clone())
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=generator)
            elif parameter.ndim == 1 and parameter is not self.norm.weight:
                nn.init.zeros_(parameter)

    def forward(self, values: Tensor, unknown: Tensor) -> Tensor:
        """Soft tokens ``[batch, tokens, hidden]`` of vectors ``[batch, fields]``, float64 on the CPU; ``unknown``:
        which fields are not known, of the same shape; the tool always is."""
        device = self.gain.device
        features = self.features(values[:, 1:], unknown[:, 1:]).to(device)
        numbers = self.direct(features)
        if self.mlp is not None:
            numbers = numbers + self.mlp(features)
        numbers = torch.unflatten(numbers, 1, (self.spec.tokens, -1))
        tools = values[:, 0].long().to(device)
        indicator = nn.functional.one_hot(tools, len(self.tool_vectors)).to(self.tool_vectors)
        tool = self.tool(torch.cat([self.tool_vectors[tools], indicator], 1)).unsqueeze(1)
        if self.attention is None:
            mixed = numbers + tool
        else:
            streams = torch.cat([tool, numbers], 1)
            mixed = (streams + self.attention(streams, streams, streams, need_weights=False)[0])[:, 1:]
        soft: Tensor = self.norm(mixed) * self.gain
        return soft
