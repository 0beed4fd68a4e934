"""The plain recipe, as it is usually written: a dataset that tokenizes sample by sample, batches of 16, one model, and
the contrastive and the reconstruction loss. What the steering benchmark compares its training step with."""

from __future__ import annotations

import time
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ethogram.specs.crossmodal import CodecSpec
from services.zoo.dataset import Zoo


class TokenDataset(Dataset[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]):
    """One subject at a time: signature tokens, weight tokens, their masks, labels."""

    def __init__(self, zoo: Zoo) -> None:
        self.signatures, self.labels = zoo.signatures, zoo.labels
        self.networks = zoo.params
        self.widest = max(fan_in for fan_in, _ in zoo.architecture.layers) + 1

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        signature = torch.stack([neuron.clone() for neuron in self.signatures[index]])
        tokens, masks = [], []
        for layer in range(len(self.networks) // 2):
            weight = self.networks[f"layers.{layer}.weight"][index]
            bias = self.networks[f"layers.{layer}.bias"][index]
            for row, one in zip(weight, bias, strict=True):
                token, mask = torch.zeros(self.widest), torch.zeros(self.widest)
                token[: len(row)], token[len(row)] = row, one
                mask[: len(row) + 1] = 1
                tokens.append(token)
                masks.append(mask)
        return signature, torch.ones(len(signature)), torch.stack(tokens), torch.stack(masks), self.labels[index]


class PlainCodec(nn.Module):
    """Flattened tokens through perceptrons of the sizes of ``spec``."""

    def __init__(self, spec: CodecSpec, inputs: int, outputs: int) -> None:
        super().__init__()

        def perceptron(widths: list[int]) -> nn.Sequential:
            layers: list[nn.Module] = []
            for fan_in, fan_out in pairwise(widths):
                layers += [nn.Linear(fan_in, fan_out), nn.GELU()]
            return nn.Sequential(*layers[:-1])

        hidden = [spec.hidden_dim] * spec.depth
        self.encoder = perceptron([inputs, *hidden, spec.latent_dim])
        self.decoder = perceptron([spec.latent_dim, *hidden, outputs])

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        latents = self.encoder(tokens.flatten(1))
        return latents, self.decoder(latents)


def contrastive(latents: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Supervised contrastive loss over subjects that share a behaviour."""
    unit = F.normalize(latents, dim=1)
    itself = torch.eye(len(unit), dtype=torch.bool)
    likeness = (unit @ unit.T / temperature).masked_fill(itself, float("-inf"))
    shared = ((labels.float() @ labels.float().T) > 0) & ~itself
    logs = likeness.log_softmax(1).masked_fill(itself, 0)
    return -((shared * logs).sum(1) / shared.sum(1).clamp_min(1)).mean()


def examples_per_second(zoo: Zoo, spec: CodecSpec, seconds: float, batch: int = 16) -> float:
    """Subjects a second of the plain training loop, measured for about ``seconds``."""
    loader = DataLoader(TokenDataset(zoo), batch_size=batch, shuffle=True, drop_last=True)
    signature, _, tokens, _, _ = next(iter(loader))
    model = PlainCodec(spec, signature[0].numel(), tokens[0].numel())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    done, began = 0, time.perf_counter()
    while True:
        for signatures, _, wanted, mask, labels in loader:
            latents, decoded = model(signatures)
            error = (decoded.view_as(wanted) - wanted).square() * mask
            loss = 0.5 * contrastive(latents, labels, 0.1) + 0.5 * error.sum() / mask.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
            done += len(labels)
            if time.perf_counter() - began >= seconds:
                return done / (time.perf_counter() - began)
