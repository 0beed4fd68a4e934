"""``python -m services.clt``: routing policies and sparse models of them from the command line, without a platform."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ethogram.cli import output
from ethogram.cli.options import Answer, Device, NewFolder, assignment, command, examples, system_app
from ethogram.cli.run import Request, flag, run_command
from ethogram.errors import InvalidInput
from ethogram.specs.clt import PAIR_SETS, PolicySpec
from ethogram.specs.kinds import KINDS, SPARSE_HEADLINE

_MODULE = "python -m services.clt"
app = system_app(
    "clt",
    "Train routing policies, and sparse models of their activations; no platform is needed.",
    f"{_MODULE} policy -o my-policy",
    f"{_MODULE} activations my-policy -o my-activations",
    f"{_MODULE} train my-activations --kind cross_layer -o my-clt",
)
Policy = Annotated[
    str | None,
    typer.Argument(
        metavar="POLICY",
        help="Folder of a policy or of its run; or `default`: TSP of 20 cities, trained once, in ten minutes.",
    ),
]
Store = Annotated[
    Path | None,
    typer.Argument(
        metavar="STORE", help="Folder of a store, or of the run that made it.", exists=True, file_okay=False
    ),
]
Cities = Annotated[
    Path | None,
    typer.Option(
        help=".npy file, or .safetensors file with `cities`: instances x cities x 2, in the unit square.", exists=True
    ),
]
RunDir = Annotated[
    str | None, typer.Option("--run-dir", metavar="DIR", help="Another way to name the folder of the run.", hidden=True)
]
Pairs = Annotated[
    list[str] | None,
    typer.Option(
        "--pair", "--layer-pairs", metavar="A->B", help="Source and target hook point. Repeatable, or A->B,C->D."
    ),
]
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
    "wandb.mode": flag(str, "--wandb-mode", metavar="MODE", help="online, offline or disabled."),
    "training.snapshot_epochs": flag(
        float, "--snapshot-epochs", "--save-freq", help="Passes over the store between snapshots of the weights."
    ),
}
"""Options of every training, by the field of the spec that they set."""


def folder_argument(argument: str, named: str | Path | None, run_dir: str | None) -> str | Path:
    """What the ``argument`` or ``--run-dir`` names. Raises :class:`InvalidInput` for both or neither."""
    if named is not None and run_dir is not None:
        raise InvalidInput.field("--run-dir", f"means the same as {argument}; give one of them")
    if (found := named or run_dir) is None:
        raise InvalidInput.field(argument, "is missing; name a folder")
    return found


def _pairs(given: list[str] | None) -> list[str]:
    return [name for listed in given or () for name in listed.split(",") if name]


def _show_store(result: dict[str, Any]) -> None:
    figures = result["figures"]
    rows = ", ".join(f"{count} {split}" for split, count in figures["rows"].items())
    output.pairs({"instances": figures["instances"], "rows": rows, "bytes": figures["bytes"]})
    hooks = [[name, hook["width"], hook["norm"], hook["sparsity"]] for name, hook in figures["hooks"].items()]
    output.table(["hook", "width", "mean norm", "share of zeros"], hooks)


def _show_pairs(rows: list[dict[str, Any]]) -> None:
    names = ("width", "zeros", "small", "norm_mean")
    table = [
        [
            f"{row['source']['hook']}->{row['target']['hook']}",
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


def _show_sweep(result: dict[str, Any]) -> None:
    rows = [[name, *(f"{figures[key]:.4f}" for key in SPARSE_HEADLINE)] for name, figures in result["runs"].items()]
    output.table(["run", *SPARSE_HEADLINE], rows)
    for name, reason in result["failed"].items():
        output.say(f"{name} failed: {reason}")


@run_command(
    app, KINDS["policy"], f"{_MODULE} policy -o my-policy", f"{_MODULE} policy --set training.steps=200 -o my-policy"
)
def policy(*, cities: Cities = None) -> Request:
    """Train a policy that builds tours, and compare it with a solver. The same command resumes an interrupted run."""
    return Request({} if cities is None else {"cities": cities})


@app.command(epilog=examples(f"{_MODULE} import-policy last.ckpt -o my-policy"))
def import_policy(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CKPT", help="Lightning checkpoint of rl4co's AttentionModel or POMO."),
    ],
    out: NewFolder,
    *,
    nodes: Annotated[int, typer.Option(help="Cities per training instance, if the checkpoint lacks it.", min=4)] = 20,
    heads: Annotated[int | None, typer.Option(help="Attention heads; by default as in the checkpoint.")] = None,
    graph_context: Annotated[
        bool | None,
        typer.Option(help="Whether the query includes the mean of the cities; by default as in the checkpoint."),
    ] = None,
) -> None:
    """Convert a policy that rl4co has trained. No code in the checkpoint is run."""
    from services.clt.policy.importing import import_rl4co
    from services.runtime.console import ConsoleRun

    with ConsoleRun() as run:
        import_rl4co(checkpoint, out, nodes=nodes, heads=heads, graph_context=graph_context, run=run)
    output.say(f"policy: {out}; `gap {out}` compares it with a solver")


@command(app, f"{_MODULE} gap my-run/policy", f"{_MODULE} gap my-policy --cities cities.npy")
def gap(
    policy: Policy = None,
    cities: Cities = None,
    *,
    instances: Annotated[
        int, typer.Option(help="Uniform random instances, without --cities.", min=1, max=10**6)
    ] = 1000,
    samples: Annotated[
        int, typer.Option(help="Tours sampled per instance, of which the shortest counts; 0: none.", min=0)
    ] = 16,
    seed: Annotated[int, typer.Option(help="Seed of instances and tours.", min=0, max=2**63 - 1)] = 0,
    run_dir: RunDir = None,
    device: Device = None,
) -> Answer:
    """Compare a policy's tours with a solver's: how much longer they are."""
    from services.clt.policy.evaluate import evaluate, evaluation_instances
    from services.clt.policy.job import named
    from services.clt.policy.model import AttentionPolicy
    from services.clt.policy.tsp import cities_in
    from services.runtime.console import ConsoleRun
    from services.runtime.devices import chosen_device

    device = chosen_device(device)
    loaded = AttentionPolicy.load(named(str(folder_argument("POLICY", policy, run_dir)), device), device)
    if cities is not None:
        tsp = cities_in(cities)
    else:
        tsp = evaluation_instances(PolicySpec(nodes=loaded.nodes, seed=seed, evaluation=instances))
    with ConsoleRun() as run:
        figures = evaluate(loaded, tsp, samples, seed, run).figures
    return Answer({"figures": figures}, lambda: output.figures(figures))


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
    show=_show_store,
)
def activations(
    policy: Policy = None,
    *,
    pair: Pairs = None,
    cities: Cities = None,
    run_dir: RunDir = None,
) -> Request:
    """Record activations of a policy, or of a language model on texts, into a store. The same command resumes an
    interrupted recording, and its store can be read meanwhile."""
    values = {"pairs": _pairs(pair) or None}
    given = {} if cities is None else {"cities": cities}
    if policy is None and run_dir is None:
        return Request(given, values)
    name = str(folder_argument("POLICY", policy, run_dir))

    def find(device: str) -> Path:
        from services.clt.policy.job import named

        return named(name, device)

    return Request({"policy": find, **given}, values)


@command(app, f"{_MODULE} list-pairs my-policy", f"{_MODULE} list-pairs my-activations")
def list_pairs(
    source: Annotated[Path, typer.Argument(metavar="FOLDER", help="A policy or a store, or the run that made it.")],
) -> Answer:
    """List candidate pairs of hook points by set. The --pair of `activations`, `sweep`, `inspect-pairs` and
    `export-pairs` takes the name of a set, too."""
    from services.clt.activations.pairs import candidates_in

    found = candidates_in(source)
    rows = [(pair["set"], f"{pair['source']}->{pair['target']}", pair["name"]) for pair in found]
    return Answer(found, lambda: output.table(["set", "pair", "name"], rows))


@command(app, f"{_MODULE} inspect-pairs my-activations --json")
def inspect_pairs(store: Store = None, *, pair: Pairs = None, run_dir: RunDir = None) -> Answer:
    """Describe pairs of hook points: sparsity, norms, correlations, and how much of the target a linear map of the
    source explains."""
    from services.clt.activations.pairs import inspect, pairs_of
    from services.clt.activations.store import ActivationStore
    from services.runtime.folders import artifact_in

    opened = ActivationStore.open(artifact_in(Path(folder_argument("STORE", store, run_dir)), "activations", "STORE"))
    inspected = inspect(opened, pairs_of(opened, _pairs(pair)))
    return Answer(inspected, lambda: _show_pairs(inspected))


@command(app, f"{_MODULE} export-pairs my-activations -o my-pairs --num-instances-per-pair 100")
def export_pairs(
    store: Store = None,
    *,
    out: NewFolder,
    pair: Pairs = None,
    instances: Annotated[
        int | None, typer.Option("--num-instances-per-pair", metavar="N", min=1, help="Only the first N instances.")
    ] = None,
    run_dir: RunDir = None,
) -> Answer:
    """Write pairs of hook points as sources.pt and targets.pt with metadata.json, a folder for each."""
    from services.clt.activations.pairs import export, pairs_of
    from services.clt.activations.store import ActivationStore
    from services.runtime.folders import artifact_in

    opened = ActivationStore.open(artifact_in(Path(folder_argument("STORE", store, run_dir)), "activations", "STORE"))
    written = export(opened, pairs_of(opened, _pairs(pair)), out, instances)
    rows = [[row["pair"], row["source"]["hook"], row["target"]["hook"], row["samples"]] for row in written]
    output.say(f"the pairs are in {out}")
    return Answer(written, lambda: output.table(["pair", "source", "target", "rows"], rows))


@run_command(
    app,
    KINDS["sae"],
    f"{_MODULE} sae my-activations --hook encoder_layer_2_mlp --k 32 -o my-sae",
    f"{_MODULE} sae my-activations --hook encoder_layer_2_mlp --set model.activation=jumprelu --set loss.l0=.001 "
    "-o my-sae",
    flags={"hook": flag(str, "--hook", help="Hook point."), **FLAGS},
)
def sae(store: Store = None, *, run_dir: RunDir = None) -> Request:
    """Train a sparse autoencoder of one hook point. The same command resumes an interrupted run."""
    return Request({"activations": Path(folder_argument("STORE", store, run_dir))})


@run_command(
    app,
    KINDS["clt"],
    f'{_MODULE} train my-activations --pair "encoder_layer_0_mlp->encoder_layer_2_mlp" --k 32 -o clt_L0_to_L2',
    f"{_MODULE} train my-activations --kind cross_layer --expansion 16 --k 32 -o my-clt",
    "torchrun --nproc-per-node 2 -m services.clt train my-activations --kind per_layer -o my-run",
    flags=KIND | FLAGS,
)
def train(
    store: Store = None,
    pair: Annotated[
        str | None,
        typer.Option("--pair", "--layer-pairs", metavar="A->B", help="Source and target hook point of a single pair."),
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
    run_dir: RunDir = None,
) -> Request:
    """Train transcoders from source to target hook points: of a pair, or of all MLPs in the store with --kind
    per_layer or cross_layer. The same command resumes an interrupted run. Under torchrun, several processes train
    together."""
    inputs = {"activations": Path(folder_argument("STORE", store, run_dir))} | (
        {"model.dictionary": dictionary} if dictionary is not None else {}
    )
    values: dict[str, Any] = {}
    if pair is not None:
        from services.clt.activations.hooks import parse_pair

        if pair in PAIR_SETS:
            text = f"{pair} is a set of pairs, and this trains one; name SOURCE->TARGET, or train each with `sweep`"
            raise InvalidInput.field("--pair", text)
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
    store: Store = None,
    *,
    pair: Pairs = None,
    grid: Annotated[
        list[str] | None,
        typer.Option("--grid", metavar="OPTION=A,B", help="Values of an option, e.g. model.k=8,16,32. Repeatable."),
    ] = None,
    run_dir: RunDir = None,
) -> Request:
    """Train transcoders for each pair and each point of a grid, and compare them."""
    given = [assignment("--grid", axis, "OPTION=A,B") for axis in grid or ()]
    axes = [{"option": option, "values": values.split(",")} for option, values in given]
    store = Path(folder_argument("STORE", store, run_dir))
    return Request({"activations": store}, {"pairs": _pairs(pair) or None, "grid": axes or None})


if __name__ == "__main__":
    output.execute(app, _MODULE)
