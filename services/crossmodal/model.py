"""Encoders to a latent and decoders to weights, and a steering direction for each behaviour.

Both work on vectors of one size for all shapes of a zoo (see :class:`services.zoo.layout.Layout`), standardised entry
by entry; the transformer, and pooling other than ``flatten``, see tokens (:mod:`services.crossmodal.tokenizer`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ethogram.specs.crossmodal import CodecSpec
from services.crossmodal.data import Subjects
from services.crossmodal.tokenizer import Form, Tokenizer, Tokens
from services.zoo.layout import Layout
from services.zoo.subjects import ACTIVATIONS

MAX_FITTED = 4096
"""Most subjects from which principal components are taken; the cost grows with their cube."""
RIDGE = 100.0
"""Regularisation of the first linear map, in subjects."""
MEMORY = 8
"""Tokens that a latent becomes for the decoder's cross-attention."""


class Standard(nn.Module):
    """Standardisation of vectors, entry by entry, over the training subjects that have the entry."""

    mean: Tensor
    scale: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))

    def fit(self, vectors: Tensor, present: Tensor) -> None:
        """From vectors ``[subjects, size]`` and which entries each has, bool ``[subjects, size]``."""
        count = present.sum(0).clamp_min(1)
        self.mean.copy_((vectors * present).sum(0) / count)
        deviation = (((vectors - self.mean) * present).square().sum(0) / (count - 1).clamp_min(1)).sqrt()
        # An entry that is constant over the training subjects must not blow up for one that differs.
        self.scale.copy_(deviation.clamp_min(1e-3 * float(deviation.mean()) + 1e-12))

    def forward(self, vectors: Tensor) -> Tensor:
        return (vectors - self.mean) / self.scale

    def undo(self, standard: Tensor) -> Tensor:
        """The inverse."""
        return standard * self.scale + self.mean


class TokenEmbedding(nn.Module):
    """Tokens as vectors ``[batch, tokens, hidden]``: their values, what they are, and where they stand."""

    position: Tensor

    def __init__(self, width: int, form: Form, spec: CodecSpec, generator: torch.Generator) -> None:
        super().__init__()
        self.values = _linear(width, spec.hidden_dim, generator) if width else None
        self.layer = _table(int(form.metadata[..., 0].max()) + 1, spec.hidden_dim, generator)
        self.parameter = _table(3, spec.hidden_dim, generator)
        self.shape = _linear(3, spec.hidden_dim, generator)
        tokens = form.metadata.shape[1]
        if spec.positions == "learned":
            self.position = _table(tokens, spec.hidden_dim, generator)
        else:
            self.register_buffer("position", sinusoids(tokens, spec.hidden_dim), persistent=False)

    def forward(self, tokens: Tokens) -> Tensor:
        layer, parameter, position, fan_out, fan_in, token = tokens.metadata.unbind(-1)
        embedded = self.layer[layer] + self.parameter[parameter] + self.position[token]
        embedded = embedded + self.shape(torch.stack([position, fan_out, fan_in], -1).float().log1p())
        known: Tensor = embedded if self.values is None else embedded + self.values(tokens.values)
        return known


class Encoder(nn.Module):
    """Signatures, weights or both to latents."""

    descriptors: Tensor
    components: Tensor

    def __init__(self, spec: CodecSpec, tokenizer: Tokenizer, generator: torch.Generator) -> None:
        super().__init__()
        self.spec, layout = spec, tokenizer.layout
        forms = [
            *([tokenizer.signature] if spec.inputs != "weights" else []),
            *([tokenizer.weights] if spec.inputs != "signature" else []),
        ]
        # Copies: they go with the model from device to device, and the tokenizer's stay.
        self.forms = nn.ModuleList(deepcopy(form) for form in forms)
        self.sizes = [
            *([layout.neurons * tokenizer.values] if spec.inputs != "weights" else []),
            *([layout.size] if spec.inputs != "signature" else []),
        ]
        self.register_buffer("descriptors", descriptors(layout))
        self.standard = Standard(sum(self.sizes))
        hidden, about = spec.hidden_dim, self.descriptors.shape[1]
        if spec.flat:
            self.register_buffer("components", torch.zeros(sum(self.sizes), spec.signature_components))
            entering = spec.signature_components + about
        else:
            self.embeddings = nn.ModuleList(TokenEmbedding(f.entry.shape[2], f, spec, generator) for f in forms)
            start = 0.02 * torch.randn(hidden, generator=generator) if spec.pooling == "cls" else None
            self.start = nn.Parameter(start) if start is not None else None
            slots = sum(form.mask.shape[1] for form in forms)
            entering = about + (hidden * slots if spec.pooling == "flatten" else hidden)
        self.blocks = nn.ModuleList(
            Block(hidden, spec.heads, generator) for _ in range(spec.depth if spec.architecture == "transformer" else 0)
        )
        if spec.architecture == "transformer":
            self.layers = perceptron([entering, spec.latent_dim], generator)
        else:
            self.layers = perceptron([entering, *[hidden] * spec.depth, spec.latent_dim], generator)
        # Beside the perceptron, so that a network's own particulars need not pass its bends.
        self.straight = _linear(entering, spec.latent_dim, generator) if spec.flat else None

    def fit(self, vectors: Tensor, present: Tensor) -> None:
        """Set the standardisation, and the components where there are any, from training subjects.

        ``vectors``: flat inputs ``[subjects, inputs]``; ``present``: which entries each subject has, bool.
        """
        self.standard.fit(vectors, present)
        if not self.spec.flat:
            return
        rows = self.standard(vectors[:MAX_FITTED]) * present[:MAX_FITTED]
        axes, sizes = principal(rows, self.components.shape[1])
        self.components.zero_()
        self.components[:, : len(axes)] = (axes / sizes.square().mean().sqrt()).T

    def features(self, vectors: Tensor) -> Tensor:
        """What enters the learned part, from flat inputs ``[batch, inputs]``; nothing learned, so it is kept."""
        standard = self.standard(vectors)
        entering: Tensor = standard @ self.components if self.spec.flat else standard
        return entering

    def forward(self, features: Tensor, shape: Tensor) -> Tensor:
        """Latents ``[batch, latent]`` of :meth:`features`; ``shape``: of each network, int64 ``[batch]``."""
        if self.spec.flat:
            return self._latents(features, shape)
        embedded, masks = [], []
        for part, form, embedding in zip(
            torch.split(features, self.sizes, 1), self.forms, self.embeddings, strict=True
        ):
            assert isinstance(form, Form)
            tokens = form.tokens(part, shape)
            embedded.append(embedding(tokens))
            masks.append(tokens.mask)
        hidden, mask = torch.cat(embedded, 1), torch.cat(masks, 1)
        if self.start is not None:
            hidden = torch.cat([self.start.expand(len(hidden), 1, -1), hidden], 1)
            mask = F.pad(mask, (1, 0), value=True)
        for block in self.blocks:
            hidden = block(hidden, mask)
        return self._latents(pool(hidden, mask, self.spec.pooling), shape)

    def _latents(self, hidden: Tensor, shape: Tensor) -> Tensor:
        entering = torch.cat([hidden, self.descriptors[shape]], 1)
        latents: Tensor = self.layers(entering)
        return latents if self.straight is None else latents + self.straight(entering)


class Decoder(nn.Module):
    """Latents to weights."""

    descriptors: Tensor
    present: Tensor

    def __init__(self, spec: CodecSpec, tokenizer: Tokenizer, generator: torch.Generator) -> None:
        super().__init__()
        self.spec, layout = spec, tokenizer.layout
        self.size = layout.size
        self.register_buffer("descriptors", descriptors(layout))
        self.register_buffer("present", layout.present.float(), persistent=False)
        self.standard = Standard(layout.size)
        hidden, entering = spec.hidden_dim, spec.latent_dim + self.descriptors.shape[1]
        if spec.architecture == "mlp":
            self.layers = perceptron([entering, *[hidden] * spec.depth, layout.size], generator)
            self.straight = _linear(entering, layout.size, generator)
            return
        self.form = deepcopy(tokenizer.weights)
        self.queries = TokenEmbedding(0, self.form, spec, generator)
        self.memory = _linear(entering, MEMORY * hidden, generator)
        self.blocks = nn.ModuleList(Block(hidden, spec.heads, generator, cross=True) for _ in range(spec.depth))
        self.values = _linear(hidden, self.form.entry.shape[2], generator)

    def fit(self, weights: Tensor, present: Tensor) -> None:
        """Set the standardisation from training weights ``[subjects, size]`` and which of them each has, bool."""
        self.standard.fit(weights, present)

    def forward(self, latents: Tensor, shape: Tensor) -> Tensor:
        """Flat networks ``[batch, size]``, of the shapes ``shape`` (int64 ``[batch]``), of latents ``[batch,
        latent]``."""
        entering = torch.cat([latents, self.descriptors[shape]], 1)
        if self.spec.architecture == "mlp":
            standard = self.layers(entering) + self.straight(entering)
        else:
            memory = self.memory(entering).view(len(latents), MEMORY, -1)
            metadata, mask = self.form.metadata[shape], self.form.mask[shape]
            hidden = self.queries(Tokens(memory, metadata, mask))
            for block in self.blocks:
                hidden = block(hidden, mask, memory)
            standard = self.form.vectors(self.values(hidden), shape, self.size)
        # In float32 under autocast too: differences of decodings are what edits are made of.
        return self.standard.undo(standard.float()) * self.present[shape]


class Block(nn.Module):
    """A transformer layer, normalised before each part: self-attention, cross-attention where asked for, and a
    perceptron (Vaswani et al. 2017, arXiv 1706.03762; Xiong et al. 2020, arXiv 2002.04745)."""

    def __init__(self, hidden: int, heads: int, generator: torch.Generator, *, cross: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(3 if cross else 2))
        self.own = nn.ModuleList([_linear(hidden, 3 * hidden, generator), _linear(hidden, hidden, generator)])
        self.other = nn.ModuleList(_linear(hidden, n * hidden, generator) for n in (1, 2, 1)) if cross else None
        widen, narrow = _linear(hidden, 4 * hidden, generator), _linear(4 * hidden, hidden, generator)
        self.feed = nn.Sequential(widen, nn.GELU(), narrow)

    def forward(self, hidden: Tensor, mask: Tensor, memory: Tensor | None = None) -> Tensor:
        """``hidden``: ``[batch, tokens, hidden]``; ``mask``: which tokens are there, bool ``[batch, tokens]``;
        ``memory``: ``[batch, memory, hidden]``."""
        into, out = self.own
        query, key, value = into(self.norms[0](hidden)).chunk(3, 2)
        hidden = hidden + out(self._attend(query, key, value, mask))
        if self.other is not None and memory is not None:
            ask, know, give = self.other
            key, value = know(memory).chunk(2, 2)
            hidden = hidden + give(self._attend(ask(self.norms[2](hidden)), key, value, None))
        fed: Tensor = hidden + self.feed(self.norms[1](hidden))
        return fed

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        heads = [part.view(*part.shape[:2], self.heads, -1).transpose(1, 2) for part in (query, key, value)]
        seen = None if mask is None else mask[:, None, None, :]
        found = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], attn_mask=seen)
        return found.transpose(1, 2).flatten(2)


class EncoderDecoder(nn.Module):
    """Everything that is trained."""

    def __init__(self, spec: CodecSpec, tokenizer: Tokenizer, behaviors: int, generator: torch.Generator) -> None:
        super().__init__()
        self.encoder = Encoder(spec, tokenizer, generator)
        self.decoder = Decoder(spec, tokenizer, generator)
        self.directions = nn.Parameter(0.1 * torch.randn(behaviors, spec.latent_dim, generator=generator))
        """What is added to a latent for its network to gain each behaviour ``[behaviors, latent]``."""

    @torch.no_grad()
    def fit(self, subjects: Subjects, present: tuple[Tensor, Tensor]) -> None:
        """Set what is not learned, from training subjects; ``present``: which entries of the inputs and of the weights
        each has, bool.

        The linear parts of an ``mlp`` begin as the principal components of the weights, which is where a straight
        reconstruction would end.
        """
        encoder, decoder = self.encoder, self.decoder
        encoder.fit(subjects.inputs, present[0])
        decoder.fit(subjects.weights, present[1])
        if encoder.straight is None or decoder.spec.architecture != "mlp":
            return
        deviations = (subjects.weights - decoder.standard.mean) * present[1]
        latent = encoder.straight.out_features
        axes, _ = principal(deviations[:MAX_FITTED], latent)
        scores = deviations @ axes.T
        typical = scores.std().clamp_min(1e-12)
        features = torch.cat([encoder.features(subjects.inputs), encoder.descriptors[subjects.shape]], 1)
        rows = F.pad(features, (0, 1), value=1.0).double()
        gram = rows.T @ rows + RIDGE * torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
        solution = torch.linalg.solve(gram, rows.T @ (scores / typical).double()).float()
        for linear in (encoder.straight, decoder.straight):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        encoder.straight.weight[: len(axes)] = solution[:-1].T
        encoder.straight.bias[: len(axes)] = solution[-1]
        decoder.straight.weight[:, : len(axes)] = (axes * typical / decoder.standard.scale).T
        for layers in (encoder.layers, decoder.layers):
            # At first the bends add little.
            for parameter in layers[-1].parameters():
                parameter.mul_(0.1)


def principal(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first principal axes of centred ``rows`` ``[n, size]``, at most ``count`` and none of hardly any variance:
    ``[axes, size]``; and the standard deviations along them, descending."""
    rows = rows.double()
    wide = rows.shape[1] > rows.shape[0]
    # Of the smaller of the two products; its eigenvalues are the squares of the singular values.
    values, vectors = torch.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    kept = (values > 1e-9 * values[-1]).nonzero().squeeze(1).flip(0)[:count]
    axes = (rows.T @ vectors[:, kept] / values[kept].sqrt()).T if wide else vectors[:, kept].T
    return axes.float().contiguous(), (values[kept] / len(rows)).sqrt().float()


def pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """``[batch, hidden]`` of ``[batch, tokens, hidden]`` over the tokens that are there (bool ``[batch, tokens]``);
    ``flatten``: ``[batch, tokens x hidden]``, zeros for those that are not."""
    there = mask.unsqueeze(2)
    match pooling:
        case "mean":
            return (hidden * there).sum(1) / there.sum(1).clamp_min(1)
        case "max":
            return hidden.masked_fill(~there, float("-inf")).amax(1)
        case "cls":
            return hidden[:, 0]
        case _:
            return (hidden * there).flatten(1)


def descriptors(layout: Layout) -> Tensor:
    """What tells the shapes of a layout apart, ``[shapes, numbers]``: relative depth and widths, and the activation
    one-hot; no numbers where there is one shape."""
    if len(layout.shapes) == 1:
        return torch.zeros(1, 0)
    depth = len(layout.envelope.hidden)
    rows = []
    for shape in layout.shapes:
        widths = [have / most for have, most in zip(shape.hidden, layout.envelope.hidden, strict=False)]
        widths += [0.0] * (depth - len(widths))
        rows.append([len(shape.hidden) / depth, *widths, *(float(name == shape.activation) for name in ACTIVATIONS)])
    return torch.tensor(rows)


def sinusoids(tokens: int, hidden: int) -> Tensor:
    """Sinusoidal positions ``[tokens, hidden]`` (Vaswani et al. 2017, arXiv 1706.03762, section 3.5)."""
    angle = torch.arange(tokens).unsqueeze(1) / 10_000 ** (torch.arange(0, hidden, 2) / hidden)
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)[:, :hidden]


def perceptron(widths: Sequence[int], generator: torch.Generator) -> nn.Sequential:
    """Linear layers with GELU between them."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [_linear(fan_in, fan_out, generator), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def _linear(fan_in: int, fan_out: int, generator: torch.Generator) -> nn.Linear:
    """Initialised as ``torch.nn.Linear`` does, from ``generator``."""
    linear, bound = nn.Linear(fan_in, fan_out), 1 / math.sqrt(fan_in)
    nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
    nn.init.uniform_(linear.bias, -bound, bound, generator=generator)
    return linear


def _table(rows: int, hidden: int, generator: torch.Generator) -> nn.Parameter:
    return nn.Parameter(0.02 * torch.randn(rows, hidden, generator=generator))
