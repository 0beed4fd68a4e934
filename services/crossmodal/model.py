"""Encoders to a latent and decoders to weights, and a steering direction for each behaviour.

Both work on vectors of one size for all shapes of a zoo (see :class:`services.zoo.layout.Layout`), standardised entry
by entry; the transformer, and pooling other than ``flatten``, see tokens (:mod:`services.crossmodal.tokenizer`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise, zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ethogram.specs.crossmodal import CodecSpec
from services.crossmodal.data import Preprocessor, Subjects
from services.crossmodal.tokenizer import Form, Tokens, signature_form, weights_form
from services.runtime.devices import double
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
        embedded: Tensor = self.layer[layer] + self.parameter[parameter] + self.position[token]
        embedded = embedded + self.shape(torch.stack([position, fan_out, fan_in], -1).float().log1p())
        return embedded if self.values is None else embedded + self.values(tokens.values)


class Encoder(nn.Module):
    """Signatures, weights or both to latents."""

    descriptors: Tensor
    components: Tensor

    def __init__(self, spec: CodecSpec, layout: Layout, values: int, generator: torch.Generator) -> None:
        """``values``: numbers of a signature for each neuron."""
        super().__init__()
        self.spec = spec
        forms, self.sizes = list[Form](), list[int]()
        if spec.inputs != "weights":
            forms.append(signature_form(layout, values))
            self.sizes.append(layout.neurons * values)
        if spec.inputs != "signature":
            forms.append(weights_form(layout, spec.granularity, spec.chunk))
            self.sizes.append(layout.size)
        self.forms = nn.ModuleList(forms)
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
        transformer = spec.architecture == "transformer"
        self.blocks = nn.ModuleList(Block(hidden, spec.heads, generator) for _ in range(spec.depth * transformer))
        widths = [] if transformer else [hidden] * spec.depth
        self.layers = perceptron([entering, *widths, spec.latent_dim], generator)
        # A linear path beside the perceptron, for the details of a network that its hidden layers would lose.
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
        standard: Tensor = self.standard(vectors)
        return standard @ self.components if self.spec.flat else standard

    def forward(self, features: Tensor, shape: Tensor) -> Tensor:
        """Latents ``[batch, latent]`` of :meth:`features`; ``shape``: of each network, int64 ``[batch]``."""
        if not self.spec.flat:
            features = self._pooled(features, shape)
        entering = torch.cat([features, self.descriptors[shape]], 1)
        latents: Tensor = self.layers(entering)
        return latents if self.straight is None else latents + self.straight(entering)

    def _pooled(self, features: Tensor, shape: Tensor) -> Tensor:
        """Features as tokens, through the transformer if there is one, and pooled: ``[batch, ...]``."""
        vectors = torch.split(features, self.sizes, 1)
        tokens = [form.tokens(part, shape) for form, part in zip(self.forms, vectors, strict=True)]  # type: ignore[operator]
        hidden = torch.cat([embedding(t) for embedding, t in zip(self.embeddings, tokens, strict=True)], 1)
        mask = torch.cat([t.mask for t in tokens], 1)
        if self.start is not None:
            hidden = torch.cat([self.start.expand(len(hidden), 1, -1), hidden], 1)
            mask = F.pad(mask, (1, 0), value=True)
        for block in self.blocks:
            hidden = block(hidden, mask)
        return pool(hidden, mask, self.spec.pooling)


class Decoder(nn.Module):
    """Latents to weights."""

    descriptors: Tensor
    present: Tensor

    def __init__(self, spec: CodecSpec, layout: Layout, generator: torch.Generator) -> None:
        super().__init__()
        self.spec, self.size = spec, layout.size
        self.register_buffer("descriptors", descriptors(layout))
        self.register_buffer("present", layout.present.float(), persistent=False)
        self.standard = Standard(layout.size)
        hidden, entering = spec.hidden_dim, spec.latent_dim + self.descriptors.shape[1]
        if spec.architecture == "mlp":
            self.layers = perceptron([entering, *[hidden] * spec.depth, layout.size], generator)
            self.straight = _linear(entering, layout.size, generator)
            return
        self.form = weights_form(layout, spec.granularity, spec.chunk)
        self.queries = TokenEmbedding(0, self.form, spec, generator)
        self.memory = _linear(entering, MEMORY * hidden, generator)
        self.blocks = nn.ModuleList(Block(hidden, spec.heads, generator, cross=True) for _ in range(spec.depth))
        self.values = _linear(hidden, self.form.entry.shape[2], generator)

    def forward(self, latents: Tensor, shape: Tensor) -> Tensor:
        """Flat networks ``[batch, size]`` of latents ``[batch, latent]``; ``shape``: of each network, int64
        ``[batch]``."""
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
    """A pre-norm transformer layer: self-attention, ``cross``-attention and a perceptron (Vaswani et al. 2017, arXiv
    1706.03762; Xiong et al. 2020, arXiv 2002.04745)."""

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
        project, output = self.own
        hidden = hidden + output(self._attend(project(self.norms[0](hidden)).chunk(3, 2), mask[:, None, None, :]))
        if self.other is not None and memory is not None:
            query, key_value, output = self.other
            projections = [query(self.norms[2](hidden)), *key_value(memory).chunk(2, 2)]
            hidden = hidden + output(self._attend(projections, None))
        result: Tensor = hidden + self.feed(self.norms[1](hidden))
        return result

    def _attend(self, projections: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        """Attention with queries, keys and values ``[batch, tokens, hidden]``."""
        query, key, value = (p.view(*p.shape[:2], self.heads, -1).transpose(1, 2) for p in projections)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


class EncoderDecoder(nn.Module):
    """An encoder, a decoder, and a steering direction for each behaviour."""

    def __init__(self, spec: CodecSpec, preprocessor: Preprocessor, behaviors: int, generator: torch.Generator) -> None:
        super().__init__()
        self.encoder = Encoder(spec, preprocessor.layout, preprocessor.extractor.values, generator)
        self.decoder = Decoder(spec, preprocessor.layout, generator)
        self.directions = nn.Parameter(0.1 * torch.randn(behaviors, spec.latent_dim, generator=generator))
        """What is added to a latent to gain each behaviour ``[behaviors, latent]``."""

    @torch.no_grad()
    def fit(self, subjects: Subjects, present: tuple[Tensor, Tensor]) -> None:
        """Set the standardisation and the components from training subjects, and initialise linear paths with them.

        ``present``: which entries of the inputs and of the weights each subject has, bool. The linear paths of an
        ``mlp`` start as the principal components of the weights, where linear training would end.
        """
        encoder, decoder = self.encoder, self.decoder
        encoder.fit(subjects.inputs, present[0])
        decoder.standard.fit(subjects.weights, present[1])
        if encoder.straight is None or decoder.spec.architecture != "mlp":
            return
        deviations = (subjects.weights - decoder.standard.mean) * present[1]
        latent = encoder.straight.out_features
        axes, _ = principal(deviations[:MAX_FITTED], latent)
        scores = deviations @ axes.T
        typical = scores.std().clamp_min(1e-12)
        features = torch.cat([encoder.features(subjects.inputs), encoder.descriptors[subjects.shape]], 1)
        rows = double(F.pad(features, (0, 1), value=1.0))
        gram = rows.T @ rows + RIDGE * torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
        solution = torch.linalg.solve(gram, rows.T @ double(scores / typical)).to(features)
        for linear in (encoder.straight, decoder.straight):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        encoder.straight.weight[: len(axes)] = solution[:-1].T
        encoder.straight.bias[: len(axes)] = solution[-1]
        decoder.straight.weight[:, : len(axes)] = (axes * typical / decoder.standard.scale).T
        for layers in (encoder.layers, decoder.layers):
            # At first the perceptrons add little to the linear paths.
            for parameter in layers[-1].parameters():
                parameter.mul_(0.1)


def principal(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """At most ``count`` principal axes ``[axes, size]`` of centred ``rows`` ``[n, size]``, without those of negligible
    variance; and the standard deviations along them, descending."""
    device, rows = rows.device, double(rows)
    wide = rows.shape[1] > rows.shape[0]
    # The smaller of the two products; its eigenvalues are the squares of the singular values.
    values, vectors = torch.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    kept = (values > 1e-9 * values[-1]).nonzero().squeeze(1).flip(0)[:count]
    axes = (rows.T @ vectors[:, kept] / values[kept].sqrt()).T if wide else vectors[:, kept].T
    sizes = (values[kept] / len(rows)).sqrt()
    return axes.float().contiguous().to(device), sizes.float().to(device)


def pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Pool ``[batch, tokens, hidden]`` to ``[batch, hidden]`` over the unmasked tokens (``mask``: bool ``[batch,
    tokens]``); ``flatten``: to ``[batch, tokens x hidden]``, zeros for masked ones."""
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
    """Descriptors ``[shapes, numbers]`` of a layout's shapes: relative depth and widths, and the activation one-hot; no
    numbers for a single shape."""
    if len(layout.shapes) == 1:
        return torch.zeros(1, 0)
    depth = len(layout.envelope.hidden)
    rows = []
    for shape in layout.shapes:
        widths = [width / widest for width, widest in zip_longest(shape.hidden, layout.envelope.hidden, fillvalue=0)]
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
