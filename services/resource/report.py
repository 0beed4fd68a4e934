"""The report of an encoder: what the language model reads in its vectors, what is predicted and recommended from them,
each beside controls, and a map of the vectors."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from torch import Tensor

from services.resource.codec import ResourceCodec
from services.resource.data import Table
from services.resource.evaluate import guess_figures
from services.resource.evaluate_prediction import (
    CONFIDENCE,
    SAID,
    TOOL,
    VECTOR,
    Predictions,
    conditions,
    front,
    recommended,
)
from services.resource.recommend import prices
from services.runtime.report import AFTER, BEFORE, CONTROL, FAINT, SOFT, Panel, Report, history_plot, plot

_MAPPED = 2000
"""Most vectors on the map."""
_NAMED = 20
"""Most tools in a legend."""
_PANELS = 8
"""Most tools with a picture of costs."""
_PLAIN = "{x:,.7g}"
_CONTROLS = {
    "zero": "control: zero vector",
    "shuffled": "control: another row's vector",
    "other_tool": "control: vector of another tool",
}


def write_report(
    folder: Path,
    codec: ResourceCodec,
    table: Table,
    *,
    figures: Mapping[str, float],
    details: Mapping[str, Mapping[str, Any]],
    controls: Mapping[str, Mapping[str, Any]],
    histories: Mapping[str, Sequence[Mapping[str, float]]],
    predictions: Predictions | str,
) -> None:
    """Write ``report.html``, its pictures, and the numbers behind them in ``report.json``.

    ``details`` and ``controls``: figures of descriptions, by part of the table and by control; ``predictions``: those
    of rows that were held out, or why there are none.
    """
    report = Report("Configurations as vectors that a language model reads")
    tokens = codec.spec.encoder.tokens
    report.text(
        f"{len(table):,} configurations of {len(table.schema.tools)} tools, each as {tokens} soft "
        f"{'token' if tokens == 1 else 'tokens'} of {codec.about.get('language_model', 'a language model')}."
    )
    for text in table.warnings():
        report.text(f"{text}.")
    report.section(
        "What the model reads",
        """Each vector is described by greedy decoding, and the text is read back into numbers. **exact match**: share
        of the descriptions in which every field is right. **seen**: rows of training; **unseen**: configurations that a
        second encoder was not trained on. The controls must be near 0: they give the model a vector that is not the
        row's.""",
    )
    rows = [
        [f"{name}, {template}", part["rows"], value]
        for name, part in details.items()
        for template, value in part["by_template"].items()
    ]
    rows += [[_CONTROLS[name], part["rows"], part["exact_match"]] for name, part in controls.items()]
    report.table(["rows, template", "descriptions", "exact match"], rows)
    _add_fields(report, table, details, controls)
    report.figure("digits", digit_plot(details, controls), "Share of right digits by place")
    if isinstance(predictions, str):
        report.section("Predictions and recommendations", predictions)
    else:
        _add_predictions(report, table, predictions)
    report.section("Map", "The vectors in the plane of their first two principal components.").figure(
        "map", map_plot(codec, table), "Vectors by tool and by latency"
    )
    plain = "the same rows as they are in the table"
    panels = [
        Panel("cross-entropy per token", {"description": "training", "validation_loss": plain}, log=True),
        Panel("exact match", {"exact_match": "training", "validation_exact_match": plain}),
    ]
    for name, history in histories.items():
        report.section(f"Training: {name}").figure(f"history-{name}", history_plot(history, panels), "Loss over steps")
    report.figures(figures).spec(codec.spec)
    data = {"figures": dict(figures), "details": details, "controls": controls, "histories": histories}
    report.write(folder, data | ({} if isinstance(predictions, str) else {"predictions": predictions.figures}))


def _add_fields(
    report: Report,
    table: Table,
    details: Mapping[str, Mapping[str, Any]],
    controls: Mapping[str, Mapping[str, Any]],
) -> None:
    """Accuracy and error of each field, beside the same without a vector or with a wrong one."""
    columns: dict[str, Mapping[str, Any]] = {
        **details,
        "control: no vector": guess_figures(table.schema, table.values),
        **{_CONTROLS[name]: part for name, part in controls.items()},
    }
    report.section(
        "By field",
        """Share of the descriptions in which the field is right. **no vector**: the most frequent value. The vector of
        another tool is right in all but the tool.""",
    )
    _add_table(report, "field", columns, "field_accuracy")
    if details["seen"]["field_error"]:
        report.text(
            """Mean relative error of the numbers that are read, at most 1, which it is where a text cannot be read.
            **no vector**: the median."""
        )
        _add_table(report, "number", columns, "field_error")


def _add_table(report: Report, head: str, columns: Mapping[str, Mapping[str, Any]], figure: str) -> None:
    names = next(iter(columns.values()))[figure]
    report.table([head, *columns], [[name, *(part[figure][name] for part in columns.values())] for name in names])


def _add_predictions(report: Report, table: Table, predictions: Predictions) -> None:
    """What is predicted and recommended of configurations that were held out."""
    number, found = predictions.number, predictions.figures
    report.section(
        f"Prediction of {number}",
        f"""Of the unseen configurations, from vectors in which all that is measured is unknown, by regression on the
        vectors of the others. **error**: of {number}, relative. **log-linear**: least squares of the logarithm on the
        labels, levels and logarithms of what can be chosen.""",
    )
    if found["left_out"]:
        total = found["measurements"] + found["left_out"]
        report.text(f"Predicted from {found['measurements']:,} of {total:,} measurements, drawn at random.")
    if found["described"] < found["rows"]:
        report.text(f"**{SAID}**: of {found['described']:,} of the {found['rows']:,} configurations, drawn at random.")
    errors = found["errors"].items()
    report.table(
        ["method", "mean error", "median error"], [[name, error["mean"], error["median"]] for name, error in errors]
    )
    report.section(
        "Intervals",
        """Share of the unseen configurations whose number an interval covers, and its width relative to the number, in
        the median. Intervals around any prediction can cover as asked; those of a good one are narrow.""",
    )
    head = ["asked", "covered", "width", f"covered, {TOOL}", f"width, {TOOL}"]
    report.table(head, [list(row.values()) for row in found["coverage"]])
    report.figure("calibration", calibration_plot(found), "Level of intervals and the share they cover; widths")
    report.section(
        "Cost",
        f"The cheapest configuration whose {number} stays below a bound with probability {CONFIDENCE:g}.",
    )
    if not found["recommendations"]:
        report.text("No figures: they take prices in the schema, and more unseen configurations.")
        return
    report.text(
        """Asked of the unseen configurations of each tool and label, with bounds at nine quantiles. **answered**: share
        of the bounds below which it finds a configuration; **kept**: share of these in which what was measured is below
        the bound; **price**: of those, relative to the cheapest configuration that is."""
    )
    rows = found["recommendations"].items()
    report.table(["method", "answered", "kept", "price"], [[name, *figures.values()] for name, figures in rows])
    report.text(
        """All measured configurations of a tool with the labels in the title, most of which the prediction was fitted
        on. **recommended**: for some bound, from the vectors; the point is what was measured, and the dashed line the
        lowest bound. **front**: no cheaper configuration has a lower number."""
    )
    report.figure("cost", cost_plot(table, predictions), "Cost against latency, with the recommended configurations")


@plot
def digit_plot(details: Mapping[str, Mapping[str, Any]], controls: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Share of right digits by place, the last digit first."""
    figure = Figure(figsize=(8, 3.2))
    axis = figure.subplots()
    curves = {**details, **{_CONTROLS["shuffled"]: controls["shuffled"]}}
    for (name, part), color in zip(curves.items(), (*(AFTER, BEFORE)[: len(details)], CONTROL), strict=True):
        places = sorted(part["digits"])
        size = 6 if name == "seen" else 3.5
        shares = [part["digits"][place] for place in places]
        axis.plot([place + 1 for place in places], shares, marker="o", ms=size, color=color, label=name)
    axis.set(title="share of right digits", xlabel="place, counted from the last digit", ylim=(-0.03, 1.03))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside right upper")
    return figure


@plot
def calibration_plot(found: Mapping[str, Any]) -> Figure:
    """Share of the rows that intervals cover, and their width, by level."""
    figure = Figure(figsize=(13.5, 4))
    left, right = figure.subplots(1, 2)
    levels = [row["level"] for row in found["coverage"]]
    for prefix, color, marker, name in (("", AFTER, "o", VECTOR), ("control_", CONTROL, "x", TOOL)):
        for axis, key in ((left, "covered"), (right, "width")):
            axis.plot(levels, [row[prefix + key] for row in found["coverage"]], color=color, marker=marker, label=name)
    level = torch.linspace(0, 1, 101, dtype=torch.float64)
    chance = 2 * (level * (1 - level) / found["rows"]).sqrt()
    ends = (level - chance).clamp_min(0), (level + chance).clamp_max(1)
    left.fill_between(level, *ends, color=FAINT, alpha=0.6, lw=0, label="as asked, give or take chance", zorder=0)
    left.set(title="share covered", xlabel="level asked", xlim=(0, 1), ylim=(0, 1.02))
    right.set(title="median width, relative to the number", xlabel="level asked", xlim=(0, 1))
    right.set_yscale("log")
    left.legend(loc="upper left")
    right.legend(loc="upper left")
    return figure


@plot
def cost_plot(table: Table, predictions: Predictions) -> Figure:
    """Cost and number of the configurations of each tool, and those that are recommended."""
    cost, method = prices(table.schema, table.values), predictions.methods[VECTOR]
    number = table.schema.index(predictions.number)
    target, shown = table.values[:, number], _typical(table, number)[:_PANELS]
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(13.5, 3.6 * lines))
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    for place, (axis, rows) in enumerate(zip(axes, shown, strict=False)):
        chosen = recommended(method, cost, rows)
        best = rows[front(cost[rows], target[rows])]
        axis.scatter(cost[rows], target[rows], s=7, color=BEFORE, label="measured")
        axis.step(cost[best], target[best], where="post", color=SOFT, lw=1, label="front")
        axis.step(cost[chosen], method.upper(chosen), where="post", color=AFTER, lw=1, ls="--", label="bound")
        axis.scatter(cost[chosen], target[chosen], s=18, color=AFTER, zorder=3, label="recommended")
        broken = chosen[target[chosen] > method.upper(chosen)]
        axis.scatter(
            cost[broken], target[broken], s=60, facecolors="none", edgecolors=CONTROL, zorder=4, label="bound missed"
        )
        labels = [
            table.schema.dimensions[index].labels[int(table.values[rows[0], index])]
            for index in conditions(table.schema)
        ]
        axis.set(title=textwrap.fill(", ".join(labels), 46), xlabel="price")
        if bool((target[rows] > 0).all()):
            axis.set_yscale("log")
            axis.yaxis.set(
                major_locator=_log_ticks(target[rows]), major_formatter=_PLAIN, minor_formatter=NullFormatter()
            )
        if place % columns == 0:
            axis.set_ylabel(_labelled(table, number))
        if place == 0:
            figure.legend(*axis.get_legend_handles_labels(), loc="outside upper right", ncols=5)
    return figure


def _typical(table: Table, number: int) -> list[Tensor]:
    """For each tool its rows with the labels of the row whose number is the median."""
    found = []
    for tool in sorted(table.measured_tools):
        rows = (table.tools == tool).nonzero().flatten()
        middle = rows[table.values[rows, number].argsort()[len(rows) // 2]]
        labels = table.values[:, conditions(table.schema)]
        found.append((labels == labels[middle]).all(1).nonzero().flatten())
    return found


def _labelled(table: Table, index: int) -> str:
    """Name of a dimension, with its unit unless the name has it."""
    dimension = table.schema.dimensions[index]
    return (
        dimension.name
        if not dimension.unit or dimension.unit in dimension.name
        else f"{dimension.name}, {dimension.unit}"
    )


def _log_ticks(numbers: Tensor) -> LogLocator:
    """Ticks of a logarithmic axis of ``numbers``: the fewer a decade the more decades there are."""
    ratio = float(numbers.max() / numbers.min())
    return LogLocator(
        subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if ratio < 100 else (1.0, 2.0, 5.0) if ratio < 1e4 else (1.0,)
    )


@plot
def map_plot(codec: ResourceCodec, table: Table) -> Figure:
    """The first two principal components of the vectors."""
    rows = torch.linspace(0, len(table) - 1, min(len(table), _MAPPED)).long()
    vectors = codec.embed(table.values[rows])
    centered = vectors - vectors.mean(0)
    names = ["component 1", "component 2"]
    places = torch.zeros(len(rows), 2)
    if len(rows) > 1:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            # More than two, for the first two to be exact.
            _, spread, directions = torch.pca_lowrank(centered, min(20, *centered.shape), center=False, niter=4)
        places = centered @ directions[:, :2]
        shares = (spread[:2].square() / centered.square().sum().clamp_min(1e-12)).tolist()
        names = [f"{name}, {share:.0%} of the variance" for name, share in zip(names, shares, strict=True)]
    figure = Figure(figsize=(13.5, 5.4))
    left, right = figure.subplots(1, 2)
    count = len(table.schema.tools)
    colors = mpl.colormaps["turbo"](torch.linspace(0.05, 0.95, count).numpy())
    for index, (tool, color) in enumerate(zip(table.schema.tools, colors, strict=True)):
        chosen = table.tools[rows] == index
        left.scatter(*places[chosen].T, s=6, color=color, label=tool)
    left.set(title="by tool", xlabel=names[0], ylabel=names[1])
    if count <= _NAMED:
        longest = max(map(len, table.schema.tools))
        figure.legend(loc="outside lower left", ncols=max(1, 190 // (longest + 6)), markerscale=2)
    measured = [
        index for index, dimension in enumerate(table.schema.dimensions) if dimension.measured and dimension.number
    ]
    index = measured[0] if measured else len(table.schema.dimensions) - 1
    numbers = table.values[rows, index]
    norm = LogNorm() if bool((numbers > 0).all()) and len(torch.unique(numbers)) > 1 else None
    shown = right.scatter(*places.T, s=6, c=numbers, norm=norm)
    right.set(title=f"by {table.schema.names[index]}", xlabel=names[0])
    figure.colorbar(
        shown, ax=right, label=_labelled(table, index), ticks=_log_ticks(numbers) if norm else None, format=_PLAIN
    )
    return figure
