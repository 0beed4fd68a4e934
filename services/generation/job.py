"""The generation job: spec in, zoo artifact out."""

from __future__ import annotations

import shutil
from typing import Any

from ethogram.specs.generation import GenerationSpec
from services.generation.pipeline import BASELINE_INPUT, DatasetGenerationPipeline
from services.generation.report import write_report
from services.runtime.run import Run


def run(spec: GenerationSpec, run: Run) -> dict[str, Any]:
    """Make the zoo, keep it as artifact ``zoo`` and a report on it as ``report``, and return its figures."""
    pipeline = DatasetGenerationPipeline(spec, run.device, run.inputs.get(BASELINE_INPUT))
    with run.output_folder("zoo") as folder, run.output_folder("report") as report:
        # The checkpoint has what an interrupted run made.
        shutil.rmtree(folder, ignore_errors=True)
        figures = pipeline.run(folder, run)
        run.artifact("zoo", "zoo", folder)
        if spec.part is None:
            with run.side_output("the report"):
                write_report(folder, report)
                run.artifact("report", "report", report)
            none = [name for name, count in figures.get("subjects_by_pattern", {}).items() if not count]
            if none:
                text = "no codec can learn them; see `rejected`, train longer or ask for fewer at once"
                run.log(f"no subject has {', '.join(none)}: {text}", "warning")
        if spec.hub is not None:
            again = f"`python -m services.generation upload ZOO {spec.hub.repo}` tries again"
            with run.side_output("the upload of the zoo", f"the zoo is kept; {again}"):
                figures |= pipeline.publish(folder)
        return figures
