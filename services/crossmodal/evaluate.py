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
the nearest training subject's own weights. *Lookups* of edits (:class:`services.crossmodal.baselines.Baselines`) are
judged on the same edits, where there is a network to look up; ``available`` is the share of the edits for which there
is, and ``add.where_same_label.*`` are the figures of the codec's own edits there. The *oracle* solves the weights from
raw signatures by least squares (:mod:`services.zoo.oracle`): the bar for an encoder of signatures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ethogram.specs.edits import DIRECTIONS, LOOKUPS, MODES, OPERATIONS, Direction, Edit
from services.crossmodal.baselines import Baselines
from services.crossmodal.codec import Codec
from services.crossmodal.data import Queries, Subjects, split_subjects
from services.crossmodal.findings import findings
from services.crossmodal.steering import Probe, Scores, edited, every_edit, score, share
from services.runtime.run import Run
from services.runtime.seeds import generator
from services.zoo.dataset import Zoo
from services.zoo.oracle import ambiguity, recovered, solvable
from services.zoo.pools import Evaluation

MIN_DECIDED, MIN_OWN_ACCURACY = 16, 0.8
CONTROLS = ("null", "random", "reverse")
OTHERS: tuple[Direction, ...] = ("mean_difference", "classifier_normal")
VARIANTS = ("edit", *CONTROLS, *OTHERS)
_SCORES = ("target_mean", "target_gate", "local_mean", "kept_mean", "all_gate")
CHUNK = 64
"""Edits that are run at once, and most edits of one kind that a curve is taken of."""
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""Of the curves."""


class Decoded(NamedTuple):
    """Judged subjects after the codec: latents ``[subjects, latent]``, their decodings ``[subjects, size]``."""

    latents: Tensor
    weights: Tensor


class Sample(NamedTuple):
    """At most ``CHUNK`` edits of one kind; the first axis is the edits'."""

    subjects: Subjects
    decoded: Decoded
    source: Tensor
    """The subjects' own answers: bool ``[edits, n]``."""
    before: Tensor
    """Exact labels before: bool ``[edits, n]``."""
    after: Tensor
    """Exact labels after."""


class PossibleEdits(NamedTuple):
    """Edits of one kind; the first axis is the edits'."""

    subject: Tensor
    """Positions among the judged subjects: int64 ``[edits]``."""
    before: Tensor
    """Exact labels, as in :class:`Sample`."""
    after: Tensor
    skipped: int
    """Edits left out: too few sequences that decide, or a subject too weak."""

    def samples(self, subjects: Subjects, decoded: Decoded, source: Tensor) -> list[Sample]:
        """The edits in chunks; ``source``: the judged subjects' own answers, bool ``[subjects, n]``."""
        chunks = zip(*(torch.split(tensor, CHUNK) for tensor in self[:3]), strict=True)
        return [
            Sample(subjects.at(index), Decoded(*(tensor[index] for tensor in decoded)), source[index], *labels)
            for index, *labels in chunks
            if len(index)
        ]


def evaluate(codec: Codec, zoo: Zoo, run: Run | None = None) -> dict[str, Any]:
    """Judge ``codec`` on the subjects of ``zoo`` that its spec held out. Raises :class:`InvalidInput` for another zoo
    than it was trained on. Returns JSON values:

    - ``figures``: dotted name to number (``agreement``, ``add.all_gate``, ``direct.remove.target_mean``,
      ``controls.max_all_gate``, ...); the short names ``add.*`` and ``remove.*`` are residual edits;
    - ``steering``: a row for each pattern, operation, mode and variant (``edit``, a control, or another kind of
      direction);
    - ``reconstruction``: of ``all`` weights and of each layer, ``mse``, ``mae``, ``rmse``, ``cosine``,
      ``relative_error`` and ``r2``;
    - ``oracle``: the same of the networks that least squares finds from raw signatures; empty if the signatures hold
      none, or of activations;
    - ``others``: other ways to the same edits, see :class:`services.crossmodal.baselines.Baselines`;
    - ``curves``: target and local over the strength of residual edits, by operation and kind of direction;
    - ``probes``: for each behaviour, how well a linear probe reads it from the latent (``balanced_accuracy``, ``auc``);
    - ``subjects``: how many were trained on and judged;
    - ``summary``: what all this says, in sentences (:func:`services.crossmodal.findings.findings`).
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
    of_oracle, oracle = judge_oracle(codec, subjects, source)
    figures |= of_oracle
    run.advance(1)
    baselines = Baselines(codec, train, Queries.build(zoo.universe, codec.layout.envelope, codec.spec.seed))
    steering: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    for done, edit in enumerate(edits, 2):
        possible = possible_edits(codec.evaluation, subjects.labels, source, edit, codec.signs([edit]))
        samples = possible.samples(subjects, decoded, source)
        rows, edit_scores = judge_edit(codec, edit, samples, possible.skipped)
        steering += rows
        others += judge_others(codec, edit, samples, baselines, edit_scores)
        curves += judge_strengths(codec, edit, samples[0]) if samples else []
        run.advance(done)
    figures |= summary(steering)
    by_way, by_strength = _groups(others, "variant", "operation"), _groups(curves, "operation", "direction", "strength")
    judged = _groups([row for row in steering if row["edits"]], "mode", "variant", "operation")
    for (way, operation), rows in by_way.items():
        figures |= {f"{operation}.{way}.{name}": _mean(rows, name) for name in _SCORES}
        had, asked = (sum(row["edits"] for row in part) for part in (rows, judged["residual", "edit", operation]))
        figures[f"{operation}.{way}.available"] = had / asked
        for mode in MODES if way in LOOKUPS else ():
            prefix = f"{_prefix(mode, operation)}.where_{way}"
            figures |= {f"{prefix}.{name}": _mean(rows, f"{mode}.{name}") for name in _SCORES}
    probes = judge_probes(codec, train, subjects, decoded)
    for name in ("balanced_accuracy", "auc") if probes else ():
        figures[f"probes.{name}"] = _mean(list(probes.values()), name)
    why = ambiguity(codec.preprocessor.extractor, codec.layout)
    return {
        "figures": figures,
        "summary": findings(figures, codec.spec, why),
        "reconstruction": judge_reconstruction(codec, subjects, decoded.weights),
        "oracle": oracle,
        "probes": probes,
        "others": others,
        "curves": [rows[0] | {name: _mean(rows, name) for name in _SCORES} for rows in by_strength.values()],
        "steering": steering,
        "subjects": {"train": len(split.train), "held_out": len(split.held_out)},
    }


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
        "agreement_balanced": float(
            torch.stack([share(decoded, source), share(~decoded, ~source)], 1).nanmean(1).mean()
        ),
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


def judge_oracle(codec: Codec, subjects: Subjects, source: Tensor) -> tuple[dict[str, float], dict[str, Any]]:
    """Figures, and errors as in :func:`judge_reconstruction`, of the networks that least squares finds from the raw
    signatures of ``subjects``; ``source``: their own answers. Empty where the signatures do not hold what that needs.
    """
    extractor = codec.preprocessor.extractor
    if not solvable(extractor):
        return {}, {}
    found = recovered(subjects.weights, subjects.shape, codec.layout, extractor).to(codec.device)
    agreement = _agreement(codec.evaluation, codec.yes(found, subjects.shape) == source)
    return {"oracle.agreement": float(agreement.mean())}, judge_reconstruction(codec, subjects, found)


@torch.no_grad()
def judge_reconstruction(codec: Codec, subjects: Subjects, weights: Tensor) -> dict[str, dict[str, float]]:
    """Errors of ``weights`` against those of ``subjects``, of ``all`` and of each layer that any network has, over the
    weights that each has.

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
        source, output = subjects.weights[:, column] * mask, weights[:, column] * mask
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
def judge_strengths(codec: Codec, edit: Edit, sample: Sample) -> list[dict[str, Any]]:
    """What residual edits of each kind of direction do as they grow stronger: a row for each direction and strength."""
    (_, weights, shape, _), decoded = sample.subjects, sample.decoded
    rows = []
    for kind, strength in product(DIRECTIONS, STRENGTHS):
        shift = codec.signs([edit]) @ codec.directions[kind]
        steered = codec.model.decoder(decoded.latents + strength * shift, shape)
        predictions = codec.yes(edited(weights, decoded.weights, steered, "residual"), shape)
        row = {"operation": edit.operation, "direction": kind, "strength": strength}
        rows.append(row | _means(score(predictions, *sample[2:])))
    return rows


def judge_others(
    codec: Codec, edit: Edit, samples: Sequence[Sample], baselines: Baselines, edit_scores: Mapping[str, Scores]
) -> list[dict[str, Any]]:
    """What each of the :class:`Baselines` reaches, a row each; fine-tuning on the first of the samples alone. The row
    of a lookup also has, by mode, what the codec's edits reach where it has a network; ``edit_scores``: of all of these
    edits, by mode."""
    scores: dict[str, list[Scores]] = {}
    masks: dict[str, list[Tensor]] = {}
    for number, sample in enumerate(samples):
        subjects = sample.subjects
        ways = baselines.edit(subjects, sample.decoded.latents, edit, tune=number == 0)
        for name, (weights, available) in ways.items():
            masks.setdefault(name, []).append(available)
            if bool(available.any()):
                predictions = codec.yes(weights[available], subjects.shape[available])
                scored = score(predictions, *(tensor[available] for tensor in sample[2:]))
                scores.setdefault(name, []).append(scored)
    row = {"pattern": edit.label, "operation": edit.operation}
    rows = []
    for name, parts in scores.items():
        joined, available = _joined(parts), torch.cat(masks[name])
        rows.append({**row, "variant": name, "edits": len(joined.target), **_means(joined)})
        for mode, columns in edit_scores.items() if name in LOOKUPS else ():
            means = _means(Scores(*(column[available] for column in columns)))
            rows[-1] |= {f"{mode}.{score_name}": mean for score_name, mean in means.items()}
    return rows


@torch.no_grad()
def judge_edit(
    codec: Codec, edit: Edit, samples: Sequence[Sample], skipped: int
) -> tuple[list[dict[str, Any]], dict[str, Scores]]:
    """The rows of one edit and its controls, in both modes; and by mode the scores of the edit."""
    count = sum(len(sample.source) for sample in samples)
    row = {"pattern": edit.label, "operation": edit.operation, "edits": count, "skipped": skipped}
    if not count:
        return [row], {}
    signs = codec.signs([edit])
    direction = signs @ codec.directions["learned"]
    noise_generator = generator(codec.spec.seed, "random direction", edit.label, edit.operation)
    noise = torch.randn(count, len(direction), generator=noise_generator).to(direction)
    noise *= direction.norm() / noise.norm(dim=1, keepdim=True)
    shifts = {"edit": direction, "null": 0 * direction, "random": noise, "reverse": -direction}
    shifts |= {kind: signs @ codec.directions[kind] for kind in OTHERS}
    scores: dict[tuple[str, str], list[Scores]] = {key: [] for key in product(MODES, VARIANTS)}
    for name, shift in shifts.items():
        for sample, part in zip(samples, torch.split(shift.expand(count, -1), CHUNK), strict=True):
            (_, weights, shape, _), decoded = sample.subjects, sample.decoded
            steered = codec.model.decoder(decoded.latents + part, shape)
            variants = torch.stack([edited(weights, decoded.weights, steered, mode) for mode in MODES], 1)
            predictions = codec.layout.logits(variants, shape, codec.evaluation_inputs) > 0
            for mode, answers in zip(MODES, predictions.unbind(1), strict=True):
                scores[mode, name].append(score(answers, *sample[2:]))
    joined = {key: _joined(chunks) for key, chunks in scores.items()}
    rows = [{**row, "mode": mode, "variant": variant, **_means(columns)} for (mode, variant), columns in joined.items()]
    return rows, {mode: joined[mode, "edit"] for mode in MODES}


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


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Macro means over the patterns, and the highest all_gate of any control."""
    figures: dict[str, float] = {}
    groups = _groups([row for row in rows if row["edits"]], "mode", "operation", "variant")
    for mode, operation, variant in product(MODES, OPERATIONS, VARIANTS):
        if (chosen := groups.get((mode, operation, variant))) is None:
            continue
        prefix = ".".join([_prefix(mode, operation), *(variant,) * (variant != "edit")])
        figures |= {f"{prefix}.{name}": _mean(chosen, name) for name in _SCORES}
        if variant == "edit":
            figures[f"{prefix}.min_pattern_all_gate"] = min(row["all_gate"] for row in chosen)
    controls = [
        value for name, value in figures.items() if name.endswith("all_gate") and name.split(".")[-2] in CONTROLS
    ]
    return figures | ({"controls.max_all_gate": max(controls)} if controls else {})


def _prefix(mode: str, operation: str) -> str:
    """Of the figures of an operation's edits."""
    return f"direct.{operation}" if mode == "direct" else operation


def _groups(rows: Sequence[dict[str, Any]], *columns: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Rows by their values in ``columns``."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    return groups


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
    return evaluation.by_stratum(equal).nanmean(1)


def _joined(parts: Sequence[Scores]) -> Scores:
    return Scores(*map(torch.cat, zip(*parts, strict=True)))


def _means(scores: Scores) -> dict[str, float]:
    columns = (scores.target, scores.target_gate, scores.local, scores.kept, scores.all_gate)
    return {name: float(column.float().nanmean()) for name, column in zip(_SCORES, columns, strict=True)}
