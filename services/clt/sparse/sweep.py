"""Sweeps: train transcoders for each pair and each point of a grid, and compare them."""

from __future__ import annotations

import csv
import itertools
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from pydantic import ValidationError

from ethogram.errors import InvalidInput
from ethogram.specs.clt import CltSpec, SweepSpec
from services.clt.activations.hooks import parse_pair
from services.clt.activations.pairs import pair_name
from services.clt.activations.store import ActivationStore
from services.clt.sparse import job
from services.clt.sparse.streams import streams_of
from services.runtime.report import Report, plot
from services.runtime.run import ChildJob, Run

TABLE = "sweep.csv"
SPARSITY = ("model.k", "model.k_ratio", "loss.l1", "loss.l0")
"""Options that change how many features are active."""
EQUIVALENT = {"model.k": "model.k_ratio", "model.k_ratio": "model.k"}
"""Options that set the same thing: the one that a grid varies replaces the other."""
MOST_NAMED = 15
"""A plot of more lines has no legend."""
STATE, PRESENT = "sweep.json", "present"
Row = dict[str, Any]


def run_specs(spec: SweepSpec, store: ActivationStore) -> dict[str, CltSpec]:
    """Specs of the runs of a sweep, by name: that of the pair, then the values of the grid. Raises
    :class:`InvalidInput` for hook points that do not fit and for wrong options."""
    pairs = [parse_pair(pair, f"spec.pairs.{number}") for number, pair in enumerate(spec.pairs)] or store.mlp_pairs()
    if not pairs:
        raise InvalidInput.field("spec.pairs", "no module's input and output are both in the store; name the pairs")
    subjects = [[pair] for pair in pairs] if spec.kind == "pair" else [pairs]
    points = itertools.product(*([(axis.option, value) for value in axis.values] for axis in spec.grid))
    specs: dict[str, CltSpec] = {}
    for point, ends in itertools.product(points, subjects):
        fields = spec.model_dump(mode="json", exclude={"pairs", "grid"})
        fields |= {"sources": [source for source, _ in ends], "targets": [target for _, target in ends]}
        for option, value in point:
            other = EQUIVALENT.get(option)
            if other is not None and all(axis.option != other for axis in spec.grid):
                _set(fields, other, "null")
            _set(fields, option, value)
        name = pair_name(*ends[0]) if spec.kind == "pair" else f"clt_{spec.kind}"
        # Without what a folder's name may not have.
        values = [f"{option.rpartition('.')[2]}_{re.sub(r'[^A-Za-z0-9_.+-]', '', value)}" for option, value in point]
        name = "-".join([name, *values])
        if name in specs:
            raise InvalidInput.field("spec", f"two runs would be called {name}; take one of the pairs or values out")
        if fields["wandb"] is not None:
            fields["wandb"]["name"] = name
        try:
            specs[name] = CltSpec.model_validate(fields)
        except ValidationError as error:
            raise InvalidInput.from_pydantic(error, f"spec.grid ({name})") from None
        streams_of(specs[name], store)
    return specs


def _set(fields: dict[str, Any], option: str, text: str) -> None:
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    section, _, name = option.rpartition(".")
    section_fields = _get(fields, section) if section else fields
    if name not in section_fields:
        raise InvalidInput.field("spec.grid", f"there is no option {option}; there are {', '.join(section_fields)}")
    section_fields[name] = value


def run(spec: SweepSpec, run: Run) -> dict[str, Any]:
    """Artifacts: ``models``, a folder for each run with its model and report, and ``report``, the comparison.

    On a platform each run is a job of its own; elsewhere they run one after the other. Raises :class:`InvalidInput`
    when all of them failed.
    """
    store = ActivationStore.open(run.inputs["activations"])
    specs = run_specs(spec, store)
    children = run.children({name: ("clt", child) for name, child in specs.items()})
    with tempfile.TemporaryDirectory() as scratch:
        models = Path(scratch, "models")
        results = Results(models)
        if children is None:
            results.train(specs, run)
        else:
            results.gather(children, run)
        if not results.rows:
            name, why = next(iter(results.failed.items()))
            raise InvalidInput.field("spec.grid", f"all runs failed, {name}: {why}")
        report = Path(scratch, "report")
        compare(report, specs, results.rows, spec)
        run.artifact("models", "sparse-models", models)
        run.artifact("report", "report", report)
    return {"runs": {name: row["figures"] for name, row in results.rows.items()}, "failed": results.failed}


class Results:
    """Results of the runs of a sweep so far; models and reports are in the folder ``models``."""

    def __init__(self, models: Path) -> None:
        self.models = models
        self.rows: dict[str, Row] = {}
        self.failed: dict[str, str] = {}
        self.present = ""
        """Name of the run in progress."""

    def fail(self, name: str, why: str, run: Run) -> None:
        """Record that a run failed; the others go on."""
        self.failed[name] = why
        run.log(f"{name} failed: {why}", "error")

    def gather(self, children: Mapping[str, ChildJob], run: Run) -> None:
        """Take the results of child jobs."""
        for name, child in children.items():
            if child.state == "SUCCEEDED":
                self.rows[name] = dict(child.result)
                for output in ("model", "report"):
                    shutil.copytree(run.output(child, output), self.models / name / output)
            else:
                self.fail(name, child.error, run)

    def train(self, specs: Mapping[str, CltSpec], run: Run) -> None:
        """Run one after the other. A checkpoint holds the finished runs and the checkpoint of the present one."""
        resume = None
        if run.resume is not None:
            kept = json.loads((run.resume / STATE).read_text())
            self.rows, self.failed, self.present = kept["rows"], kept["failed"], kept["present"]
            if (run.resume / "models").exists():
                shutil.copytree(run.resume / "models", self.models)
            resume = run.resume / PRESENT
        run.stage("sweep", len(specs), "runs")
        for name, spec in specs.items():
            if name not in self.rows and name not in self.failed:
                resumed = resume is not None and resume.exists() and name == self.present
                self.present = name
                try:
                    self.rows[name] = job.run(spec, SweptRun(run, self, resume if resumed else None))
                except InvalidInput as error:
                    self.fail(name, error.message, run)
                run.checkpoint(len(self.rows), self.save)
            run.advance(len(self.rows) + len(self.failed))

    def save(self, folder: Path, write: Callable[[Path], None] | None = None) -> None:
        """Write the finished runs into ``folder``; ``write`` writes the checkpoint of the present one."""
        kept = {"rows": self.rows, "failed": self.failed, "present": self.present}
        (folder / STATE).write_text(json.dumps(kept))
        for name in self.rows:
            shutil.copytree(self.models / name, folder / "models" / name)
        if write is not None:
            (folder / PRESENT).mkdir()
            write(folder / PRESENT)


class SweptRun(Run):
    """One run of a sweep in this process: its artifacts are folders of the sweep's."""

    def __init__(self, run: Run, results: Results, resume: Path | None) -> None:
        self.device, self.inputs, self.resume = run.device, run.inputs, resume
        self._run, self._results, self._name = run, results, results.present

    def advance(self, done: int) -> None:
        if done % 100 == 0:
            self._run.log(f"{self._name}: step {done}")

    def log(self, message: str, level: str = "info") -> None:
        self._run.log(f"{self._name}: {message}", level)

    def checkpoint_due(self) -> bool:
        return self._run.checkpoint_due()

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        self._run.checkpoint(step, lambda folder: self._results.save(folder, write))

    def artifact(self, name: str, type: str, folder: Path) -> None:
        shutil.copytree(folder, self._results.models / self._name / name, dirs_exist_ok=True)


def compare(folder: Path, specs: Mapping[str, CltSpec], rows: Mapping[str, Row], spec: SweepSpec) -> None:
    """Write the report that compares the runs into ``folder``, with ``sweep.png`` and ``sweep.csv``."""
    options = [axis.option for axis in spec.grid]
    head = ["run", *options, "fvu", "l0", "dead", "cosine", "features"]
    values = [
        [
            name,
            *(_get(specs[name].model_dump(), option) for option in options),
            *(row["figures"][key] for key in ("fvu", "l0", "dead", "cosine")),
            row["features"],
        ]
        for name, row in rows.items()
    ]
    report = Report(f"Sweep over {len(rows)} runs")
    alt = "Fraction of variance unexplained, over active features"
    report.figure("sweep", tradeoff(specs, rows, options), alt).table(head, values).spec(spec)
    report.write(folder, {"runs": {name: row["figures"] for name, row in rows.items()}}, former="sweep.html")
    with (folder / TABLE).open("w", newline="") as file:
        csv.writer(file).writerows([head, *values])


def _get(fields: Mapping[str, Any], option: str) -> Any:
    value: Any = fields
    for name in option.split("."):
        value = value[name]
    return value


@plot
def tradeoff(specs: Mapping[str, CltSpec], rows: Mapping[str, Row], options: Sequence[str]) -> Figure:
    """Fraction of variance unexplained over active features: a line for each pair and each setting of the grid's
    ``options`` but the one that changes how many features are active."""
    along = next((option for option in options if option in SPARSITY), None)
    others = [option for option in options if option != along]
    figure = Figure(figsize=(9, 5))
    axis = figure.subplots()
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, row in rows.items():
        fields = specs[name].model_dump()
        settings = [f"{option.rpartition('.')[2]} {_get(fields, option)}" for option in others]
        line = ", ".join([f"{fields['sources'][0]} to {fields['targets'][-1]}", *settings])
        lines.setdefault(line, []).append((row["figures"]["l0"], row["figures"]["fvu"]))
    for name, points in lines.items():
        axis.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axis.set(title="variance unexplained, over active features", xlabel="active features per row")
    axis.set_ylabel("fraction of variance unexplained (validation)")
    if len(lines) <= MOST_NAMED:
        axis.legend()
    return figure
