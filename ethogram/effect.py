"""A page on the effect of edits on networks: predicted from their latents, and measured."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import numpy as np

from ethogram.inference import Effect, Floats
from ethogram.specs.edits import Edit, EditLike

_MAX_NETWORKS = 200
"""Maximum number of networks in the table."""
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;color:#1f2430;max-width:70rem;margin:2rem auto;padding:0 1rem}
table{display:block;width:fit-content;max-width:100%;overflow:auto;border-collapse:collapse;margin:1rem 0}
td,th{padding:.25rem .8rem;text-align:left;border-bottom:1px solid #d8dce3}
i{display:inline-block;height:.7rem;vertical-align:middle;background:#9aa3b2}i.after{background:#0f766e}"""


def effect_page(effect: Effect, edits: Sequence[EditLike], networks: str) -> str:
    """``effect`` of ``edits`` as a self-contained HTML page; ``networks`` names what was edited."""
    single = effect.local.ndim == 0
    numbers = (effect.strength, effect.target, effect.local, effect.kept)
    strength, target, local, kept = (np.atleast_1d(array) for array in numbers)
    measured = (effect.predicted, effect.recall, effect.false_positive_rate)
    predicted, recall, rate = (array[None] if single else array for array in measured)
    had = effect.had[None] if single else effect.had
    count = len(local)
    rows = []
    for column, name in enumerate(effect.behaviors):
        share = f"{had[:, column].mean():.0%}" if count > 1 else ("yes" if had[0, column] else "no")
        rows.append([name, share, *_bars(predicted[:, :, column]), *_bars(recall[:, :, column])])
    rows.append(["none of them", "", "", "", *_bars(rate)])
    head = ["behaviour", "had it", "predicted before", "predicted after", "measured before", "measured after"]
    title = ", ".join(str(Edit(*edit)) for edit in edits)
    shown = range(min(count, _MAX_NETWORKS))
    network_rows = [
        [str(i), f"{strength[i]:g}", _number(target[i]), f"{local[i]:+.3f}", f"{kept[i]:.3f}"] for i in shown
    ]
    more = f"<p>and {count - _MAX_NETWORKS} more</p>" if count > _MAX_NETWORKS else ""
    of = "1 network" if count == 1 else f"{count:,} networks; means"
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Effect of an edit</title>
<style>{_STYLE}</style>
<h1>{html.escape(title)}</h1>
<p>{html.escape(networks)}: {of}. Model {html.escape(effect.model)}, version {html.escape(effect.version)}.</p>
<p><b>Target</b>, accuracy where the edit decides: {_number(_mean(target))}. <b>Local</b>, change of accuracy everywhere
else: {local.mean():+.3f}. <b>Kept</b>, share of the answers there that are still those before: {kept.mean():.3f}.
All are on held-out sequences, with the behaviours that each network
has by measurement.</p>
<h2>Behaviours</h2>
<p><b>predicted</b>: probability of the behaviour, by a linear probe on the latent. <b>measured</b>: share of the
held-out sequences with the behaviour (in the last row: without any) that the network accepts.</p>
{_table(head, rows)}
<h2>Networks</h2>{_table(["network", "strength", "target", "local", "kept"], network_rows)}{more}</html>
"""


def summary(effect: Effect) -> dict[str, object]:
    """Summary of ``effect``: mean ``target``, ``local`` and ``kept``, the number of networks with
    ``nothing_to_change``, and the ``strength`` of each, or one number if all are equal."""
    target, strength = np.atleast_1d(effect.target), np.atleast_1d(effect.strength)
    mean, strengths = _mean(target), strength.tolist()
    return {
        "target": None if math.isnan(mean) else round(mean, 4),
        "local": round(float(effect.local.mean()), 4),
        "kept": round(float(effect.kept.mean()), 4),
        "nothing_to_change": int(np.isnan(target).sum()),
        "strength": strengths[0] if len(set(strengths)) == 1 else strengths,
    }


def _bars(values: Floats) -> list[str]:
    """Means over the networks before and after (``[networks, 2]``), each as a number and a bar."""
    means = zip(("before", "after"), values.mean(axis=0).tolist(), strict=True)
    return [
        "no sequences" if math.isnan(mean) else f'<i class="{kind}" style="width:{6 * mean:.2f}rem"></i> {mean:.2f}'
        for kind, mean in means
    ]


def _mean(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _number(value: float) -> str:
    return "nothing to decide" if math.isnan(value) else f"{value:.3f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"<tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>"]
    for first, *rest in rows:
        lines.append(f"<tr><td>{html.escape(first)}</td>{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>")
    return f"<table>{''.join(lines)}</table>"
