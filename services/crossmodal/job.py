"""The crossmodal job: train on the zoo, evaluate, and keep the codec and its report."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ethogram.specs.crossmodal import CrossmodalSpec
from services.artifacts.hub import Repository
from services.crossmodal.evaluate import evaluate
from services.crossmodal.hub import push
from services.crossmodal.report import write_report
from services.crossmodal.train import train
from services.runtime.parallel import ALONE, World
from services.runtime.run import Run
from services.zoo.source import open_zoo


def run(spec: CrossmodalSpec, run: Run, world: World = ALONE) -> dict[str, Any]:
    """Artifacts: ``codec`` and ``report``; with ``spec.hub`` the codec is uploaded at the end. Returns the ``summary``,
    the ``figures`` and the numbers of ``subjects``; the rows behind them are in the report (see
    :func:`services.crossmodal.evaluate.evaluate`)."""
    if spec.hub is not None and world.first and run.resume is None:
        # Fail before training, not after it, without a network or permission.
        Repository(spec.hub, "model").open()
    zoo = open_zoo(run.inputs["zoo"], run)
    codec = train(spec, zoo, run, world)
    if not world.first:
        return {}
    with tempfile.TemporaryDirectory() as scratch:
        codec.save(Path(scratch, "codec"))
        # Before the evaluation, so that the codec is kept if a later step fails.
        run.artifact("codec", "codec", Path(scratch, "codec"))
        evaluation = evaluate(codec, zoo, run)
        with run.side_output("the report"):
            write_report(Path(scratch, "report"), codec, zoo, evaluation)
            run.artifact("report", "report", Path(scratch, "report"))
        if spec.hub is not None:
            again = f"`python -m services.crossmodal push CODEC {spec.hub.repo}` tries again"
            with run.side_output("the upload of the codec", f"it is kept; {again}"):
                push(Path(scratch, "codec"), spec.hub)
    return {name: evaluation[name] for name in ("summary", "figures", "subjects")}
