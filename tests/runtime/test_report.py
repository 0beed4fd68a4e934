"""Reports: what is on the page, beside it, and in its JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from pydantic import BaseModel

from services.runtime.report import Panel, Report, history_plot

pytestmark = pytest.mark.pictures


class Small(BaseModel):
    name: str = "<a>"


def test_a_report_holds_its_pictures_tables_and_spec(tmp_path: Path) -> None:
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "validation_loss": 1.5}]
    panels = [Panel("loss", {"validation_loss": "validation", "loss": "training", "none": "none"}, level=("best", 0.5))]
    figure = history_plot(history, panels)
    assert [np.size(line.get_xdata()) for line in figure.axes[0].lines] == [1, 2, 2]
    report = Report("One & two").text("**bold** <b>").section("Training").figure("history", figure, "losses")
    report.points(["one", "<two>"]).table(["a<", "b"], [[0.12345, 12345], ["<i>", ""]])
    report.figures({"fvu": 0.5}).spec(Small())
    report.write(tmp_path / "report", {"figures": {"fvu": float("nan"), "l0": 2.5}}, former="old.html")
    assert {file.name for file in (tmp_path / "report").iterdir()} == {
        "history.png",
        "old.html",
        "report.html",
        "report.json",
    }
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<h1>One &amp; two</h1>" in page and "<p><b>bold</b> &lt;b&gt;</p>" in page
    assert '<h2>Training</h2>\n<img alt="losses" src="data:image/png;base64,' in page
    assert "<ul><li>one</li><li>&lt;two&gt;</li></ul>" in page
    # A table never runs past the page.
    assert re.search(r"table\{display:block;[^}]*max-width:100%;[^}]*overflow:auto", page)
    assert "<tr><td>0.123</td><td>12,345</td></tr><tr><td>&lt;i&gt;</td><td></td></tr>" in page
    assert "<tr><td>fvu</td><td>0.500</td></tr>" in page and "&quot;name&quot;: &quot;&lt;a&gt;&quot;" in page
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == {"figures": {"fvu": None, "l0": 2.5}}
    assert 'href="report.html"' in (tmp_path / "report" / "old.html").read_text()
