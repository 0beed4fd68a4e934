"""Edits: what they ask for, and how decoded networks are run to see whether they got it."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from services.zoo.subjects import ACTIVATIONS, Architecture

Operation = Literal["add", "remove"]
Mode = Literal["residual", "direct"]
OPERATIONS: tuple[Operation, ...] = ("add", "remove")
MODES: tuple[Mode, ...] = ("residual", "direct")
REMOVALS = 0.4
"""Share of removals among the edits of training."""
SIGNS: dict[Operation, float] = {"add": 1.0, "remove": -1.0}


class Edit(NamedTuple):
    """One change of a network's behaviour."""

    operation: Operation
    behavior: str
    """Name of the behaviour, e.g. ``starts_with(A)``."""


def choose(selected: Tensor, draws: torch.Generator) -> Tensor:
    """A pattern for each subject to gain or lose, int64 ``[subjects]``; ``selected``: bool ``[subjects, patterns]``.

    Drawn evenly, subjects with few patterns would hardly ever lose one: it is one of their own in ``REMOVALS`` of the
    cases.
    """
    own = selected.sum(1, keepdim=True)
    other = selected.shape[1] - own
    odds = torch.where(selected, REMOVALS / own.clamp_min(1), (1 - REMOVALS) / other.clamp_min(1))
    return torch.multinomial(odds, 1, generator=draws).squeeze(1)


def toggle(selected: Tensor, pattern: Tensor) -> tuple[Tensor, Tensor]:
    """Each subject's patterns with one of them added where it lacks it, removed where it has it.

    ``selected``: bool ``[subjects, patterns]``; ``pattern``: int64 ``[subjects]``. Returns the patterns after the edit
    and the sign of the direction, +1 or -1, ``[subjects]``. Labels after the edit are those of the exact union of the
    patterns that remain, so a sequence that another selected pattern claims keeps its label.
    """
    column = pattern.unsqueeze(1)
    had = selected.gather(1, column)
    return selected.scatter(1, column, ~had), 1 - 2 * had.squeeze(1).float()


def edited(source: Tensor, decoded: Tensor, steered: Tensor, mode: Mode) -> Tensor:
    """The edited weights, all ``[..., size]``: ``steered``, or ``source + (steered - decoded)`` for residual edits.

    ``decoded`` and ``steered`` are decodings of a latent before and after the edit. The reconstruction's error cancels
    in the residual form; a null edit returns the source exactly.
    """
    return steered if mode == "direct" else source + (steered - decoded)


def answers(weights: Tensor, inputs: Tensor, architecture: Architecture) -> Tensor:
    """Logits ``[subjects, variants, n]`` of several variants of each subject on the same inputs.

    ``weights``: flat, ``[subjects, variants, size]``; ``inputs``: ``[input_size, n]`` for all subjects, or
    ``[subjects, input_size, n]``. Columns are examples, so that the variants' first layers are one matrix product.
    """
    subjects, variants, _ = weights.shape
    # Split rather than sliced: the gradient is then put together once, not once for each parameter.
    sizes = [math.prod(shape) for shape in architecture.shapes.values()]
    parts = torch.split(weights.flatten(0, 1), sizes, 1)
    activation = ACTIVATIONS[architecture.activation]
    hidden = inputs
    for i, (fan_in, fan_out) in enumerate(architecture.layers):
        weight, bias = parts[2 * i].view(-1, fan_out, fan_in), parts[2 * i + 1].unsqueeze(-1)
        if i > 0:
            hidden = torch.baddbmm(bias, weight, activation(hidden))
        elif inputs.dim() == 2:
            hidden = (weight.reshape(-1, fan_in) @ inputs).view(subjects * variants, fan_out, -1) + bias
        else:
            rows = weight.reshape(subjects, variants * fan_out, fan_in)
            hidden = torch.baddbmm(bias.reshape(subjects, -1, 1), rows, inputs).view(subjects * variants, fan_out, -1)
    return hidden.view(subjects, variants, -1)
