"""Evaluation of a codec on held-out subjects and held-out sequences, beside its controls.

*Agreement*: share of equal predicted classes of decoded and source network, a mean over the strata of the evaluation
set (one for each pattern, one for none) with equal weight.

*Edits*: every held-out subject with patterns S, for every pattern p: add where it lacks p; remove where it has p and
another. In a zoo whose subjects have one pattern each, so that none can be removed, also: replace it by each other one.
y0 and y1 are the exact labels before and after, C the sequences where they differ. An edit with fewer than 16 sequences
in C is skipped, and so is a removal whose subject is right on less than .8 of C. *target* is the accuracy of y1 on C;
*local* the accuracy of y1 outside C after the edit minus the accuracy of y0 there before; *kept* the share of answers
outside C that are the source's own, its errors too; *target_gate*: target >= .85; *all_gate*: that and local >= -.02.
Figures are macro means over the patterns that have edits.

*Controls* of edits: ``null`` (no shift), ``random`` (a direction of the same norm, drawn for each edit), ``reverse``
(the direction the other way). Controls of decoding: the latent of another held-out subject with the same patterns, and
the nearest training subject's own weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ethogram.specs.edits import DIRECTIONS, MODES, OPERATIONS, Direction, Edit, Mode
from services.crossmodal.baselines import Baselines
from services.crossmodal.codec import Codec
from services.crossmodal.data import Queries, Subjects, split_subjects
from services.crossmodal.steering import Probe, Scores, edited, every_edit, score, share
from services.runtime.run import Run
from services.runtime.seeds import generator
from services.zoo.dataset import Zoo
from services.zoo.pools import Evaluation

MIN_DECIDED, MIN_OWN_ACCURACY = 16, 0.8
CONTROLS = ("null", "random", "reverse")
OTHERS: tuple[Direction, ...] = ("mean_difference", "classifier_normal")
VARIANTS = ("edit", *CONTROLS, *OTHERS)
CHUNK = 64
"""Edits that are run at once, and most edits of one kind that a curve is taken of."""
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""Of the curves."""


class PossibleEdits(NamedTuple):
    """Edits of one kind; the first axis is the edits'."""

    subject: Tensor
    """Positions among the judged subjects: int64 ``[edits]``."""
    before: Tensor
    """Exact labels before: bool ``[edits, n]``."""
    after: Tensor
    """Exact labels after."""
    skipped: int
    """Edits left out: too few sequences that decide, or a subject too weak."""


def evaluate(codec: Codec, zoo: Zoo, run: Run | None = None) -> dict[str, Any]:
    """Judge ``codec`` on the subjects of ``zoo`` that its spec held out. Raises :class:`InvalidInput` for another zoo
    than it was trained on. Returns JSON values:

    - ``figures``: dotted name to number (``agreement``, ``add.all_gate``, ``direct.remove.target_mean``,
      ``controls.max_all_gate``, ...); the short names ``add.*`` and ``remove.*`` are residual edits;
    - ``steering``: a row for each pattern, operation, mode and variant (``edit``, a control, or another kind of
      direction);
    - ``reconstruction``: of ``all`` weights and of each layer, ``mse``, ``mae``, ``rmse``, ``cosine``,
      ``relative_error`` and ``r2``;
    - ``others``: other ways to the same edits, see :class:`services.crossmodal.baselines.Baselines`;
    - ``curves``: target and local over the strength of residual edits, by operation and kind of direction;
    - ``probes``: for each behaviour, how well a linear probe reads it from the latent (``balanced_accuracy``, ``auc``);
    - ``subjects``: how many were trained on and judged.
    """
    run = run or Run()
    codec.check_zoo(zoo)
    split = split_subjects(zoo.labels, zoo.shape, codec.spec)
    subjects = codec.preprocessor.subjects(zoo, split.held_out, codec.device)
    train = codec.preprocessor.subjects(zoo, split.train, codec.device)
    source = codec.yes(subjects.weights, subjects.shape)
    edits = every_edit([p.name for p in codec.patterns], replace=bool((zoo.labels.sum(1) == 1).all()))
    run.stage("evaluate", len(edits) + 1, "edits")
    figures, decoded = judge_decoding(codec, train, subjects)
    run.advance(1)
    rows: list[dict[str, Any]] = []
    for done, edit in enumerate(edits, 2):
        rows += judge_edit(codec, subjects, decoded, source, edit)
        run.advance(done)
    figures |= summary(rows)
    baselines = Baselines(codec, train, Queries.build(zoo.universe, codec.layout.envelope, codec.spec.seed))
    others = judge_others(codec, subjects, decoded, source, edits, baselines=baselines)
    ways = product(*(dict.fromkeys(row[key] for row in others) for key in ("variant", "operation")))
    for variant, operation in ways:
        if group := [row for row in others if (row["variant"], row["operation"]) == (variant, operation)]:
            figures[f"{operation}.{variant}.all_gate"] = _mean(group, "all_gate")
    probes = judge_probes(codec, train, subjects, decoded)
    for name in ("balanced_accuracy", "auc") if probes else ():
        figures[f"probes.{name}"] = _mean(list(probes.values()), name)
    return {
        "figures": figures,
        "reconstruction": judge_reconstruction(codec, subjects, decoded),
        "probes": probes,
        "others": others,
        "curves": judge_curves(codec, subjects, decoded, source, edits),
        "steering": rows,
        "subjects": {"train": len(split.train), "held_out": len(split.held_out)},
    }


class Decoded(NamedTuple):
    """Judged subjects after the codec: latents ``[subjects, latent]``, their decodings ``[subjects, size]``."""

    latents: Tensor
    weights: Tensor


@torch.no_grad()
def judge_decoding(codec: Codec, train: Subjects, subjects: Subjects) -> tuple[dict[str, float], Decoded]:
    """How well decoded networks do what their sources do, and whether that is due to the latent."""
    evaluation, shape = codec.evaluation, subjects.shape
    latents = codec.latents(subjects.inputs, shape)
    weights = codec.decodings(latents, shape)
    source, decoded = codec.yes(subjects.weights, shape), codec.yes(weights, shape)
    matched = _agreement(evaluation, decoded == source)
    constant = max(float(_agreement(evaluation, source == answer).mean()) for answer in (True, False))
    figures = {
        "agreement": float(matched.mean()),
        "agreement_balanced": float(_balanced(decoded, source).mean()),
        "agreement_constant": constant,
    }
    if len(weights) > 1:
        spread = torch.pdist(weights).mean() / torch.pdist(subjects.weights).mean().clamp_min(1e-12)
        figures["spread"] = float(spread)
    other = same_label_partner(subjects.labels)
    have = other >= 0
    if bool(have.any()):
        swapped = _agreement(evaluation, decoded[other[have]] == source[have])
        figures["same_label.agreement"] = float(swapped.mean())
        figures["matched_beats_same_label"] = float((matched[have] > swapped).float().mean())
    nearest = torch.cdist(latents, codec.latents(train.inputs, train.shape)).argmin(1)
    copied = _agreement(evaluation, codec.yes(train.weights[nearest], train.shape[nearest]) == source)
    figures["nearest_train.agreement"] = float(copied.mean())
    figures["matched_beats_nearest_train"] = float((matched > copied).float().mean())
    return figures, Decoded(latents, weights)


@torch.no_grad()
def judge_reconstruction(codec: Codec, subjects: Subjects, decoded: Decoded) -> dict[str, dict[str, float]]:
    """Errors of decoded weights, of ``all`` and of each layer that any network has, over the weights that each has.

    ``cosine`` and ``relative_error`` (norm of the difference over the source's norm) are means over the networks;
    ``r2`` is against the training mean.
    """
    present = codec.layout.present.to(subjects.shape.device)[subjects.shape]
    mean = codec.model.decoder.standard.mean
    columns, start = {"all": slice(None)}, 0
    for layer, (fan_in, fan_out) in enumerate(codec.layout.envelope.layers):
        end = start + (fan_in + 1) * fan_out
        columns[f"layers.{layer}"], start = slice(start, end), end
    errors = {}
    for name, column in columns.items():
        mask = present[:, column]
        if not bool(mask.any()):
            # Only networks deeper than the held-out ones have this layer.
            continue
        source, output = subjects.weights[:, column] * mask, decoded.weights[:, column] * mask
        difference = output - source
        squared, count = float(difference.square().sum()), int(mask.sum())
        spread = float(((source - mean[column]) * mask).square().sum())
        norms, have = source.norm(dim=1), mask.any(1)
        errors[name] = {
            "mse": squared / count,
            "mae": float(difference.abs().sum()) / count,
            "rmse": (squared / count) ** 0.5,
            "cosine": float(torch.cosine_similarity(output, source, dim=1)[have].mean()),
            "relative_error": float((difference.norm(dim=1) / norms.clamp_min(1e-12))[have].mean()),
            "r2": 1 - squared / max(spread, 1e-12),
        }
    return errors


@torch.no_grad()
def judge_probes(codec: Codec, train: Subjects, subjects: Subjects, decoded: Decoded) -> dict[str, dict[str, float]]:
    """How well linear probes, fitted on the training subjects' latents, predict each behaviour of held-out subjects."""
    scores = Probe.fit(codec.latents(train.inputs, train.shape), train.labels)(decoded.latents)
    figures = {}
    for pattern, logits, has in zip(codec.patterns, scores.T, subjects.labels.T, strict=True):
        if not (has.any() and (~has).any()):
            continue
        ahead = logits[has].unsqueeze(1) - logits[~has].unsqueeze(0)
        figures[pattern.name] = {
            "balanced_accuracy": float(((logits[has] > 0).float().mean() + (logits[~has] <= 0).float().mean()) / 2),
            "auc": float(((ahead > 0).float() + (ahead == 0).float() / 2).mean()),
        }
    return figures


@torch.no_grad()
def judge_curves(
    codec: Codec, subjects: Subjects, decoded: Decoded, source: Tensor, edits: Sequence[Edit]
) -> list[dict[str, float | str]]:
    """What residual edits of each kind of direction do as they grow stronger: macro means over ``edits``, of each
    operation; ``source``: the subjects' own answers, bool ``[subjects, n]``."""
    by_point: dict[tuple[str, str, float], list[dict[str, float]]] = {}
    for edit, possible in _samples(codec, subjects, source, edits):
        index = possible.subject
        chosen = subjects.at(index)
        for kind in DIRECTIONS:
            shift = codec.signs([edit]) @ codec.directions[kind]
            for strength in STRENGTHS:
                steered = codec.model.decoder(decoded.latents[index] + strength * shift, chosen.shape)
                weights = edited(chosen.weights, decoded.weights[index], steered, "residual")
                scores = score(codec.yes(weights, chosen.shape), source[index], possible.before, possible.after)
                by_point.setdefault((edit.operation, kind, strength), []).append(_means(scores))
    return [
        {"operation": operation, "direction": kind, "strength": strength, **{n: _mean(rows, n) for n in rows[0]}}
        for (operation, kind, strength), rows in by_point.items()
    ]


def judge_others(
    codec: Codec, subjects: Subjects, decoded: Decoded, source: Tensor, edits: Sequence[Edit], *, baselines: Baselines
) -> list[dict[str, Any]]:
    """What the :class:`Baselines` reach, on at most ``CHUNK`` subjects each; a row for each edit and baseline."""
    rows: list[dict[str, Any]] = []
    for edit, possible in _samples(codec, subjects, source, edits):
        chosen = subjects.at(possible.subject)
        labels = (source[possible.subject], possible.before, possible.after)
        for name, (weights, available) in baselines.edit(chosen, decoded.latents[possible.subject], edit).items():
            if bool(available.any()):
                predictions = codec.yes(weights[available], chosen.shape[available])
                scores = score(predictions, *(tensor[available] for tensor in labels))
                row = {"pattern": edit.label, "operation": edit.operation, "variant": name}
                rows.append({**row, "edits": int(available.sum()), **_means(scores)})
    return rows


@torch.no_grad()
def judge_edit(codec: Codec, subjects: Subjects, decoded: Decoded, source: Tensor, edit: Edit) -> list[dict[str, Any]]:
    """The rows of one edit and its controls, in both modes; ``source``: the subjects' own answers, bool ``[subjects,
    n]``."""
    signs = codec.signs([edit])
    possible = possible_edits(codec.evaluation, subjects.labels, source, edit, signs)
    count = len(possible.subject)
    row = {"pattern": edit.label, "operation": edit.operation, "edits": count, "skipped": possible.skipped}
    if not count:
        return [row]
    direction = signs @ codec.directions["learned"]
    noise_generator = generator(codec.spec.seed, "random direction", edit.label, edit.operation)
    noise = torch.randn(count, len(direction), generator=noise_generator).to(direction)
    noise *= direction.norm() / noise.norm(dim=1, keepdim=True)
    shifts = {"edit": direction, "null": 0 * direction, "random": noise, "reverse": -direction}
    shifts |= {kind: signs @ codec.directions[kind] for kind in OTHERS}
    results: dict[tuple[Mode, str], list[Scores]] = {(mode, name): [] for mode in MODES for name in VARIANTS}
    for chunk in torch.split(torch.arange(count, device=direction.device), CHUNK):
        index = possible.subject[chunk]
        weights, shape = subjects.weights[index], subjects.shape[index]
        for name, shift in shifts.items():
            moved = decoded.latents[index] + (shift[chunk] if shift.dim() == 2 else shift)
            steered = codec.model.decoder(moved, shape)
            variants = torch.stack([edited(weights, decoded.weights[index], steered, mode) for mode in MODES], 1)
            predictions = codec.layout.logits(variants, shape, codec.evaluation_inputs) > 0
            for i, mode in enumerate(MODES):
                scores = score(predictions[:, i], source[index], possible.before[chunk], possible.after[chunk])
                results[mode, name].append(scores)
    return [
        {**row, "mode": mode, "variant": variant, **_means(Scores(*map(torch.cat, zip(*chunks, strict=True))))}
        for (mode, variant), chunks in results.items()
    ]


def possible_edits(evaluation: Evaluation, labels: Tensor, source: Tensor, edit: Edit, signs: Tensor) -> PossibleEdits:
    """The edits of one kind that can be judged.

    ``labels``: the subjects' patterns, bool ``[subjects, patterns]``; ``source``: their own answers, bool
    ``[subjects, n]``; ``signs``: the edit's, ``[patterns]``.
    """
    gained, lost = signs > 0, signs < 0
    fits = ~(labels & gained).any(1) & (labels | ~lost).all(1)
    if edit.operation == "remove":
        fits &= labels.sum(1) >= 2
    subject = fits.nonzero().squeeze(1)
    selected = labels[subject]
    before, after = evaluation.labels(selected), evaluation.labels(selected & ~lost | gained)
    decided = before != after
    keep = decided.sum(1) >= MIN_DECIDED
    if edit.operation == "remove":
        keep &= share(source[subject] == before, decided) >= MIN_OWN_ACCURACY
    return PossibleEdits(subject[keep], before[keep], after[keep], int((~keep).sum()))


def _samples(
    codec: Codec, subjects: Subjects, source: Tensor, edits: Sequence[Edit]
) -> Iterator[tuple[Edit, PossibleEdits]]:
    """The first ``CHUNK`` edits of each kind that can be judged, if there are any."""
    for edit in edits:
        possible = possible_edits(codec.evaluation, subjects.labels, source, edit, codec.signs([edit]))
        if len(possible.subject):
            subject, before, after, skipped = possible
            yield edit, PossibleEdits(subject[:CHUNK], before[:CHUNK], after[:CHUNK], skipped)


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Macro means over the patterns, and the highest all_gate of any control."""
    figures: dict[str, float] = {}
    for mode, operation, variant in product(MODES, OPERATIONS, VARIANTS):
        key = (mode, operation, variant)
        chosen = [row for row in rows if row["edits"] and (row["mode"], row["operation"], row["variant"]) == key]
        if not chosen:
            continue
        direct, control = ("direct",) * (mode == "direct"), (variant,) * (variant != "edit")
        prefix = ".".join([*direct, operation, *control])
        for name in ("target_mean", "target_gate", "local_mean", "kept_mean", "all_gate"):
            figures[f"{prefix}.{name}"] = _mean(chosen, name)
        if variant == "edit":
            figures[f"{prefix}.min_pattern_all_gate"] = min(row["all_gate"] for row in chosen)
    controls = [
        value for name, value in figures.items() if name.endswith("all_gate") and name.split(".")[-2] in CONTROLS
    ]
    return figures | ({"controls.max_all_gate": max(controls)} if controls else {})


def _mean(rows: Sequence[Mapping[str, float]], name: str) -> float:
    """Mean of the column ``name``."""
    return sum(row[name] for row in rows) / len(rows)


def same_label_partner(labels: Tensor) -> Tensor:
    """For each subject another one with the very same patterns (the next in a cycle), or -1: int64 ``[subjects]``."""
    partner = torch.full((len(labels),), -1, device=labels.device)
    for group in torch.unique(labels, dim=0):
        members = (labels == group).all(1).nonzero().squeeze(1)
        if len(members) > 1:
            partner[members] = members.roll(1)
    return partner


def _agreement(evaluation: Evaluation, equal: Tensor) -> Tensor:
    """Mean over the strata that have sequences, ``[subjects]``."""
    strata = evaluation.by_stratum(equal)
    return strata[:, torch.unique(evaluation.stratum)].mean(1)


def _balanced(predictions: Tensor, source: Tensor) -> Tensor:
    """Mean of the agreement where the source says yes and where it says no, ``[subjects]``."""
    return (share(predictions, source) + share(~predictions, ~source)) / 2


def _means(scores: Scores) -> dict[str, float]:
    return {
        "target_mean": float(scores.target.mean()),
        "target_gate": float(scores.target_gate.float().mean()),
        "local_mean": float(scores.local.mean()),
        "kept_mean": float(scores.kept.mean()),
        "all_gate": float(scores.all_gate.float().mean()),
    }
