"""The default language model: a small one that learns to read soft tokens, from random schemas alone.

It learns in two phases. First it copies random tokens, which gives it the attention that copying takes. Then it writes
descriptions of rows of random schemas from soft tokens of an encoder that is trained with it and thrown away; so that
no table, and no encoder, is special to it. The number of fields grows as it learns.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ethogram.specs.resource import MAX_DIMENSIONS, MAX_LABELS, ReaderSizeSpec, ReaderSpec
from services.resource.corpus import RandomSchema, random_schema
from services.resource.texts import blank, option
from services.runtime import checkpoints
from services.runtime.run import Run
from services.runtime.seeds import generator
from services.runtime.trained import trained_once
from services.runtime.training import Optimization, Progress, Trainer, cosine, fit

FORMAT = 1
PAD, END = "<pad>", "<end>"
MARKS = [blank(index) for index in range(MAX_DIMENSIONS + 1)]
OPTIONS = [option(index) for index in range(MAX_LABELS)]
_CORPUS = 3000
"""Random schemas whose texts the tokenizer is made of."""
_COPIED = 64
"""Rows of a step of copying."""
_GROW_BELOW, _DECAY, _JUMP = 0.35, 0.97, 0.25
"""Loss of the values below which schemas get one field more, decay of its mean, and what is added to it then."""
_TEMPLATE_WEIGHT = 0.2
"""Weight of the tokens of the template beside those of values."""
_BARE = 0.8, 0.3
"""Share of templates that are hardly more than the values, in the first and the last steps."""
_BARE_UNTIL = 0.6


def make_tokenizer(vocabulary: int, seed: int) -> Any:
    """A tokenizer of ``transformers``: byte-pair pieces of words, digits one by one, and the marks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(seed)
    texts = []
    for _ in range(_CORPUS):
        schema = random_schema(rng, 8, bare=False)
        texts += [schema.template.prompt, schema.template.write(schema.row(rng))]
    tokenizer = Tokenizer(models.BPE())
    digits, pieces = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pieces])  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, END, *MARKS, *OPTIONS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)


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
    """Soft tokens of rows of any schema: codes of the characters of numbers and of labels, bound to the field."""

    CHARACTERS = "0123456789."
    PLACES = 11
    WIDTH = 48

    def __init__(self, hidden: int, fields: int, generator: torch.Generator) -> None:
        super().__init__()

        def normal(*shape: int, scale: float) -> nn.Parameter:
            return nn.Parameter(scale * torch.randn(*shape, generator=generator))

        self.character = normal(self.PLACES, len(self.CHARACTERS) + 1, self.WIDTH, scale=0.5)
        self.option = normal(hidden, self.WIDTH, scale=hidden**-0.5)
        self.bind = normal(fields, self.WIDTH, hidden, scale=self.WIDTH**-0.5)
        self.slot = normal(4, 8, hidden, scale=0.3)

    def forward(self, schema: RandomSchema, rows: Sequence[Sequence[float]], embedding: nn.Module) -> Tensor:
        """Soft tokens ``[rows, tokens, hidden]``; field ``i`` is in token ``i`` modulo their number."""
        template, tokens = schema.template, schema.tokens
        device = self.bind.device
        codes = []
        for field, labels in enumerate(template.labels):
            if labels:
                chosen = torch.tensor([int(row[field]) for row in rows], device=device)
                marks = embedding(len([PAD, END]) + len(MARKS) + chosen)
                codes.append(nn.functional.layer_norm(marks, marks.shape[-1:]) @ self.option)
            else:
                places = [self._places(template.value_text(field, row[field])) for row in rows]
                codes.append(self.character[torch.arange(self.PLACES), torch.tensor(places, device=device)].sum(1))
        bound = torch.einsum("frc,fch->rfh", torch.stack(codes), self.bind[: len(codes)])
        soft = torch.zeros(len(rows), tokens, bound.shape[2], device=device)
        soft = soft.index_add(1, torch.arange(len(codes), device=device) % tokens, bound)
        return nn.functional.layer_norm(soft + self.slot[tokens.bit_length() - 1, :tokens], bound.shape[2:])

    def _places(self, text: str) -> list[int]:
        """Index of the character at each place, the last index where there is none."""
        known = [self.CHARACTERS.index(character) for character in text[: self.PLACES]]
        return known + [len(self.CHARACTERS)] * (self.PLACES - len(known))


class Item(NamedTuple):
    """A random schema with rows, tokenized."""

    schema: RandomSchema
    rows: list[list[float]]
    prompt: list[int]
    descriptions: list[list[int]]
    """With the token that ends a text."""
    weights: list[list[float]]
    """Of each token of the descriptions."""


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
        self.encoder = ThrowawayEncoder(spec.model.hidden_dim, spec.fields, generator(spec.seed, "init")).to(device)
        rising = cosine(training.steps)
        self.optimization = Optimization(
            [{"params": [*self.model.parameters(), *self.encoder.parameters()]}],
            training,
            lambda step: 1.0 if step < training.copying else rising(step - training.copying),
            weight_decay=0.01,
        )
        self.fields = torch.tensor(min(2, spec.fields))
        """Most fields of a schema, by now."""
        self.mean = torch.tensor(2.0)
        """Running mean of the loss of the values."""

    @property
    def embedding(self) -> nn.Module:
        embedding: nn.Module = self.model.get_input_embeddings()
        return embedding

    def advance(self) -> dict[str, Tensor]:
        self.model.train()
        self.optimization.optimizer.zero_grad()
        if self.step < self.spec.training.copying:
            metrics = {"loss": self._copying()}
        else:
            metrics = self._describing()
        metrics["loss"].backward()  # type: ignore[no-untyped-call]
        metrics = {name: value.detach() for name, value in metrics.items()}
        self.optimization.update(self.step, metrics)
        self.step += 1
        if "values" in metrics:
            self.mean = _DECAY * self.mean + (1 - _DECAY) * metrics["values"].cpu()
            if self.mean < _GROW_BELOW and self.fields < self.spec.fields:
                self.fields, self.mean = self.fields + 1, self.mean + _JUMP
            metrics["fields"] = self.fields.float()
        return metrics

    def _copying(self) -> Tensor:
        """Loss of the second copy of random tokens."""
        rng = generator(self.spec.seed, "copy", self.step)
        length = int(torch.randint(6, 28, (), generator=rng))
        tokens = torch.randint(2, len(self.tokenizer), (_COPIED, length), generator=rng)
        end = torch.ones(_COPIED, 1, dtype=torch.long)
        row = torch.cat([tokens, end, tokens], 1).to(self.device)
        states = self.model.model(row[:, :-1]).last_hidden_state[:, length:]
        return nn.functional.cross_entropy(self.model.lm_head(states).flatten(0, 1), row[:, length + 1 :].flatten())

    def _describing(self) -> dict[str, Tensor]:
        training = self.spec.training
        rng = generator(self.spec.seed, "step", self.step)
        done = (self.step - training.copying) / training.steps
        bare = float(torch.rand((), generator=rng)) < _BARE[done >= _BARE_UNTIL]
        items = self._items(rng, training.schemas, training.batch_size // training.schemas, bare)
        soft = [self.encoder(item.schema, item.rows, self.embedding) for item in items]
        if training.noise:
            soft = [part + training.noise * torch.randn(part.shape, generator=rng).to(part) for part in soft]
        losses, weights, _, _ = self.losses(items, soft)
        values = losses[weights == 1].mean()
        return {"loss": (losses * weights).sum() / weights.sum(), "values": values}

    def _items(self, rng: torch.Generator, schemas: int, rows: int, bare: bool) -> list[Item]:
        seed = int(torch.randint(2**62, (), generator=rng))
        return [self.item(random.Random(f"{seed} {number}"), rows, bare) for number in range(schemas)]

    def item(self, rng: random.Random, count: int, bare: bool) -> Item:
        """A random schema with ``count`` rows."""
        schema = random_schema(rng, int(self.fields), bare=bare)
        rows = [schema.row(rng) for _ in range(count)]
        parts = [schema.template.parts(row) for row in rows]
        texts = list(dict.fromkeys([schema.template.prompt, *(text for row in parts for text, _ in row)]))
        known = dict(zip(texts, self.tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True))
        descriptions, weights = [], []
        for row in parts:
            tokens = [(token, is_value) for text, is_value in row for token in known[text]] + [(1, False)]
            # What follows a value says where it ends.
            counted = [is_value or (place > 0 and tokens[place - 1][1]) for place, (_, is_value) in enumerate(tokens)]
            descriptions.append([token for token, _ in tokens])
            weights.append([1.0 if value else _TEMPLATE_WEIGHT for value in counted])
        return Item(schema, rows, known[schema.template.prompt], descriptions, weights)

    def losses(self, items: Sequence[Item], soft: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Cross-entropy and weight of each token of the descriptions, whether it is right, ``[tokens]`` each, and
        whether all tokens of a description are, ``[items * rows]``.

        Prompts are padded on the left and computed once for all rows of a schema.
        """
        from transformers import DynamicCache

        rows = len(items[0].rows)
        prompts, prompt_mask = _padded([item.prompt for item in items], left=True)
        prompts, prompt_mask = prompts.to(self.device), prompt_mask.to(self.device)
        cache = DynamicCache(config=self.model.config)
        places = (prompt_mask.cumsum(1) - 1).clamp_min(0)
        self.model.model(prompts, attention_mask=prompt_mask, position_ids=places, past_key_values=cache)
        cache.batch_repeat_interleave(rows)
        # After the soft tokens come the marks of the fields.
        first = len([PAD, END])
        heads = [
            torch.cat([part, self.embedding(self._range(first, len(item.schema.samplers))).expand(rows, -1, -1)], 1)
            for item, part in zip(items, soft, strict=True)
        ]
        longest = max(head.shape[1] for head in heads)
        head = torch.cat([nn.functional.pad(head, (0, 0, longest - head.shape[1], 0)) for head in heads])
        lengths = torch.tensor([head.shape[1] for head in heads], device=self.device).repeat_interleave(rows)
        head_mask = (torch.arange(longest, device=self.device) >= (longest - lengths).unsqueeze(1)).long()
        tokens, present = _padded([row for item in items for row in item.descriptions])
        weights, _ = _padded([row for item in items for row in item.weights])
        tokens, present, weights = tokens.to(self.device), present.bool().to(self.device), weights.to(self.device)
        inputs = torch.cat([head, self.embedding(tokens[:, :-1])], 1)
        mask = torch.cat([prompt_mask.repeat_interleave(rows, 0), head_mask, torch.ones_like(tokens[:, :-1])], 1)
        places = (mask.cumsum(1) - 1).clamp_min(0)[:, prompts.shape[1] :]
        outputs = self.model.model(
            inputs_embeds=inputs, attention_mask=mask, position_ids=places, past_key_values=cache
        )
        logits = self.model.lm_head(outputs.last_hidden_state[:, longest - 1 :][present])
        right = torch.ones_like(present)
        right[present] = logits.argmax(-1) == tokens[present]
        losses = nn.functional.cross_entropy(logits, tokens[present], reduction="none")
        return losses, weights[present], right[present], right.all(1)

    def _range(self, start: int, count: int) -> Tensor:
        return torch.arange(start, start + count, device=self.device)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss of the values, and the share of exact descriptions, on schemas that training never saw."""
        self.model.eval()
        rng = generator(self.spec.seed, "validation")
        items = [item for bare in (True, False) for item in self._items(rng, 8, 16, bare)]
        soft = [self.encoder(item.schema, item.rows, self.embedding) for item in items]
        losses, weights, _, exact = self.losses(items, soft)
        return {
            "validation_loss": float(losses[weights == 1].mean()),
            "validation_exact_match": float(exact.float().mean()),
        }

    def state(self) -> dict[str, Tensor]:
        # The output weights are those of the embedding.
        model = {name: value for name, value in self.model.state_dict().items() if name != "lm_head.weight"}
        return (
            checkpoints.part("model", model)
            | checkpoints.part("encoder", self.encoder.state_dict())
            | checkpoints.part("optimization", self.optimization.state())
            | {"fields": self.fields, "mean": self.mean}
        )

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        parts = checkpoints.parts(tensors)
        self.model.load_state_dict(parts["model"], strict=False)
        self.encoder.load_state_dict(parts["encoder"])
        self.optimization.restore(parts["optimization"])
        self.fields, self.mean = tensors["fields"].cpu(), tensors["mean"].cpu()

    def save(self, folder: Path) -> None:
        """Write model and tokenizer as ``transformers`` does."""
        self.model.eval().save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def _padded(rows: Sequence[Sequence[float]], *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as a matrix, and 1 where there is something."""
    length = max(map(len, rows))
    blanks = [[0] * (length - len(row)) for row in rows]
    values = torch.tensor([[*pad, *row] if left else [*row, *pad] for row, pad in zip(rows, blanks, strict=True)])
    ones = [[1] * len(row) for row in rows]
    return values, torch.tensor([[*pad, *one] if left else [*one, *pad] for one, pad in zip(ones, blanks, strict=True)])


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
