"""``python -m services.clt``: routing policies and sparse models of them from the command line, without a platform."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ethogram.cli import output
from ethogram.cli.execute import execute
from ethogram.cli.files import read_spec
from ethogram.cli.options import Json, Set, SpecFile, examples, system_app
from ethogram.errors import InvalidInput
from ethogram.specs.clt import PolicySpec
from services.clt.activations.commands import POLICY
from services.clt.activations.commands import add_commands as activation_commands
from services.clt.sparse.commands import add_commands as sparse_commands

app = system_app("clt", "Train routing policies, and sparse models of what goes on in them; no platform is needed.")

_MODULE = "python -m services.clt"
_CHECKPOINT_SECONDS = 30.0

Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1; by default a GPU if there is one.")]


@app.command(
    epilog=examples(f"{_MODULE} policy -o my-policy", f"{_MODULE} policy --set training.steps=200 -o my-policy")
)
def policy(
    out: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Folder of the run: policy, report, metrics, checkpoint."),
    ],
    file: SpecFile = None,
    values: Set = None,
    *,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train a policy that builds tours, and compare it with a solver. A checkpoint is kept every half minute and on
    Ctrl-C, from which the same command goes on; a run that is finished, or was begun with another spec, is never
    overwritten."""
    spec = read_spec(PolicySpec, file, values)
    output.say("preparing: loading what trains")
    from services.clt.policy import job
    from services.runtime.console import ConsoleRun
    from services.runtime.devices import chosen_device
    from services.runtime.folders import begin, begun
    from services.runtime.report import PAGE

    own = chosen_device(device)
    begin(out, spec)
    with begun(out, "policy"), ConsoleRun(out, own, checkpoint_seconds=_CHECKPOINT_SECONDS) as run:
        result = job.run(spec, run)
    output.result(result, as_json, lambda: _show(result["figures"]))
    output.say(f"the policy is in {out / 'policy'}, all figures are in {out / 'report' / PAGE}, metrics beside them")


@app.command(epilog=examples(f"{_MODULE} import-policy last.ckpt -o my-policy"))
def import_policy(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CKPT", help="Lightning checkpoint of rl4co's AttentionModel or POMO (batch norm)."),
    ],
    out: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write.")],
    *,
    nodes: Annotated[int, typer.Option(help="Cities that it was trained on, if its settings do not say.", min=4)] = 20,
    heads: Annotated[int | None, typer.Option(help="Attention heads, if its settings do not say; else 8.")] = None,
    graph_context: Annotated[
        bool | None, typer.Option(help="Whether its query has the mean of the cities; by default as its settings say.")
    ] = None,
) -> None:
    """Make a policy of what rl4co has trained. Nothing that is in the checkpoint is run."""
    from services.clt.policy.importing import import_rl4co

    if out.exists():
        raise InvalidInput.field("--output", f"{out} is there already; name another one")
    import_rl4co(checkpoint, out, nodes=nodes, heads=heads, graph_context=graph_context)
    output.say(f"the policy is in {out}; `gap {out}` compares it with a solver")


@app.command(epilog=examples(f"{_MODULE} gap my-run/policy", f"{_MODULE} gap my-policy --cities cities.npy"))
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
        int, typer.Option(help="Tours drawn of each, of which the shortest counts; 0: none.", min=0)
    ] = 16,
    seed: Annotated[int, typer.Option(help="Draws instances and tours.", min=0, max=2**63 - 1)] = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Compare a policy's tours with a solver's: how much longer they are, as a share."""
    from services.clt.policy.evaluate import evaluate, evaluation_instances
    from services.clt.policy.job import named
    from services.clt.policy.model import AttentionPolicy
    from services.clt.policy.tsp import read_cities
    from services.runtime.console import ConsoleRun
    from services.runtime.devices import chosen_device

    own = chosen_device(device)
    loaded = AttentionPolicy.load(named(policy, own), own)
    if cities is not None:
        places = read_cities(cities)
    else:
        places = evaluation_instances(PolicySpec(nodes=loaded.nodes, seed=seed, evaluation=instances))
    with ConsoleRun() as run:
        figures = evaluate(loaded, places, samples, seed, run).figures
    output.result({"figures": figures}, as_json, lambda: _show(figures))


activation_commands(app)
sparse_commands(app)


def _show(figures: dict[str, float]) -> None:
    output.table(["figure", "value"], [[name, f"{value:.4f}"] for name, value in figures.items()])


if __name__ == "__main__":
    execute(app, _MODULE)
