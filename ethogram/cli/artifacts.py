"""Commands about artifacts and published models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ethogram.cli.options import Json, Limit, Url, Version, connect, examples, show_help
from ethogram.cli.output import pairs, result, say, table

if TYPE_CHECKING:
    from ethogram.client import Client
    from ethogram.resources import Model

app = typer.Typer(help="Upload, list, download and delete artifacts.", invoke_without_command=True, callback=show_help)
models = typer.Typer(
    help="Publish models to the inference service, and list them.", invoke_without_command=True, callback=show_help
)

Source = Annotated[
    str, typer.Argument(metavar="ARTIFACT", help="Id of an artifact, or JOB/NAME: a job's output.", show_default=False)
]
ModelName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the model.", show_default=False)]


@app.command(epilog=examples("ethogram artifacts put my-zoo/ --name zoo --type zoo"))
def put(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A file or a folder.", show_default=False)],
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the artifact; by default the file's or folder's.")
    ] = None,
    type: Annotated[str, typer.Option("--type", help="Type of the artifact, e.g. zoo.")] = "file",
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Upload a file or a folder."""
    with connect(url) as client:
        made = client.put(path, name=name or path.resolve().stem, type=type)
    shown = {"artifact": made.id, "name": made.name, "type": made.type, "bytes": made.size}
    result(made, as_json, lambda: pairs(shown))


@app.command(epilog=examples("ethogram artifacts ls --job job_abc", "ethogram artifacts ls --type codec --json"))
def ls(
    job: Annotated[str | None, typer.Option("--job", help="Only outputs of this job.")] = None,
    type: Annotated[str | None, typer.Option("--type", help="Only artifacts of this type.")] = None,
    limit: Limit = 20,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """List artifacts, newest first."""
    with connect(url) as client:
        found = client.artifacts(job=job, type=type, limit=limit)
    rows = [(a.id, a.name, a.type, a.size, a.job, a.created_at) for a in found]
    result(found, as_json, lambda: table(["Artifact", "Name", "Type", "Bytes", "Job", "Created"], rows))


@app.command(epilog=examples("ethogram artifacts get job_abc/report -o report", "ethogram artifacts get 3f9c..."))
def get(
    source: Source,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Folder to write; by default one of the artifact's name."),
    ] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Download an artifact; every file is checked against its digest."""
    with connect(url) as client:
        artifact = client.artifact(_resolve(client, source))
        name = artifact.manifest.name if artifact.manifest else artifact.name
        folder = client.get(artifact.id, output or Path(Path(name).name or artifact.id))
    files = sorted(artifact.manifest.files) if artifact.manifest else []
    answer = {"artifact": artifact.id, "folder": str(folder), "files": files}
    result(answer, as_json, lambda: say(f"{len(files)} files in {folder}"))


@app.command(epilog=examples("ethogram artifacts rm 3f9c...", "ethogram artifacts rm job_abc/zoo"))
def rm(source: Source, url: Url = None, as_json: Json = False) -> None:
    """Delete an artifact that no job needs, with the retired models made of it."""
    with connect(url) as client:
        id = _resolve(client, source)
        client.delete_artifact(id)
    result({"deleted": id}, as_json, lambda: pairs({"deleted": id}))


@models.command(epilog=examples("ethogram models publish my-codec job_abc/codec"))
def publish(
    name: ModelName,
    source: Source,
    version: Annotated[
        str | None, typer.Option("--version", help="Version of the model; by default the next number.")
    ] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Publish an artifact as a model; the inference service serves it within seconds."""
    with connect(url) as client:
        model = client.publish(name, _resolve(client, source), version)
    result(model, as_json, lambda: _show(model))


@models.command(epilog=examples("ethogram models retire my-codec 1"))
def retire(
    name: ModelName,
    version: Annotated[str, typer.Argument(metavar="VERSION", help="Version of the model.", show_default=False)],
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Stop serving a version, except to requests that name it."""
    with connect(url) as client:
        model = client.retire(name, version)
    result(model, as_json, lambda: _show(model))


@models.command("ls", epilog=examples("ethogram models ls"))
def models_ls(url: Url = None, as_json: Json = False) -> None:
    """List published models."""
    with connect(url) as client:
        found = client.models()
    rows = [(m.name, m.version, m.artifact, m.created, "retired" if m.retired else "") for m in found]
    result(found, as_json, lambda: table(["Name", "Version", "Artifact", "Created", ""], rows))


@models.command("get", epilog=examples("ethogram models get my-codec", "ethogram models get my-codec --version 1"))
def models_get(name: ModelName, version: Version = None, url: Url = None, as_json: Json = False) -> None:
    """Show a published model."""
    with connect(url) as client:
        model = client.model(name, version)
    result(model, as_json, lambda: _show(model))


@models.command(epilog=examples("ethogram models behaviors my-codec"))
def behaviors(name: ModelName, version: Version = None, url: Url = None, as_json: Json = False) -> None:
    """List the behaviours that a model can steer."""
    with connect(url) as client, client.inference() as inference:
        answer = inference.behaviors(name, version=version)
    value = {
        "model": answer.model,
        "version": answer.version,
        "behaviors": [behavior._asdict() for behavior in answer.behaviors],
    }
    result(value, as_json, lambda: table(["Behavior", "Meaning", "Positives"], answer.behaviors))


def _show(model: Model) -> None:
    state = "retired" if model.retired else ""
    pairs({"model": model.name, "version": model.version, "artifact": model.artifact, "state": state})


def _resolve(client: Client, source: str) -> str:
    job, slash, name = source.partition("/")
    return client.output(job, name).id if slash else source
