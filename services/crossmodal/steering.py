"""Edits of behaviours: directions and probes in latent space, what an edit asks for, and how well it was done."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import NamedTuple

import torch
from torch import Tensor

from ethogram.specs.edits import Edit, Mode
from services.runtime.devices import double

REMOVALS = 0.4
"""Share of removals among the edits of training."""
TARGET_GATE, LOCAL_GATE = 0.85, -0.02
"""Least accuracy where an edit decides, and least change of accuracy elsewhere, for it to pass."""
RIDGE = 1.0
"""Regularisation of linear probes, in subjects."""


class Probe(NamedTuple):
    """Linear probes of each behaviour from the latent, by least squares: positive where a subject has it."""

    weights: Tensor
    """``[latent, behaviors]``."""
    bias: Tensor
    """``[behaviors]``."""

    @classmethod
    def fit(cls, latents: Tensor, labels: Tensor) -> Probe:
        """From latents ``[subjects, latent]`` and behaviours, bool ``[subjects, behaviors]``."""
        mean = latents.mean(0)
        rows, has = double(latents - mean), double(labels)
        # Both classes count alike, however rare a behaviour is.
        share = has.mean(0).clamp(1e-6, 1 - 1e-6)
        targets = has / share - (1 - has) / (1 - share)
        gram = rows.T @ rows + RIDGE * torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
        weights = torch.linalg.solve(gram, rows.T @ targets).to(latents)
        # Half way between the classes' means.
        scores = (latents - mean) @ weights
        middle = sum((scores * members).sum(0) / members.sum(0).clamp_min(1) for members in (labels, ~labels)) / 2
        return cls(weights, -middle - mean @ weights)

    def __call__(self, latents: Tensor) -> Tensor:
        """Scores ``[subjects, behaviors]``."""
        return latents @ self.weights + self.bias

    def calibrated(self, latents: Tensor, labels: Tensor) -> Probe:
        """The probe whose scores are the log-odds of having each behaviour (Platt 1999: a logistic regression on the
        scores, here by Newton's method), from subjects as in :meth:`fit`."""
        scores, has = double(self(latents)), double(labels)
        scale, shift = scores.std(0).clamp_min(1e-12), scores.mean(0)
        x = (scores - shift) / scale
        slope, offset = torch.ones_like(scale), torch.zeros_like(scale)
        for _ in range(25):
            chance = torch.sigmoid(slope * x + offset)
            error, weight = chance - has, chance * (1 - chance)
            # Regularised: where a line separates the classes, the slope would grow without bound.
            first = torch.stack([(error * x).sum(0) + slope - 1, error.sum(0)], 1)
            cross = (weight * x).sum(0)
            second = torch.stack([(weight * x * x).sum(0) + 1, cross, cross, weight.sum(0) + 1e-6], 1).view(-1, 2, 2)
            step = torch.linalg.solve(second, first)
            slope, offset = slope - step[:, 0], offset - step[:, 1]
        factor, shift, offset = (tensor.to(latents) for tensor in (slope / scale, shift, offset))
        return Probe(self.weights * factor, (self.bias - shift) * factor + offset)


def mean_differences(latents: Tensor, labels: Tensor) -> Tensor:
    """For each behaviour, the mean latent of the subjects that have it minus that of those that lack it:
    ``[behaviors, latent]``."""
    classes = (members.to(latents.dtype) for members in (labels, ~labels))
    has, lacks = (members.T @ latents / members.sum(0).clamp_min(1).unsqueeze(1) for members in classes)
    return has - lacks


def classifier_normals(latents: Tensor, labels: Tensor) -> Tensor:
    """For each behaviour, the normal of its linear probe without what it shares with the others' normals, as long as
    the classes' means are apart along it: ``[behaviors, latent]`` (the edit directions of Dravid et al. 2024, arXiv
    2406.09413)."""
    normals = Probe.fit(latents, labels).weights.T
    directions = []
    for i, (normal, difference) in enumerate(zip(normals, mean_differences(latents, labels), strict=True)):
        basis = torch.linalg.qr(torch.cat([normals[:i], normals[i + 1 :]]).T).Q
        alone = normal - basis @ (basis.T @ normal)
        directions.append(alone * (difference @ alone) / alone.square().sum().clamp_min(1e-12))
    return torch.stack(directions)


def signs(edits: Sequence[Edit], behaviors: Sequence[str]) -> Tensor:
    """-1 for the behaviours that the edits remove and 1 for those that they add: float32 ``[behaviors]``."""
    signs = torch.zeros(len(behaviors))
    for name, sign in (change for edit in edits for change in edit.signs.items()):
        signs[behaviors.index(name)] = sign
    return signs


def every_edit(behaviors: Sequence[str], *, replace: bool) -> list[Edit]:
    """To gain and to lose each behaviour; with ``replace`` also to have another one instead."""
    edits = [Edit(operation, name) for name in behaviors for operation in ("add", "remove")]
    return edits + [Edit("replace", old, new) for old, new in permutations(behaviors if replace else (), 2)]


def choose(selected: Tensor, several: float, generator: torch.Generator) -> Tensor:
    """Draw behaviours for each subject to gain or lose, int64 ``[subjects, 2]``; a single one is in both columns.

    ``selected``: bool ``[subjects, patterns]``. Drawn evenly, subjects with few patterns would hardly ever lose one:
    the first is one that the subject has in ``REMOVALS`` of the cases. In the share ``several`` a second changes the
    other way, if there is such a behaviour: one is lost and one is gained.
    """
    count = selected.sum(1, keepdim=True)
    lacking = selected.shape[1] - count
    odds = torch.where(selected, REMOVALS / count.clamp_min(1), (1 - REMOVALS) / lacking.clamp_min(1))
    first = torch.multinomial(odds, 1, generator=generator)
    opposite = selected != selected.gather(1, first)
    second = torch.multinomial(opposite + 1e-9 * torch.ones_like(odds), 1, generator=generator)
    both = (torch.rand(first.shape, generator=generator) < several) & opposite.any(1, keepdim=True)
    return torch.cat([first, torch.where(both, second, first)], 1)


def toggle(selected: Tensor, patterns: Tensor) -> tuple[Tensor, Tensor]:
    """Remove ``patterns`` from the subjects' behaviours where they have them, and add them elsewhere.

    ``selected``: bool ``[subjects, patterns]``; ``patterns``: int64 ``[subjects, edited]``; repeats count once. Returns
    the behaviours after the edit, and the signs of the directions, -1, 0 or 1 ``[subjects, patterns]``.
    """
    edited = torch.zeros_like(selected).scatter_(1, patterns, torch.ones_like(patterns, dtype=torch.bool))
    return selected ^ edited, edited * (1.0 - 2.0 * selected.float())


def edited(source: Tensor, decoded: Tensor, steered: Tensor, mode: Mode) -> Tensor:
    """The edited weights, all ``[..., size]``: ``steered``, or ``source + (steered - decoded)`` for residual edits.

    ``decoded`` and ``steered`` are decodings of a latent before and after the edit. The reconstruction's error cancels
    in the residual form; a null edit returns the source exactly.
    """
    return steered if mode == "direct" else source + (steered - decoded)


class Scores(NamedTuple):
    """How edits went, ``[edits]`` each."""

    target: Tensor
    """Accuracy where the edit decides; NaN where it decides nothing."""
    local: Tensor
    """Change of accuracy elsewhere."""
    kept: Tensor
    """Share of the answers elsewhere that are the source's own; NaN where the edit decides everything."""

    @property
    def target_gate(self) -> Tensor:
        """Whether the behaviour changed."""
        return self.target >= TARGET_GATE

    @property
    def all_gate(self) -> Tensor:
        """Whether the behaviour changed and the rest did not get worse."""
        return self.target_gate & (self.local >= LOCAL_GATE)


def score(answers: Tensor, source: Tensor, before: Tensor, after: Tensor) -> Scores:
    """How edited networks' ``answers`` compare with those of their ``source``; all bool ``[edits, n]``."""
    decided = before != after
    right, was_right = answers == after, source == before
    # One division: the difference of two rounded shares would miss the gate where exactly 2 % are lost.
    change = ((right & ~decided).sum(1) - (was_right & ~decided).sum(1)) / (~decided).sum(1).clamp_min(1)
    return Scores(share(right, decided), change, share(answers == source, ~decided))


def share(hit: Tensor, where: Tensor) -> Tensor:
    """Share of ``where`` (bool ``[rows, n]``) that is hit; NaN for a row where it is empty."""
    return (hit & where).sum(1) / where.sum(1)
