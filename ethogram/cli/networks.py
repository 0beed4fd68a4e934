"""Commands about networks: encode, steer, decode, evaluate. Networks and latents are safetensors files.

A file of networks holds one tensor per parameter: a batch, or the state dict of one network, see
:class:`ethogram.inference.Inference`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ethogram.cli.options import Answer, ModelName, Output, Version, assignment, command, new_path
from ethogram.cli.output import say, table
from ethogram.errors import InvalidInput, Violation

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ethogram.client import Client
    from ethogram.inference import Effect
    from ethogram.specs.edits import Edit

app = typer.Typer()
NetworksFile = Annotated[Path, typer.Argument(metavar="NETWORKS", help="A safetensors file of networks.")]
Activation = Annotated[
    str | None, typer.Option(help="Activation of the hidden layers, if the model has this shape with several.")
]


@command(app, "ethogram encode my-codec networks.safetensors -o latents.safetensors")
def encode(
    client: Client,
    model: ModelName,
    networks: NetworksFile,
    *,
    activation: Activation = None,
    output: Output = Path("latents.safetensors"),
    version: Version = None,
) -> Answer:
    """Encode networks to latents."""
    with client.inference() as inference:
        answer = inference.encode(model, networks, activation=activation, version=version)
    return _written(output, {"latents": answer.latents}, model=answer.model, version=answer.version)


@command(app, "ethogram decode my-codec latents.safetensors -o networks.safetensors")
def decode(
    client: Client,
    model: ModelName,
    latents: Annotated[Path, typer.Argument(metavar="LATENTS", help="A safetensors file with the tensor `latents`.")],
    *,
    output: Output = Path("networks.safetensors"),
    hidden: Annotated[
        str | None,
        typer.Option(metavar="WIDTHS", help="Widths of the hidden layers, e.g. 16,16, if the model knows several."),
    ] = None,
    activation: Activation = None,
    version: Version = None,
) -> Answer:
    """Decode latents to networks."""
    from ethogram.networks import load

    tensors = load(latents)
    if "latents" not in tensors:
        raise InvalidInput(f"{latents} has no tensor `latents`; it has: {', '.join(sorted(tensors)) or 'none'}")
    try:
        widths = [int(width) for width in hidden.split(",")] if hidden else []
    except ValueError:
        raise InvalidInput.field("--hidden", f"{hidden} is not a list of widths such as 16,16") from None
    with client.inference() as inference:
        answer = inference.decode(model, tensors["latents"], hidden=widths, activation=activation, version=version)
    return _written(output, answer.networks, model=answer.model, version=answer.version)


@command(
    app,
    "ethogram steer my-codec networks.safetensors --add palindrome -o steered.safetensors",
    "ethogram steer my-codec networks.safetensors --remove 'ends_with(C)' --add palindrome",
    "ethogram steer my-codec mine.safetensors --replace palindrome=has_majority --strength auto --report effect.html",
)
def steer(
    client: Client,
    model: ModelName,
    networks: NetworksFile,
    *,
    output: Output = Path("steered.safetensors"),
    add: Annotated[list[str] | None, typer.Option(metavar="BEHAVIOR", help="Add a behaviour. Repeatable.")] = None,
    remove: Annotated[
        list[str] | None, typer.Option(metavar="BEHAVIOR", help="Remove a behaviour. Repeatable.")
    ] = None,
    replace: Annotated[
        list[str] | None, typer.Option(metavar="OLD=NEW", help="Replace one behaviour by another. Repeatable.")
    ] = None,
    direct: Annotated[
        bool, typer.Option("--direct", help="Write the decoded weights instead of adding their change to the source.")
    ] = False,
    strength: Annotated[
        str, typer.Option(help="Scale of the edit: 1 as in training; auto: the best for each network.")
    ] = "1",
    direction: Annotated[str, typer.Option(help="learned, mean_difference or classifier_normal.")] = "learned",
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="New HTML file for a report of the predicted and measured effect.", callback=new_path
        ),
    ] = None,
    activation: Activation = None,
    version: Version = None,
) -> Answer:
    """Change the behaviours of networks, and write the changed networks."""
    from ethogram.specs.edits import Edit

    edits = [Edit("add", name) for name in add or ()] + [Edit("remove", name) for name in remove or ()]
    edits += [Edit("replace", *assignment("--replace", pair, "OLD=NEW")) for pair in replace or ()]
    if not edits:
        raise InvalidInput(
            "name what to change with --add BEHAVIOR, --remove BEHAVIOR or --replace OLD=NEW; `ethogram models "
            "behaviors` lists them"
        )
    try:
        scale = strength if strength == "auto" else float(strength)
    except ValueError:
        raise InvalidInput.field("--strength", f"{strength} is neither a number nor auto") from None
    options: dict[str, Any] = {"mode": "direct" if direct else "residual", "strength": scale, "direction": direction}
    options |= {"activation": activation, "version": version}
    measured: dict[str, Any] = {}
    try:
        with client.inference() as inference:
            steered = (inference.effect if report else inference.steer)(model, networks, edits, **options)
    except InvalidInput as error:
        wrong = [Violation(*(_with_options(text, edits) for text in violation)) for violation in error.violations]
        raise InvalidInput(_with_options(error.message, edits), wrong) from None
    if report is not None:
        from ethogram.effect import effect_page, summary

        effect = cast("Effect", steered)
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(effect_page(effect, edits, str(networks)), encoding="utf-8")
        measured = summary(effect)
    return _written(output, steered.networks, model=steered.model, version=steered.version, **measured)


def _with_options(text: str, edits: Sequence[Edit]) -> str:
    """``text`` with the options that gave the edits, in place of the paths of the request: ``edits.0.behavior``."""

    def option(path: re.Match[str]) -> str:
        edit = edits[int(path[1])]
        return f"--{edit.operation} {getattr(edit, path[2] or 'behavior')}"

    return re.sub(r"\bedits\.(\d+)(?:\.(behavior|by))?", option, text)


@command(app, "ethogram evaluate my-codec steered.safetensors", "ethogram evaluate my-codec n.safetensors --json")
def evaluate(
    client: Client, model: ModelName, networks: NetworksFile, *, activation: Activation = None, version: Version = None
) -> Answer:
    """Run networks on held-out sequences and print their recall of each behaviour."""
    with client.inference() as inference:
        answer = inference.evaluate(model, networks, activation=activation, version=version)
    # A batch is shown by its mean; a single network has no batch axis.
    recall = answer.recall.reshape(-1, len(answer.behaviors))
    shares = [*recall.mean(axis=0).tolist(), float(answer.false_positive_rate.mean())]
    shown = ["no sequences" if isnan(share) else share for share in shares]
    rows = list(zip([*answer.behaviors, "none of them"], shown, strict=True))
    columns = ["Sequences with", "Answered yes" if len(recall) == 1 else f"Answered yes, mean of {len(recall)}"]
    return Answer(answer._asdict(), lambda: table(columns, rows))


def _written(path: Path, tensors: Mapping[str, NDArray[Any]], **more: Any) -> Answer:
    from ethogram.networks import save

    save(path, tensors)
    value = {"file": str(path), "tensors": {name: list(value.shape) for name, value in tensors.items()}} | more
    lines = [f"{path}: {', '.join(f'{n} {list(v.shape)}' for n, v in tensors.items())}"]
    if "local" in more:
        strength = more["strength"]
        shown = more | ({"strength": _range(strength)} if isinstance(strength, list) else {})
        names = ("target", "local", "kept", "nothing_to_change", "strength")
        lines.append("; ".join(f"{name.replace('_', ' ')}: {shown[name]}" for name in names))
    return Answer(value, lambda: say("\n".join(lines)))


def _range(strengths: Sequence[float]) -> str:
    """The strengths of many networks in few words."""
    low, middle, high = min(strengths), median(strengths), max(strengths)
    return f"{low:g} to {high:g}, median {middle:g}, 0 for {strengths.count(0)} of {len(strengths)} networks"
