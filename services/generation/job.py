"""The generation job: spec in, zoo artifact out."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ethogram.specs.generation import GenerationSpec
from services.generation.pipeline import DatasetGenerationPipeline
from services.runtime.run import Run


def run(spec: GenerationSpec, run: Run) -> dict[str, Any]:
    """Make the zoo, keep it as artifact ``zoo``, and return its figures."""
    pipeline = DatasetGenerationPipeline(spec, run.device)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "zoo"
        figures = pipeline.run(folder, run)
        run.artifact("zoo", "zoo", folder)
    return figures
