"""``python -m services.crossmodal``: codecs from the command line, without a platform."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from ethogram.cli import output
from ethogram.cli.execute import execute
from ethogram.cli.files import read_spec
from ethogram.cli.options import Json, Set, SpecFile, examples, system_app
from ethogram.errors import InvalidInput
from ethogram.specs.base import HubSpec
from ethogram.specs.crossmodal import CrossmodalSpec

app = system_app("crossmodal", "Train codecs and judge them; no platform is needed.")

_MODULE = "python -m services.crossmodal"
_CHECKPOINT_SECONDS = 30.0


@app.command(
    epilog=examples(
        f"{_MODULE} train my-zoo -o my-run",
        f"{_MODULE} train my-zoo -f examples/plain.yaml --set training.steps=2000 -o my-run",
        f"{_MODULE} train owner/name -o my-run",
        "torchrun --nproc-per-node 2 -m services.crossmodal train my-zoo -o my-run",
    )
)
def train(
    zoo: Annotated[
        str,
        typer.Argument(
            metavar="ZOO",
            help="Folder of a zoo; file or folder of records with JSON text; or dataset owner/name on the Hub.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Folder of the run: codec, report, metrics, checkpoint."),
    ],
    file: SpecFile = None,
    values: Set = None,
    *,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1; by default a GPU if there is one.")] = None,
    as_json: Json = False,
) -> None:
    """Train a codec on a zoo and judge it. A checkpoint is kept every half minute and on Ctrl-C, from which the same
    command goes on; a run that is finished, or was begun with another spec, is never overwritten. Started by torchrun,
    each process does its part of every batch."""
    output.say("preparing: loading what trains")
    from services.crossmodal import job
    from services.runtime.console import ConsoleRun
    from services.runtime.devices import check_device
    from services.runtime.folders import begin, begun
    from services.runtime.parallel import join
    from services.runtime.report import PAGE
    from services.runtime.run import Run
    from services.zoo.source import locate

    spec = read_spec(CrossmodalSpec, file, values, {"zoo": {"artifact": "folder"}})
    if device is not None:
        check_device(device)
    inputs = {"zoo": locate(zoo, "ZOO")}
    world, own = join(device)
    if world.first:
        begin(out, spec)
        with begun(out, "codec"), ConsoleRun(out, own, inputs, checkpoint_seconds=_CHECKPOINT_SECONDS) as run:
            result = job.run(spec, run, world)
        output.result(result, as_json, lambda: _show(result["figures"]))
        output.say(f"the codec is in {out / 'codec'}, all figures are in {out / 'report' / PAGE}, metrics beside them")
    else:
        silent = Run()
        silent.device, silent.inputs = own, inputs
        job.run(spec, silent, world)


@app.command(epilog=examples(f"{_MODULE} push my-run/codec me/my-codec --public"))
def push(
    codec: Annotated[Path, typer.Argument(metavar="CODEC", help="Folder of a codec.", exists=True, file_okay=False)],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Model repository, owner/name; made if there is none.")],
    *,
    public: Annotated[bool, typer.Option("--public", help="Make a repository that everybody may read.")] = False,
) -> None:
    """Upload a codec to the Hugging Face Hub, with the permission of HF_TOKEN."""
    from services.crossmodal import hub

    try:
        spec = HubSpec(repo=repo, private=not public)
    except ValidationError as error:
        raise InvalidInput.from_pydantic(error) from None
    hub.push(codec, spec, "REPO")
    output.say(f"{codec} is in {repo}")


@app.command(
    epilog=examples(f"{_MODULE} pull me/my-codec -o my-codec", f"{_MODULE} pull me/my-codec -o c --only encoder")
)
def pull(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Model repository, owner/name.")],
    out: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write.")],
    *,
    only: Annotated[str | None, typer.Option(metavar="PART", help="encoder or decoder alone.")] = None,
) -> None:
    """Download a codec from the Hugging Face Hub."""
    from services.crossmodal import hub
    from services.crossmodal.codec_files import PARTS

    parts = tuple(part for part in PARTS if only in (None, part))
    if not parts:
        raise InvalidInput.field("--only", f"must be one of {', '.join(PARTS)}")
    if out.exists():
        raise InvalidInput.field("--output", f"{out} is there already; name another one")
    shutil.copytree(hub.pull(repo, parts), out, ignore=shutil.ignore_patterns(".*", *_others(parts)))
    output.say(f"{repo} is in {out}")


def _others(parts: tuple[str, ...]) -> list[str]:
    # The cache may hold what an earlier download left.
    from services.crossmodal.codec_files import PARTS

    return [f"{part}.safetensors" for part in PARTS if part not in parts]


def _show(figures: dict[str, Any]) -> None:
    """Those that say whether it worked."""
    names = ("target_mean", "local_mean", "kept_mean", "all_gate")
    wanted = ["agreement", "matched_beats_same_label", "spread", "controls.max_all_gate"]
    wanted += [f"{operation}.{name}" for operation in ("add", "remove", "replace") for name in names]
    known = [name for name in wanted if name in figures]
    output.table(["figure", "value"], [[name, f"{figures[name]:.3f}"] for name in known])


if __name__ == "__main__":
    execute(app, _MODULE)
