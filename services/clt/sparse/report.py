"""The report of a sparse model: its training, and how its features are used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ethogram.specs.clt import CltSpec, SaeSpec
from services.clt.sparse.model import SparseModel
from services.runtime.report import Panel, Report, history_plot, plot


def write_report(
    folder: Path,
    model: SparseModel,
    spec: SaeSpec | CltSpec,
    *,
    figures: Mapping[str, float],
    density: Tensor,
    history: Sequence[Mapping[str, float]],
) -> None:
    """Write ``report.html``, its pictures and ``report.json`` (figures and history) into ``folder``; ``figures`` and
    ``density`` as :func:`services.clt.sparse.evaluate.evaluate` gives them."""
    streams, densities = model.streams, torch.split(density, model.features)
    others = {"step", "active", "dead"}
    names = dict.fromkeys(["loss", "error", *(name for row in history for name in row)])
    losses = {name: name for name in names if name not in others and not name.startswith("validation_")}
    panels = [
        Panel("losses", losses, log=True),
        Panel(
            "share of the variance that is not explained",
            {"validation_fvu": "validation", "error": "training"},
            log=True,
        ),
        Panel("active features of a row", {"validation_l0": "validation", "active": "training"}),
        Panel("share of features that are dead", {"dead": "dead"}),
    ]
    report = Report("Training of a sparse model")
    report.text(
        f"""{_title(model)}: {sum(model.features):,} features explain {figures["explained_variance"]:.1%} of the
        variance of validation rows with {figures["l0"]:.1f} active features per source and row."""
    )
    report.section("Training").figure("history", history_plot(history, panels), "Metrics over the steps of training")
    report.text(
        f"""**error**: squared error as a share of the variance, on the training rows; validation rows are of other
        instances. A feature is **dead** when it was not active for {spec.training.dead_after:,} rows."""
    )
    report.section("Features").figure(
        "features", features_plot(model, densities), "How often features are active, and how much they write"
    )
    report.table(
        ["source", "features", "k", "density", "active in no validation row"],
        (
            [source, count, k, float(shares.mean()), float((shares == 0).float().mean())]
            for source, count, k, shares in zip(streams.sources, model.features, model.k, densities, strict=True)
        ),
    )
    report.figures(figures).spec(spec)
    report.write(folder, {"figures": dict(figures), "course": list(history), "streams": streams._asdict()})


@plot
def features_plot(model: SparseModel, densities: Sequence[Tensor]) -> Figure:
    """Features by density, and the norms of their decoder directions, by source; ``densities``: ``[features]`` each."""
    figure = Figure(figsize=(13.5, 4))
    count, norm = figure.subplots(1, 2)
    for source, shares, decoder in zip(model.streams.sources, densities, model.decoders, strict=True):
        active = shares[shares > 0].log10()
        if len(active):
            count.hist(active.numpy(), bins=40, histtype="step", label=f"{source} ({int((shares == 0).sum())} never)")
        norm.scatter(
            shares.clamp_min(1e-6).log10(), decoder.detach().norm(dim=1).cpu(), s=4, linewidths=0, label=source
        )
    count.set(title="features by density", xlabel="log10 of the share of rows")
    norm.set(title="norm of a feature's decoder direction, by density", xlabel="log10 of the share of rows")
    for axis in (count, norm):
        if axis.has_data():
            axis.legend()
    return figure


def _title(model: SparseModel) -> str:
    streams = model.streams
    if streams.kind == "sae":
        return f"Autoencoder of {streams.sources[0]}"
    titles = {"pair": "Transcoder", "per_layer": "Per-layer transcoders", "cross_layer": "Cross-layer transcoder"}
    return f"{titles[streams.kind]} from {', '.join(streams.sources)} to {', '.join(streams.targets)}"
