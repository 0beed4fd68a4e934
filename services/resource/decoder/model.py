"""The hierarchical decoder: a text encoder, a head for the tool, and a head for the configuration of that tool."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ethogram.errors import InvalidInput
from ethogram.specs.resource import DecoderModelSpec

PAD, UNKNOWN = 0, 1
"""Tokens of nothing, and of a word that no generated text has."""
LONGEST = 512
"""Words, digits and marks of a text at most."""


def split(text: str) -> list[str]:
    """Words in small letters, digits and marks of a text."""
    return re.findall(r"[^\W\d]+|\d|[^\w\s]", text.lower())


class Choice(NamedTuple):
    """Scores of a batch of texts."""

    tools: Tensor
    """Logits ``[batch, tools]``."""
    configurations: Tensor
    """Logits ``[batch, configurations]``, of all tools."""


class Decision(NamedTuple):
    """What is chosen for a batch of texts, each ``[batch]``."""

    tools: Tensor
    """Index of the tool."""
    configurations: Tensor
    """Index of the configuration, which is always one of the tool's."""
    tool_probability: Tensor
    """Of the tool among all tools."""
    probability: Tensor
    """Of the configuration among the tool's, by the masked softmax."""


class HierarchicalDecoder(nn.Module):
    """From the text of a task to a tool and one of its configurations."""

    mask: Tensor

    def __init__(
        self,
        spec: DecoderModelSpec,
        weights: Tensor,
        tools: Tensor,
        words: Sequence[str],
        generator: torch.Generator,
    ) -> None:
        """``weights``: the vectors of the export, ``[configurations, size]``; ``tools``: index of the tool of each
        configuration, ``[configurations]``; ``words``: those that it knows."""
        super().__init__()
        self.spec, self.words = spec, tuple(words)
        self._tokens = {word: token for token, word in enumerate(self.words, UNKNOWN + 1)}
        width, (count, size) = spec.hidden_dim, weights.shape
        self.embedding = nn.Embedding(UNKNOWN + 1 + len(self.words), width, padding_idx=PAD)
        layer = nn.TransformerEncoderLayer(
            width, spec.heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, spec.layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.tool_head = nn.Linear(width, int(tools.max()) + 1)
        self.query = nn.Linear(width, size)
        self.config_head = nn.Linear(size, count)
        self.position = nn.Parameter(torch.zeros(LONGEST, width))
        self.register_buffer("mask", nn.functional.one_hot(tools).bool().T.contiguous())
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        if spec.initialization == "export":
            with torch.no_grad():
                centered = weights - weights.mean(0)
                # As large as random rows are.
                self.config_head.weight.copy_(centered / centered.norm(dim=1).mean())

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Words, digits and marks of each text, ``[batch, length]``, padded with :data:`PAD`. Raises
        :class:`InvalidInput` for a text of none, or of more than :data:`LONGEST`."""
        rows = [[self._tokens.get(word, UNKNOWN) for word in split(text)] for text in texts]
        for number, row in enumerate(rows):
            if not row:
                raise InvalidInput.field(f"texts.{number}", "has no words")
            if len(row) > LONGEST:
                text = f"has {len(row)} words, digits and marks; at most {LONGEST} are read"
                raise InvalidInput.field(f"texts.{number}", text)
        length = max((len(row) for row in rows), default=1)
        return torch.tensor([row + [PAD] * (length - len(row)) for row in rows])

    def forward(self, tokens: Tensor) -> Choice:
        """Scores of ``tokens`` ``[batch, length]``."""
        padding = tokens == PAD
        states = self.embedding(tokens) + self.position[: tokens.shape[1]]
        states = self.norm(self.encoder(states, src_key_padding_mask=padding))
        kept = (~padding).unsqueeze(2).float()
        pooled = (states * kept).sum(1) / kept.sum(1).clamp_min(1)
        return Choice(self.tool_head(pooled), self.config_head(self.query(pooled)))

    def choose(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Index of the tool and of the configuration for each text, as :meth:`decide`."""
        decision = self.decide(texts)
        return decision.tools, decision.configurations

    @torch.no_grad()
    def decide(self, texts: Sequence[str]) -> Decision:
        """The most probable tool for each text, and the most probable of its configurations."""
        choice = self(self.tokenize(texts).to(self.config_head.weight.device))
        tools = choice.tools.argmax(1)
        scores = choice.configurations.masked_fill(~self.mask[tools], -torch.inf)
        configurations = scores.argmax(1)
        pairs = (choice.tools, tools), (scores, configurations)
        shares = [logits.softmax(1).gather(1, chosen.unsqueeze(1)).squeeze(1) for logits, chosen in pairs]
        return Decision(*(part.cpu() for part in (tools, configurations, *shares)))
