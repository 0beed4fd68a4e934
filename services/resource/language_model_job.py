"""The language model job: train the default language model, or one of another size."""

from __future__ import annotations

from typing import Any

from ethogram.specs.resource import ReaderSpec
from services.resource.language_model import train_language_model
from services.runtime.run import Run


def run(spec: ReaderSpec, run: Run) -> dict[str, Any]:
    """Artifact: ``model``, a folder that ``transformers`` reads. Returns the ``figures`` of the last validation."""
    with run.output_folder("model") as folder:
        trainer = train_language_model(spec, run, folder)
        run.artifact("model", "language-model", folder)
    return {"figures": trainer.validate()}
