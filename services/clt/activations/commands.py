"""Commands for activations: record them, look at pairs of hook points, and write these as files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from ethogram.cli import output
from ethogram.cli.files import read_spec
from ethogram.cli.options import Json, Set, SpecFile, examples
from ethogram.errors import InvalidInput
from ethogram.specs.clt import ActivationsSpec

_MODULE = "python -m services.clt"

POLICY = typer.Argument(
    metavar="POLICY",
    help="Folder of a policy or of its run; or `default`: TSP of 20 cities, trained once, in ten minutes.",
)
Store = Annotated[
    Path, typer.Argument(metavar="STORE", help="Folder of a store, or of its run.", exists=True, file_okay=False)
]
Pairs = Annotated[
    list[str] | None,
    typer.Option("--pair", metavar="A->B", help="Source and target hook point. Repeatable."),
]


def activations(
    policy: Annotated[str | None, POLICY] = None,
    *,
    out: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Folder of the run, with the store in activations."),
    ],
    language_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Instead: a causal language model, a folder or on the Hub.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Its texts: a file, a folder, or a dataset on the Hub.")
    ] = None,
    file: SpecFile = None,
    values: Set = None,
    pair: Pairs = None,
    layer_pairs: Annotated[str | None, typer.Option(metavar="A->B,C->D", hidden=True)] = None,
    instances: Annotated[
        int | None,
        typer.Option("--instances", "--num-instances-per-pair", metavar="N", help="Tours or sequences to record."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1; by default a GPU if there is one.")] = None,
    as_json: Json = False,
) -> None:
    """Record activations of a policy, or of a language model on texts, into a store. What was interrupted is gone on
    with by the same command, and can be read meanwhile; a store of another spec or model is never overwritten."""
    from services.clt.activations import job
    from services.clt.activations.store import MANIFEST
    from services.clt.policy.job import named
    from services.runtime.console import ConsoleRun
    from services.runtime.devices import chosen_device

    pairs = [*(pair or ()), *(part for part in (layer_pairs or "").split(",") if part)]
    flags: dict[str, Any] = {"pairs": pairs, "instances": instances, "language_model.model": language_model}
    flags["language_model.dataset"] = dataset
    given = {"policy": {"artifact": "policy"}} if policy is not None else {}
    assignments = [f"{name}={json.dumps(value)}" for name, value in flags.items() if value not in (None, [])]
    spec = read_spec(ActivationsSpec, file, [*assignments, *(values or ())], given)
    if spec.policy is not None and policy is None:
        raise InvalidInput.field("POLICY", "name the folder of a policy, or `default`")
    if out.exists() and not out.is_dir():
        raise InvalidInput.field("--output", f"{out} is a file; name a folder")
    own = chosen_device(device)
    inputs = {"policy": named(policy, own)} if policy is not None else {}
    fresh = not out.exists()
    try:
        with ConsoleRun(out, own, inputs) as run:
            result = job.record(spec, run, out / "activations")
    except InvalidInput:
        # Nothing was recorded, there or below a root inside: an empty folder tells nobody anything.
        if fresh and not any(out.rglob(MANIFEST)):
            shutil.rmtree(out, ignore_errors=True)
        raise
    output.result(result, as_json, lambda: _show(result["figures"]))
    output.say(f"the store is in {out / 'activations'}")


def inspect_pairs(store: Store, *, pair: Pairs = None, as_json: Json = False) -> None:
    """What pairs of hook points are like: sparsity, norms, correlations, and how much of the target a linear map of the
    source explains."""
    from services.clt.activations.pairs import inspect, pairs_of
    from services.clt.activations.store import ActivationStore

    opened = ActivationStore.open(inside(store))
    found = inspect(opened, pairs_of(opened, pair or ()))
    output.result(found, as_json, lambda: _show_pairs(found))


def export_pairs(
    store: Store,
    *,
    out: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write; a new one.")],
    pair: Pairs = None,
    instances: Annotated[
        int | None,
        typer.Option(
            "--num-instances-per-pair", "--num_instances_per_pair", metavar="N", min=1, help="The first N; else all."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write pairs of hook points as sources.pt and targets.pt with metadata.json, a folder for each."""
    from services.clt.activations.pairs import export, pairs_of
    from services.clt.activations.store import ActivationStore

    if out.exists():
        raise InvalidInput.field("--output", f"{out} is there already; name another one")
    opened = ActivationStore.open(inside(store))
    written = export(opened, pairs_of(opened, pair or ()), out, instances)
    rows = [[one["pair"], one["source"]["hook"], one["target"]["hook"], one["samples"]] for one in written]
    output.result(written, as_json, lambda: output.table(["pair", "source", "target", "rows"], rows))
    output.say(f"the pairs are in {out}")


def add_commands(app: typer.Typer) -> None:
    """Put the commands of this module into ``app``."""
    app.command(
        epilog=examples(
            f"{_MODULE} activations my-run/policy --instances 10000 -o my-activations",
            f"{_MODULE} activations default -o my-activations",
            f'{_MODULE} activations my-run/policy --pair "encoder_layer_0->encoder_layer_2" -o my-activations',
            f"{_MODULE} activations --language-model my-gpt2 --dataset texts.txt -o my-activations",
        )
    )(activations)
    app.command(epilog=examples(f"{_MODULE} inspect-pairs my-activations --json"))(inspect_pairs)
    app.command(epilog=examples(f"{_MODULE} export-pairs my-activations -o my-pairs --num-instances-per-pair 100"))(
        export_pairs
    )


def inside(store: Path) -> Path:
    """The store's own folder, where that of its run is given."""
    from services.clt.activations.store import MANIFEST, POINTER

    within = store / "activations"
    here = any((store / name).exists() for name in (MANIFEST, POINTER))
    return within if not here and within.is_dir() else store


def _show(figures: dict[str, Any]) -> None:
    rows = ", ".join(f"{count} {split}" for split, count in figures["rows"].items())
    output.pairs({"instances": figures["instances"], "rows": rows, "bytes": figures["bytes"]})
    hooks = [[name, one["width"], one["norm"], one["sparsity"]] for name, one in figures["hooks"].items()]
    output.table(["hook", "width", "mean norm", "share of zeros"], hooks)


def _show_pairs(found: list[dict[str, Any]]) -> None:
    head = ["pair", "widths", "zeros", "small", "norms", "mean |r|", "largest r", "linear R2"]

    def both(one: dict[str, Any], name: str) -> str:
        return " / ".join(f"{one[side][name]:.3g}" for side in ("source", "target"))

    output.table(
        head,
        [
            [
                one["pair"],
                both(one, "width"),
                both(one, "zeros"),
                both(one, "small"),
                both(one, "norm_mean"),
                one["mean_correlation"],
                one["top_correlations"][0]["value"],
                one["linear_r2"],
            ]
            for one in found
        ],
    )
    output.say(
        "source / target of: zeros, shares of zeros; small, of numbers below a hundredth of the root mean square;"
    )
    output.say("norms, mean norms of a row. r: correlations of a source channel with a target channel, absolute.")
