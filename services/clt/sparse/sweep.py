"""Sweeps: transcoders for each pair and each point of a grid, and how they compare."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from pydantic import ValidationError

from ethogram.errors import InvalidInput
from ethogram.specs.clt import CltSpec, SweepSpec
from services.clt.activations.pairs import pair_name
from services.clt.activations.store import ActivationStore
from services.clt.sparse import job
from services.clt.sparse.streams import mlps, streams_of
from services.runtime.page import FAINT, drawing, image, page, png, table
from services.runtime.run import Run

TABLE, PAGE = "sweep.csv", "sweep.html"
Row = dict[str, Any]


def parts(spec: SweepSpec, store: ActivationStore) -> dict[str, CltSpec]:
    """The runs of a sweep by name: the pair's, then the values of the grid. Raises :class:`InvalidInput` before any is
    begun where one could not be."""
    pairs = [tuple(pair.split("->")) for pair in spec.pairs]
    if not pairs:
        pairs = list(zip(*mlps(list(store.widths)), strict=True))
    if not pairs:
        raise InvalidInput.field("spec.pairs", "no module's input and output are both in the store; name the pairs")
    places = [[pair] for pair in pairs] if spec.kind == "pair" else [pairs]
    points = itertools.product(*([(axis.option, value) for value in axis.values] for axis in spec.grid))
    found: dict[str, CltSpec] = {}
    for point, ends in itertools.product(list(points), places):
        asked = spec.model_dump(mode="json", exclude={"pairs", "grid"})
        asked |= {"sources": [source for source, _ in ends], "targets": [target for _, target in ends]}
        for option, value in point:
            _set(asked, option, value)
        name = pair_name(*ends[0]) if spec.kind == "pair" else f"clt_{spec.kind}"
        name = "-".join([name, *(f"{option.rpartition('.')[2]}_{value}" for option, value in point)])
        if asked["wandb"] is not None:
            asked["wandb"]["name"] = name
        try:
            part = CltSpec.model_validate(asked)
        except ValidationError as error:
            raise InvalidInput.from_pydantic(error, f"spec.grid ({name})") from None
        streams_of(part, store)
        found[name] = part
    return found


def _set(asked: dict[str, Any], option: str, text: str) -> None:
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    *above, last = option.split(".")
    for name in above:
        asked = asked[name]
    if last not in asked:
        raise InvalidInput.field("spec.grid", f"there is no option {option}")
    asked[last] = value


def run(spec: SweepSpec, run: Run) -> dict[str, Any]:
    """Artifacts: ``models``, a folder for each run with its model and report, and ``report``, the comparison.

    On a platform each run is a job of its own; elsewhere they follow one another. Raises :class:`InvalidInput` when
    all of them failed.
    """
    store = ActivationStore.open(run.inputs["activations"])
    wanted = parts(spec, store)
    done = run.children({name: ("clt", part) for name, part in wanted.items()})
    with tempfile.TemporaryDirectory() as scratch:
        models, failed = Path(scratch, "models"), dict[str, str]()
        rows: dict[str, Row] = {}
        if done is None:
            run.stage("sweep", len(wanted), "runs")
        for number, (name, part) in enumerate(wanted.items(), 1):
            if done is None:
                each = Each(run, models / name)
                try:
                    rows[name] = job.run(part, each)
                # What one run cannot do costs none of the others.
                except InvalidInput as error:
                    failed[name] = error.message
                    run.log(f"{name} failed: {error.message}", "error")
                run.advance(number)
            elif done[name].state == "SUCCEEDED":
                rows[name] = dict(done[name].result)
                for output in ("model", "report"):
                    shutil.copytree(run.output(done[name], output), models / name / output)
            else:
                failed[name] = done[name].error
                run.log(f"{name} failed: {done[name].error}", "error")
        if not rows:
            raise InvalidInput.field(
                "spec.grid", f"all runs failed, {next(iter(failed))}: {next(iter(failed.values()))}"
            )
        report = Path(scratch, "report")
        compare(report, wanted, rows, spec)
        run.artifact("models", "sparse-models", models)
        run.artifact("report", "report", report)
    return {"runs": {name: row["figures"] for name, row in rows.items()}, "failed": failed}


class Each(Run):
    """One of several runs in this process: its artifacts are folders of ``folder``."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.device, self.inputs, self._run, self._folder = run.device, run.inputs, run, folder

    def advance(self, done: int) -> None:
        if done % 100 == 0:
            self._run.log(f"{self._folder.name}: step {done}")

    def artifact(self, name: str, type: str, folder: Path) -> None:
        shutil.copytree(folder, self._folder / name)


def compare(folder: Path, wanted: Mapping[str, CltSpec], rows: Mapping[str, Row], spec: SweepSpec) -> None:
    """Write what the runs came to into ``folder``: ``sweep.csv``, ``sweep.png`` and ``sweep.html``."""
    folder.mkdir(parents=True, exist_ok=True)
    options = [axis.option for axis in spec.grid]
    head = ["run", *options, "fvu", "l0", "dead", "cosine", "features"]
    values = [
        [
            name,
            *(_get(wanted[name].model_dump(), option) for option in options),
            *(row["figures"][key] for key in ("fvu", "l0", "dead", "cosine")),
            row["features"],
        ]
        for name, row in rows.items()
    ]
    with (folder / TABLE).open("w", newline="") as file:
        csv.writer(file).writerows([head, *values])
    with drawing():
        picture = png(tradeoff(rows))
    (folder / "sweep.png").write_bytes(picture)
    text = "Share of the variance that is left, over active features"
    body = f"{image(picture, text)}{table(head, values)}"
    (folder / PAGE).write_text(page(f"Sweep over {len(rows)} runs", body))


def _get(asked: Mapping[str, Any], option: str) -> Any:
    value: Any = asked
    for name in option.split("."):
        value = value[name]
    return value


def tradeoff(rows: Mapping[str, Row]) -> Figure:
    """What is left over the active features, a line for each pair."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, row in rows.items():
        lines.setdefault(name.partition("-")[0], []).append((row["figures"]["l0"], row["figures"]["fvu"]))
    for name, points in lines.items():
        axis.plot(*zip(*sorted(points), strict=True), marker="o", ms=4, lw=1, label=name)
    axis.set_xlabel("active features of a row")
    axis.set_ylabel("share of the variance that is left (validation)")
    axis.grid(color=FAINT, lw=0.5)
    axis.legend(frameon=False, fontsize=8)
    return figure
