"""The report of a codec: figures as JSON, two pictures, and steered networks to try."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ethogram.specs.edits import DIRECTIONS, OPERATIONS, Edit
from services.crossmodal.codec import Codec
from services.crossmodal.data import split_subjects
from services.crossmodal.evaluate import CONTROLS, OTHERS
from services.crossmodal.steering import LOCAL_GATE, TARGET_GATE
from services.runtime.page import (
    AFTER,
    BEFORE,
    CONTROL,
    FAINT,
    INK,
    SOFT,
    drawing,
    image,
    page,
    png,
    table,
)
from services.runtime.tensors import write_tensors
from services.zoo.dataset import Zoo
from services.zoo.subjects import Architecture, Params, select, unflatten

PAGE = "report.html"
PICTURES = {
    "course": "Losses over the steps of training",
    "steering": "Steering: target, locality and gates by behaviour",
    "curves": "Target and locality over the strength of edits, and one against the other",
    "latent_map": "Latents by behaviour, principal components",
    "clusters": "Latents by behaviour, UMAP",
}
"""The pictures of a report, ``<name>.png`` each, and what they show."""
LEAST_FOR_UMAP = 500
"""Of fewer networks the principal components tell as much, and at once."""


def write_report(folder: Path, codec: Codec, zoo: Zoo, evaluation: dict[str, Any]) -> None:
    """Write the report of ``codec`` on ``zoo`` into ``folder``; ``evaluation`` is what ``evaluate`` returned.

    ``report.json``: the evaluation, and in ``examples`` the networks of ``steered.safetensors``; the latter holds
    ``source.<parameter>`` and ``steered.<parameter>``, stacked in the order of the examples. ``held_out.safetensors``
    has the parameters of all held-out subjects, stacked; ``held_out_labels.safetensors`` their ``labels``, bool
    ``[subjects, behaviors]``. In a zoo of several shapes these files have subjects of the most common one.
    ``latent_map.png`` shows the latents of all subjects by behaviour, ``clusters.png`` (of many subjects) the same by
    UMAP, ``steering.png`` the behaviours before and after each edit, ``curves.png`` what strength does;
    ``course.png`` the losses over the training, where the codec comes from it and not from a file; ``report.html``
    has them all and the numbers.

    Raises :class:`InvalidInput` for another zoo than the codec was trained on.
    """
    codec.check_zoo(zoo)
    folder.mkdir(parents=True, exist_ok=True)
    examples, tensors = steer_examples(codec, zoo)
    write_tensors(folder / "steered.safetensors", tensors)
    held_out, networks, _ = held_out_networks(codec, zoo)
    write_tensors(folder / "held_out.safetensors", networks)
    write_tensors(folder / "held_out_labels.safetensors", {"labels": zoo.labels[held_out]})
    (folder / "report.json").write_text(json.dumps({**evaluation, "examples": examples}, indent=2, allow_nan=False))
    latents = all_latents(codec, zoo)
    with drawing():
        pictures = {
            "latent_map": png(latent_map(codec, zoo, *principal_places(latents))),
            "steering": png(steering_plot(evaluation)),
            "curves": png(curves_plot(evaluation)),
        }
        if codec.course:
            pictures["course"] = png(course_plot(codec.course))
        if len(zoo) >= LEAST_FOR_UMAP:
            title = f"Latents of {len(zoo):,} networks, by behaviour (UMAP)"
            pictures["clusters"] = png(latent_map(codec, zoo, umap_places(latents, codec.spec.seed), title))
    for name, picture in pictures.items():
        (folder / f"{name}.png").write_bytes(picture)
    (folder / PAGE).write_text(report_page(codec, evaluation, pictures))


def held_out_networks(codec: Codec, zoo: Zoo) -> tuple[Tensor, Params, Architecture]:
    """Held-out subjects of the most common shape: their positions in the zoo, their networks, and the shape."""
    common = int(zoo.shape.bincount().argmax())
    held_out = split_subjects(zoo.labels, zoo.shape, codec.spec).held_out
    held_out = held_out[zoo.shape[held_out] == common]
    shape = zoo.layout.shapes[common]
    return held_out, unflatten(zoo.layout.strip(zoo.weights[held_out], common), shape), shape


def steer_examples(codec: Codec, zoo: Zoo) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """For each behaviour, the first held-out subject that can gain it and the first that can lose it, residual edits.

    Returns a description of each example and the tensors of ``steered.safetensors``.
    """
    held_out, networks, shape = held_out_networks(codec, zoo)
    names = [behavior.name for behavior in codec.behaviors]
    chosen: list[tuple[int, Edit]] = []
    for column, name in enumerate(names):
        for operation in ("add", "remove"):
            labels = zoo.labels[held_out]
            fits = ~labels[:, column] if operation == "add" else labels[:, column] & (labels.sum(1) >= 2)
            chosen += [(place, Edit(operation, name)) for place in fits.nonzero().flatten()[:1].tolist()]
    if not chosen:
        return [], {}
    index = torch.tensor([place for place, _ in chosen])
    source = {name: tensor.to(codec.device) for name, tensor in select(networks, index).items()}
    parts = [
        codec.steer(select(source, torch.tensor([i])), [edit], activation=shape.activation)[0]
        for i, (_, edit) in enumerate(chosen)
    ]
    steered = {name: torch.cat([part[name] for part in parts]) for name in source}
    recalls = [
        [dict(zip(names, row, strict=True)) for row in codec.evaluate(nets, shape.activation)[0].tolist()]
        for nets in (source, steered)
    ]
    examples = [
        {
            "subject": int(held_out[place]),
            "patterns": [name for name, on in zip(names, zoo.labels[held_out[place]].tolist(), strict=True) if on],
            "edit": edit._asdict(),
            "recall_before": before,
            "recall_after": after,
        }
        for (place, edit), before, after in zip(chosen, *recalls, strict=True)
    ]
    tensors = {f"source.{name}": tensor.cpu().contiguous() for name, tensor in source.items()}
    return examples, tensors | {f"steered.{name}": tensor.cpu().contiguous() for name, tensor in steered.items()}


@torch.no_grad()
def all_latents(codec: Codec, zoo: Zoo) -> Tensor:
    """Latents of all subjects, ``[subjects, latent]``."""
    subjects = codec.preprocessor.subjects(zoo, torch.arange(len(zoo)), codec.device)
    return codec.latents(subjects.inputs, subjects.shape)


def principal_places(latents: Tensor) -> tuple[Tensor, str]:
    """Places of latents on their two first principal components ``[subjects, 2]``, and a title that says so."""
    centred = (latents - latents.mean(0)).double()
    # A latent may be of one number, and all latents one: then there is nothing to see in the rest.
    centred = torch.nn.functional.pad(centred, (0, max(0, 2 - centred.shape[1])))
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    first, second = (values[-2:].flip(0) / values.sum().clamp_min(1e-12)).tolist()
    title = f"Latents of {len(latents):,} networks, by behaviour (PCA: {first:.0%} and {second:.0%} of the variance)"
    return (centred @ vectors[:, -2:].flip(1)).float().cpu(), title


def umap_places(latents: Tensor, seed: int) -> Tensor:
    """Places of latents by UMAP (McInnes et al. 2018, arXiv 1802.03426): ``[subjects, 2]``."""
    # It compiles for seconds when it is imported.
    from umap import UMAP

    places = UMAP(random_state=seed % 2**32, n_jobs=1).fit_transform(latents.cpu().numpy())
    return torch.from_numpy(places)


def latent_map(codec: Codec, zoo: Zoo, places: Tensor, title: str) -> Figure:
    """Latents at ``places`` ``[subjects, 2]``: an overview and a panel for each behaviour."""
    labels, names = zoo.labels, [pattern.name for pattern in codec.patterns]
    colors = _palette(len(names))
    columns = 4
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(13.5, max(5.6, 1.85 * rows + 1.2)), layout="constrained")
    sides: Any = figure.subfigures(1, 2, width_ratios=(1, 1.25))
    left, right = sides
    figure.suptitle(title, fontsize=12, fontweight="bold")
    overview = left.subplots()
    single = labels.sum(1) == 1
    overview.scatter(*places[~single].T, s=7, c=FAINT, linewidths=0, label="several behaviours")
    for column, (name, color) in enumerate(zip(names, colors, strict=True)):
        overview.scatter(*places[single & labels[:, column]].T, s=16, color=color, linewidths=0, label=name)
    overview.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.02),
        ncols=3,
        frameon=False,
        fontsize=8,
        handletextpad=0.1,
        markerscale=1.6,
    )
    overview.set_title("networks with one behaviour, coloured by it", fontsize=10, color=SOFT)
    panels = right.subplots(rows, columns, squeeze=False).flat
    for panel in panels:
        panel.set_axis_off()
    for column, (name, color, panel) in enumerate(zip(names, colors, right.axes, strict=False)):
        has = labels[:, column]
        panel.set_axis_on()
        panel.scatter(*places[~has].T, s=3, c=FAINT, linewidths=0)
        panel.scatter(*places[has].T, s=4, color=color, linewidths=0)
        panel.set_title(f"{name}  ({int(has.sum())})", fontsize=8.5)
    for panel in (overview, *right.axes):
        _plain(panel)
        panel.set_xticks([])
        panel.set_yticks([])
    return figure


def steering_plot(evaluation: dict[str, Any]) -> Figure:
    """What residual edits do to held-out subjects: the behaviour before and after, the rest, and the strict gate."""
    rows = {
        (r["operation"], r["pattern"], r["variant"]): r for r in evaluation["steering"] if r.get("mode") == "residual"
    }
    # Of the operations that any subject could be asked for; replacements are of pairs, the others of single behaviours.
    behaviors = {
        operation: list(dict.fromkeys(r["pattern"] for r in evaluation["steering"] if r["operation"] == operation))
        for operation in OPERATIONS
        if any(operation == known for known, _, _ in rows)
    }
    lines, heights = max(1, len(behaviors)), [0.4 + 0.25 * len(names) for names in behaviors.values()]
    figure = Figure(figsize=(13.5, 1.6 + sum(heights)), layout="constrained")
    figure.suptitle("Steering held-out networks: residual edits, held-out sequences", fontsize=12, fontweight="bold")
    axes = figure.subplots(
        lines, 3, sharey="row", width_ratios=(1.25, 1, 1), height_ratios=heights or None, squeeze=False
    )
    for line, (operation, names) in zip(axes, behaviors.items(), strict=False):
        known = [(y, name) for y, name in enumerate(reversed(names)) if (operation, name, "edit") in rows]
        ys = [y for y, _ in known]
        edits = [rows[operation, name, "edit"] for _, name in known]
        before = [rows[operation, name, "null"]["target_mean"] for _, name in known]
        after, local, passed = ([edit[key] for edit in edits] for key in ("target_mean", "local_mean", "all_gate"))
        target, rest, gate = line
        target.hlines(ys, before, after, color=FAINT, lw=3, zorder=1)
        target.scatter(before, ys, s=34, color=BEFORE, zorder=2, label="before")
        target.scatter(after, ys, s=34, color=AFTER, zorder=3, label="after")
        target.axvline(TARGET_GATE, color=SOFT, lw=0.8, ls=":", label=f"gate {TARGET_GATE}")
        target.set_xlim(-0.03, 1.03)
        rest.hlines(ys, 0, local, color=AFTER, lw=3, alpha=0.35)
        rest.scatter(local, ys, s=34, color=AFTER, label="change")
        rest.axvline(0, color=SOFT, lw=0.8)
        rest.axvline(LOCAL_GATE, color=SOFT, lw=0.8, ls=":", label=f"gate {LOCAL_GATE}")
        reach = 1.15 * max(0.05, *(abs(value) for value in local)) if local else 0.05
        rest.set_xlim(-reach, reach)
        rest.locator_params(axis="x", nbins=5)
        control = [max(rows[operation, name, variant]["all_gate"] for variant in CONTROLS) for _, name in known]
        gate.barh(ys, passed, height=0.62, color=AFTER, label="edit")
        gate.barh(ys, control, height=0.62, color=CONTROL, label="worst control")
        for y, value, other in zip(ys, passed, control, strict=True):
            # Beside the longer bar, so that neither lies under it.
            gate.text(max(value, other) + 0.015, y, f"{value:.2f}", va="center", fontsize=8, color=SOFT)
        for y in set(range(len(names))) - set(ys):
            target.text(0.5, y, "no subject to judge", ha="center", va="center", fontsize=8, color=SOFT)
        # Room for the legend beside the longest bar.
        gate.set_xlim(0, 1.5)
        gate.set_xticks([0, 0.25, 0.5, 0.75, 1])
        for axis, title in zip(
            line,
            (
                f"{operation.upper()}: accuracy where the edit decides",
                "accuracy everywhere else, after minus before",
                "share of edits that pass both gates",
            ),
            strict=True,
        ):
            axis.set_title(title, fontsize=10, loc="left")
            axis.set_yticks(range(len(names)), reversed(names))
            axis.grid(axis="x", color=FAINT, lw=0.5)
            axis.set_axisbelow(True)
            axis.tick_params(length=0, labelsize=8.5)
            axis.legend(
                loc="center right" if axis is gate else "best",
                fontsize=7.5,
                frameon=True,
                framealpha=0.9,
                edgecolor="none",
            )
            _plain(axis)
    return figure


def curves_plot(evaluation: dict[str, Any]) -> Figure:
    """Target and local over the strength, for each operation and kind of direction; and one against the other, with
    the front that no other point beats in both."""
    rows = evaluation["curves"]
    operations = list(dict.fromkeys(row["operation"] for row in rows))
    figure = Figure(figsize=(13.5, 0.8 + 3.4 * max(1, len(operations))), layout="constrained")
    figure.suptitle("Strength of residual edits: means over the behaviours", fontsize=12, fontweight="bold")
    axes = figure.subplots(max(1, len(operations)), 3, squeeze=False)
    colors = dict(zip(DIRECTIONS, (AFTER, BEFORE, CONTROL), strict=True))
    for (target, local, front), operation in zip(axes, operations, strict=False):
        for kind, color in colors.items():
            own = [row for row in rows if (row["operation"], row["direction"]) == (operation, kind)]
            strengths, reached, lost = ([row[key] for row in own] for key in ("strength", "target_mean", "local_mean"))
            target.plot(strengths, reached, color=color, marker="o", ms=3, label=kind.replace("_", " "))
            local.plot(strengths, lost, color=color, marker="o", ms=3)
            front.plot(lost, reached, color=color, marker="o", ms=3, lw=0.6)
        best = pareto([(row["local_mean"], row["target_mean"]) for row in rows if row["operation"] == operation])
        front.plot(*zip(*best, strict=True), color=INK, lw=1.2, ls="--", label="Pareto front")
        target.axhline(TARGET_GATE, color=SOFT, lw=0.8, ls=":")
        local.axhline(LOCAL_GATE, color=SOFT, lw=0.8, ls=":")
        front.axhline(TARGET_GATE, color=SOFT, lw=0.8, ls=":")
        front.axvline(LOCAL_GATE, color=SOFT, lw=0.8, ls=":")
        for axis, title, across in (
            (target, f"{operation.upper()}: accuracy where the edit decides", "strength"),
            (local, "change of accuracy everywhere else", "strength"),
            (front, "the one against the other", "change everywhere else"),
        ):
            axis.set_title(title, fontsize=10, loc="left")
            axis.set_xlabel(across)
            axis.locator_params(axis="x", nbins=6)
            axis.grid(color=FAINT, lw=0.5)
            _plain(axis)
        target.legend(frameon=False, fontsize=8)
        front.legend(frameon=False, fontsize=8)
    return figure


def course_plot(course: Sequence[Mapping[str, float]]) -> Figure:
    """The loss over the steps, in training and on validation subjects, and its terms on the latter."""
    figure = Figure(figsize=(13.5, 3.6), layout="constrained")
    loss, terms = figure.subplots(1, 2)
    curves = {
        name: [(row["step"], row[name]) for row in course if name in row]
        for name in dict.fromkeys(name for row in course for name in row)
        if name != "step"
    }
    for name, points in curves.items():
        if name in ("loss", "validation_loss"):
            color = BEFORE if name == "loss" else AFTER
            loss.plot(*zip(*points, strict=True), color=color, lw=1.2, label=name.replace("_", " "))
        elif name.startswith("validation_"):
            terms.plot(*zip(*points, strict=True), lw=1.2, label=name.removeprefix("validation_"))
    for axis, title in ((loss, "loss"), (terms, "its terms on validation subjects")):
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("step")
        axis.set_yscale("log")
        axis.grid(color=FAINT, lw=0.5)
        if axis.lines:
            axis.legend(frameon=False, fontsize=8)
        _plain(axis)
    return figure


def _ending(codec: Codec) -> str:
    """What training did, in words."""
    if not codec.course:
        return "Its course is told where the codec comes from training, not from its files."
    validations = [(row["validation_loss"], row["step"]) for row in codec.course if "validation_loss" in row]
    text = f"{codec.course[-1]['step']:,.0f} of at most {codec.spec.training.steps:,} steps were taken."
    if validations:
        text += f" The validation loss was lowest, {min(validations)[0]:.4f}, at step {min(validations)[1]:,.0f}."
    return text


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both numbers, by the first, ascending."""
    front: list[tuple[float, float]] = []
    for point in sorted(points, reverse=True):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front[::-1]


def report_page(codec: Codec, evaluation: dict[str, Any], pictures: Mapping[str, bytes]) -> str:
    """``report.html``: the numbers, and ``pictures`` by name."""
    figures = evaluation["figures"]
    shown = {name: image(pictures[name], text) for name, text in PICTURES.items() if name in pictures}
    names = list(dict.fromkeys((row["operation"], row["pattern"]) for row in evaluation["steering"]))
    by_key = {
        (row["operation"], row["pattern"], row["mode"], row["variant"]): row
        for row in evaluation["steering"]
        if row["edits"]
    }
    gates = []
    for operation, pattern in names:
        edit = by_key.get((operation, pattern, "residual", "edit"))
        if edit is not None:
            others = [by_key[operation, pattern, "residual", name]["all_gate"] for name in (*CONTROLS, *OTHERS)]
            direct = by_key[operation, pattern, "direct", "edit"]["all_gate"]
            values = [edit[key] for key in ("target_mean", "local_mean", "kept_mean", "target_gate", "all_gate")]
            gates.append([operation, pattern, edit["edits"], *values, direct, *others])
    head = ["edit", "behaviour", "edits", "target", "local", "kept", "target gate", "all gates", "direct"]
    head += [name.replace("_", " ") for name in (*CONTROLS, *OTHERS)]
    ways = list(dict.fromkeys(row["variant"] for row in evaluation["others"]))
    reached = {(r["operation"], r["pattern"], r["variant"]): r["all_gate"] for r in evaluation["others"]}
    others = [[*name, *(reached.get((*name, way), "") for way in ways)] for name in names]
    errors = [[name, *row.values()] for name, row in evaluation["reconstruction"].items()]
    probes = [[name, *row.values()] for name, row in evaluation["probes"].items()]
    counts = evaluation["subjects"]
    body = f"""
<p>Judged on {counts["held_out"]:,} networks and on sequences that training never saw; trained on {counts["train"]:,}.
Decoded networks agree with their sources on {figures["agreement"]:.1%} of the sequences.</p>
<h2>Training</h2><p>{_ending(codec)}</p>{shown.get("course", "")}
<h2>Edits</h2>{shown["steering"]}
<p><b>target</b>: accuracy where the edit decides; <b>local</b>: change of accuracy everywhere else,
and <b>kept</b>: the share of answers there that stayed the source's own. An edit passes the
<b>target gate</b> from {TARGET_GATE} on, and <b>all gates</b> if local is at least {LOCAL_GATE} too. <b>direct</b> is
the share of direct edits that pass all gates. The last columns are that share of controls (no edit, a random direction,
the direction the other way) and of directions that were not trained.</p>{table(head, gates)}
<h2>Other ways to the same edits</h2>
<p>Share of edits that pass all gates. <b>same label</b>: another network of training with just the behaviours asked
for; <b>nearest train</b>: the network of training whose latent is nearest to the steered one; <b>centroid</b>: the
decoded mean latent of networks with those behaviours; <b>task arithmetic</b>: the source plus the difference of the
mean weights with and without the behaviour; <b>fine tuning</b>: the source, trained shortly on the labels after it, an
oracle that the others are not.</p>{table(["edit", "behaviour", *(way.replace("_", " ") for way in ways)], others)}
<h2>Strength</h2>{shown["curves"]}
<h2>Latents</h2>{shown["latent_map"]}{shown.get("clusters", "")}
<p>How well a line tells each behaviour from the latent of a held-out network:</p>
{table(["behaviour", "balanced accuracy", "area under the curve"], probes)}
<h2>Decoded weights</h2>
{table(["layer", "MSE", "MAE", "RMSE", "cosine", "relative error", "R2"], errors)}
<h2>All figures</h2>{table(["figure", "value"], figures.items())}
<h2>Spec</h2><pre>{html.escape(codec.spec.model_dump_json(indent=2))}</pre>"""
    return page("Steering of networks by behaviour", body)


def _palette(count: int) -> list[Any]:
    """Colours that stay apart."""
    base = list(mpl.colormaps["tab10"].colors) if count <= 10 else list(mpl.colormaps["tab20"].colors)  # type: ignore[attr-defined]
    return [base[i % len(base)] for i in range(count)]


def _plain(axis: Axes) -> None:
    for spine in axis.spines.values():
        spine.set_color(FAINT)
