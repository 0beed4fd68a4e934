"""Commands for sparse models: train one, or a sweep of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from ethogram.cli import output
from ethogram.cli.files import read_spec
from ethogram.cli.options import Json, Set, SpecFile, examples
from ethogram.errors import InvalidInput
from ethogram.specs.base import Spec
from ethogram.specs.clt import CltSpec, SaeSpec, SweepSpec

_MODULE = "python -m services.clt"
_CHECKPOINT_SECONDS = 30.0
S = TypeVar("S", bound=Spec)

Store = Annotated[
    Path, typer.Argument(metavar="STORE", help="Folder of a store, or of its run.", exists=True, file_okay=False)
]
Out = Annotated[
    Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of the run: model, report, metrics, checkpoint.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1; by default a GPU if there is one.")]
Expansion = Annotated[
    float | None,
    typer.Option("--expansion", "--expansion-factor", "--expansion_factor", help="Features per number of the source."),
]
K = Annotated[int | None, typer.Option("--k", help="Active features of a row.")]
Ratio = Annotated[float | None, typer.Option("--k-ratio", "--k_ratio", help="The same as a share of the features.")]
Rate = Annotated[float | None, typer.Option("--learning-rate", "--lr", help="Peak learning rate.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Optimiser steps.")]
Epochs = Annotated[
    float | None, typer.Option("--epochs", "--num-epochs", "--num_epochs", help="Passes over the store instead.")
]
Project = Annotated[
    str | None,
    typer.Option(
        "--wandb", "--wandb-project", "--wandb_project", metavar="PROJECT", help="Metrics to Weights & Biases too."
    ),
]
Name = Annotated[
    str | None, typer.Option("--wandb-name", "--wandb-run-name", "--wandb_run_name", metavar="NAME", help="There.")
]


def sae(
    store: Store,
    hook: Annotated[str | None, typer.Option(help="Hook point.")] = None,
    file: SpecFile = None,
    values: Set = None,
    *,
    out: Out,
    expansion: Expansion = None,
    k: K = None,
    k_ratio: Ratio = None,
    learning_rate: Rate = None,
    steps: Steps = None,
    epochs: Epochs = None,
    wandb: Project = None,
    wandb_name: Name = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train a sparse autoencoder of one hook point. A checkpoint is kept every half minute and on Ctrl-C, from which
    the same command goes on; a run that is finished, or was begun with another spec, is never overwritten."""
    flags = _flags(
        expansion=expansion,
        k=k,
        k_ratio=k_ratio,
        learning_rate=learning_rate,
        steps=steps,
        epochs=epochs,
        wandb=wandb,
        wandb_name=wandb_name,
    ) | {"hook": hook}
    _run(_spec(SaeSpec, file, values, flags), store, out, device=device, as_json=as_json)


def train(
    store: Store,
    pair: Annotated[
        str | None, typer.Option("--pair", metavar="A->B", help="Source and target hook point of a single pair.")
    ] = None,
    file: SpecFile = None,
    values: Set = None,
    *,
    out: Out,
    kind: Annotated[str | None, typer.Option(help="pair, per_layer or cross_layer.")] = None,
    dictionary: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL", help="Autoencoder of the target, whose decoder is taken.", exists=True, file_okay=False
        ),
    ] = None,
    expansion: Expansion = None,
    k: K = None,
    k_ratio: Ratio = None,
    learning_rate: Rate = None,
    steps: Steps = None,
    epochs: Epochs = None,
    wandb: Project = None,
    wandb_name: Name = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train transcoders from source to target hook points: of a pair, or of all MLPs in the store with --kind per_layer
    or cross_layer. Interrupted, the same command goes on; also by torchrun."""
    flags = _flags(
        expansion=expansion,
        k=k,
        k_ratio=k_ratio,
        learning_rate=learning_rate,
        steps=steps,
        epochs=epochs,
        wandb=wandb,
        wandb_name=wandb_name,
    ) | {"kind": kind}
    if pair is not None:
        from services.clt.activations.hooks import parse_pair

        source, target = parse_pair(pair, "--pair")
        flags |= {"sources": [source], "targets": [target]}
    inputs = {}
    if dictionary is not None:
        flags["model.dictionary.artifact"] = "dictionary"
        inside = dictionary / "model"
        inputs["model.dictionary"] = inside if inside.is_dir() else dictionary
    spec = _spec(CltSpec, file, values, flags)
    if pair is not None and spec.kind != "pair":
        raise InvalidInput.field(
            "--pair", f"is the one of --kind pair; {spec.kind} takes all MLPs, or spec.sources and targets"
        )
    _run(spec, store, out, device=device, as_json=as_json, more=inputs)


def sweep(
    store: Store,
    file: SpecFile = None,
    values: Set = None,
    *,
    out: Out,
    pair: Annotated[
        list[str] | None, typer.Option("--pair", metavar="A->B", help="A pair of hook points. Repeatable.")
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option("--grid", metavar="OPTION=A,B", help="Values of an option, e.g. model.k=8,16,32. Repeatable."),
    ] = None,
    kind: Annotated[str | None, typer.Option(help="pair, per_layer or cross_layer.")] = None,
    expansion: Expansion = None,
    k: K = None,
    k_ratio: Ratio = None,
    learning_rate: Rate = None,
    steps: Steps = None,
    epochs: Epochs = None,
    wandb: Project = None,
    wandb_name: Name = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train transcoders for each pair and each point of a grid, and compare them."""
    flags = _flags(
        expansion=expansion,
        k=k,
        k_ratio=k_ratio,
        learning_rate=learning_rate,
        steps=steps,
        epochs=epochs,
        wandb=wandb,
        wandb_name=wandb_name,
    ) | {"kind": kind}
    flags["pairs"] = [part for one in pair or () for part in one.split(",")] or None
    axes = []
    for axis in grid or ():
        option, equals, listed = axis.partition("=")
        if not equals:
            raise InvalidInput.field("--grid", f"{axis} is not of the form OPTION=A,B")
        axes.append({"option": option, "values": listed.split(",")})
    flags["grid"] = axes or None
    _run(_spec(SweepSpec, file, values, flags), store, out, device=device, as_json=as_json)


def add_commands(app: typer.Typer) -> None:
    """Put the commands of this module into ``app``."""
    app.command(
        epilog=examples(
            f"{_MODULE} sae my-activations --hook encoder_layer_2 --k 32 -o my-sae",
            f"{_MODULE} sae my-activations --hook encoder_layer_2 --set model.activation=jumprelu --set loss.l0=1e-3 "
            "-o my-sae",
        )
    )(sae)
    app.command(
        epilog=examples(
            f'{_MODULE} train my-activations --pair "encoder_layer_0->encoder_layer_2" --k 32 -o clt_L0_to_L2',
            f"{_MODULE} train my-activations --kind cross_layer --expansion 16 --k 32 -o my-clt",
            "torchrun --nproc-per-node 2 -m services.clt train my-activations --kind per_layer -o my-run",
        )
    )(train)
    app.command(
        epilog=examples(
            f"{_MODULE} sweep my-activations --grid model.k=8,16,32 --grid training.learning_rate=1e-3,3e-4 -o my-sweep"
        )
    )(sweep)


def _flags(
    *,
    expansion: float | None,
    k: int | None,
    k_ratio: float | None,
    learning_rate: float | None,
    steps: int | None,
    epochs: float | None,
    wandb: str | None,
    wandb_name: str | None,
) -> dict[str, Any]:
    return {
        "model.expansion": expansion,
        "model.k": k,
        "model.k_ratio": k_ratio,
        "training.learning_rate": learning_rate,
        "training.steps": steps,
        "training.epochs": epochs,
        "wandb.project": wandb,
        "wandb.name": wandb_name,
    }


def _spec(spec: type[S], file: Path | None, values: list[str] | None, flags: dict[str, Any]) -> S:
    given = [f"{name}={json.dumps(value)}" for name, value in flags.items() if value is not None]
    return read_spec(spec, file, [*given, *(values or ())], {"activations": {"artifact": "activations"}})


def _run(
    spec: SaeSpec | CltSpec | SweepSpec,
    store: Path,
    out: Path,
    *,
    device: str | None,
    as_json: bool,
    more: dict[str, Path] | None = None,
) -> None:
    output.say("preparing: loading what trains")
    from services.clt.activations.commands import inside
    from services.clt.sparse import job
    from services.clt.sparse import sweep as sweeps
    from services.runtime.console import ConsoleRun
    from services.runtime.devices import chosen_device
    from services.runtime.folders import begin, begun
    from services.runtime.parallel import join
    from services.runtime.report import PAGE
    from services.runtime.run import Run

    inputs = {"activations": inside(store), **(more or {})}
    world, own = join(chosen_device(device) if device else None)
    if not world.first:
        silent = Run()
        silent.device, silent.inputs = own, inputs
        if not isinstance(spec, SweepSpec):
            job.run(spec, silent, world)
        return
    begin(out, spec)
    whole = isinstance(spec, SweepSpec)
    kept = "models" if whole else "model"
    with begun(out, kept), ConsoleRun(out, own, inputs, checkpoint_seconds=_CHECKPOINT_SECONDS) as run:
        result = sweeps.run(spec, run) if isinstance(spec, SweepSpec) else job.run(spec, run, world)
    output.result(result, as_json, lambda: _show(result))
    output.say(f"{kept}: {out / kept}; report: {out / 'report' / PAGE}; metrics are beside them")


def _show(result: dict[str, Any]) -> None:
    names = ("fvu", "explained_variance", "cosine", "l0", "dead", "silent")
    if "runs" in result:
        rows = [[name, *(f"{row[key]:.4f}" for key in names)] for name, row in result["runs"].items()]
        output.table(["run", *names], rows)
        for name, why in result["failed"].items():
            output.say(f"{name} failed: {why}")
    else:
        output.table(["figure", "value"], [[name, f"{result['figures'][name]:.4f}"] for name in names])
