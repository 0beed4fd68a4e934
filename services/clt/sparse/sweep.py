"""Sweeps: train transcoders for each pair and each point of a grid, and compare them."""

from __future__ import annotations

import csv
import itertools
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from pydantic import ValidationError

from ethogram.errors import InvalidInput
from ethogram.specs.clt import CltSpec, SweepSpec
from services.clt.activations.hooks import named_pairs
from services.clt.activations.pairs import pair_name
from services.clt.activations.store import ActivationStore
from services.clt.sparse import job
from services.clt.sparse.streams import streams_of
from services.runtime.parts import Parts
from services.runtime.report import Report, plot
from services.runtime.run import ChildJob, Run

TABLE = "sweep.csv"
SPARSITY = ("model.k", "model.k_ratio", "loss.l1", "loss.l0")
"""Options that change how many features are active."""
MOST_NAMED = 15
"""A plot of more lines has no legend."""
FAILED = "failed"
Row = dict[str, Any]


def run_specs(spec: SweepSpec, store: ActivationStore) -> dict[str, CltSpec]:
    """Specs of the runs of a sweep, by name: that of the pair, then the values of the grid. Raises
    :class:`InvalidInput` for hook points that do not fit and for wrong options."""
    named = named_pairs(spec.pairs, store.manifest.source.kind, store.hooks, "spec.pairs.{}")
    pairs = [pair for _, pair in named] or store.mlp_pairs()
    if not pairs:
        raise InvalidInput.field("spec.pairs", "no module's input and output are both in the store; name the pairs")
    subjects = [[pair] for pair in pairs] if spec.kind == "pair" else [pairs]
    specs: dict[str, CltSpec] = {}
    for (point, shared), ends in itertools.product(spec.points(), subjects):
        fields = shared | {"sources": [source for source, _ in ends], "targets": [target for _, target in ends]}
        name = pair_name(*ends[0]) if spec.kind == "pair" else f"clt_{spec.kind}"
        # Only characters that are allowed in the name of a folder.
        values = [f"{option.rpartition('.')[2]}_{re.sub(r'[^A-Za-z0-9_.+-]', '', value)}" for option, value in point]
        name = "-".join([name, *values])
        if name in specs:
            raise InvalidInput.field("spec", f"two runs would be called {name}; remove one of the pairs or values")
        if fields["wandb"] is not None:
            fields["wandb"] = fields["wandb"] | {"name": name}
        try:
            specs[name] = CltSpec.model_validate(fields)
        except ValidationError as error:
            raise InvalidInput.from_pydantic(error, f"spec.grid ({name})", CltSpec) from None
        streams_of(specs[name], store)
    return specs


def run(spec: SweepSpec, run: Run) -> dict[str, Any]:
    """Artifacts: ``models``, a folder for each run with its model and report, and ``report``, the comparison.

    On a platform each run is a job of its own; elsewhere they run one after the other. Raises :class:`InvalidInput`
    when all of them failed.
    """
    store = ActivationStore.open(run.inputs["activations"])
    specs = run_specs(spec, store)
    children = run.children({name: ("clt", child) for name, child in specs.items()})
    with run.output_folder("models") as models, tempfile.TemporaryDirectory() as scratch:
        sweep = Sweep(run, models)
        if children is None:
            sweep.train(specs)
        else:
            sweep.gather(children)
        if not sweep.rows:
            name, reason = next(iter(sweep.failed.items()))
            raise InvalidInput.field("spec.grid", f"all runs failed, {name}: {reason}")
        run.artifact("models", "sparse-models", sweep.models)
        with run.side_output("the report"):
            compare(Path(scratch, "report"), specs, sweep.rows, spec)
            run.artifact("report", "report", Path(scratch, "report"))
    return {"runs": {name: row["figures"] for name, row in sweep.rows.items()}, "failed": sweep.failed}


class Sweep(Parts):
    """The runs of a sweep in this process, or the results of those of other jobs; models and reports are in ``models``.

    It is also the :class:`Run` of the runs in this process, and keeps what they make.
    """

    def __init__(self, run: Run, models: Path) -> None:
        super().__init__(run, models)
        self.models = models

    @property
    def rows(self) -> dict[str, Row]:
        """What each run that did not fail returned."""
        return {name: result for name, result in self.results.items() if FAILED not in result}

    @property
    def failed(self) -> dict[str, str]:
        """Why the others failed."""
        return {name: result[FAILED] for name, result in self.results.items() if FAILED in result}

    def fail(self, name: str, reason: str) -> Row:
        """Record that a run failed; the others continue."""
        self._run.log(f"{name} failed: {reason}", "error")
        self.results[name] = {FAILED: reason}
        return self.results[name]  # type: ignore[no-any-return]

    def gather(self, children: Mapping[str, ChildJob]) -> None:
        """Take the results of child jobs."""
        for name, child in children.items():
            if child.state == "SUCCEEDED":
                self.results[name] = dict(child.result)
                for output in ("model", "report"):
                    shutil.copytree(self._run.output(child, output), self.models / name / output)
            else:
                self.fail(name, child.error)

    def train(self, specs: Mapping[str, CltSpec]) -> None:
        """Run one after the other."""
        for number, (name, spec) in enumerate(specs.items(), 1):
            if name not in self.results:
                self._run.log(f"{name}: run {number} of {len(specs)}")
            self.part(name, partial(self._train, name, spec))

    def _train(self, name: str, spec: CltSpec, run: Run) -> Row:
        try:
            return job.run(spec, run)
        except InvalidInput as error:
            return self.fail(name, error.message)

    @contextmanager
    def output_folder(self, name: str) -> Iterator[Path]:
        yield self.models / self.present / name

    def artifact(self, name: str, type: str, folder: Path) -> None:
        kept = self.models / self.present / name
        if folder != kept:
            shutil.copytree(folder, kept, dirs_exist_ok=True)


def compare(folder: Path, specs: Mapping[str, CltSpec], rows: Mapping[str, Row], spec: SweepSpec) -> None:
    """Write the report that compares the runs into ``folder``, with ``sweep.png`` and ``sweep.csv``."""
    options = [axis.option for axis in spec.grid]
    head = ["run", *options, "fvu", "l0", "dead", "cosine", "features"]
    values = [
        [
            name,
            *(attrgetter(option)(specs[name]) for option in options),
            *(row["figures"].get(key, math.nan) for key in ("fvu", "l0", "dead", "cosine")),
            row["features"],
        ]
        for name, row in rows.items()
    ]
    report = Report(f"Sweep over {len(rows)} runs")
    alt = "Fraction of variance unexplained, over active features"
    report.figure("sweep", tradeoff(specs, rows, options), alt).table(head, values).spec(spec)
    report.write(folder, {"runs": {name: row["figures"] for name, row in rows.items()}}, former="sweep.html")
    with (folder / TABLE).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *values])


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
        spec = specs[name]
        settings = [f"{option.rpartition('.')[2]} {attrgetter(option)(spec)}" for option in others]
        line = ", ".join([f"{spec.sources[0]} to {spec.targets[-1]}", *settings])
        lines.setdefault(line, []).append((row["figures"]["l0"], row["figures"]["fvu"]))
    for name, points in lines.items():
        axis.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axis.set(title="variance unexplained, over active features", xlabel="active features per row")
    axis.set_ylabel("fraction of variance unexplained (validation)")
    if len(lines) <= MOST_NAMED:
        axis.legend()
    return figure
