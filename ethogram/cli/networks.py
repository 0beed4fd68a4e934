"""Commands about networks: encode, steer, decode, evaluate. Networks and latents are safetensors files.

A file of networks holds one tensor per parameter: a batch, or the state dict of one network, see
:class:`ethogram.inference.Inference`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ethogram.cli.options import Json, Output, Url, Version, connect, examples

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ethogram.inference import Inference, Mode, Operation

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A published model.", show_default=False)]
NetworksFile = Annotated[
    Path, typer.Argument(metavar="NETWORKS", help="A safetensors file of networks.", show_default=False)
]


def encode(
    model: ModelName,
    networks: NetworksFile,
    *,
    output: Output = Path("latents.safetensors"),
    version: Version = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Encode networks to latents."""
    with _inference(url) as inference:
        answer = inference.encode(model, networks, version=version)
    _write(output, {"latents": answer.latents}, as_json, model=answer.model, version=answer.version)


encode_examples = examples("ethogram encode my-codec networks.safetensors -o latents.safetensors")


def decode(
    model: ModelName,
    latents: Annotated[
        Path,
        typer.Argument(metavar="LATENTS", help="A safetensors file with the tensor `latents`.", show_default=False),
    ],
    *,
    output: Output = Path("networks.safetensors"),
    version: Version = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Decode latents to networks."""
    from ethogram.errors import InvalidInput
    from ethogram.networks import load

    tensors = load(latents)
    if "latents" not in tensors:
        raise InvalidInput(f"{latents} has no tensor `latents`; it has: {', '.join(sorted(tensors)) or 'none'}")
    with _inference(url) as inference:
        answer = inference.decode(model, tensors["latents"], version=version)
    _write(output, answer.networks, as_json, model=answer.model, version=answer.version)


decode_examples = examples("ethogram decode my-codec latents.safetensors -o networks.safetensors")


def steer(
    model: ModelName,
    networks: NetworksFile,
    *,
    output: Output = Path("steered.safetensors"),
    add: Annotated[
        list[str] | None, typer.Option("--add", metavar="BEHAVIOR", help="A behaviour to gain. Repeatable.")
    ] = None,
    remove: Annotated[
        list[str] | None, typer.Option("--remove", metavar="BEHAVIOR", help="A behaviour to lose. Repeatable.")
    ] = None,
    direct: Annotated[
        bool, typer.Option("--direct", help="Take the decoded weights themselves, not their change.")
    ] = False,
    strength: Annotated[float, typer.Option("--strength", help="1 is what the model was trained for.")] = 1.0,
    version: Version = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Change the behaviours of networks, and write the changed networks."""
    from ethogram.errors import InvalidInput

    edits: list[tuple[Operation, str]] = [("add", name) for name in add or ()]
    edits += [("remove", name) for name in remove or ()]
    if not edits:
        raise InvalidInput(
            "name what to change with --add BEHAVIOR or --remove BEHAVIOR; `ethogram models behaviors` lists them"
        )
    with _inference(url) as inference:
        mode: Mode = "direct" if direct else "residual"
        answer = inference.steer(model, networks, edits, mode=mode, strength=strength, version=version)
    _write(output, answer.networks, as_json, model=answer.model, version=answer.version)


steer_examples = examples(
    "ethogram steer my-codec networks.safetensors --add palindrome -o steered.safetensors",
    "ethogram steer my-codec networks.safetensors --remove 'starts_with(A)' --add all_same",
)


def evaluate(
    model: ModelName, networks: NetworksFile, version: Version = None, url: Url = None, as_json: Json = False
) -> None:
    """Run networks on held-out sequences and print how much of each behaviour they show."""
    from ethogram.cli.output import result, table

    with _inference(url) as inference:
        answer = inference.evaluate(model, networks, version=version)
    value = {
        "behaviors": answer.behaviors,
        "recall": answer.recall.tolist(),
        "false_positive_rate": answer.false_positive_rate.tolist(),
        "model": answer.model,
        "version": answer.version,
    }
    # A batch is shown by its mean; a single network has no batch axis.
    recall = answer.recall.reshape(-1, len(answer.behaviors))
    rows = [(name, float(share)) for name, share in zip(answer.behaviors, recall.mean(axis=0), strict=True)]
    rows.append(("none of them", float(answer.false_positive_rate.mean())))
    columns = ["Sequences with", "Answered yes" if len(recall) == 1 else f"Answered yes, mean of {len(recall)}"]
    result(value, as_json, lambda: table(columns, rows))


evaluate_examples = examples(
    "ethogram evaluate my-codec steered.safetensors", "ethogram evaluate my-codec n.safetensors --json"
)


@contextmanager
def _inference(url: str | None) -> Iterator[Inference]:

    with connect(url) as client, client.inference() as inference:
        yield inference


def _write(path: Path, tensors: Mapping[str, NDArray[Any]], as_json: bool, **more: str) -> None:
    from ethogram.cli.output import result, say
    from ethogram.networks import save

    save(path, tensors)
    value = {"file": str(path), "tensors": {name: list(value.shape) for name, value in tensors.items()}} | more
    result(value, as_json, lambda: say(f"{path}: {', '.join(f'{n} {list(v.shape)}' for n, v in tensors.items())}"))
