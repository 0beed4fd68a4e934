"""``python -m services.clt``: routing policies and sparse models of them from the command line, without a platform."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ethogram.cli import output
from ethogram.cli.options import Answer, Device, NewFolder, command, examples, system_app
from ethogram.cli.run import Request, run_command
from ethogram.specs.clt import PolicySpec
from ethogram.specs.kinds import KINDS
from services.clt.activations.commands import POLICY
from services.clt.activations.commands import app as activation_commands
from services.clt.sparse.commands import app as sparse_commands

_MODULE = "python -m services.clt"
app = system_app(
    "clt",
    "Train routing policies, and sparse models of their activations; no platform is needed.",
    f"{_MODULE} policy -o my-policy",
    f"{_MODULE} activations my-policy -o my-activations",
    f"{_MODULE} train my-activations --kind cross_layer -o my-clt",
)


@run_command(
    app, KINDS["policy"], f"{_MODULE} policy -o my-policy", f"{_MODULE} policy --set training.steps=200 -o my-policy"
)
def policy() -> Request:
    """Train a policy that builds tours, and compare it with a solver. The same command resumes an interrupted run."""
    return Request()


@app.command(epilog=examples(f"{_MODULE} import-policy last.ckpt -o my-policy"))
def import_policy(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CKPT", help="Lightning checkpoint of rl4co's AttentionModel or POMO (batch norm)."),
    ],
    out: NewFolder,
    *,
    nodes: Annotated[int, typer.Option(help="Cities per training instance, if the checkpoint lacks it.", min=4)] = 20,
    heads: Annotated[
        int | None, typer.Option(help="Attention heads, if the checkpoint lacks their number; else 8.")
    ] = None,
    graph_context: Annotated[
        bool | None,
        typer.Option(help="Whether the query includes the mean of the cities; by default as in the checkpoint."),
    ] = None,
) -> None:
    """Convert a policy that rl4co has trained. No code in the checkpoint is run."""
    from services.clt.policy.importing import import_rl4co

    import_rl4co(checkpoint, out, nodes=nodes, heads=heads, graph_context=graph_context)
    output.say(f"policy: {out}; `gap {out}` compares it with a solver")


@command(app, f"{_MODULE} gap my-run/policy", f"{_MODULE} gap my-policy --cities cities.npy")
def gap(
    policy: Annotated[str, POLICY],
    cities: Annotated[
        Path | None,
        typer.Option(help=".npy file, or .safetensors file with `cities`: instances x cities x 2, in the unit square."),
    ] = None,
    *,
    instances: Annotated[
        int, typer.Option(help="Uniform random instances, without --cities.", min=1, max=10**6)
    ] = 1000,
    samples: Annotated[
        int, typer.Option(help="Tours sampled per instance, of which the shortest counts; 0: none.", min=0)
    ] = 16,
    seed: Annotated[int, typer.Option(help="Seed of instances and tours.", min=0, max=2**63 - 1)] = 0,
    device: Device = None,
) -> Answer:
    """Compare a policy's tours with a solver's: how much longer they are."""
    from services.clt.policy.evaluate import evaluate, evaluation_instances
    from services.clt.policy.job import named
    from services.clt.policy.model import AttentionPolicy
    from services.clt.policy.tsp import read_cities
    from services.runtime.console import ConsoleRun
    from services.runtime.devices import chosen_device

    device = chosen_device(device)
    loaded = AttentionPolicy.load(named(policy, device), device)
    if cities is not None:
        tsp = read_cities(cities)
    else:
        tsp = evaluation_instances(PolicySpec(nodes=loaded.nodes, seed=seed, evaluation=instances))
    with ConsoleRun() as run:
        figures = evaluate(loaded, tsp, samples, seed, run).figures
    return Answer({"figures": figures}, lambda: output.figures(figures))


app.add_typer(activation_commands)
app.add_typer(sparse_commands)


if __name__ == "__main__":
    output.execute(app, _MODULE)
