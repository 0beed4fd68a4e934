"""The encoder: a configuration becomes soft tokens in the embedding space of a frozen language model."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from ethogram.specs.resource import EncoderSpec
from services.resource.code import CONTENTS, SoftTokenCode
from services.resource.completion import Completion
from services.resource.numbers import CHARACTERS, Features
from services.resource.schema import Schema
from services.resource.texts import OPTIONS, Template, slots


class ResourceEncoder(nn.Module):
    """Stream A, the tool: its name in the model's frozen token embeddings, and an indicator, since names of the same
    words have the same mean; and stream B, an MLP of the numbers, fused by self-attention over both. What is unknown is
    estimated first."""

    tool_vectors: Tensor

    def __init__(
        self, spec: EncoderSpec, schema: Schema, values: Tensor, tool_vectors: Tensor, generator: torch.Generator
    ) -> None:
        """``values``: of the training rows, ``[rows, fields]``; ``tool_vectors``: mean token embedding of each tool's
        name, ``[tools, hidden]``."""
        super().__init__()
        self.spec, self.schema = spec, schema
        hidden = tool_vectors.shape[1]
        self.completion = Completion(schema.dimensions, values, spec.hidden_dim, generator)
        self.features = Features(spec.numbers, schema.dimensions[1:], values[:, 1:])
        self.register_buffer("tool_vectors", tool_vectors.clone())
        width, out = self.features.width, spec.tokens * hidden
        # A linear map of digits holds for numbers whose digits never stood together in the table.
        self.direct = nn.Linear(width, out)
        self.mlp = None
        if spec.numbers != "xval":
            self.mlp = nn.Sequential(nn.Linear(width, spec.hidden_dim), nn.GELU(), nn.Linear(spec.hidden_dim, out))
        self.tool = nn.Linear(hidden + len(tool_vectors), out)
        self.attention = (
            nn.MultiheadAttention(hidden, spec.heads, batch_first=True) if spec.fusion == "attention" else None
        )
        self.norm = nn.LayerNorm(hidden)
        self.gain = nn.Parameter(tool_vectors.std().clamp_min(1e-3).clone())
        for name, parameter in self.named_parameters():
            if name.startswith("completion"):
                continue
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=generator)
            elif parameter.ndim == 1 and parameter is not self.norm.weight:
                nn.init.zeros_(parameter)

    def forward(self, values: Tensor, unknown: Tensor) -> Tensor:
        """Soft tokens ``[batch, tokens, hidden]`` of vectors ``[batch, fields]``, float64 on the CPU; ``unknown``:
        which fields are not known, of the same shape; the tool always is."""
        device = self.gain.device
        values = self.completion(values, unknown)
        features = self.features(values[:, 1:], unknown[:, 1:]).to(device)
        numbers = self.direct(features)
        if self.mlp is not None:
            numbers = numbers + self.mlp(features)
        numbers = torch.unflatten(numbers, 1, (self.spec.tokens, -1))
        tools = values[:, 0].long().to(device)
        indicator = nn.functional.one_hot(tools, len(self.tool_vectors)).to(self.tool_vectors)
        tool = self.tool(torch.cat([self.tool_vectors[tools], indicator], 1)).unflatten(1, (self.spec.tokens, -1))
        mixed = numbers + tool
        if self.attention is not None:
            streams = torch.cat([tool, numbers], 1)
            mixed = mixed + self.attention(numbers, streams, streams, need_weights=False)[0]
        soft: Tensor = self.norm(mixed) * self.gain
        return soft

    @torch.no_grad()
    def begin_as(self, code: SoftTokenCode, template: Template) -> None:
        """Take the weights with which soft tokens are those of ``code``, as far as the features say what is written: of
        numbers those of ``digits`` do, of categories all."""
        vectors = code.vectors()
        # What a content changes where nothing was.
        changes, first_slots = vectors - vectors[:, :1], template.first_slots(self.spec.tokens)
        parts = [
            self.tool,
            *([self.mlp[-1]] if self.mlp else []),
            *([self.attention.out_proj] if self.attention else []),
        ]
        for parameter in itertools.chain(*(part.parameters() for part in parts)):
            parameter.zero_()
        nothing = [vectors[:count, 0].sum(0) + code.base for count in slots(template, self.spec.tokens)]
        self.direct.bias.copy_(torch.cat(nothing))
        tool, direct = (torch.unflatten(layer.weight, 0, (self.spec.tokens, -1)) for layer in (self.tool, self.direct))
        columns = [slice(tool.shape[2] - len(self.tool_vectors), None), *self.features.columns]
        for index, ((token, slot), column) in enumerate(zip(first_slots, columns, strict=True)):
            weight = direct if index else tool
            if index:
                # What is unknown is nothing, until training says otherwise.
                weight[:, :, column.stop] = 0.0
            if count := len(template.labels[index]):
                first = len(CONTENTS) - OPTIONS + template.options[index]
                found = changes[slot, first : first + count]
            elif self.spec.numbers == "digits":
                written = changes[slot : slot + template.places[index], 1 : 1 + CHARACTERS]
                found = written.flatten(0, 1)
            else:
                continue
            weight[:, :, column] = 0.0
            weight[token, :, column][:, -len(found) :] = found.T
        self.gain.fill_(1.0)
