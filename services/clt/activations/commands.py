"""Commands for activations: record them, look at pairs of hook points, and write these as files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ethogram.cli import output
from ethogram.cli.options import Answer, NewFolder, command
from ethogram.cli.run import Request, flag, run_command
from ethogram.specs.kinds import KINDS

app = typer.Typer()
_MODULE = "python -m services.clt"

POLICY = typer.Argument(
    metavar="POLICY",
    help="Folder of a policy or of its run; or `default`: TSP of 20 cities, trained once, in ten minutes.",
)
Store = Annotated[
    Path,
    typer.Argument(
        metavar="STORE", help="Folder of a store, or of the run that made it.", exists=True, file_okay=False
    ),
]
Pairs = Annotated[
    list[str] | None, typer.Option("--pair", metavar="A->B", help="Source and target hook point. Repeatable.")
]


def _show(result: dict[str, Any]) -> None:
    figures = result["figures"]
    rows = ", ".join(f"{count} {split}" for split, count in figures["rows"].items())
    output.pairs({"instances": figures["instances"], "rows": rows, "bytes": figures["bytes"]})
    hooks = [[name, hook["width"], hook["norm"], hook["sparsity"]] for name, hook in figures["hooks"].items()]
    output.table(["hook", "width", "mean norm", "share of zeros"], hooks)


def _show_pairs(rows: list[dict[str, Any]]) -> None:
    names = ("width", "zeros", "small", "norm_mean")
    table = [
        [
            row["pair"],
            *(" / ".join(f"{row[side][name]:.3g}" for side in ("source", "target")) for name in names),
            row["mean_correlation"],
            row["top_correlations"][0]["value"],
            row["linear_r2"],
        ]
        for row in rows
    ]
    output.table(["pair", "widths", "zeros", "small", "norms", "mean |r|", "largest r", "linear R2"], table)
    output.say(
        "source / target: zeros, share of zeros; small, share of numbers below a hundredth of the root mean square;"
    )
    output.say("norms, the mean norm of a row. r: absolute correlation of a source channel with a target channel.")


@run_command(
    app,
    KINDS["activations"],
    f"{_MODULE} activations my-run/policy --instances 10000 -o my-activations",
    f"{_MODULE} activations default -o my-activations",
    f'{_MODULE} activations my-run/policy --pair "encoder_layer_0->encoder_layer_2" -o my-activations',
    f"{_MODULE} activations --language-model my-gpt2 --dataset texts.txt -o my-activations",
    flags={
        "language_model.model": flag(
            str, "--language-model", metavar="NAME", help="A causal language model instead: folder, or name on the Hub."
        ),
        "language_model.dataset": flag(
            str, "--dataset", metavar="NAME", help="Its texts: a file, a folder, or a dataset on the Hub."
        ),
        "instances": flag(
            int, "--instances", "--num-instances-per-pair", metavar="N", help="Tours or sequences to record."
        ),
    },
    show=_show,
)
def activations(
    policy: Annotated[str | None, POLICY] = None,
    *,
    pair: Pairs = None,
    layer_pairs: Annotated[str | None, typer.Option(metavar="A->B,C->D", hidden=True)] = None,
) -> Request:
    """Record activations of a policy, or of a language model on texts, into a store. The same command resumes an
    interrupted recording, and its store can be read meanwhile."""
    pairs = [*(pair or ()), *(name for name in (layer_pairs or "").split(",") if name)]
    if policy is None:
        return Request(values={"pairs": pairs or None})

    def find(device: str) -> Path:
        from services.clt.policy.job import named

        return named(policy, device)

    return Request({"policy": find}, {"pairs": pairs or None})


@command(app, f"{_MODULE} inspect-pairs my-activations --json")
def inspect_pairs(store: Store, *, pair: Pairs = None) -> Answer:
    """Describe pairs of hook points: sparsity, norms, correlations, and how much of the target a linear map of the
    source explains."""
    from services.clt.activations.pairs import inspect, pairs_of
    from services.clt.activations.store import ActivationStore
    from services.runtime.folders import artifact_in

    opened = ActivationStore.open(artifact_in(store, "activations"))
    inspected = inspect(opened, pairs_of(opened, pair or ()))
    return Answer(inspected, lambda: _show_pairs(inspected))


@command(app, f"{_MODULE} export-pairs my-activations -o my-pairs --num-instances-per-pair 100")
def export_pairs(
    store: Store,
    *,
    out: NewFolder,
    pair: Pairs = None,
    instances: Annotated[
        int | None, typer.Option("--num-instances-per-pair", metavar="N", min=1, help="Only the first N instances.")
    ] = None,
) -> Answer:
    """Write pairs of hook points as sources.pt and targets.pt with metadata.json, a folder for each."""
    from services.clt.activations.pairs import export, pairs_of
    from services.clt.activations.store import ActivationStore
    from services.runtime.folders import artifact_in

    opened = ActivationStore.open(artifact_in(store, "activations"))
    written = export(opened, pairs_of(opened, pair or ()), out, instances)
    rows = [[row["pair"], row["source"]["hook"], row["target"]["hook"], row["samples"]] for row in written]
    output.say(f"the pairs are in {out}")
    return Answer(written, lambda: output.table(["pair", "source", "target", "rows"], rows))
