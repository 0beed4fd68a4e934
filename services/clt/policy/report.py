"""The report of a policy: its training, the gaps of its tours to the solver's, and some tours of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from ethogram.specs.clt import PolicySpec
from services.clt.policy.tsp import lengths
from services.runtime.report import AFTER, BEFORE, CONTROL, INK, Panel, Report, history_plot, plot

if TYPE_CHECKING:
    from services.clt.policy.evaluate import Evaluation

_COLORS = {"greedy": BEFORE, "multistart": AFTER, "sampled": CONTROL}
_TOURS = 4


def write_report(
    folder: Path,
    spec: PolicySpec,
    nodes: int,
    history: Sequence[Mapping[str, float]],
    evaluation: Evaluation | None,
) -> None:
    """Write ``report.html``, its pictures, and the numbers behind them in ``report.json``."""
    figures = evaluation.figures if evaluation else {}
    gaps = {name: values.tolist() for name, values in evaluation.gaps.items()} if evaluation else {}
    solver = ("solver, on the instances of the evaluation", figures["length_solver"]) if evaluation else None
    panels = [
        Panel("length of a tour", {"validation_length": "greedy", "length": "sampled"}, level=solver),
        Panel("entropy of a tour, in nats", {"entropy": "entropy"}),
    ]
    kind = spec.distribution if spec.cities is None else "given"
    report = Report(f"A policy for tours of {nodes} cities")
    report.text(f"{spec.training.steps:,} steps of {spec.training.batch_size:,} {kind} instances of {nodes} cities.")
    report.section("Training").figure("history", history_plot(history, panels), "Length and entropy over the steps")
    if evaluation is not None:
        report.section(
            "Tours",
            f"""How much longer than the solver's the policy's tours are, on {len(evaluation.cities):,} instances that
            training never saw. **greedy**: one tour, always to the likeliest city; **multistart**: the shortest of the
            greedy tours from each city; **sampled**: the shortest of {spec.samples} sampled tours.""",
        )
        report.table(
            ["tours", "mean", "median", "95 %", "longest"], ([name, *_spread(gap)] for name, gap in gaps.items())
        )
        report.figure("gaps", gap_plot(evaluation), "Gaps to the solver")
        report.figure("tours", tour_plot(evaluation), "Tours of the policy and of the solver")
    report.figures(figures).spec(spec)
    report.write(folder, {"figures": figures, "course": list(history), "gaps": gaps})


def _spread(values: Sequence[float]) -> list[str]:
    ordered = sorted(values)
    numbers = [sum(ordered) / len(ordered), *(ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.95, 1))]
    return [f"{number:.2%}" for number in numbers]


@plot
def gap_plot(evaluation: Evaluation) -> Figure:
    """Histogram of the gaps."""
    figure = Figure(figsize=(8, 3.2))
    axis = figure.subplots()
    limit = max(0.01, *(float(values.quantile(0.99)) for values in evaluation.gaps.values()))
    for name, values in evaluation.gaps.items():
        percent = 100 * values.clamp(0, limit)
        axis.hist(percent, 40, range=(0, 100 * limit), histtype="step", lw=1.4, color=_COLORS[name], label=name)
    beyond = max(int((values > limit).sum()) for values in evaluation.gaps.values())
    note = f"; the last bin also has all larger gaps ({beyond} at most)" if beyond else ""
    axis.set(title="instances by gap to the solver", xlabel=f"percent{note}")
    axis.legend()
    return figure


@plot
def tour_plot(evaluation: Evaluation) -> Figure:
    """Tours of the policy above, of the solver below, for instances from the smallest gap to the largest."""
    order = evaluation.gaps["greedy"].argsort().tolist()
    count = min(_TOURS, len(order))
    shown = [order[round(rank * (len(order) - 1) / max(1, count - 1))] for rank in range(count)]
    figure = Figure(figsize=(2.6 * count, 5.4))
    rows = figure.subplots(2, count, squeeze=False)
    ways = (("policy", AFTER, evaluation.tours), ("solver", BEFORE, evaluation.shortest))
    for (name, color, tours), axes in zip(ways, rows, strict=True):
        for index, axis in zip(shown, axes, strict=True):
            cities, tour = evaluation.cities[index], tours[index, 0]
            path = cities[[*tour.tolist(), int(tour[0])]]
            axis.plot(path[:, 0], path[:, 1], color=color, marker="o", ms=3, mfc=INK, mec=INK)
            axis.set_title(f"{name}: {float(lengths(cities[None], tour[None, None])):.3f}")
            axis.set(aspect="equal", xticks=[], yticks=[])
            axis.spines[:].set_visible(True)
    return figure
