"""How reports look: pictures of one style, and pages that hold them and the numbers."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import matplotlib as mpl
from matplotlib.figure import Figure

INK, SOFT, FAINT = "#1f2430", "#6b7280", "#d8dce3"
BEFORE, AFTER, CONTROL = "#9aa3b2", "#0f766e", "#c2410c"
_DPI = 150
_STYLE = f"""body{{font:15px/1.5 system-ui,sans-serif;color:{INK};max-width:70rem;margin:2rem auto;padding:0 1rem}}
img{{max-width:100%}}table{{border-collapse:collapse;margin:1rem 0}}td,th{{padding:.25rem .8rem;text-align:left;
border-bottom:1px solid {FAINT}}}pre{{background:#f6f7f9;padding:1rem;overflow:auto}}"""


@contextmanager
def drawing() -> Iterator[None]:
    """Figures made inside have the reports' type and colours."""
    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "axes.labelcolor": INK}):
        yield


def png(figure: Figure) -> bytes:
    """A figure as a picture."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=_DPI, format="png")
    return picture.getvalue()


def page(title: str, body: str) -> str:
    """A page that stands alone; ``body``: HTML."""
    name = html.escape(title)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{name}</title>
<style>{_STYLE}</style>
<h1>{name}</h1>
{body}</html>
"""


def image(picture: bytes, alt: str) -> str:
    """A picture, in the page itself."""
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; fractions with three digits."""
    lines = [f"<tr>{''.join(f'<th>{html.escape(name)}</th>' for name in head)}</tr>"]
    for row in rows:
        lines.append(f"<tr>{''.join(f'<td>{_cell(cell)}</td>' for cell in row)}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else html.escape(str(value))
