"""The report of a zoo: one picture, and a page that holds it and the numbers."""

from __future__ import annotations

import html
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from services.runtime.page import AFTER, BEFORE, INK, SOFT, drawing, image, page, png, table
from services.zoo.dataset import read_about, read_records
from services.zoo.statistics import Statistics

PICTURE, PAGE = "zoo.png", "zoo.html"
_MOST_NEURONS = 64


def write_report(zoo: Path, folder: Path) -> None:
    """Write ``zoo.png`` and ``zoo.html`` on the zoo in the folder ``zoo`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    found = Statistics.of(zoo)
    with drawing():
        picture = png(_figure(found, zoo))
    (folder / PICTURE).write_bytes(picture)
    (folder / PAGE).write_text(_page(found, zoo, picture))


def _figure(found: Statistics, zoo: Path) -> Figure:
    figure = Figure(figsize=(13.5, 10), layout="constrained")
    figure.suptitle(f"Zoo of {found.subjects:,} networks: {found.origin}", fontsize=12)
    (accuracy, rejected), (together, signature) = figure.subplots(2, 2)
    _accuracy(accuracy, found)
    _rejected(rejected, found)
    _together(together, found)
    _signature(signature, zoo)
    for axes in (accuracy, rejected):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _accuracy(axes: Axes, found: Statistics) -> None:
    places = np.arange(len(found.strata))[::-1]
    axes.set_title("held-out accuracy by kind of sequence", color=SOFT, loc="left")
    if found.degraded_accuracy is not None:
        axes.barh(places - 0.2, found.degraded_accuracy, 0.38, color=BEFORE, label="degraded")
        axes.barh(places + 0.2, found.accuracy, 0.38, color=AFTER, label="improved")
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2)
    else:
        axes.barh(places, found.accuracy, 0.7, color=AFTER)
    for place, value in zip(places, found.accuracy, strict=True):
        axes.text(value + 0.01, place, f"{value:.2f}", va="center", fontsize=8, color=SOFT)
    axes.set_yticks(places, found.strata)
    axes.set_xlim(0, 1.08)


def _rejected(axes: Axes, found: Statistics) -> None:
    causes = sorted(found.rejected.items(), key=lambda item: -item[1])[:12]
    axes.set_title(f"{sum(found.rejected.values()):,} candidates rejected, by cause", color=SOFT)
    places = np.arange(len(causes))[::-1]
    axes.barh(places, [count for _, count in causes], 0.7, color=BEFORE)
    for place, (_, count) in zip(places, causes, strict=True):
        axes.text(count, place, f" {count:,}", va="center", fontsize=8, color=SOFT)
    axes.set_yticks(places, [cause for cause, _ in causes])


def _together(axes: Axes, found: Statistics) -> None:
    names = found.strata[:-1]
    axes.set_title("networks that have both patterns", color=SOFT)
    axes.imshow(found.together, cmap="Greens", aspect="auto")
    dark = found.together.max() / 2
    for row, line in enumerate(found.together.tolist()):
        for column, count in enumerate(line):
            axes.text(column, row, count, ha="center", va="center", fontsize=7, color="white" if count > dark else INK)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)


def _signature(axes: Axes, zoo: Path) -> None:
    """Of the first record: a row for each number, a column for each neuron."""
    first = next(iter(read_records(zoo, ["index", "layers", "neurons", "signature"]))).slice(0, 1)
    record = first.to_pylist()[0]
    neurons = record["layers"] * record["neurons"] + 1
    rows, names = [], []
    for method, values in record["signature"].items():
        numbers = np.asarray(values, np.float32).reshape(neurons, -1).T
        rows += list(numbers[:, :_MOST_NEURONS])
        names += [method] + [""] * (len(numbers) - 1)
    scaled = np.stack([row / max(np.abs(row).max(), 1e-9) for row in rows])
    axes.imshow(scaled, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_title(f"signature of network {record['index']}", color=SOFT)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("neurons, layer after layer" + (f" (the first {_MOST_NEURONS})" if neurons > _MOST_NEURONS else ""))


def _page(found: Statistics, zoo: Path, picture: bytes) -> str:
    _, spec, patterns = read_about(zoo)
    degraded = found.degraded_accuracy
    meanings = [*(pattern.description for pattern in patterns), "sequences that match no pattern"]
    networks = [*np.diag(found.together).tolist(), ""]
    rows = [
        [name, meaning, count, *([] if degraded is None else [f"{degraded[i]:.3f}"]), f"{found.accuracy[i]:.3f}"]
        for i, (name, meaning, count) in enumerate(zip(found.strata, meanings, networks, strict=True))
    ]
    names = found.strata[:-1]
    stages = ["accuracy"] if degraded is None else ["accuracy, degraded", "accuracy, improved"]
    accuracies = table(["pattern", "what it is", "networks that have it", *stages], rows)
    rejected = table(["cause", "candidates"], found.figures()["rejected"].items())
    pairs = ([name, *row] for name, row in zip(names, found.together.tolist(), strict=True))
    gain = ""
    if found.improvement is not None:
        gain = f""" <b>Improvement</b> is by how much a network is more accurate on its target pattern, the one whose
labels were flipped in the first stage, after the second stage than after the first: {found.improvement:.3f} on
average."""
    shown = image(picture, "Accuracy by pattern, rejections by cause, co-occurrence of patterns, one signature")
    body = f"""<p>{html.escape(found.origin)} Mean held-out accuracy: {found.accuracy.mean():.3f}.</p>
{shown}
<h2>Patterns</h2><p><b>Accuracy</b> is the share of right answers on held-out sequences that match the pattern, over all
networks: yes is right where a sequence matches one of the network's own patterns, no everywhere else. The last row,
<b>none</b>, is for sequences that match no pattern.{gain}</p>{accuracies}
<h2>Rejected candidates</h2><p><b>misses</b> and <b>false alarms on</b>: less accurate than min_accuracy on that
pattern, which is the candidate's own or is not; <b>others</b> are sequences that match no pattern. <b>magnitude</b>,
<b>specificity</b>, <b>stability</b>: the checks of training in two stages. <b>too little degraded</b>: too good after
the first stage to gain enough. <b>diverged</b>: weights that are no numbers.</p>{rejected}
<h2>Networks that have both patterns</h2>{table(["", *names], pairs)}
<h2>Shapes</h2>{table(["hidden layers x activation", "networks"], found.shapes.items())}
<h2>Spec</h2><pre>{html.escape(spec.model_dump_json(indent=2))}</pre>"""
    return page(f"Zoo of {found.subjects:,} networks", body)
