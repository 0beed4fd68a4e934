"""The report of a sparse model's training: pictures, and a page with the numbers."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ethogram.specs.clt import CltSpec, SaeSpec
from services.clt.sparse.model import SparseModel
from services.runtime.page import AFTER, BEFORE, CONTROL, FAINT, SOFT, drawing, image, page, png, table

PAGE = "report.html"
PICTURES = {
    "training": "Losses, explained variance, active and dead features over the steps of training",
    "features": "How often features are active, and how much they write",
}
"""The pictures of a report, ``<name>.png`` each, and what they show."""

MARKED = 8
"""Points of a curve below which each is marked: one alone has no line."""

Course = Sequence[Mapping[str, float]]


def write_report(
    folder: Path,
    model: SparseModel,
    spec: SaeSpec | CltSpec,
    *,
    figures: Mapping[str, float],
    density: Tensor,
    course: Course,
) -> None:
    """Write ``report.html``, its pictures and ``report.json`` (figures and course) into ``folder``; ``figures`` and
    ``density`` as :func:`services.clt.sparse.evaluate.evaluate` gives them."""
    folder.mkdir(parents=True, exist_ok=True)
    with drawing():
        pictures = {"training": png(training_plot(course)), "features": png(features_plot(model, density))}
    for name, picture in pictures.items():
        (folder / f"{name}.png").write_bytes(picture)
    whole = {"figures": dict(figures), "course": [dict(row) for row in course], "streams": model.streams._asdict()}
    (folder / "report.json").write_text(json.dumps(whole, indent=2))
    (folder / PAGE).write_text(_page(model, spec, figures, density, pictures))


def training_plot(course: Course) -> Figure:
    """Losses; variance that is left; active features; dead ones."""
    figure = Figure(figsize=(13.5, 6.4), layout="constrained")
    losses, left, active, dead = figure.subplots(2, 2).flat
    names = list(dict.fromkeys(name for row in course for name in row))
    colors = dict(zip(("loss", "error"), (AFTER, BEFORE), strict=True))
    told = ("step", "active", "dead")
    for name in names:
        if name not in told and not name.startswith("validation_"):
            _curve(losses, course, name, name, colors.get(name))
    losses.set_yscale("log")
    _curve(left, course, "error", "training", BEFORE)
    _curve(left, course, "validation_fvu", "validation", AFTER)
    left.set_yscale("log")
    _curve(active, course, "active", "training", BEFORE)
    _curve(active, course, "validation_l0", "validation", AFTER)
    _curve(dead, course, "dead", "dead", CONTROL)
    dead.set_ylim(bottom=0)
    for axis, title in (
        (losses, "losses"),
        (left, "share of the variance that is not explained"),
        (active, "active features of a row"),
        (dead, "share of features that are dead"),
    ):
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("step")
        axis.grid(color=FAINT, lw=0.5)
        if axis.lines:
            axis.legend(frameon=False, fontsize=8)
        _plain(axis)
    return figure


def _curve(axis: Axes, course: Course, name: str, label: str, color: str | None) -> None:
    points = [(row["step"], row[name]) for row in course if name in row]
    if points:
        mark = "o" if len(points) < MARKED else None
        axis.plot(*zip(*points, strict=True), color=color, lw=1.2, label=label, marker=mark, ms=4)


def features_plot(model: SparseModel, density: Tensor) -> Figure:
    """Densities of features, by source; and beside them the norms of what they write."""
    figure = Figure(figsize=(13.5, 4), layout="constrained")
    often, far = figure.subplots(1, 2)
    for source, own, words in zip(
        model.streams.sources, torch.split(density, model.features), model.decoders, strict=True
    ):
        seen = own[own > 0].log10()
        if len(seen):
            often.hist(seen.numpy(), bins=40, histtype="step", label=f"{source} ({int((own == 0).sum())} never)")
        norms = words.detach().norm(dim=1).cpu()
        far.scatter(own.clamp_min(1e-6).log10(), norms, s=4, linewidths=0, label=source)
    often.set_title("features by density (log10 of the share of rows)", fontsize=10, loc="left")
    far.set_title("norm of what a feature writes, by density", fontsize=10, loc="left")
    for axis in (often, far):
        axis.grid(color=FAINT, lw=0.5)
        if axis.has_data():
            axis.legend(frameon=False, fontsize=8)
        _plain(axis)
    return figure


def _page(
    model: SparseModel,
    spec: SaeSpec | CltSpec,
    figures: Mapping[str, float],
    density: Tensor,
    pictures: Mapping[str, bytes],
) -> str:
    streams = model.streams
    rows = [
        [source, count, k, float(own.mean()), float((own == 0).float().mean())]
        for source, count, k, own in zip(
            streams.sources, model.features, model.k, torch.split(density, model.features), strict=True
        )
    ]
    shown = {name: image(pictures[name], text) for name, text in PICTURES.items()}
    asked = html.escape(spec.model_dump_json(indent=2))
    body = f"""
<p>{_title(model)}: {sum(model.features):,} features explain {figures["explained_variance"]:.1%} of the variance of
validation rows with {figures["l0"]:.1f} active features of a source and row.</p>
<h2>Training</h2>{shown["training"]}
<p><b>error</b>: squared error as a share of the variance, on the training rows; validation rows are of other instances.
A feature is <b>dead</b> when it was not active for {spec.training.dead_after:,} rows.</p>
<h2>Features</h2>{shown["features"]}
{table(["source", "features", "k", "density", "active in no validation row"], rows)}
<h2>All figures</h2>{table(["figure", "value"], figures.items())}
<h2>Spec</h2><pre>{asked}</pre>"""
    return page("Training of a sparse model", body)


def _title(model: SparseModel) -> str:
    streams = model.streams
    if streams.kind == "sae":
        return f"Autoencoder of {html.escape(streams.sources[0])}"
    what = {"pair": "Transcoder", "per_layer": "Per-layer transcoders", "cross_layer": "Cross-layer transcoder"}
    ends = f"{html.escape(', '.join(streams.sources))} to {html.escape(', '.join(streams.targets))}"
    return f"{what[streams.kind]} from {ends}"


def _plain(axis: Axes) -> None:
    for spine in axis.spines.values():
        spine.set_color(FAINT)
    axis.tick_params(colors=SOFT, labelsize=8)
