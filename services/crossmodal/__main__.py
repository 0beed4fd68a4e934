"""``python -m services.crossmodal``: codecs from the command line, without a platform."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from ethogram.cli import output
from ethogram.cli.options import NewFolder, Public, examples, hub_spec, system_app
from ethogram.cli.run import Request, run_command
from ethogram.errors import InvalidInput
from ethogram.specs.kinds import KINDS

_MODULE = "python -m services.crossmodal"
app = system_app(
    "crossmodal",
    "Train codecs, and exchange them with the Hugging Face Hub; no platform is needed.",
    f"{_MODULE} train my-zoo -o my-run",
)


@run_command(
    app,
    KINDS["crossmodal"],
    f"{_MODULE} train my-zoo -o my-run",
    f"{_MODULE} train my-zoo -f examples/plain.yaml --set training.steps=2000 -o my-run",
    f"{_MODULE} train owner/name -o my-run",
    "torchrun --nproc-per-node 2 -m services.crossmodal train my-zoo -o my-run",
)
def train(
    zoo: Annotated[
        str,
        typer.Argument(
            metavar="ZOO",
            help="Folder of a zoo; file or folder of records with JSON text; or dataset owner/name on the Hub.",
        ),
    ],
) -> Request:
    """Train a codec on a zoo and evaluate it. The same command resumes an interrupted run. Under torchrun, several
    processes train together."""

    def locate(device: str) -> Path:
        from services.zoo.source import locate

        return locate(zoo, "ZOO")

    return Request({"zoo": locate})


@app.command(epilog=examples(f"{_MODULE} push my-run/codec me/my-codec --public"))
def push(
    codec: Annotated[Path, typer.Argument(metavar="CODEC", help="Folder of a codec.", exists=True, file_okay=False)],
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="Model repository, owner/name; created if it does not exist.")
    ],
    *,
    public: Public = False,
) -> None:
    """Upload a codec to the Hugging Face Hub, with the token in HF_TOKEN."""
    from services.crossmodal import hub

    hub.push(codec, hub_spec(repo, public, "REPO"), "REPO")
    output.say(f"uploaded {codec} to {repo}")


@app.command(
    epilog=examples(f"{_MODULE} pull me/my-codec -o my-codec", f"{_MODULE} pull me/my-codec -o c --only encoder")
)
def pull(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Model repository, owner/name.")],
    out: NewFolder,
    *,
    only: Annotated[str | None, typer.Option(metavar="PART", help="encoder or decoder: that part alone.")] = None,
) -> None:
    """Download a codec from the Hugging Face Hub."""
    from services.crossmodal import hub
    from services.crossmodal.codec_files import PARTS

    parts = tuple(part for part in PARTS if only in (None, part))
    if not parts:
        raise InvalidInput.field("--only", f"must be one of {', '.join(PARTS)}")
    # The cache may hold what an earlier download left.
    others = [f"{part}.safetensors" for part in PARTS if part not in parts]
    shutil.copytree(hub.pull(repo, parts), out, ignore=shutil.ignore_patterns(".*", *others))
    output.say(f"codec: {out}")


if __name__ == "__main__":
    output.execute(app, _MODULE)
