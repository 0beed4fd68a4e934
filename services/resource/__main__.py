"""``python -m services.resource``: encoders of configurations from the command line, without a platform."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ethogram.cli.options import assignment, system_app
from ethogram.cli.run import Request, flag, run_command
from ethogram.errors import InvalidInput
from ethogram.specs.kinds import KINDS

_MODULE = "python -m services.resource"
app = system_app(
    "resource",
    "Turn measured configurations into vectors that a frozen language model reads; no platform is needed.",
    f"{_MODULE} train -o my-run",
)
language = typer.Typer(help="Language models that read vectors.", no_args_is_help=True)
app.add_typer(language, name="language-model")

Encoder = Annotated[
    Path, typer.Argument(metavar="ENCODER", help="Folder of an encoder, or of a run that made one.", exists=True)
]
Values = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Value of a field, e.g. cpu_cores=4, or unknown. Repeatable."),
]
Tool = Annotated[str, typer.Option("--tool", metavar="NAME", help="The tool.")]

FLAGS = {
    "llm_model": flag(str, "--llm-model", help="Causal language model: folder, name on the Hub, or default."),
    "augmentation.copies": flag(int, "--num-augmented-copies", help="Variants of each row per epoch."),
    "augmentation.mode": flag(str, "--augmentation-mode", help="none, jitter, variation or both."),
    "training.batch_size": flag(int, "--batch-size", help="Rows per step."),
    "training.epochs": flag(float, "--num-epochs", help="Most passes over all copies of all rows."),
    "training.learning_rate": flag(float, "--lr", help="Peak learning rate."),
    "training.target_loss": flag(float, "--target-loss", help="Cross-entropy at which training ends."),
    "training.snapshot_epochs": flag(float, "--checkpoint-freq", help="Epochs between snapshots of the encoder."),
}


@run_command(
    app,
    KINDS["resource"],
    f"{_MODULE} train -o my-run",
    f"{_MODULE} train -f examples/resource-production.yaml --llm_model Qwen/Qwen2.5-7B --device cuda -o big",
    f"{_MODULE} train --tool_registry tools.json --profiling_data profiling.csv -o my-run",
    flags=FLAGS,
)
def train(
    tool_registry: Annotated[
        Path | None, typer.Option("--tool-registry", metavar="FILE", help="Registry of tools, tools.json.", exists=True)
    ] = None,
    profiling_data: Annotated[
        Path | None, typer.Option("--profiling-data", metavar="FILE", help="Table of measurements.", exists=True)
    ] = None,
) -> Request:
    """Train an encoder on a table, by default the generator's, evaluate it on unseen configurations, and export its
    vectors. The same command resumes an interrupted run."""
    files = {"tools": tool_registry, "profiling": profiling_data}
    return Request({name: file for name, file in files.items() if file is not None})


def _codec(folder: Path, device: str = "cpu") -> Any:
    from services.resource.codec import ResourceCodec
    from services.runtime.folders import artifact_in

    return ResourceCodec.load(artifact_in(folder, "resource-encoder", "ENCODER"), device)


def _values(given: list[str] | None, schema: Any) -> dict[str, Any]:
    """The values of ``--set``; numbers where the schema has numbers."""
    numbers = {dimension.name for dimension in schema.dimensions if dimension.number}
    values: dict[str, Any] = {}
    for text in given or ():
        name, value = assignment("--set", text, "FIELD=VALUE, e.g. cpu_cores=4")
        try:
            values[name] = float(value) if name in numbers and value != "unknown" else value
        except ValueError:
            raise InvalidInput.field(f"--set {name}", f"{value!r} is not a number") from None
    return values
