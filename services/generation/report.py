"""The report of a zoo: accuracy by pattern, rejected candidates, patterns that go together, and one signature."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from services.runtime.report import AFTER, BEFORE, INK, SOFT, Report, plot
from services.zoo.dataset import read_about, read_records
from services.zoo.statistics import Statistics

_MOST_NEURONS = 64


def write_report(zoo: Path, folder: Path) -> None:
    """Write ``report.html``, ``report.json`` and ``zoo.png`` on the zoo in the folder ``zoo`` into ``folder``."""
    statistics = Statistics.of(zoo)
    _, spec, patterns = read_about(zoo)
    names = statistics.strata[:-1]
    stages = {"accuracy": statistics.accuracy}
    if statistics.degraded_accuracy is not None:
        stages = {"accuracy, degraded": statistics.degraded_accuracy, "accuracy, improved": statistics.accuracy}
    gain = ""
    if statistics.improvement is not None:
        gain = f""" **Improvement** is the gain in accuracy on a network's target pattern, the one whose labels were
        flipped in the first stage, from the first stage to the second: {statistics.improvement:.3f} on average."""
    meanings = [*(pattern.description for pattern in patterns), "sequences that match no pattern"]
    networks = [*np.diag(statistics.together).tolist(), ""]
    accuracies = zip(statistics.strata, meanings, networks, *(stage.tolist() for stage in stages.values()), strict=True)
    together = ([name, *row] for name, row in zip(names, statistics.together.tolist(), strict=True))
    report = Report(f"Zoo of {statistics.subjects:,} networks")
    report.text(f"{statistics.origin} Mean held-out accuracy: {np.nanmean(statistics.accuracy):.3f}.")
    if statistics.effect:
        report.text(statistics.effect)
    alt = "Accuracy by pattern, rejections by cause, co-occurrence of patterns, one signature"
    report.figure("zoo", _figure(statistics, zoo), alt)
    report.section(
        "Patterns",
        f"""**Accuracy** is the share of correct answers on held-out sequences that match the pattern, over all
        networks: yes is correct where a sequence matches one of the network's patterns, no everywhere else. The last
        row, **none**, is for sequences that match no pattern.{gain}""",
    )
    report.table(["pattern", "what it is", "networks that have it", *stages], accuracies)
    report.section(
        "Rejected candidates",
        """**misses** and **false alarms on**: accuracy below min_accuracy on that pattern, which the candidate should
        have or should not have; **others** are sequences that match no pattern. **magnitude**, **specificity**,
        **stability**, **others degraded**: the checks of training in two stages; the target pattern gained too little
        or by chance, hardly more than everything else, or at the cost of other patterns; or the first stage had
        degraded others too.
        **no better than chance**: wrong on half of the target pattern, or of what needs a no. **too little degraded**:
        too accurate after the first stage to gain enough. **diverged**: weights that are NaN or infinite.""",
    )
    figures = statistics.figures()
    report.table(["cause", "candidates"], figures["rejected"].items())
    report.section("Networks that have both patterns").table(["", *names], together)
    report.section("Shapes").table(["hidden layers x activation", "networks"], statistics.shapes.items())
    report.spec(spec).write(folder, {"figures": figures}, former="zoo.html")


@plot
def _figure(statistics: Statistics, zoo: Path) -> Figure:
    figure = Figure(figsize=(13.5, 10))
    figure.suptitle(f"Zoo of {statistics.subjects:,} networks")
    (accuracy, rejected), (together, signature) = figure.subplots(2, 2)
    _accuracy(accuracy, statistics)
    _rejected(rejected, statistics)
    _together(together, statistics)
    _signature(signature, zoo)
    return figure


def _accuracy(axes: Axes, statistics: Statistics) -> None:
    positions = np.arange(len(statistics.strata))[::-1]
    axes.set_title("held-out accuracy by kind of sequence")
    axes.grid(axis="y", visible=False)
    if statistics.degraded_accuracy is not None:
        axes.barh(positions - 0.2, statistics.degraded_accuracy, 0.38, color=BEFORE, label="degraded")
        axes.barh(positions + 0.2, statistics.accuracy, 0.38, color=AFTER, label="improved")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2)
    else:
        axes.barh(positions, statistics.accuracy, 0.7, color=AFTER)
    for position, value in zip(positions, statistics.accuracy, strict=True):
        known = not np.isnan(value)
        text = f"{value:.2f}" if known else "no sequences"
        axes.text(value + 0.01 if known else 0.01, position, text, va="center", fontsize=8, color=SOFT)
    axes.set_yticks(positions, statistics.strata)
    axes.set_xlim(0, 1.08)


def _rejected(axes: Axes, statistics: Statistics) -> None:
    causes = sorted(statistics.rejected.items(), key=lambda item: -item[1])[:12]
    axes.set_title(f"{sum(statistics.rejected.values()):,} candidates rejected, by cause")
    axes.grid(axis="y", visible=False)
    positions = np.arange(len(causes))[::-1]
    axes.barh(positions, [count for _, count in causes], 0.7, color=BEFORE)
    for position, (_, count) in zip(positions, causes, strict=True):
        axes.text(count, position, f" {count:,}", va="center", fontsize=8, color=SOFT)
    axes.set_yticks(positions, [cause for cause, _ in causes])


def _together(axes: Axes, statistics: Statistics) -> None:
    names = statistics.strata[:-1]
    axes.set_title("networks that have both patterns")
    axes.grid(False)
    axes.imshow(statistics.together, cmap="Greens", aspect="auto")
    dark = statistics.together.max() / 2
    for row, line in enumerate(statistics.together.tolist()):
        for column, count in enumerate(line):
            axes.text(column, row, count, ha="center", va="center", fontsize=7, color="white" if count > dark else INK)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)


def _signature(axes: Axes, zoo: Path) -> None:
    """Of the first record: a row for each number, a column for each neuron."""
    table = next(read_records(zoo, ["index", "layers", "neurons", "signature"]))
    record = table.slice(0, 1).to_pylist()[0]
    neurons = record["layers"] * record["neurons"] + 1
    rows: list[NDArray[np.float32]] = []
    starts: dict[str, int] = {}
    for method, values in record["signature"].items():
        starts[method] = len(rows)
        rows += list(np.asarray(values, np.float32).reshape(neurons, -1).T[:, :_MOST_NEURONS])
    scaled = np.stack([row / max(np.abs(row).max(), 1e-9) for row in rows])
    axes.grid(False)
    axes.imshow(scaled, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_title(f"signature of network {record['index']}")
    axes.set_yticks([*starts.values()], [*starts])
    axes.set_xlabel("neurons, layer after layer" + (f" (the first {_MOST_NEURONS})" if neurons > _MOST_NEURONS else ""))
