"""The sae and clt jobs: train a sparse model on a store, judge it, and keep it and its report."""

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

DICTIONARY_INPUT = "model.dictionary"


def run(spec: SaeSpec | CltSpec, run: Run, world: World = ALONE) -> dict[str, Any]:
    """Artifacts: ``model`` and ``report``. Returns the ``figures`` of
    :func:`services.clt.sparse.evaluate.evaluate` and what was trained."""
    store = ActivationStore.open(run.inputs["activations"])
    given = run.inputs.get(DICTIONARY_INPUT)
    dictionary = SparseModel.load(given) if given is not None else None
    with SparseTrainer(spec, store, run.device, world, dictionary) as trainer:
        model = train(trainer, run)
        if not world.first:
            return {}
        if not trainer.figures:
            # A run that resumed after its last step.
            trainer.validate()
        figures = trainer.figures
        if max(value for name, value in figures.items() if name.startswith("fvu")) > 1:
            run.log(
                "the model explains less than the mean does: it needs more steps, or another learning rate", "warning"
            )
        with tempfile.TemporaryDirectory() as scratch:
            model.save(Path(scratch, "model"), {**trainer.about, "figures": figures})
            # First, so that nothing that fails later costs it.
            run.artifact("model", "sparse-model", Path(scratch, "model"))
            write_report(
                Path(scratch, "report"),
                model,
                spec,
                figures=figures,
                density=trainer.density,
                history=trainer.progress.history,
            )
            run.artifact("report", "report", Path(scratch, "report"))
    return {
        "figures": {**figures, "dead": trainer.dead_share},
        "kind": model.streams.kind,
        "sources": model.streams.sources,
        "targets": model.streams.targets,
        "features": sum(model.features),
        "steps": trainer.step,
    }
