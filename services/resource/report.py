"""The report of an encoder: what the language model reads in its vectors, controls, and a map of the vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from services.resource.codec import ResourceCodec
from services.resource.data import Table
from services.runtime.report import AFTER, BEFORE, CONTROL, Panel, Report, history_plot, plot

_MAPPED = 2000
"""Most vectors on the map."""


def write_report(
    folder: Path,
    codec: ResourceCodec,
    table: Table,
    *,
    figures: Mapping[str, float],
    details: Mapping[str, Mapping[str, Any]],
    controls: Mapping[str, float],
    histories: Mapping[str, Sequence[Mapping[str, float]]],
) -> None:
    """Write ``report.html``, its pictures, and the numbers behind them in ``report.json``."""
    report = Report("Configurations as vectors that a language model reads")
    tokens = codec.spec.encoder.tokens
    report.text(
        f"{len(table):,} configurations of {len(table.schema.tools)} tools, each as {tokens} soft "
        f"{'token' if tokens == 1 else 'tokens'} of {codec.about.get('language_model', 'a language model')}."
    )
    report.section(
        "What the model reads",
        """Each vector is described by greedy decoding, and the text is read back into numbers. **exact match**: share
        of the descriptions in which every field is right. **seen**: rows of training; **unseen**: configurations that a
        second encoder was not trained on. The controls must be near 0: they give the model a vector that is not the
        row's.""",
    )
    rows = [
        [f"{name}, {template}", value]
        for name, part in details.items()
        for template, value in part["by_template"].items()
    ]
    rows += [[f"control: {name.replace('_', ' ')}", value] for name, value in controls.items()]
    report.table(["rows, template", "exact match"], rows)
    names = list(details)
    fields = list(details[names[0]]["field_accuracy"])
    report.section("By field").table(
        ["field", *names], [[field, *(details[name]["field_accuracy"][field] for name in names)] for field in fields]
    )
    report.figure("digits", digit_plot(details), "Share of right digits by place")
    panels = [
        Panel("cross-entropy per token", {"description": "training", "validation_loss": "validation"}, log=True),
        Panel("exact match", {"exact_match": "training", "validation_exact_match": "validation"}),
    ]
    for name, history in histories.items():
        report.section(f"Training: {name}").figure(f"history-{name}", history_plot(history, panels), "Loss over steps")
    report.section(
        "Map",
        "The vectors in the plane of their first two components, by tool and by the first measured dimension.",
    ).figure("map", map_plot(codec, table), "Vectors by tool and by latency")
    report.figures(figures).spec(codec.spec)
    report.write(folder, {"figures": dict(figures), "details": details, "controls": controls, "histories": histories})


@plot
def digit_plot(details: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Share of right digits by place, the last digit first."""
    figure = Figure(figsize=(8, 3.2))
    axis = figure.subplots()
    for (name, part), color in zip(details.items(), (AFTER, BEFORE, CONTROL), strict=False):
        places = sorted(part["digits"], key=int)
        axis.plot(
            [int(place) for place in places],
            [part["digits"][place] for place in places],
            marker="o",
            color=color,
            label=name,
        )
    axis.set(title="right digits, by place from the last", xlabel="place", ylim=(-0.02, 1.02))
    axis.legend()
    return figure


@plot
def map_plot(codec: ResourceCodec, table: Table) -> Figure:
    """The first two principal components of the vectors."""
    rows = torch.linspace(0, len(table) - 1, min(len(table), _MAPPED)).long()
    vectors = codec.embed(table.values[rows])
    centered = vectors - vectors.mean(0)
    places = centered @ torch.pca_lowrank(centered, 2, center=False)[2] if len(rows) > 1 else torch.zeros(len(rows), 2)
    figure = Figure(figsize=(13.5, 5))
    left, right = figure.subplots(1, 2)
    for index, tool in enumerate(table.schema.tools):
        chosen = table.tools[rows] == index
        left.scatter(*places[chosen].T, s=5, label=tool)
    left.set_title("by tool")
    if len(table.schema.tools) <= 10:
        left.legend(markerscale=2)
    measured = [
        index for index, dimension in enumerate(table.schema.dimensions) if dimension.measured and dimension.number
    ]
    index = measured[0] if measured else len(table.schema.dimensions) - 1
    shown = right.scatter(*places.T, s=5, c=table.values[rows, index].log1p())
    right.set_title(f"by the logarithm of {table.schema.names[index]}")
    figure.colorbar(shown, ax=right)
    return figure
