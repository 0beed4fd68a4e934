"""The sae and clt jobs: train a sparse model on a store, evaluate it, and keep it and its report."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ethogram.specs.clt import CltSpec, SaeSpec
from services.clt.activations.store import ActivationStore
from services.clt.sparse.model import SparseModel
from services.clt.sparse.report import write_report
from services.clt.sparse.train import SparseTrainer, train
from services.runtime.parallel import ALONE, World
from services.runtime.run import Run


def run(spec: SaeSpec | CltSpec, run: Run, world: World = ALONE) -> dict[str, Any]:
    """Artifacts: ``model`` and ``report``. Returns the ``figures`` of
    :func:`services.clt.sparse.evaluate.evaluate`, the streams and the number of features and steps."""
    store = ActivationStore.open(run.inputs["activations"])
    folder = run.inputs.get("model.dictionary")
    dictionary = None if folder is None else SparseModel.load(folder)
    with SparseTrainer(spec, store, run.device, world, dictionary) as trainer:
        model = train(trainer, run)
        if not world.first:
            return {}
        if not trainer.figures:
            # A run that resumed after its last step.
            trainer.validate()
        figures = trainer.figures | trainer.dead_figure
        if max(value for name, value in figures.items() if name.startswith("fvu")) > 1:
            text = "the model explains less than the mean does; take more steps, or another learning rate"
            run.log(text, "warning")
        with tempfile.TemporaryDirectory() as scratch:
            model.save(Path(scratch, "model"), {**trainer.about, "figures": figures})
            run.artifact("model", "sparse-model", Path(scratch, "model"))
            with run.side_output("the report"):
                history, density = trainer.progress.history, trainer.density
                write_report(Path(scratch, "report"), model, spec, figures=figures, density=density, history=history)
                run.artifact("report", "report", Path(scratch, "report"))
    return {
        "figures": figures,
        "kind": model.streams.kind,
        "sources": model.streams.sources,
        "targets": model.streams.targets,
        "features": sum(model.features),
        "steps": trainer.step,
    }
