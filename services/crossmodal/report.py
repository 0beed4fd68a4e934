"""The report of a codec: figures, pictures, and steered networks to try."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ethogram.specs.edits import (
    DIRECTIONS,
    LOOKUPS,
    MIN_AVAILABLE,
    OPERATIONS,
    Edit,
    Operation,
    comparable_lookups,
)
from services.crossmodal.baselines import WAYS
from services.crossmodal.codec import Codec
from services.crossmodal.data import split_subjects
from services.crossmodal.evaluate import CHUNK, CONTROLS, OTHERS
from services.crossmodal.findings import prefixes
from services.crossmodal.steering import LOCAL_GATE, TARGET_GATE
from services.runtime.devices import double
from services.runtime.report import AFTER, BEFORE, CONTROL, FAINT, INK, SOFT, Panel, Report, history_plot, plot
from services.runtime.tensors import write_tensors
from services.zoo.dataset import Zoo
from services.zoo.subjects import Architecture, Params, select, unflatten

LEAST_FOR_UMAP = 500
"""With fewer networks, principal components show as much and take no time."""


def write_report(folder: Path, codec: Codec, zoo: Zoo, evaluation: dict[str, Any]) -> None:
    """Write the report of ``codec`` on ``zoo`` into ``folder``; ``evaluation`` is what ``evaluate`` returned.

    Beside ``report.html`` and its pictures: ``report.json``, the evaluation, with ``examples`` that describe the
    networks of ``steered.safetensors`` (``source.<parameter>`` and ``steered.<parameter>``, stacked in that order);
    ``held_out.safetensors``, the stacked parameters of all held-out subjects; ``held_out_labels.safetensors``, their
    ``labels``, bool ``[subjects, behaviors]``. Of several shapes these files have subjects of the most common one.

    Raises :class:`InvalidInput` for another zoo than the codec was trained on.
    """
    codec.check_zoo(zoo)
    folder.mkdir(parents=True, exist_ok=True)
    examples, tensors = steer_examples(codec, zoo)
    write_tensors(folder / "steered.safetensors", tensors)
    held_out, networks, _ = held_out_networks(codec, zoo)
    write_tensors(folder / "held_out.safetensors", networks)
    write_tensors(folder / "held_out_labels.safetensors", {"labels": zoo.labels[held_out]})

    counts, figures = evaluation["subjects"], evaluation["figures"]
    report = Report("Steering of networks by behaviour")
    report.text(
        f"""Trained on {counts["train"]:,} networks; evaluated on {counts["held_out"]:,} others and on sequences that
        training never saw. Figures of edits are means over the behaviours."""
    ).points(evaluation["summary"])
    for operation, prefix in prefixes(figures, codec.spec).items():
        report.section(f"How many edits pass: {operation}").table(*_ways(figures, operation, prefix))
    report.text(
        f"""**target**: accuracy where the edit decides; **local**: change of accuracy everywhere else; **kept**: the
        share of answers there that are still the source's. An edit passes the **target gate** at {TARGET_GATE}, and
        **both gates** if local is at least {LOCAL_GATE} too. Lookups: **nearest train**, the training network whose
        latent is nearest to the steered one; **same label**, the nearest of those with exactly the requested
        behaviours; **centroid**, the decoded mean latent of these. **Task arithmetic**: the source plus the difference
        of the mean weights with and without the behaviour. **Fine tuning**: the source, trained briefly on the exact
        labels after the edit, which no other way is given; on at most {CHUNK} edits of each kind. Controls: no edit
        (**null**), a **random** direction, the **reverse** direction. **Available**: the share of the edits for which
        there is such a network, on which alone it is judged; **edit, same subset**: the codec's edit on the same."""
    )
    alt = "Steering: target, locality and gates by behaviour"
    report.section("Edits by behaviour").figure("steering", steering_plot(evaluation), alt)
    report.text(
        f"""A lookup is judged on the edits for which there is a network; its cell is empty where that is fewer than
        {MIN_AVAILABLE:.0%} of them."""
    ).table(*_gates(evaluation))
    report.text(
        """Share of edits that pass both gates: of the three controls, of directions that were not trained, and of other
        ways to the same edits."""
    )
    report.table(*_other_ways(evaluation))
    alt = "Target and locality over the strength of edits, and one against the other"
    report.section("Strength").figure("curves", curves_plot(evaluation), alt)
    latents = all_latents(codec, zoo)
    picture = latent_map(codec, zoo, *principal_positions(latents))
    report.section("Latents").figure("latent_map", picture, "Latents by behaviour, principal components")
    if len(zoo) >= LEAST_FOR_UMAP:
        # McInnes et al. 2018, arXiv 1802.03426. Importing it takes seconds.
        from umap import UMAP

        umap = UMAP(random_state=codec.spec.seed % 2**32, n_jobs=1)
        positions = torch.from_numpy(umap.fit_transform(latents.cpu().numpy()))
        picture = latent_map(codec, zoo, positions, f"Latents of {len(zoo):,} networks, by behaviour (UMAP)")
        report.figure("clusters", picture, "Latents by behaviour, UMAP")
    report.text("How well a linear probe reads each behaviour from the latent of a held-out network:")
    probes = ([name, *row.values()] for name, row in evaluation["probes"].items())
    report.table(["behaviour", "balanced accuracy", "area under the curve"], probes)
    errors = ([name, *row.values()] for name, row in evaluation["reconstruction"].items())
    report.section("Decoded weights")
    report.table(["layer", "MSE", "MAE", "RMSE", "cosine", "relative error", "R2"], errors)
    if evaluation["oracle"]:
        report.text(
            f"""The same of networks that least squares finds from the raw signatures, without learning. They agree with
            the sources in {figures["oracle.agreement"]:.3f} of the answers, the decoded ones in
            {figures["agreement"]:.3f}. Of equal functions of one-hot inputs the one like the source is taken."""
        )
        errors = ([name, *row.values()] for name, row in evaluation["oracle"].items())
        report.table(["layer", "MSE", "MAE", "RMSE", "cosine", "relative error", "R2"], errors)
    report.section("Training", _training_summary(codec))
    if codec.history:
        report.figure("history", _history_plot(codec.history), "Losses over the steps of training")
    report.figures(figures).spec(codec.spec).write(folder, {**evaluation, "examples": examples})


def held_out_networks(codec: Codec, zoo: Zoo) -> tuple[Tensor, Params, Architecture]:
    """Held-out subjects of the most common shape: their positions in the zoo, their networks, and the shape."""
    common = int(zoo.shape.bincount().argmax())
    held_out = split_subjects(zoo.labels, zoo.shape, codec.spec).held_out
    held_out = held_out[zoo.shape[held_out] == common]
    shape = zoo.layout.shapes[common]
    return held_out, unflatten(zoo.layout.strip(zoo.weights[held_out], common), shape), shape


def steer_examples(codec: Codec, zoo: Zoo) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Apply residual edits to the first held-out subject that can gain each behaviour and the first that can lose it.

    Returns a description of each example and the tensors of ``steered.safetensors``.
    """
    held_out, networks, shape = held_out_networks(codec, zoo)
    names, labels = [pattern.name for pattern in codec.patterns], zoo.labels[held_out]
    chosen: list[tuple[int, Edit]] = []
    for name, has in zip(names, labels.T, strict=True):
        fitting: dict[Operation, Tensor] = {"add": ~has, "remove": has & (labels.sum(1) >= 2)}
        for operation, fits in fitting.items():
            chosen += [(row, Edit(operation, name)) for row in fits.nonzero().flatten()[:1].tolist()]
    if not chosen:
        return [], {}
    source = select(networks, torch.tensor([row for row, _ in chosen]))
    effects = [
        codec.effect(select(networks, torch.tensor([row])), [edit], activation=shape.activation) for row, edit in chosen
    ]
    examples = [
        {
            "subject": int(held_out[row]),
            "patterns": [name for name, has in zip(names, labels[row].tolist(), strict=True) if has],
            "edit": edit._asdict(),
            "recall_before": dict(zip(names, effect.recall[0, 0].tolist(), strict=True)),
            "recall_after": dict(zip(names, effect.recall[0, 1].tolist(), strict=True)),
        }
        for (row, edit), effect in zip(chosen, effects, strict=True)
    ]
    steered = {name: torch.cat([effect.networks[name] for effect in effects]).cpu() for name in source}
    variants = {"source": source, "steered": steered}
    return examples, {f"{v}.{name}": tensor for v, params in variants.items() for name, tensor in params.items()}


@torch.no_grad()
def all_latents(codec: Codec, zoo: Zoo) -> Tensor:
    """Latents of all subjects, ``[subjects, latent]``."""
    subjects = codec.preprocessor.subjects(zoo, torch.arange(len(zoo)), codec.device)
    return codec.latents(subjects.inputs, subjects.shape)


def principal_positions(latents: Tensor) -> tuple[Tensor, str]:
    """Positions of latents on their first two principal components, ``[subjects, 2]``, and a title for their plot."""
    centred = double(latents - latents.mean(0))
    # A latent may have a single dimension, and all latents may be equal: the missing axes are zero.
    centred = torch.nn.functional.pad(centred, (0, max(0, 2 - centred.shape[1])))
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    first, second = (values[-2:].flip(0) / values.sum().clamp_min(1e-12)).tolist()
    title = f"Latents of {len(latents):,} networks, by behaviour (PCA: {first:.0%} and {second:.0%} of the variance)"
    return (centred @ vectors[:, -2:].flip(1)).float().cpu(), title


@plot
def latent_map(codec: Codec, zoo: Zoo, positions: Tensor, title: str) -> Figure:
    """Latents at ``positions`` ``[subjects, 2]``: an overview and a panel for each behaviour."""
    labels, names = zoo.labels, [pattern.name for pattern in codec.patterns]
    palette = mpl.colormaps["tab10" if len(names) <= 10 else "tab20"]
    columns = 4
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(13.5, max(5.6, 1.85 * rows + 1.2)))
    halves: Any = figure.subfigures(1, 2, width_ratios=(1, 1.25))
    figure.suptitle(title)
    overview = halves[0].subplots()
    single = labels.sum(1) == 1
    overview.scatter(*positions[~single].T, s=7, c=FAINT, linewidths=0, label="several behaviours")
    panels = halves[1].subplots(rows, columns, squeeze=False).flatten().tolist()
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    for i, (name, has, panel) in enumerate(zip(names, labels.T, panels, strict=False)):
        color = palette(i % palette.N)
        overview.scatter(*positions[single & has].T, s=16, color=color, linewidths=0, label=name)
        panel.scatter(*positions[~has].T, s=3, c=FAINT, linewidths=0)
        panel.scatter(*positions[has].T, s=4, color=color, linewidths=0)
        panel.set_title(f"{name}  ({int(has.sum())})", fontsize=8.5)
    overview.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=3, handletextpad=0.1, markerscale=1.6)
    overview.set_title("networks with one behaviour, coloured by it")
    for panel in (overview, *panels):
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(True)
    return figure


@plot
def steering_plot(evaluation: dict[str, Any]) -> Figure:
    """Residual edits of held-out subjects: the behaviour before and after, other accuracy, and the share that pass."""
    steering = evaluation["steering"]
    rows = {(r["operation"], r["pattern"], r["variant"]): r for r in steering if r.get("mode") == "residual"}
    lookups: dict[tuple[str, str], list[float]] = {}
    for (operation, pattern, _), share in comparable_lookups(evaluation).items():
        lookups.setdefault((operation, pattern), []).append(share)
    # Which lookup is best is not known where one of them cannot be compared.
    most = max(map(len, lookups.values()), default=0)
    best_lookups = {edit: max(shares) for edit, shares in lookups.items() if len(shares) == most}
    # Operations with edits to judge; replacements are of pairs, the others of single behaviours.
    behaviors = {
        operation: list(dict.fromkeys(row["pattern"] for row in steering if row["operation"] == operation))
        for operation in OPERATIONS
        if any(operation == judged for judged, _, _ in rows)
    }
    heights = [0.4 + 0.25 * len(names) for names in behaviors.values()]
    figure = Figure(figsize=(13.5, 1.6 + sum(heights)))
    figure.suptitle("Steering held-out networks: residual edits, held-out sequences")
    ratios: dict[str, Any] = {"width_ratios": (1.25, 1, 1), "height_ratios": heights or None}
    axes = figure.subplots(max(1, len(behaviors)), 3, sharey="row", squeeze=False, **ratios)
    for (target, local, gate), (operation, names) in zip(axes, behaviors.items(), strict=False):
        judged = {y: name for y, name in enumerate(reversed(names)) if (operation, name, "edit") in rows}
        ys = list(judged)
        before = [rows[operation, name, "null"]["target_mean"] for name in judged.values()]
        after, change, passed = (
            [rows[operation, name, "edit"][key] for name in judged.values()]
            for key in ("target_mean", "local_mean", "all_gate")
        )
        target.hlines(ys, before, after, color=FAINT, lw=3, zorder=1)
        target.scatter(before, ys, s=34, color=BEFORE, zorder=2, label="before")
        target.scatter(after, ys, s=34, color=AFTER, zorder=3, label="after")
        _gate_line(target.axvline, TARGET_GATE)
        target.set_xlim(-0.03, 1.03)
        for y in set(range(len(names))) - set(ys):
            target.text(0.5, y, "no subject to judge", ha="center", va="center", fontsize=8, color=SOFT)
        local.hlines(ys, 0, change, color=AFTER, lw=3, alpha=0.35)
        local.scatter(change, ys, s=34, color=AFTER, label="change")
        local.axvline(0, color=SOFT, lw=0.8)
        _gate_line(local.axvline, LOCAL_GATE)
        reach = 1.15 * max(0.05, *(abs(value) for value in change)) if change else 0.05
        local.set_xlim(-reach, reach)
        local.locator_params(axis="x", nbins=5)
        control = [max(rows[operation, name, variant]["all_gate"] for variant in CONTROLS) for name in judged.values()]
        gate.barh(ys, passed, height=0.62, color=AFTER, label="edit")
        gate.barh(ys, control, height=0.62, color=CONTROL, label="best control")
        looked_up = {y: best_lookups[edit] for y, name in judged.items() if (edit := (operation, name)) in best_lookups}
        gate.scatter(looked_up.values(), looked_up.keys(), s=60, color=INK, marker="|", zorder=3, label="best lookup")
        for y, value, other in zip(ys, passed, control, strict=True):
            # Beside the longer bar, so that neither lies under it.
            gate.text(max(value, other) + 0.015, y, f"{value:.2f}", va="center", fontsize=8, color=SOFT)
        # Room for the legend beside the longest bar.
        gate.set(xlim=(0, 1.65), xticks=[0, 0.25, 0.5, 0.75, 1])
        target.set_title(f"{operation.upper()}: accuracy where the edit decides")
        local.set_title("accuracy everywhere else, after minus before")
        gate.set_title("share of edits that pass both gates")
        for axis in (target, local, gate):
            axis.set_yticks(range(len(names)), reversed(names))
            axis.grid(axis="y", visible=False)
            axis.tick_params(length=0)
            axis.legend(loc="center right" if axis is gate else "best", frameon=True, framealpha=0.9, edgecolor="none")
    return figure


@plot
def curves_plot(evaluation: dict[str, Any]) -> Figure:
    """Target and local over the strength, for each operation and kind of direction; and one against the other, with
    the Pareto front."""
    rows = evaluation["curves"]
    operations = list(dict.fromkeys(row["operation"] for row in rows))
    figure = Figure(figsize=(13.5, 0.8 + 3.4 * max(1, len(operations))))
    figure.suptitle("Strength of residual edits: means over the behaviours")
    axes = figure.subplots(max(1, len(operations)), 3, squeeze=False)
    for (target, local, front), operation in zip(axes, operations, strict=False):
        for kind, color in zip(DIRECTIONS, (AFTER, BEFORE, CONTROL), strict=True):
            curve = [row for row in rows if (row["operation"], row["direction"]) == (operation, kind)]
            strengths, reached, lost = (
                [row[key] for row in curve] for key in ("strength", "target_mean", "local_mean")
            )
            target.plot(strengths, reached, color=color, marker="o", ms=3, label=kind.replace("_", " "))
            local.plot(strengths, lost, color=color, marker="o", ms=3)
            front.plot(lost, reached, color=color, marker="o", ms=3, lw=0.6)
        best = pareto([(row["local_mean"], row["target_mean"]) for row in rows if row["operation"] == operation])
        front.plot(*zip(*best, strict=True), color=INK, ls="--", label="Pareto front")
        _gate_line(target.axhline, TARGET_GATE)
        _gate_line(local.axhline, LOCAL_GATE)
        _gate_line(front.axhline, TARGET_GATE)
        _gate_line(front.axvline, LOCAL_GATE)
        for axis, title, across in (
            (target, f"{operation.upper()}: accuracy where the edit decides", "strength"),
            (local, "change of accuracy everywhere else", "strength"),
            (front, "the one against the other", "change everywhere else"),
        ):
            axis.set_title(title)
            axis.set_xlabel(across)
            axis.locator_params(axis="x", nbins=6)
        target.legend()
        front.legend()
    return figure


def _gate_line(draw: Callable[..., object], gate: float) -> None:
    draw(gate, color=SOFT, lw=0.8, ls=":", label=f"gate {gate}")


def _history_plot(history: Sequence[Mapping[str, float]]) -> Figure:
    names = dict.fromkeys(name for row in history for name in row if name.startswith("validation_"))
    terms = {name: _label(name.removeprefix("validation_")) for name in names if name != "validation_loss"}
    loss = Panel("loss", {"validation_loss": "validation", "loss": "training"}, log=True)
    return history_plot(history, [loss, Panel("its terms on validation subjects", terms, log=True)])


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other point beats in both numbers, ascending by the first."""
    front: list[tuple[float, float]] = []
    for point in sorted(points, reverse=True):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front[::-1]


def _training_summary(codec: Codec) -> str:
    if not codec.history:
        return "The history of training is shown where the codec comes from training, not from its files."
    validations = [(row["validation_loss"], row["step"]) for row in codec.history if "validation_loss" in row]
    text = f"{codec.history[-1]['step']:,.0f} of at most {codec.spec.training.steps:,} steps were taken."
    if validations:
        text += f" The validation loss was lowest, {min(validations)[0]:.4f}, at step {min(validations)[1]:,.0f}."
    return text


def _ways(figures: Mapping[str, float], operation: str, prefix: str) -> tuple[list[str], list[list[Any]]]:
    """Head and rows of the table of one operation: the edit, lookups, other ways and controls."""
    numbers = ("all_gate", "target_gate", "target_mean", "local_mean", "kept_mean", "available")
    rows = [["edit", *(figures.get(f"{prefix}.{name}", "") for name in numbers)]]
    for way in (*WAYS, *CONTROLS):
        start = f"{prefix if way in CONTROLS else operation}.{way}"
        if f"{start}.all_gate" in figures:
            rows.append([_label(way), *(figures.get(f"{start}.{name}", "") for name in numbers)])
            if figures.get(f"{start}.available", 1) < 1 and way in LOOKUPS:
                subset = f"{prefix}.where_{way}"
                rows.append(["edit, same subset", *(figures.get(f"{subset}.{name}", "") for name in numbers)])
    return ["way", "both gates", "target gate", "target", "local", "kept", "available"], rows


def _gates(evaluation: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Head and rows of the table of edits by behaviour, beside lookups and the best control."""
    numbers = ("edits", "target_mean", "local_mean", "kept_mean", "target_gate", "all_gate")
    (table, _), comparable = _by_variant(evaluation), comparable_lookups(evaluation)
    rows = []
    for operation, pattern in dict.fromkeys(key[:2] for key in table):
        direct = table[operation, pattern, "direct", "edit"]["all_gate"]
        control = max(table[operation, pattern, "residual", variant]["all_gate"] for variant in CONTROLS)
        lookups = [comparable.get((operation, pattern, way), "") for way in LOOKUPS]
        row = table[operation, pattern, "residual", "edit"]
        rows.append([operation, pattern, *(row[name] for name in numbers), *lookups, control, direct])
    head = ["edit", "behaviour", "edits", "target", "local", "kept", "target gate", "both gates"]
    return [*head, *map(_label, LOOKUPS), "best control", "direct edit"], rows


def _other_ways(evaluation: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Head and rows of the table of controls, other directions, and other ways to the same edits."""
    variants, ways = (*CONTROLS, *OTHERS), [way for way in WAYS if way not in LOOKUPS]
    table, others = _by_variant(evaluation)
    rows = []
    for edit in dict.fromkeys(key[:2] for key in table):
        gates = [table[*edit, "residual", variant]["all_gate"] for variant in variants]
        rows.append([*edit, *gates, *(others.get((*edit, way), "") for way in ways)])
    return ["edit", "behaviour", *map(_label, (*variants, *ways))], rows


def _by_variant(evaluation: dict[str, Any]) -> tuple[dict[tuple[str, ...], Any], dict[tuple[str, ...], float]]:
    """Rows of edits by operation, pattern, mode and variant; of other ways the share that passes, by the first two and
    the way."""
    columns = ("operation", "pattern", "mode", "variant")
    table: dict[tuple[str, ...], Any] = {
        tuple(row[name] for name in columns): row for row in evaluation["steering"] if row["edits"]
    }
    others: dict[tuple[str, ...], float] = {
        (row["operation"], row["pattern"], row["variant"]): row["all_gate"] for row in evaluation["others"]
    }
    return table, others


def _label(name: str) -> str:
    return name.replace("_", " ")
