"""Commands for sparse models: train one, or a sweep of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ethogram.cli import output
from ethogram.cli.options import assignment
from ethogram.cli.run import Request, flag, run_command
from ethogram.errors import InvalidInput
from ethogram.specs.kinds import KINDS, SPARSE_HEADLINE
from services.clt.activations.commands import Store

app = typer.Typer()
_MODULE = "python -m services.clt"

KIND: dict[str, Any] = {"kind": flag(str, "--kind", help="pair, per_layer or cross_layer.")}
FLAGS: dict[str, Any] = {
    "model.expansion": flag(float, "--expansion", "--expansion-factor", help="Features per channel of the source."),
    "model.k": flag(int, "--k", help="Active features per row."),
    "model.k_ratio": flag(float, "--k-ratio", help="Active features per row, as a share of all."),
    "training.learning_rate": flag(float, "--learning-rate", "--lr", help="Peak learning rate."),
    "training.steps": flag(int, "--steps", help="Optimizer steps."),
    "training.epochs": flag(float, "--epochs", "--num-epochs", help="Passes over the store, instead of --steps."),
    "wandb.project": flag(
        str, "--wandb", "--wandb-project", metavar="PROJECT", help="Log metrics to this project at Weights & Biases."
    ),
    "wandb.name": flag(
        str, "--wandb-name", "--wandb-run-name", metavar="NAME", help="Name of the run at Weights & Biases."
    ),
}
"""Options of every training, by the field of the spec that they set."""


def _show_sweep(result: dict[str, Any]) -> None:
    rows = [[name, *(f"{figures[key]:.4f}" for key in SPARSE_HEADLINE)] for name, figures in result["runs"].items()]
    output.table(["run", *SPARSE_HEADLINE], rows)
    for name, why in result["failed"].items():
        output.say(f"{name} failed: {why}")


@run_command(
    app,
    KINDS["sae"],
    f"{_MODULE} sae my-activations --hook encoder_layer_2 --k 32 -o my-sae",
    f"{_MODULE} sae my-activations --hook encoder_layer_2 --set model.activation=jumprelu --set loss.l0=1e-3 -o my-sae",
    flags={"hook": flag(str, "--hook", help="Hook point."), **FLAGS},
)
def sae(store: Store) -> Request:
    """Train a sparse autoencoder of one hook point. The same command resumes an interrupted run."""
    return Request({"activations": store})


@run_command(
    app,
    KINDS["clt"],
    f'{_MODULE} train my-activations --pair "encoder_layer_0->encoder_layer_2" --k 32 -o clt_L0_to_L2',
    f"{_MODULE} train my-activations --kind cross_layer --expansion 16 --k 32 -o my-clt",
    "torchrun --nproc-per-node 2 -m services.clt train my-activations --kind per_layer -o my-run",
    flags=KIND | FLAGS,
)
def train(
    store: Store,
    pair: Annotated[
        str | None, typer.Option("--pair", metavar="A->B", help="Source and target hook point of a single pair.")
    ] = None,
    *,
    dictionary: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL",
            help="Sparse autoencoder of the target; the transcoder uses its decoder and does not train it.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
) -> Request:
    """Train transcoders from source to target hook points: of a pair, or of all MLPs in the store with --kind
    per_layer or cross_layer. The same command resumes an interrupted run. Under torchrun, several processes train
    together."""
    inputs = {"activations": store} | ({"model.dictionary": dictionary} if dictionary is not None else {})
    values: dict[str, Any] = {}
    if pair is not None:
        from services.clt.activations.hooks import parse_pair

        source, target = parse_pair(pair, "--pair")
        values = {"sources": [source], "targets": [target]}

    def check(spec: Any) -> None:
        if pair is not None and spec.kind != "pair":
            text = f"is for --kind pair; {spec.kind} takes all MLPs, or spec.sources and spec.targets"
            raise InvalidInput.field("--pair", text)

    return Request(inputs, values, check)


@run_command(
    app,
    KINDS["sweep"],
    f"{_MODULE} sweep my-activations --grid model.k=8,16,32 --grid training.learning_rate=1e-3,3e-4 -o my-sweep",
    flags=KIND | FLAGS,
    show=_show_sweep,
)
def sweep(
    store: Store,
    *,
    pair: Annotated[
        list[str] | None, typer.Option("--pair", metavar="A->B", help="A pair of hook points. Repeatable.")
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option("--grid", metavar="OPTION=A,B", help="Values of an option, e.g. model.k=8,16,32. Repeatable."),
    ] = None,
) -> Request:
    """Train transcoders for each pair and each point of a grid, and compare them."""
    given = [assignment("--grid", axis, "OPTION=A,B") for axis in grid or ()]
    axes = [{"option": option, "values": values.split(",")} for option, values in given]
    pairs = [name for listed in pair or () for name in listed.split(",")]
    return Request({"activations": store}, {"pairs": pairs or None, "grid": axes or None})
