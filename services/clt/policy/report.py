"""The report of a policy: how training went, how far its tours are from the shortest, and some of both."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from ethogram.specs.clt import PolicySpec
from services.clt.policy.tsp import lengths
from services.runtime.page import AFTER, BEFORE, CONTROL, FAINT, INK, SOFT, drawing, image, page, png, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from services.clt.policy.evaluate import Evaluation

PAGE = "report.html"
_COLORS = {"greedy": BEFORE, "multistart": AFTER, "sampled": CONTROL}
_TOURS = 4


def write_report(
    folder: Path, spec: PolicySpec, course: Sequence[Mapping[str, float]], evaluation: Evaluation | None
) -> None:
    """``report.html``, its pictures, and the numbers behind them in ``report.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, float] = evaluation.figures if evaluation else {}
    with drawing():
        pictures = {"course": png(course_plot(course, figures.get("length_solver")))}
        if evaluation is not None:
            pictures |= {"gaps": png(gap_plot(evaluation)), "tours": png(tour_plot(evaluation))}
    for name, picture in pictures.items():
        (folder / f"{name}.png").write_bytes(picture)
    found = {name: values.tolist() for name, values in evaluation.gaps.items()} if evaluation else {}
    about = {"figures": figures, "course": list(course), "gaps": found}
    (folder / "report.json").write_text(json.dumps(about))
    compared = ""
    if evaluation is not None:
        gaps = [[name, *_spread(values)] for name, values in found.items()]
        compared = f"""<h2>Tours</h2>
<p>How much longer than the solver's the policy's tours of {len(evaluation.cities):,} instances are, that training never
saw. <b>greedy</b>: one, always to the likeliest city; <b>multistart</b>: the shortest of the greedy ones from each
city; <b>sampled</b>: the shortest of {spec.samples} drawn.</p>
{table(["tours", "mean", "median", "95 %", "longest"], gaps)}
{image(pictures["gaps"], "gaps")}{image(pictures["tours"], "tours of policy and solver")}"""
    body = f"""<p>{spec.training.steps:,} steps of {spec.training.batch_size:,} instances of {spec.nodes} cities.</p>
<h2>Training</h2>{image(pictures["course"], "length over the steps")}{compared}
<h2>All figures</h2>{table(["figure", "value"], figures.items())}
<h2>Spec</h2><pre>{html.escape(spec.model_dump_json(indent=2))}</pre>"""
    (folder / PAGE).write_text(page(f"A policy for tours of {spec.nodes} cities", body))


def _spread(values: Sequence[float]) -> list[str]:
    ordered = sorted(values)
    numbers = [sum(ordered) / len(ordered), *(ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.95, 1))]
    return [f"{number:.2%}" for number in numbers]


def course_plot(course: Sequence[Mapping[str, float]], solver: float | None) -> Figure:
    """Mean length over the steps, of tours drawn in training and of greedy ones; and the entropy of a tour."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    length, entropy = figure.subplots(1, 2)
    names = (
        (length, "length", BEFORE, "drawn"),
        (length, "validation_length", AFTER, "greedy"),
        (entropy, "entropy", INK, "entropy"),
    )
    for axis, name, color, label in names:
        points = [(row["step"], row[name]) for row in course if name in row]
        if points:
            mark = "o" if len(points) == 1 else None
            axis.plot(*zip(*points, strict=True), color=color, lw=1.2, label=label, marker=mark)
    if solver is not None:
        length.axhline(solver, color=SOFT, lw=0.8, ls=":", label="solver, of the evaluation's instances")
    for axis, title in ((length, "length of a tour"), (entropy, "entropy of a tour, in nats")):
        _plain(axis, title)
        axis.set_xlabel("step")
    if length.lines:
        length.legend(frameon=False, fontsize=8)
    return figure


def gap_plot(evaluation: Evaluation) -> Figure:
    """Histogram of the gaps."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axis = figure.subplots()
    most = max(0.01, *(float(values.quantile(0.99)) for values in evaluation.gaps.values()))
    for name, values in evaluation.gaps.items():
        axis.hist(
            100 * values.clamp(0, most), 40, range=(0, 100 * most), histtype="step", color=_COLORS[name], label=name
        )
    _plain(axis, "instances by gap to the solver")
    beyond = max(int((values > most).sum()) for values in evaluation.gaps.values())
    axis.set_xlabel(f"percent; the last bin has what is beyond too (up to {beyond} instances)" if beyond else "percent")
    axis.legend(frameon=False, fontsize=8)
    return figure


def tour_plot(evaluation: Evaluation) -> Figure:
    """Tours of the policy above, of the solver below, of instances from the best to the worst."""
    order = evaluation.gaps["greedy"].argsort().tolist()
    count = min(_TOURS, len(order))
    shown = [order[round(place * (len(order) - 1) / max(1, count - 1))] for place in range(count)]
    figure = Figure(figsize=(2.6 * count, 5.4), layout="constrained")
    rows = figure.subplots(2, count, squeeze=False)
    ways = (("policy", AFTER, evaluation.tours), ("solver", BEFORE, evaluation.shortest))
    for (name, color, tours), axes in zip(ways, rows, strict=True):
        for index, axis in zip(shown, axes, strict=True):
            cities, tour = evaluation.cities[index], tours[index, 0]
            path = cities[[*tour.tolist(), int(tour[0])]]
            axis.plot(path[:, 0], path[:, 1], color=color, lw=1.2, marker="o", ms=3, mfc=INK, mec=INK)
            long = float(lengths(cities[None], tour[None, None]))
            _plain(axis, f"{name}: {long:.3f}")
            axis.set_aspect("equal")
            axis.set_xticks([])
            axis.set_yticks([])
    return figure


def _plain(axis: Axes, title: str) -> None:
    axis.set_title(title, fontsize=10, loc="left")
    axis.grid(color=FAINT, lw=0.5)
    for spine in axis.spines.values():
        spine.set_color(FAINT)
