"""The encoder-decoder: signature -> latent -> weights, and a steering direction for each behaviour."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ethogram.specs.crossmodal import CodecSpec

MAX_FITTED = 2048
"""Most subjects from which the standardisation and the components are taken; the cost grows with their cube."""


class Encoder(nn.Module):
    """A multilayer perceptron over the principal components of standardised signatures."""

    mean: Tensor
    scale: Tensor
    components: Tensor

    def __init__(self, inputs: int, components: int, spec: CodecSpec, draws: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("scale", torch.ones(inputs))
        self.register_buffer("components", torch.zeros(inputs, components))
        self.layers = perceptron([components, *[spec.hidden_dim] * spec.depth, spec.latent_dim], draws)

    def fit(self, signatures: Tensor) -> None:
        """Set the standardisation and the components from training signatures ``[subjects, inputs]``."""
        signatures = signatures[:MAX_FITTED]
        deviation = signatures.std(0)
        self.mean.copy_(signatures.mean(0))
        # A neuron that is constant over the training subjects must not blow up for one that differs.
        self.scale.copy_(deviation.clamp_min(1e-3 * float(deviation.mean()) + 1e-12))
        rows = ((signatures - self.mean) / self.scale).double()
        # Of the Gram matrix: there are more numbers in a signature than subjects.
        values, vectors = torch.linalg.eigh(rows @ rows.T)
        kept = (values > 1e-9 * values[-1]).nonzero().squeeze(1).flip(0)[: self.components.shape[1]]
        axes = rows.T @ vectors[:, kept] / values[kept].sqrt()
        typical = (values[kept].mean() / len(rows)).sqrt()
        self.components.zero_()
        self.components[:, : len(kept)] = (axes / typical).float()

    def features(self, signatures: Tensor) -> Tensor:
        """What enters the layers, ``[batch, components]``, from signatures ``[batch, inputs]``; nothing learned."""
        return ((signatures - self.mean) / self.scale) @ self.components

    def forward(self, signatures: Tensor) -> Tensor:
        """Latents ``[batch, latent]`` of flat signatures ``[batch, inputs]``."""
        latents: Tensor = self.layers(self.features(signatures))
        return latents


class Decoder(nn.Module):
    """A multilayer perceptron to the flat weights of a network, standardised per weight."""

    mean: Tensor
    scale: Tensor

    def __init__(self, outputs: int, spec: CodecSpec, draws: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(outputs))
        self.register_buffer("scale", torch.ones(outputs))
        self.layers = perceptron([spec.latent_dim, *[spec.hidden_dim] * spec.depth, outputs], draws)

    def fit(self, weights: Tensor) -> None:
        """Set the standardisation from training weights ``[subjects, outputs]``."""
        deviation = weights.std(0)
        self.mean.copy_(weights.mean(0))
        self.scale.copy_(deviation.clamp_min(1e-3 * float(deviation.mean()) + 1e-12))

    def forward(self, latents: Tensor) -> Tensor:
        """Flat weights ``[batch, outputs]`` of latents ``[batch, latent]``."""
        decoded: Tensor = self.layers(latents) * self.scale + self.mean
        return decoded


class EncoderDecoder(nn.Module):
    """Everything that is trained."""

    def __init__(
        self, spec: CodecSpec, draws: torch.Generator, *, inputs: int, components: int, outputs: int, behaviors: int
    ) -> None:
        super().__init__()
        self.encoder = Encoder(inputs, components, spec, draws)
        self.decoder = Decoder(outputs, spec, draws)
        self.directions = nn.Parameter(0.1 * torch.randn(behaviors, spec.latent_dim, generator=draws))
        """What is added to a latent for its network to gain each behaviour ``[behaviors, latent]``."""


def perceptron(widths: Sequence[int], draws: torch.Generator) -> nn.Sequential:
    """Linear layers with GELU between them, initialised as ``torch.nn.Linear`` does, from ``draws``."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        linear = nn.Linear(fan_in, fan_out)
        bound = 1 / math.sqrt(fan_in)
        nn.init.uniform_(linear.weight, -bound, bound, generator=draws)
        nn.init.uniform_(linear.bias, -bound, bound, generator=draws)
        layers += [linear, nn.GELU()]
    return nn.Sequential(*layers[:-1])
