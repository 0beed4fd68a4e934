"""A frozen language model that reads soft tokens: the loss of a description, and descriptions by greedy decoding.

The model sees a prompt, which has the labels of each category and the template, then the soft tokens of a vector, and
continues with the description and the token that ends a text. A model that was trained to read vectors, whose tokenizer
has marks of slots, labels and edges, sees the labels and then the template with the soft tokens in it. The prompt is
the same for all vectors, so its keys and values are computed once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ethogram.errors import InvalidInput
from services.language.models import LanguageModel
from services.resource.schema import Schema
from services.resource.texts import EDGES, LABEL_END, OPTIONS, SLOTS, Slot, Soft, Template, edge, option, slot

BATCH = 256
"""Rows that are described at once, unless a job says otherwise."""
NUMBERS = (0.0, 9_876_543.21)
"""Numbers in the descriptions that a tokenizer is tried on."""


class Scores(NamedTuple):
    """How a batch of descriptions is predicted from the tokens before."""

    loss: Tensor
    """Mean cross-entropy per token, a scalar."""
    exact: Tensor
    """Whether every token has the highest probability, ``[batch]``: then greedy decoding writes the description."""


class Describer:
    """Reads soft tokens with one language model and the templates of one schema."""

    def __init__(
        self, language: LanguageModel, schema: Schema, *, checkpointing: bool = False, batch: int = BATCH
    ) -> None:
        """``checkpointing``: compute the model's activations again in the backward pass, to save memory; ``batch``:
        rows that are described, or scored, at once in evaluations.

        Raises :class:`InvalidInput` for a tokenizer whose tokens of a description are another text.
        """
        self.language, self.schema, self.checkpointing, self.batch = language, schema, checkpointing, batch
        self.model: Any = language.model
        self.embed: Any = self.model.get_input_embeddings()
        self.device: torch.device = self.embed.weight.device
        self.hidden: int = self.embed.weight.shape[1]
        self._end = language.end_of_text
        self.reads_slots = _reads_slots(language)
        """Whether the model was trained to read vectors."""
        marks = [LABEL_END, *map(option, range(OPTIONS)), *map(edge, range(EDGES))]
        self._hidden = {row[0] for row in language.tokenize(marks)} if self.reads_slots else set()
        """Tokens that no text shows."""
        if self.reads_slots:
            schema.check_labels(language.name)
        self._layouts: dict[tuple[str, int], list[tuple[str | Soft | Slot, Tensor]]] = {}
        self._prompts: dict[str, tuple[list[int], Any]] = {}
        self._layers = _layers(self.model) if checkpointing else []
        if checkpointing and not self._layers:
            text = f"{language.name} has no layers whose activations can be computed again; turn it off"
            raise InvalidInput.field("spec.training.gradient_checkpointing", text)
        for template in schema.templates:
            self._check_tokens(template)

    def tool_vectors(self) -> Tensor:
        """Mean token embedding of each tool's name, ``[tools, hidden]``, float32."""
        rows = self.language.tokenize(list(self.schema.tools))
        with torch.no_grad():
            means = [self.embed(torch.tensor(row, device=self.device)).float().mean(0) for row in rows]
        return torch.stack(means).cpu()

    def tokens(self, template: Template, values: Tensor) -> list[list[int]]:
        """Tokens of the description of each row of ``values``, with the token that ends a text."""
        rows = [template.parts(row, marked=self.reads_slots) for row in values.tolist()]
        # In parts, so that a value has the same tokens wherever it stands.
        texts = list(dict.fromkeys(text for row in rows for text, _ in row))
        known = dict(zip(texts, self.language.tokenize(texts), strict=True))
        return [[token for text, _ in row for token in known[text]] + [self._end] for row in rows]

    def _check_tokens(self, template: Template) -> None:
        """Raise :class:`InvalidInput` unless the tokens of descriptions are their text, with each of the labels."""
        most = max(2, *map(len, template.labels))
        rows = [
            [float(row % len(labels)) if labels else NUMBERS[row % 2] for labels in template.labels]
            for row in range(most)
        ]
        for row, tokens in zip(rows, self.tokens(template, torch.tensor(rows, dtype=torch.float64)), strict=True):
            text, wanted = self._text(tokens[:-1]), template.write(row)
            if text != wanted:
                says = f"its tokenizer turns the description {wanted!r} into {text!r}; take another model"
                raise InvalidInput.field(self.language.field, says)

    def _text(self, tokens: list[int]) -> str:
        tokens = [token for token in tokens if token not in self._hidden]
        text: str = self.language.tokenizer.decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def scores(self, soft: Tensor, values: Tensor, template: Template) -> Scores:
        """Loss and exactness of the descriptions of ``values`` ``[batch, fields]`` after ``soft``
        ``[batch, tokens, hidden]``."""
        rows = self.tokens(template, values)
        head = self._head(soft, template)
        self._check_length(template, head.shape[1], max(map(len, rows)))
        length = max(map(len, rows))
        tokens = torch.tensor([row + [self._end] * (length - len(row)) for row in rows], device=self.device)
        present = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows], device=self.device)
        inputs = torch.cat([head, self.embed(tokens[:, :-1])], 1)
        states = self._states(inputs, template)[:, head.shape[1] - 1 :]
        logits = self.model.get_output_embeddings()(states[present]).float()
        targets = tokens[present]
        right = torch.ones_like(present)
        right[present] = logits.argmax(-1) == targets
        return Scores(nn.functional.cross_entropy(logits, targets), right.all(1))

    def _head(self, soft: Tensor, template: Template) -> Tensor:
        """What stands between prompt and description, ``[batch, length, hidden]``."""
        soft = soft.to(self.embed.weight.dtype)
        if not self.reads_slots:
            return soft
        parts = []
        for cell, tokens in self._layout(template, soft.shape[1]):
            if isinstance(cell, Soft):
                before = soft[:, cell.index : cell.index + 1]
                parts.append(before)
                continue
            embedded = self.embed(tokens).expand(len(soft), -1, -1)
            parts.append(embedded * before if isinstance(cell, Slot) else embedded)
        return torch.cat(parts, 1)

    def _layout(self, template: Template, count: int) -> list[tuple[str | Soft | Slot, Tensor]]:
        """What stands between prompt and description, with ``count`` soft tokens, and its tokens."""
        if (template.name, count) not in self._layouts:
            cells = template.layout(count)
            texts = [slot(cell.index) if isinstance(cell, Slot) else cell for cell in cells]
            rows = iter(self.language.tokenize([text for text in texts if isinstance(text, str)]))
            known = [[] if isinstance(text, Soft) else next(rows) for text in texts]
            tokens = [torch.tensor(row, dtype=torch.long, device=self.device) for row in known]
            self._layouts[template.name, count] = list(zip(cells, tokens, strict=True))
        return self._layouts[template.name, count]

    def _states(self, inputs: Tensor, template: Template) -> Tensor:
        """Last hidden states of ``inputs`` ``[batch, length, hidden]`` after the prompt."""
        tokens, cache = self._prompt(template)
        if self.checkpointing and torch.is_grad_enabled():
            prompt = self.embed(torch.tensor([tokens], device=self.device)).expand(len(inputs), -1, -1)
            with _checkpointed(self._layers):
                outputs = self._backbone(inputs_embeds=torch.cat([prompt, inputs], 1), use_cache=False)
            states: Tensor = outputs.last_hidden_state[:, len(tokens) :]
            return states
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(len(inputs))
        return self._backbone(inputs_embeds=inputs, past_key_values=cache, use_cache=True).last_hidden_state  # type: ignore[no-any-return]

    @property
    def _backbone(self) -> Any:
        return self.model.base_model

    @torch.no_grad()
    def _prompt(self, template: Template) -> tuple[list[int], Any]:
        """Tokens of a template's prompt, and their keys and values."""
        if template.name not in self._prompts:
            from transformers import DynamicCache

            texts = template.legend if self.reads_slots else [template.prompt]
            tokens = [token for row in self.language.tokenize(texts) for token in row]
            cache = DynamicCache(config=self.model.config)
            self._backbone(torch.tensor([tokens], device=self.device), past_key_values=cache, use_cache=True)
            self._prompts[template.name] = tokens, cache
        return self._prompts[template.name]

    def _check_length(self, template: Template, head: int, description: int) -> None:
        """Raise :class:`InvalidInput` for more tokens than the model takes."""
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        length = len(self._prompt(template)[0]) + head + description
        if context is not None and length > context:
            text = (
                f"a description by {template.name} has {length} tokens with its prompt, and the model takes {context}"
            )
            raise InvalidInput.field(
                self.language.field, f"{text}; shorten the template or the labels, or take another model"
            )

    def check_longest(self, template: Template, tokens: int) -> None:
        """Raise :class:`InvalidInput` for a template of which a description behind ``tokens`` soft tokens may be longer
        than the model takes."""
        head = self._head(torch.zeros(1, tokens, self.hidden, device=self.device), template)
        self._check_length(template, head.shape[1], self._longest(template))

    def _longest(self, template: Template) -> int:
        """Tokens that are written at most."""
        return 8 + sum(len(self.language.tokenize([text])[0]) for text, _ in template.longest(marked=self.reads_slots))

    @torch.no_grad()
    def write(self, soft: Tensor, template: Template) -> list[str]:
        """The description of each row of ``soft`` ``[batch, tokens, hidden]`` by greedy decoding, up to the token that
        ends a text, or as long as no description of the template is."""
        longest = self._longest(template)
        inputs = self._head(soft, template)
        self._check_length(template, inputs.shape[1], longest)
        _, cache = self._prompt(template)
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(len(inputs))
        written: list[Tensor] = []
        ended = torch.zeros(len(inputs), dtype=torch.bool, device=self.device)
        while len(written) < longest and not bool(ended.all()):
            states = self._backbone(inputs_embeds=inputs, past_key_values=cache, use_cache=True).last_hidden_state[
                :, -1
            ]
            token = self.model.get_output_embeddings()(states).argmax(-1).masked_fill(ended, self._end)
            ended = ended | (token == self._end)
            written.append(token)
            inputs = self.embed(token).unsqueeze(1)
        rows = torch.stack(written, 1).tolist() if written else [[] for _ in soft]
        texts = [row[: row.index(self._end)] if self._end in row else row for row in rows]
        return [self._text(row) for row in texts]


def _reads_slots(language: LanguageModel) -> bool:
    """Whether a model was trained to read vectors. Raises :class:`InvalidInput` of one that was by another version."""
    tokens = language.tokenize([slot(SLOTS - 1), option(OPTIONS - 1), edge(EDGES - 1)])
    known = [len(row) == 1 for row in tokens]
    if any(known) and not all(known):
        text = f"{language.name} was trained to read vectors by another version; train language model and encoder again"
        raise InvalidInput.field(language.field, text)
    return all(known)


def _layers(model: nn.Module) -> list[nn.Module]:
    """Layers of a language model that allow for checkpointing."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def _checkpointed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Within, ``layers`` keep no activations: the backward pass computes them again. The model's own way to this takes
    training mode, and with it dropout."""
    forwards = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer, forward in zip(layers, forwards, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward
