"""The default language model: a small one that learns to read soft tokens, from random schemas alone.

It learns in two phases. First it copies random tokens, with more and more to leave out and to look up, which gives it
the attention that copying takes; beside it, it reads the slots of soft tokens. Then it writes descriptions of rows of
random schemas. The soft tokens are those of an encoder that is trained with it and thrown away, so that no table, and
no encoder, is special to it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ethogram.specs.resource import ReaderSizeSpec, ReaderSpec
from services.resource.corpus import RandomSchema, random_schema
from services.resource.texts import OPTIONS, READ, SLOTS, WRITE, Slot, Soft, option, slot, slots
from services.runtime import checkpoints
from services.runtime.run import Run
from services.runtime.seeds import generator
from services.runtime.trained import trained_once
from services.runtime.training import Optimization, Progress, Trainer, cosine, fit

FORMAT = 1
PAD, END = "<pad>", "<end>"
_TEXT_MARKS = [PAD, END, READ, WRITE]
OPTION_MARKS = [option(index) for index in range(OPTIONS)]
SLOT_MARKS = [slot(index) for index in range(SLOTS)]
CONTENTS = [PAD, *"0123456789.", *OPTION_MARKS]
"""What a slot may hold; the first one: nothing."""
_CONTENT = {"": 0} | {text: index for index, text in enumerate(CONTENTS)}
_CORPUS = 3000
"""Random schemas whose texts the tokenizer is made of."""
_COPIED = 64
"""Rows of a step of copying."""
_COPIES_BELOW, _LEVELS, _DECAY, _JUMP = 1.0, 3, 0.97, 2.0
"""Mean loss below which copying gets harder, how often it does, decay of the mean, and what is added to it then."""
_MANY_LABELS = 0.25
"""Share of steps with long lists of labels."""
_TEMPLATE_WEIGHT = 0.3
"""Weight of the tokens of the template beside those of values."""
_BARE = 0.3
"""Share of steps with templates that are hardly more than the values."""
_CONTEXT_AFTER = 2
_LABEL_AFTER = 2
_READ_AFTER = 1
"""Layers after which the slots are read."""


def make_tokenizer(vocabulary: int, seed: int) -> Any:
    """A tokenizer of ``transformers``: byte-pair pieces of words, digits one by one, and the marks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(seed)
    texts = []
    for _ in range(_CORPUS):
        schema = random_schema(rng, rng.randint(2, 8), 10, bare=False)
        texts += [*schema.template.legend[1::2], schema.template.write(schema.row(rng))]
    tokenizer = Tokenizer(models.BPE())
    digits, pieces = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pieces])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[*_TEXT_MARKS, *OPTION_MARKS, *SLOT_MARKS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)  # type: ignore[no-untyped-call]


def make_model(size: ReaderSizeSpec, vocabulary: int, seed: int) -> Any:
    """A ``Qwen2ForCausalLM`` with random weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=size.hidden_dim,
        intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    # transformers draws weights from the global generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        return Qwen2ForCausalLM(config)


class ThrowawayEncoder(nn.Module):
    """Soft tokens of rows of any schema: the sum of a code of the content of each slot, bound to the slot."""

    WIDTH = 8

    def __init__(self, hidden: int, generator: torch.Generator) -> None:
        super().__init__()

        def normal(*shape: int, scale: float) -> nn.Parameter:
            return nn.Parameter(scale * torch.randn(*shape, generator=generator))

        self.content = normal(len(CONTENTS), self.WIDTH, scale=1.0)
        self.bind = normal(SLOTS, self.WIDTH, hidden, scale=self.WIDTH**-0.5)
        self.base = normal(hidden, scale=1.0)

    def forward(self, contents: Tensor, slots: Sequence[int]) -> Tensor:
        """Soft tokens ``[rows, tokens, hidden]``. ``contents``: index of the content of each slot, ``[rows, sum of
        slots]``; ``slots``: of each soft token."""
        parts = []
        for part, count in zip(torch.split(self.content[contents], list(slots), 1), slots, strict=True):
            code = torch.einsum("rsw,swh->rh", part, self.bind[:count])
            parts.append(nn.functional.layer_norm(code + self.base, code.shape[1:]))
        return torch.stack(parts, 1)


class Item(NamedTuple):
    """A random schema with rows, tokenized."""

    schema: RandomSchema
    prompt: list[int]
    head: list[int | Soft | Slot]
    """Tokens between prompt and description."""
    descriptions: list[list[int]]
    """With the token that ends a text."""
    weights: list[list[float]]
    """Of each token of the descriptions."""
    contents: list[list[list[int]]]
    """Index of the content of each slot of each field of each row."""


class ItemScores(NamedTuple):
    """How the descriptions of some items are predicted."""

    losses: Tensor
    """Cross-entropy of each token, ``[tokens]``."""
    weights: Tensor
    """Of each token, ``[tokens]``."""
    exact: Tensor
    """Whether all tokens of a description are right, ``[items * rows]``."""
    slots: Tensor
    """Mean cross-entropy of the contents of slots, a scalar."""
    slots_right: Tensor
    """Share of the slots that are read right, a scalar."""


class LanguageModelTrainer(Trainer):
    """Trains the default language model together with a :class:`ThrowawayEncoder`."""

    spec: ReaderSpec
    monitor = "validation_loss"

    def __init__(self, spec: ReaderSpec, device: str = "cpu") -> None:
        self.spec, self.device = spec, device
        self.step, self.progress = 0, Progress()
        training = spec.training
        self.steps, self.validate_every = training.copying + training.steps, training.validate_every
        self.tokenizer = make_tokenizer(spec.model.vocabulary, spec.seed)
        self.model = make_model(spec.model, len(self.tokenizer), spec.seed).to(device)
        self.encoder = ThrowawayEncoder(spec.model.hidden_dim, generator(spec.seed, "init")).to(device)
        self.context = nn.Linear(spec.model.hidden_dim, 48).to(device)
        self.label = nn.Linear(spec.model.hidden_dim, 24).to(device)
        self.codes = torch.randint(2, (len(self.tokenizer), 16), generator=generator(spec.seed, "codes")) * 2.0 - 1
        rising = cosine(training.steps)
        matrices = [weight for weight in self.model.model.layers.parameters() if weight.ndim == 2]
        inner = {*matrices}
        rest = [
            weight
            for part in (self.model, self.encoder, self.context, self.label)
            for weight in part.parameters()
            if weight not in inner
        ]
        self.optimization = Optimization(
            [{"params": rest}],
            training,
            lambda step: 1.0 if step < training.copying else rising(step - training.copying),
            weight_decay=0.01,
            matrices=matrices,
        )
        self.ids = torch.tensor(self.tokenizer.convert_tokens_to_ids(CONTENTS))
        """Token of each content of a slot."""
        self.level = torch.tensor(0)
        """How hard copying is, by now."""
        self._slot = self.tokenizer.convert_tokens_to_ids(SLOT_MARKS[0])
        self.mean = torch.tensor(6.0)
        """Running mean of the loss of copying."""

    @property
    def embedding(self) -> nn.Module:
        embedding: nn.Module = self.model.get_input_embeddings()
        return embedding

    def advance(self) -> dict[str, Tensor]:
        self.model.train()
        for optimizer in self.optimization.optimizers:
            optimizer.zero_grad()
        copies = self.step < self.spec.training.copying
        if copies:
            metrics = {**self._copying(), "slots": self._reading()}
            metrics["loss"] = sum(metrics.values())
        else:
            metrics = self._describing()
        metrics["loss"].backward()  # type: ignore[no-untyped-call]
        metrics = {name: value.detach() for name, value in metrics.items()}
        self.optimization.update(self.step, metrics)
        self.step += 1
        if copies:
            self.mean = _DECAY * self.mean + (1 - _DECAY) * metrics["copying"].cpu()
            if self.mean < _COPIES_BELOW and self.level < _LEVELS:
                self.level, self.mean = self.level + 1, self.mean + _JUMP
        return metrics

    def _copying(self) -> dict[str, Tensor]:
        """Loss of the second of two texts of random tokens, in the form of descriptions.

        From level 1 on the first text has gaps: soft tokens, which the second leaves out, and values behind them, with
        blanks; from level 2 on some values are marks of labels, which the second has the label for, and all gaps of a
        row may follow the same token; from level 3 on values are in slots of the soft tokens.
        """
        rng = random.Random(f"{self.spec.seed} copy {self.step}")
        draws = generator(self.spec.seed, "copy", self.step)
        level = int(self.level)
        _, end, read, write = torch.arange(len(_TEXT_MARKS)).unsqueeze(1).expand(-1, _COPIED).unsqueeze(2)
        size, length = rng.randint(0, 8) if level > 1 else 0, rng.randint(1, 3)
        chosen = torch.rand(_COPIED, OPTIONS, generator=draws).argsort(1)[:, :size]
        labels = self._words(size * length, draws).reshape(_COPIED, size, length)
        legend = torch.cat([(chosen + len(_TEXT_MARKS)).unsqueeze(2), labels], 2).flatten(1)
        separator = self._words(1 if level > 1 and rng.random() < 0.5 else 0, draws)
        shown, written = [legend, read], list[Tensor]()
        values: list[Tensor] = []
        counts: list[int] = []
        places: list[tuple[int, int]] = []
        rows = torch.arange(_COPIED)
        # Of each column of both texts: the two tokens of the text before it, and the contents of slots since.
        t1, t2, since = read[:, 0], read[:, 0], 0
        context_shown: list[tuple[Tensor, Tensor, int] | None] = [None] * (legend.shape[1] + 1)
        context_written: list[tuple[Tensor, Tensor, int] | None] = []
        looked_up: list[tuple[int, Tensor]] = []
        for _ in range(rng.randint(2, 8)):
            literal = torch.cat([self._words(rng.randint(1, 4), draws), separator], 1)
            shown.append(literal)
            written.append(literal)
            for token in literal.T:
                context_shown.append((t1, t2, since))
                context_written.append((t1, t2, since))
                t1, t2, since = token, t1, 0
            if not level:
                continue
            if size and rng.random() < 0.4:
                picked = torch.randint(size, (_COPIED,), generator=draws)
                value = (chosen[rows, picked] + len(CONTENTS) - OPTIONS).unsqueeze(1)
                written.append(labels[rows, picked])
                full = 1
                looked_up.append((sum(part.shape[1] for part in shown) + 1, labels[rows, picked, 0]))
                context_written += [(t1, t2, 0)] + [None] * (length - 1)
            else:
                value = torch.randint(1, len(CONTENTS) - OPTIONS, (_COPIED, rng.randint(1, 6)), generator=draws)
                written.append(self.ids[value])
                full = value.shape[1]
                value = nn.functional.pad(value, (0, rng.randint(0, 2)))
                context_written += [(t1, t2, place) for place in range(full)]
            context_shown += [None] + [(t1, t2, place) for place in range(full)] + [None] * (value.shape[1] - full)
            since = full
            if not counts or counts[-1] + value.shape[1] > SLOTS or rng.random() < 0.2:
                counts.append(0)
            places.append((sum(part.shape[1] for part in shown), len(counts) - 1))
            marks = self._slot + counts[-1] + torch.arange(value.shape[1]).expand(_COPIED, -1)
            counts[-1] += value.shape[1]
            shown += [read, marks if level > 2 else self.ids[value]]
            values.append(value)
        context_shown.append((t1, t2, since))
        context_written.append((t1, t2, since))
        before, after = torch.cat([*shown, write], 1), torch.cat([*written, end], 1)
        embedded = self.embedding(torch.cat([before, after[:, :-1]], 1).to(self.device))
        if places:
            soft = self.encoder(torch.cat(values, 1).to(self.device), counts)
            indices, numbers = (torch.tensor(row, device=self.device) for row in zip(*places, strict=True))
            embedded = embedded.index_copy(1, indices, soft[:, numbers])
        outputs = self.model.model(inputs_embeds=embedded, output_hidden_states=True)
        states = outputs.last_hidden_state[:, before.shape[1] - 1 :]
        copying = nn.functional.cross_entropy(self.model.lm_head(states).flatten(0, 1), after.to(self.device).flatten())
        # What is written at a column is predicted one before it.
        start = before.shape[1] - 1
        cells = [(place, cell) for place, cell in enumerate(context_shown) if cell]
        cells += [(start + place, cell) for place, cell in enumerate(context_written) if cell]
        contexts = torch.stack([torch.stack([a, b, torch.full_like(a, c)], 1) for _, (a, b, c) in cells], 1)
        early = outputs.hidden_states[_CONTEXT_AFTER][:, [place for place, _ in cells]]
        context = self._context_loss(early, contexts)
        metrics = {"copying": copying, "context": context}
        if looked_up:
            columns, first = zip(*looked_up, strict=True)
            early = outputs.hidden_states[_LABEL_AFTER][:, list(columns)]
            logits = self.model.lm_head(self.model.model.norm(early))
            metrics["labels"] = nn.functional.cross_entropy(logits.flatten(0, 1), torch.stack(first, 1).flatten())
        if size:
            early = outputs.hidden_states[_READ_AFTER][:, 1 : size * (length + 1) : length + 1]
            logits = self.model.lm_head(self.model.model.norm(early))
            metrics["marks"] = nn.functional.cross_entropy(logits.flatten(0, 1), (chosen + len(_TEXT_MARKS)).flatten())
        return metrics

    def _reading(self) -> Tensor:
        """Loss of the contents of slots behind soft tokens, with nothing to describe."""
        draws = generator(self.spec.seed, "read", self.step)
        number, count = (int(torch.randint(1, most, (), generator=draws)) for most in (3, SLOTS + 1))
        shape = (_COPIED, number * count)
        characters = torch.randint(len(CONTENTS) - OPTIONS, shape, generator=draws)
        labels = torch.randint(len(CONTENTS), shape, generator=draws)
        contents = torch.where(torch.rand(shape, generator=draws) < 0.8, characters, labels)
        soft = self.encoder(contents.to(self.device), [count] * number)
        # Fields of some slots each, of one soft token or another, with a word between.
        cells: list[Soft | Slot | None] = []
        ends = (torch.rand(count, generator=draws) < 0.3).tolist()
        for index in range(number):
            for place, end in enumerate(ends):
                if place == 0 or end:
                    cells += [None, Soft(index)]
                cells.append(Slot(place))
        tokens = self._words(len(cells), draws)
        for place, cell in enumerate(cells):
            if isinstance(cell, Slot):
                tokens[:, place] = self._slot + cell.index
        embedded = self.embedding(tokens.to(self.device))
        chosen = [(place, cell.index) for place, cell in enumerate(cells) if isinstance(cell, Soft)]
        indices, numbers = (torch.tensor(row, device=self.device) for row in zip(*chosen, strict=True))
        embedded = embedded.index_copy(1, indices, soft[:, numbers])
        backbone = self.model.model
        places = torch.arange(len(cells), device=self.device).unsqueeze(0)
        rotary = backbone.rotary_emb(embedded, places)
        for layer in backbone.layers[:_READ_AFTER]:
            embedded = layer(embedded, attention_mask=None, position_ids=places, position_embeddings=rotary)
        is_slot = torch.tensor([isinstance(cell, Slot) for cell in cells], device=self.device)
        logits = self.model.lm_head(backbone.norm(embedded[:, is_slot]))
        return nn.functional.cross_entropy(logits.flatten(0, 1), self.ids[contents].flatten().to(self.device))

    def _words(self, count: int, draws: torch.Generator) -> Tensor:
        """Random tokens that are no marks, for each row of a step of copying."""
        return torch.randint(self._slot + SLOTS, len(self.tokenizer), (_COPIED, count), generator=draws)

    def _describing(self) -> dict[str, Tensor]:
        training = self.spec.training
        rng = generator(self.spec.seed, "step", self.step)
        bare = float(torch.rand((), generator=rng)) < _BARE
        items = self._items(rng, training.schemas, training.batch_size // training.schemas, bare)
        soft = [self.soft(item) for item in items]
        if training.noise:
            soft = [part + training.noise * torch.randn(part.shape, generator=rng).to(part) for part in soft]
        scores = self.losses(items, soft)
        values = scores.losses[scores.weights == 1].mean()
        described = (scores.losses * scores.weights).sum() / scores.weights.sum()
        return {"loss": described + scores.slots, "values": values, "slots": scores.slots}

    def soft(self, item: Item) -> Tensor:
        """Soft tokens of an item's rows."""
        contents = torch.tensor([list(itertools.chain(*row)) for row in item.contents], device=self.device)
        soft: Tensor = self.encoder(contents, slots(item.schema.template, item.schema.tokens))
        return soft

    def _items(self, rng: torch.Generator, schemas: int, rows: int, bare: bool) -> list[Item]:
        seed = int(torch.randint(2**62, (), generator=rng))
        # Schemas of a step are about as large, so that little is padded.
        fields = int(torch.randint(2, self.spec.fields + 1, (), generator=rng))
        many = float(torch.rand((), generator=rng)) < _MANY_LABELS
        form: dict[str, Any] = {"most_labels": 16 if many else 4, "bare": bare}
        return [
            self.item(random.Random(f"{seed} {number}"), rows, partial(random_schema, count=fields, **form))
            for number in range(schemas)
        ]

    def item(self, rng: random.Random, count: int, draw: Callable[[random.Random], RandomSchema]) -> Item:
        """A random schema with ``count`` rows."""
        schema = draw(rng)
        rows = [schema.row(rng) for _ in range(count)]
        parts = [schema.template.parts(row) for row in rows]
        legend, layout = schema.template.legend, schema.template.layout(schema.tokens)
        cells = [slot(cell.index) if isinstance(cell, Slot) else cell for cell in layout]
        seen = [cell for cell in cells if isinstance(cell, str)]
        texts = list(dict.fromkeys([*legend, *seen, *(text for row in parts for text, _ in row)]))
        known = dict(zip(texts, self.tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True))
        descriptions, weights = [], []
        for row in parts:
            tokens = [(token, is_value) for text, is_value in row for token in known[text]] + [(1, False)]
            # What follows a value says where it ends.
            counted = [is_value or (place > 0 and tokens[place - 1][1]) for place, (_, is_value) in enumerate(tokens)]
            descriptions.append([token for token, _ in tokens])
            weights.append([1.0 if value else _TEMPLATE_WEIGHT for value in counted])
        contents = [[[_CONTENT[text] for text in field] for field in schema.template.contents(row)] for row in rows]
        head: list[int | Soft | Slot] = []
        for cell in layout:
            head += known[cell] if isinstance(cell, str) else [cell]
        prompt = [token for text in legend for token in known[text]]
        return Item(schema, prompt, head, descriptions, weights, contents)


    def losses(self, items: Sequence[Item], soft: Sequence[Tensor]) -> ItemScores:
        """How the descriptions of ``items`` are predicted after ``soft`` of each, ``[rows, tokens, hidden]``.

        Prompts are computed once for all rows of a schema.
        """
        from transformers import DynamicCache

        rows = len(items[0].descriptions)
        prompts, prompt_mask = _padded([item.prompt for item in items])
        prompts, prompt_mask = prompts.to(self.device), prompt_mask.to(self.device)
        cache = DynamicCache(config=self.model.config)
        places = (prompt_mask.cumsum(1) - 1).clamp_min(0)
        self.model.model(prompts, attention_mask=prompt_mask, position_ids=places, past_key_values=cache)
        cache.batch_repeat_interleave(rows)
        heads, contents = zip(*(self._head(item, part) for item, part in zip(items, soft, strict=True)), strict=True)
        longest = max(head.shape[1] for head in heads)
        head = torch.cat([nn.functional.pad(head, (0, 0, longest - head.shape[1], 0)) for head in heads])
        wanted = torch.cat([nn.functional.pad(part, (longest - part.shape[1], 0), value=-1) for part in contents])
        lengths = torch.tensor([head.shape[1] for head in heads], device=self.device).repeat_interleave(rows)
        head_mask = (torch.arange(longest, device=self.device) >= (longest - lengths).unsqueeze(1)).long()
        tokens, present = _padded([row for item in items for row in item.descriptions])
        weights, _ = _padded([row for item in items for row in item.weights])
        tokens, present, weights = tokens.to(self.device), present.bool().to(self.device), weights.to(self.device)
        inputs = torch.cat([head, self.embedding(tokens[:, :-1])], 1)
        mask = torch.cat([prompt_mask.repeat_interleave(rows, 0), head_mask, torch.ones_like(tokens[:, :-1])], 1)
        places = (mask.cumsum(1) - 1).clamp_min(0)[:, prompts.shape[1] :]
        outputs = self.model.model(
            inputs_embeds=inputs,
            attention_mask=mask,
            position_ids=places,
            past_key_values=cache,
            output_hidden_states=True,
        )
        early = outputs.hidden_states[_READ_AFTER][:, :longest][wanted >= 0]
        # The output layer has the embedding of every content.
        logits = self.model.lm_head(self.model.model.norm(early))
        read = nn.functional.cross_entropy(logits, wanted[wanted >= 0]) if len(early) else logits.new_zeros(())
        slots_right = (logits.argmax(-1) == wanted[wanted >= 0]).float().mean()
        logits = self.model.lm_head(outputs.last_hidden_state[:, longest - 1 :][present])
        right = torch.ones_like(present)
        right[present] = logits.argmax(-1) == tokens[present]
        losses = nn.functional.cross_entropy(logits, tokens[present], reduction="none")
        return ItemScores(losses, weights[present], right.all(1), read, slots_right)

    def _context_loss(self, states: Tensor, contexts: Tensor) -> Tensor:
        found = self.context(self.model.model.norm(states))
        contexts = contexts.to(self.device)
        signs = self.codes[contexts[..., :2]].flatten(-2)
        bits = nn.functional.softplus(-found[..., :32] * signs).mean() * 16
        return bits + nn.functional.cross_entropy(found[..., 32:].flatten(0, -2), contexts[..., 2].flatten())

    def _head(self, item: Item, soft: Tensor) -> tuple[Tensor, Tensor]:
        """What stands between prompt and description, ``[rows, length, hidden]``; and the token that each slot is to be
        read as, ``[rows, length]``, -1 elsewhere."""
        is_slot = torch.tensor([isinstance(cell, Slot) for cell in item.head], device=self.device)
        is_soft = torch.tensor([isinstance(cell, Soft) for cell in item.head], device=self.device)
        ids = [self._slot + cell.index if isinstance(cell, Slot) else cell for cell in item.head]
        ids = [0 if isinstance(cell, Soft) else cell for cell in ids]
        tokens = torch.tensor(ids, device=self.device).repeat(len(soft), 1)
        order = item.schema.template.order
        rows = [list(itertools.chain(*(row[field] for field in order))) for row in item.contents]
        contents, wanted = self.ids[torch.tensor(rows)].to(self.device), torch.full_like(tokens, -1)
        wanted[:, is_slot] = contents
        embedded = self.embedding(tokens)
        numbers = torch.tensor([cell.index for cell in item.head if isinstance(cell, Soft)], device=self.device)
        return embedded.masked_scatter(is_soft.unsqueeze(1).expand_as(embedded), soft[:, numbers]), wanted

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss of the values, and the share of exact descriptions, on schemas that training never saw."""
        self.model.eval()
        rng = generator(self.spec.seed, "validation")
        items = [item for bare in (True, False) for item in self._items(rng, 8, 16, bare)]
        scores = self.losses(items, [self.soft(item) for item in items])
        return {
            "validation_loss": float(scores.losses[scores.weights == 1].mean()),
            "validation_exact_match": float(scores.exact.float().mean()),
            "validation_slots": float(scores.slots_right),
        }

    def state(self) -> dict[str, Tensor]:
        # The output weights are those of the embedding.
        model = {name: value for name, value in self.model.state_dict().items() if name != "lm_head.weight"}
        return (
            checkpoints.part("model", model)
            | checkpoints.part("encoder", self.encoder.state_dict())
            | checkpoints.part("context", self.context.state_dict())
            | checkpoints.part("label", self.label.state_dict())
            | checkpoints.part("optimization", self.optimization.state())
            | {"mean": self.mean, "level": self.level}
        )

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        parts = checkpoints.parts(tensors)
        self.model.load_state_dict(parts["model"], strict=False)
        self.encoder.load_state_dict(parts["encoder"])
        self.context.load_state_dict(parts["context"])
        if "label" in parts: self.label.load_state_dict(parts["label"])
        self.optimization.restore(parts["optimization"])
        self.mean, self.level = (tensors[name].cpu() for name in ("mean", "level"))

    def save(self, folder: Path) -> None:
        """Write model and tokenizer as ``transformers`` does."""
        self.model.eval().save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def _padded(rows: Sequence[Sequence[float]]) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as a matrix, and 1 where there is something."""
    length = max(map(len, rows))
    blanks = [[0] * (length - len(row)) for row in rows]
    pairs = list(zip(rows, blanks, strict=True))
    return torch.tensor([[*row, *pad] for row, pad in pairs]), torch.tensor(
        [[1] * len(row) + pad for row, pad in pairs]
    )


def train_language_model(spec: ReaderSpec, run: Run, folder: Path) -> LanguageModelTrainer:
    """Train the model of ``spec`` and write it into ``folder``."""
    trainer = LanguageModelTrainer(spec, run.device)
    fit(trainer, run)
    trainer.save(folder)
    return trainer


def default_folder(device: str = "cpu", spec: ReaderSpec | None = None) -> Path:
    """Folder of the language model of ``spec``, by default the default spec. It is trained once, resuming from
    checkpoints where a call was interrupted, and kept in the cache."""
    spec = spec or ReaderSpec()
    recipe = json.dumps(spec.model_dump(mode="json", exclude={"wandb"}), sort_keys=True)
    name = hashlib.sha256(f"{FORMAT} {recipe}".encode()).hexdigest()[:32]

    def train(run: Run, folder: Path) -> None:
        train_language_model(spec, run, folder)

    return trained_once(f"language-models/{name}", "model", train, device)
