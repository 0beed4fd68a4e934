"""Reports: a page with pictures and tables, the pictures as files, and the numbers as JSON."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, Self

import matplotlib as mpl
from matplotlib.figure import Figure
from pydantic import BaseModel

PAGE, DATA = "report.html", "report.json"
_STYLE = mpl.rc_params_from_file(Path(__file__).with_name("report.mplstyle"), use_default_template=False)
_COLORS = _STYLE["axes.prop_cycle"].by_key()["color"]
AFTER, BEFORE, CONTROL = _COLORS[:3]
INK, SOFT, FAINT = (_STYLE[name] for name in ("text.color", "xtick.labelcolor", "grid.color"))
_CSS = f"""body{{font:15px/1.5 system-ui,sans-serif;color:{INK};max-width:70rem;margin:2rem auto;padding:0 1rem}}
img{{max-width:100%}}
table{{display:block;width:fit-content;max-width:100%;max-height:80vh;overflow:auto;
border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}}
td,th{{padding:.25rem .7rem;text-align:left;border-bottom:1px solid {FAINT}}}
th{{position:sticky;top:0;background:#fff;vertical-align:bottom}}
pre{{background:#f6f7f9;padding:1rem;overflow:auto}}
@media print{{table{{max-height:none}}}}"""
_FEW_POINTS = 8
"""A curve with fewer points than this has a marker at each of them."""

Parameters = ParamSpec("Parameters")


class Panel(NamedTuple):
    """One plot of a history."""

    title: str
    curves: Mapping[str, str]
    """Metric -> label. Metrics that the history does not have are left out."""
    log: bool = False
    level: tuple[str, float] | None = None
    """Label and value of a horizontal line to compare the curves with."""


class Report:
    """A report, built from top to bottom: each method appends to it and returns it.

    Texts are plain, except that ``**this**`` is bold.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._body: list[str] = []
        self._pictures: dict[str, bytes] = {}

    def section(self, heading: str, text: str = "") -> Self:
        self._body.append(f"<h2>{html.escape(heading)}</h2>")
        return self.text(text) if text else self

    def text(self, text: str) -> Self:
        marked = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(text))
        self._body.append(f"<p>{marked}</p>")
        return self

    def figure(self, name: str, figure: Figure, alt: str) -> Self:
        """Show ``figure`` in the page, and write it as ``<name>.png`` beside it."""
        picture = io.BytesIO()
        with mpl.rc_context(_STYLE):
            figure.savefig(picture, format="png")
        self._pictures[name] = picture.getvalue()
        data = base64.b64encode(picture.getvalue()).decode()
        self._body.append(f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">')
        return self

    def points(self, texts: Iterable[str]) -> Self:
        """Add a list of sentences."""
        self._body.append(f"<ul>{''.join(f'<li>{html.escape(text)}</li>' for text in texts)}</ul>")
        return self

    def table(self, head: Sequence[str], rows: Iterable[Sequence[object]]) -> Self:
        """Add a table; floats are shown with three decimals, and NaN, of what was not measured, as a dash. One that is
        wider than the page, or long, scrolls."""
        lines = ["".join(f"<th>{html.escape(name)}</th>" for name in head)]
        lines += ["".join(f"<td>{_cell(cell)}</td>" for cell in row) for row in rows]
        self._body.append(f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>")
        return self

    def figures(self, figures: Mapping[str, object]) -> Self:
        """Add the section of all figures."""
        return self.section("All figures").table(["figure", "value"], figures.items())

    def spec(self, spec: BaseModel) -> Self:
        """Add the section of the spec, as JSON."""
        self.section("Spec")._body.append(f"<pre>{html.escape(spec.model_dump_json(indent=2))}</pre>")
        return self

    def write(self, folder: Path, data: Mapping[str, Any], former: str | None = None) -> None:
        """Write ``report.html``, the pictures and ``data`` as ``report.json`` into ``folder``.

        NaN and infinities in ``data`` become null. ``former``: the name that the page had in an earlier version; a page
        of that name leads to ``report.html``.
        """
        title, body = html.escape(self.title), "\n".join(self._body)
        strict = json.loads(json.dumps(data), parse_constant=lambda _: None)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DATA).write_text(json.dumps(strict, indent=2), encoding="utf-8")
        for name, picture in self._pictures.items():
            (folder / f"{name}.png").write_bytes(picture)
        (folder / PAGE).write_text(
            _HEAD.format(title=title) + f"<style>{_CSS}</style>\n<h1>{title}</h1>\n{body}</html>\n", encoding="utf-8"
        )
        if former is not None:
            link = f'<meta http-equiv="refresh" content="0; url={PAGE}">\n<a href="{PAGE}">{PAGE}</a></html>\n'
            (folder / former).write_text(_HEAD.format(title=title) + link, encoding="utf-8")


_HEAD = '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>\n'


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else html.escape(str(value))


def plot(draw: Callable[Parameters, Figure]) -> Callable[Parameters, Figure]:
    """Decorate a function that draws a figure: it draws in the style of the reports."""
    return mpl.rc_context(_STYLE)(draw)


@plot
def history_plot(history: Sequence[Mapping[str, float]], panels: Sequence[Panel]) -> Figure:
    """Metrics over the steps of training, two panels side by side.

    ``history``: rows of ``step`` and some of the metrics.
    """
    lines = -(-len(panels) // 2)
    figure = Figure(figsize=(13.5, 3.3 * lines + 0.2))
    for axis, panel in zip(figure.subplots(lines, 2, squeeze=False).flat, panels, strict=False):
        for order, (name, label) in enumerate(panel.curves.items()):
            points = [(row["step"], row[name]) for row in history if name in row]
            if points:
                marker = "o" if len(points) < _FEW_POINTS else None
                # The first curve lies on top.
                axis.plot(
                    *zip(*points, strict=True),
                    label=label,
                    marker=marker,
                    color=_COLORS[order % 8],
                    zorder=3 - order / 99,
                )
        if panel.level is not None:
            axis.axhline(panel.level[1], color=SOFT, lw=0.8, ls=":", label=panel.level[0])
        if panel.log:
            axis.set_yscale("log")
        axis.set_title(panel.title)
        axis.set_xlabel("step")
        if axis.lines:
            axis.legend()
    return figure
