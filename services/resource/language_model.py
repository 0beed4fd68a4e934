"""The default language model: a small one that learns to read soft tokens, from random schemas alone.

It learns in two phases. First it copies random tokens, soon with slots to read and labels to look up, which gives it
the attention that copying takes; beside it, it reads the slots of soft tokens. Then it writes descriptions of rows of
random schemas. The soft tokens are in a code that is trained with it and kept beside it. An encoder of any table begins
as that code, and learns what the model does with it.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ethogram.specs.resource import ReaderSizeSpec, ReaderSpec
from services.resource import code, copying, corpus, texts
from services.resource.code import CONTENT, CONTENTS, SoftTokenCode, own_dimensions
from services.resource.copying import Contexts, Copies, Vocabulary, contexts, draw_copies
from services.resource.corpus import RandomSchema, random_schema
from services.resource.texts import (
    EDGES,
    LABEL_END,
    OPTIONS,
    PAD,
    READ,
    SLOTS,
    WRITE,
    Slot,
    Soft,
    edge,
    option,
    slot,
    slots,
)
from services.runtime import checkpoints
from services.runtime.run import Run
from services.runtime.seeds import generator
from services.runtime.trained import trained_once
from services.runtime.training import Optimization, Progress, Trainer, cosine, fit

RECIPE = (code, copying, corpus, texts, sys.modules[__name__])
"""Modules on which a model of the same spec depends."""
END = "<end>"
_TEXT_MARKS = [PAD, END, READ, WRITE, LABEL_END]
OPTION_MARKS = [option(index) for index in range(OPTIONS)]
EDGE_MARKS = [edge(index) for index in range(EDGES)]
SLOT_MARKS = [slot(index) for index in range(SLOTS)]
_CORPUS = 3000
"""Random schemas whose texts the tokenizer is made of."""
_COPIED = 48
"""Rows of a step of copying."""
_COPIES_BELOW, _DECAY = 2.0, 0.9
"""Mean loss of copying below which texts have gaps, and decay of the mean."""
_MANY_LABELS = 0.25
"""Share of steps with long lists of labels."""
_LONG, _SHORT = 0.2, 8
"""Share of steps with schemas of any length, and the most fields in the others."""
_TEMPLATE_WEIGHT = 0.3
"""Weight of the tokens of the template beside those of values."""
_BARE = 0.3
"""Share of steps with templates that are hardly more than the values."""
VALIDATED = (3, 6, 10, 17)
"""Fields of the schemas of a validation."""
_OTHER_WORDS = 0.5
"""Share of the schemas whose tokens are others, since a token that never occurs is no longer copied."""
_GATE = 0.2
"""What the mark of a slot multiplies its own dimensions by, at first."""
_READ_AFTER, _CONTEXT_AFTER = 1, 2
"""Layers after which slots are read, and a token knows where it stands."""


def make_tokenizer(vocabulary: int, seed: int) -> Any:
    """A tokenizer of ``transformers``: byte-pair pieces of words, digits one by one, and the marks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(seed)
    texts = []
    for _ in range(_CORPUS):
        schema = random_schema(rng, rng.randint(2, 8), 10, bare=False)
        texts += [*schema.template.legend[1::3], schema.template.write(schema.row(rng))]
    tokenizer = Tokenizer(models.BPE())
    digits, pieces = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pieces])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[*_TEXT_MARKS, *OPTION_MARKS, *EDGE_MARKS, *SLOT_MARKS],
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


class ContextProbe(nn.Module):
    """Reads :class:`Contexts` in hidden states, with one linear map, so that both texts have them in the same form and
    attention can match them."""

    BITS, SINCE = 16, 32
    codes: Tensor

    def __init__(self, embedding: Tensor, generator: torch.Generator) -> None:
        """``embedding``: of the model before training, ``[vocabulary, hidden]``."""
        super().__init__()
        hidden = embedding.shape[1]
        self.linear = nn.Linear(hidden, 2 * self.BITS + self.SINCE)
        nn.init.normal_(self.linear.weight, std=hidden**-0.5, generator=generator)
        nn.init.zeros_(self.linear.bias)
        # A token is read as signs that its embedding has from the start, so that only where to look must be learned.
        directions = torch.randn(hidden, self.BITS, generator=generator)
        self.register_buffer("codes", (embedding.cpu() @ directions).sign(), persistent=False)

    def forward(self, states: Tensor, contexts: Contexts) -> Tensor:
        """The loss of ``states`` ``[rows, columns, hidden]``."""
        logits = self.linear(states)
        signs = self.codes[torch.stack([contexts.mark, contexts.previous], 2)].flatten(2)
        bits = nn.functional.softplus(-logits[..., : 2 * self.BITS] * signs).mean() * self.BITS
        since = contexts.since.clamp_max(self.SINCE - 1)
        return bits + nn.functional.cross_entropy(logits[..., 2 * self.BITS :].flatten(0, 1), since.flatten())


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
    """Trains the default language model together with its :class:`SoftTokenCode`."""

    spec: ReaderSpec
    monitor = "validation_loss"

    def __init__(self, spec: ReaderSpec, device: str = "cpu") -> None:
        self.spec, self.device = spec, device
        self.step, self.progress = 0, Progress()
        training = spec.training
        self.steps, self.validate_every = training.copying + training.steps, training.validate_every
        self.tokenizer = make_tokenizer(spec.model.vocabulary, spec.seed)
        self.model = make_model(spec.model, len(self.tokenizer), spec.seed).to(device)
        self.code = SoftTokenCode(spec.model.hidden_dim, generator(spec.seed, "init")).to(device)
        weights: Tensor = self.model.get_input_embeddings().weight
        self.context = ContextProbe(weights.detach(), generator(spec.seed, "context"))
        self.context.to(device)
        falling = cosine(training.steps)
        matrices = [weight for weight in self.model.model.layers.parameters() if weight.ndim == 2]
        inner = {*matrices}
        rest = [
            weight
            for part in (self.model, self.code, self.context)
            for weight in part.parameters()
            if weight not in inner
        ]
        self.optimization = Optimization(
            [{"params": rest}],
            training,
            lambda step: 1.0 if step < training.copying else falling(step - training.copying),
            weight_decay=0.01,
            matrices=matrices,
        )
        self.ids = torch.tensor(self.tokenizer.convert_tokens_to_ids(CONTENTS))
        """Token of each content of a slot."""
        self.gaps = torch.tensor(False)
        """Whether texts that are copied have gaps by now."""
        self._slot = self.tokenizer.convert_tokens_to_ids(SLOT_MARKS[0])
        with torch.no_grad():
            marks = weights[self._slot : self._slot + SLOTS]
            marks.add_(own_dimensions(spec.model.hidden_dim).to(marks)).mul_(_GATE)
        number = self.tokenizer.convert_tokens_to_ids
        self.vocabulary = Vocabulary(
            read=number(READ),
            write=number(WRITE),
            end=number(END),
            label_end=number(LABEL_END),
            option=number(OPTION_MARKS[0]),
            edge=number(EDGE_MARKS[0]),
            slot=self._slot,
            word=self._slot + SLOTS,
            size=len(self.tokenizer),
            contents=self.ids,
            characters=len(CONTENTS) - OPTIONS,
        )
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
            metrics["loss"] = torch.stack([*metrics.values()]).sum()
        else:
            metrics = self._describing()
        metrics["loss"].backward()  # type: ignore[no-untyped-call]
        metrics = {name: value.detach() for name, value in metrics.items()}
        self.optimization.update(self.step, metrics)
        self.step += 1
        if copies:
            self.mean = _DECAY * self.mean + (1 - _DECAY) * metrics["copying"].cpu()
            self.gaps = self.gaps | (self.mean < _COPIES_BELOW)
        return metrics

    def _copying(self) -> dict[str, Tensor]:
        """Losses of a step of copying: of the copy, and of where each token stands, which its attention takes."""
        rng = random.Random(f"{self.spec.seed} copy {self.step}")
        draw = generator(self.spec.seed, "copy", self.step)
        copies = draw_copies(rng, draw, _COPIED, self.vocabulary, gaps=bool(self.gaps))
        embedded = self.embedding(torch.cat([copies.before, copies.after[:, :-1]], 1).to(self.device))
        if copies.soft:
            soft = self.code(copies.contents.to(self.device), copies.slots)
            embedded = _with_soft(embedded, soft, copies.soft, copies.slotted)
        outputs = self.model.model(inputs_embeds=embedded, output_hidden_states=True)
        states = outputs.last_hidden_state[:, copies.before.shape[1] - 1 :]
        copying = nn.functional.cross_entropy(
            self.model.lm_head(states).flatten(0, 1), copies.after.to(self.device).flatten()
        )
        return {"copying": copying, "context": self._contexts(copies, outputs.hidden_states[_CONTEXT_AFTER])}

    def _contexts(self, copies: Copies, states: Tensor) -> Tensor:
        """Loss of where each token stands, in ``states`` ``[rows, length, hidden]`` of an early layer."""
        if self.spec.model.layers > _CONTEXT_AFTER:
            # Those of the last layer are normalised already.
            states = self.model.model.norm(states)
        tokens = torch.cat([copies.before, copies.after], 1)
        is_soft = torch.zeros(tokens.shape[1], dtype=torch.bool)
        is_soft[[column for column, _ in copies.soft]] = True
        # What is written at a column is predicted one before it.
        written = range(copies.before.shape[1], tokens.shape[1])
        shown, wanted = (torch.tensor([*copies.keys, *(column - step for column in written)]) for step in (1, 0))
        found = contexts(tokens, is_soft, self.vocabulary)
        loss: Tensor = self.context(
            states[:, shown.to(self.device)], Contexts(*(part[:, wanted].to(self.device) for part in found))
        )
        return loss

    def _reading(self) -> Tensor:
        """Loss of the contents of slots behind soft tokens, with nothing to describe."""
        draw = generator(self.spec.seed, "read", self.step)
        number, count = (int(torch.randint(1, most, (), generator=draw)) for most in (3, SLOTS + 1))
        shape = (_COPIED, number * count)
        characters = torch.randint(len(CONTENTS) - OPTIONS, shape, generator=draw)
        labels = torch.randint(len(CONTENTS), shape, generator=draw)
        contents = torch.where(torch.rand(shape, generator=draw) < 0.6, characters, labels)
        soft = self.code(contents.to(self.device), [count] * number)
        # Fields of some slots each, of one soft token or another, with a word between.
        cells: list[Soft | Slot | None] = []
        ends = (torch.rand(count, generator=draw) < 0.3).tolist()
        for index in range(number):
            for place, end in enumerate(ends):
                if place == 0 or end:
                    cells += [None, Soft(index)]
                cells.append(Slot(place))
        tokens = self._words(len(cells), draw)
        for place, cell in enumerate(cells):
            if isinstance(cell, Slot):
                tokens[:, place] = self._slot + cell.index
        embedded = _with_soft(self.embedding(tokens.to(self.device)), soft, *_columns(cells))
        backbone = self.model.model
        places = torch.arange(len(cells), device=self.device).unsqueeze(0)
        rotary = backbone.rotary_emb(embedded, places)
        for layer in backbone.layers[:_READ_AFTER]:
            embedded = layer(embedded, attention_mask=None, position_ids=places, position_embeddings=rotary)
        is_slot = torch.tensor([isinstance(cell, Slot) for cell in cells], device=self.device)
        logits = self.model.lm_head(backbone.norm(embedded[:, is_slot]))
        return nn.functional.cross_entropy(logits.flatten(0, 1), self.ids[contents].flatten().to(self.device))

    def _words(self, count: int, draw: torch.Generator) -> Tensor:
        """Random tokens that are no marks, for each row of a step of copying."""
        return torch.randint(self._slot + SLOTS, len(self.tokenizer), (_COPIED, count), generator=draw)

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
        # Rows rarely fill all slots; the others would be forgotten.
        slots = scores.slots + self._reading()
        return {"loss": described + slots, "values": values, "slots": slots}

    def soft(self, item: Item) -> Tensor:
        """Soft tokens of an item's rows."""
        contents = torch.tensor([list(itertools.chain(*row)) for row in item.contents], device=self.device)
        soft: Tensor = self.code(contents, slots(item.schema.template, item.schema.tokens))
        return soft

    def _items(self, rng: torch.Generator, schemas: int, rows: int, bare: bool) -> list[Item]:
        seed = int(torch.randint(2**62, (), generator=rng))
        # Schemas of a step are about as large, so that little is padded.
        most = self.spec.fields if float(torch.rand((), generator=rng)) < _LONG else min(self.spec.fields, _SHORT)
        fields = int(torch.randint(2, most + 1, (), generator=rng))
        # Steps take about as long.
        schemas = max(1, min(schemas, schemas * _SHORT // fields))
        many = float(torch.rand((), generator=rng)) < _MANY_LABELS
        return self._schemas(seed, schemas, rows, fields=fields, bare=bare, many=many)

    def _schemas(self, seed: int, schemas: int, rows: int, *, fields: int, bare: bool, many: bool) -> list[Item]:
        """Random schemas of a form, with ``rows`` each."""
        form: dict[str, Any] = {"count": fields, "most_labels": 16 if many else 4, "bare": bare}
        return [
            self.item(random.Random(f"{seed} {number}"), rows, partial(random_schema, **form))
            for number in range(schemas)
        ]

    def item(self, rng: random.Random, count: int, draw: Callable[[random.Random], RandomSchema]) -> Item:
        """A random schema with ``count`` rows."""
        schema = draw(rng)
        rows = [schema.row(rng) for _ in range(count)]
        parts = [schema.template.parts(row, marked=True) for row in rows]
        legend, layout = schema.template.legend, schema.template.layout(schema.tokens)
        cells = [slot(cell.index) if isinstance(cell, Slot) else cell for cell in layout]
        seen = [cell for cell in cells if isinstance(cell, str)]
        texts = list(dict.fromkeys([*legend, *seen, *(text for row in parts for text, _ in row)]))
        known = dict(zip(texts, self.tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True))
        if rng.random() < _OTHER_WORDS:
            others = self._others(rng)
            known = {text: [others.get(token, token) for token in row] for text, row in known.items()}
        descriptions, weights = [], []
        for row in parts:
            tokens = [(token, is_value) for text, is_value in row for token in known[text]] + [(1, False)]
            # What follows a value says where it ends.
            counted = [is_value or (place > 0 and tokens[place - 1][1]) for place, (_, is_value) in enumerate(tokens)]
            descriptions.append([token for token, _ in tokens])
            weights.append([1.0 if value else _TEMPLATE_WEIGHT for value in counted])
        contents = [[[CONTENT[text] for text in field] for field in schema.template.contents(row)] for row in rows]
        head: list[int | Soft | Slot] = []
        for cell in layout:
            head += known[cell] if isinstance(cell, str) else [cell]
        prompt = [token for text in legend for token in known[text]]
        return Item(schema, prompt, head, descriptions, weights, contents)

    def _others(self, rng: random.Random) -> dict[int, int]:
        """Another token for each that is neither a mark nor a character of numbers."""
        numbers = set(self.ids.tolist())
        words = [token for token in range(self.vocabulary.word, self.vocabulary.size) if token not in numbers]
        return dict(zip(words, rng.sample(words, len(words)), strict=True))

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

    def _head(self, item: Item, soft: Tensor) -> tuple[Tensor, Tensor]:
        """What stands between prompt and description, ``[rows, length, hidden]``; and the token that each slot is to be
        read as, ``[rows, length]``, -1 elsewhere."""
        is_slot = torch.tensor([isinstance(cell, Slot) for cell in item.head], device=self.device)
        ids = [self._slot + cell.index if isinstance(cell, Slot) else cell for cell in item.head]
        ids = [0 if isinstance(cell, Soft) else cell for cell in ids]
        tokens = torch.tensor(ids, device=self.device).repeat(len(soft), 1)
        order = item.schema.template.order
        rows = [list(itertools.chain(*(row[field] for field in order))) for row in item.contents]
        contents, wanted = self.ids[torch.tensor(rows)].to(self.device), torch.full_like(tokens, -1)
        wanted[:, is_slot] = contents
        return _with_soft(self.embedding(tokens), soft, *_columns(item.head)), wanted

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss of the values, and the share of exact descriptions, on schemas that training never saw: as many of each
        length, with templates and without, with few labels and many."""
        self.model.eval()
        rng, rows = generator(self.spec.seed, "validation"), 16
        losses, exact, slots_right = [], dict[int, Tensor](), []
        for fields in sorted({min(self.spec.fields, most) for most in VALIDATED}):
            forms = itertools.product((True, False), repeat=2)
            items = []
            for bare, many in forms:
                seed = int(torch.randint(2**62, (), generator=rng))
                items += self._schemas(seed, 2, rows, fields=fields, bare=bare, many=many)
            scores = self.losses(items, [self.soft(item) for item in items])
            losses.append(scores.losses[scores.weights == 1].mean())
            exact[fields] = scores.exact.float().mean()
            slots_right.append(scores.slots_right)
        by_fields = {f"validation_exact_match_{fields}_fields": float(share) for fields, share in exact.items()}
        return {
            "validation_loss": float(torch.stack(losses).mean()),
            "validation_exact_match": sum(by_fields.values()) / len(by_fields),
            "validation_slots": float(torch.stack(slots_right).mean()),
            **by_fields,
        }

    def identity(self) -> dict[str, str]:
        return {"recipe": _recipe()}

    def state(self) -> dict[str, Tensor]:
        # The output weights are those of the embedding.
        model = {name: value for name, value in self.model.state_dict().items() if name != "lm_head.weight"}
        return (
            checkpoints.part("model", model)
            | checkpoints.part("code", self.code.state_dict())
            | checkpoints.part("context", self.context.state_dict())
            | checkpoints.part("optimization", self.optimization.state())
            | {"mean": self.mean, "gaps": self.gaps}
        )

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        parts = checkpoints.parts(tensors)
        self.model.load_state_dict(parts["model"], strict=False)
        self.code.load_state_dict(parts["code"])
        self.context.load_state_dict(parts["context"])
        self.optimization.restore(parts["optimization"])
        self.mean, self.gaps = (tensors[name].cpu() for name in ("mean", "gaps"))

    def save(self, folder: Path) -> None:
        """Write model and tokenizer as ``transformers`` does, and the code beside them."""
        self.model.eval().save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.code.save(folder)


def _columns(cells: Sequence[object]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Columns of soft tokens and of slots, each with the number of the soft token."""
    soft: list[tuple[int, int]] = []
    slotted: list[tuple[int, int]] = []
    for column, cell in enumerate(cells):
        if isinstance(cell, Soft):
            soft.append((column, cell.index))
        elif isinstance(cell, Slot):
            slotted.append((column, soft[-1][1]))
    return soft, slotted


def _with_soft(
    embedded: Tensor, soft: Tensor, columns: Sequence[tuple[int, int]], slotted: Sequence[tuple[int, int]]
) -> Tensor:
    """``embedded`` ``[rows, length, hidden]`` with ``soft`` ``[rows, tokens, hidden]`` in their ``columns``, and in
    those of slots their product with the marks of these."""
    for pairs, gated in ((columns, False), (slotted, True)):
        if pairs:
            places, numbers = (torch.tensor(row, device=embedded.device) for row in zip(*pairs, strict=True))
            chosen = soft[:, numbers]
            embedded = embedded.index_copy(1, places, embedded[:, places] * chosen if gated else chosen)
    return embedded


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


def _recipe() -> str:
    """SHA-256 of the code on which a model of the same spec depends."""
    content = b"".join(Path(inspect.getfile(module)).read_bytes() for module in RECIPE)
    return hashlib.sha256(content).hexdigest()


def default_folder(device: str = "cpu", spec: ReaderSpec | None = None, run: Run | None = None) -> Path:
    """Folder of the language model of ``spec``, by default the default spec. It is trained once, resuming from
    checkpoints where a call was interrupted, and kept in the cache. ``run``: what that reports to, and whose device it
    takes; by default the terminal. With another recipe, which is the code of this module and of those that it draws on,
    there is another folder."""
    spec = spec or ReaderSpec()
    asked = json.dumps(spec.model_dump(mode="json", exclude={"wandb"}), sort_keys=True)
    name = hashlib.sha256(f"{asked} {_recipe()}".encode()).hexdigest()[:32]

    def train(run: Run, folder: Path) -> None:
        train_language_model(spec, run, folder)

    return trained_once(f"language-models/{name}", "model", train, device, run)
