"""Commands about artifacts and published models."""

from __future__ import annotations

import os
import re
import unicodedata
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ethogram.cli.options import Answer, Limit, ModelName, Version, command, group
from ethogram.cli.output import pairs, say, table

if TYPE_CHECKING:
    from ethogram.client import Client
    from ethogram.resources import Model

app = group("Upload, list, download and delete artifacts.", "ethogram artifacts get job_abc/report -o report")
models = group(
    "Publish models to the inference service, and list them.", "ethogram models publish my-codec job_abc/codec"
)

Source = Annotated[str, typer.Argument(metavar="ARTIFACT", help="Id of an artifact, or JOB/NAME: a job's output.")]


@command(app, "ethogram artifacts put my-zoo/ --name zoo --type zoo")
def put(
    client: Client,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A file or a folder.")],
    name: Annotated[str | None, typer.Option(help="Name of the artifact; by default the file's or folder's.")] = None,
    type: Annotated[str, typer.Option(help="Type of the artifact, e.g. zoo.")] = "file",
) -> Answer:
    """Upload a file or a folder."""
    artifact = client.put(path, name=name or _name(path, type), type=type)
    shown = {"artifact": artifact.id, "name": artifact.name, "type": artifact.type, "bytes": artifact.size}
    return Answer(artifact, lambda: pairs(shown))


@command(app, "ethogram artifacts ls --job job_abc", "ethogram artifacts ls --type codec --json")
def ls(
    client: Client,
    job: Annotated[str | None, typer.Option(help="Only outputs of this job.")] = None,
    type: Annotated[str | None, typer.Option(help="Only artifacts of this type.")] = None,
    limit: Limit = 20,
) -> Answer:
    """List artifacts, newest first."""
    artifacts = client.artifacts(job=job, type=type, limit=limit)
    if job and not artifacts:
        client.job(job)  # raises if there is no such job
    rows = [(a.id, a.name, a.type, a.size, a.job, a.created_at) for a in artifacts]
    return Answer(artifacts, lambda: table(["Artifact", "Name", "Type", "Bytes", "Job", "Created"], rows))


@command(app, "ethogram artifacts get job_abc/report -o report", "ethogram artifacts get 3f9c...")
def get(
    client: Client,
    source: Source,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Folder to write; by default one of the artifact's name."),
    ] = None,
) -> Answer:
    """Download an artifact; every file is checked against its digest."""
    id = _resolve(client, source)
    manifest = client.artifact(id).manifest
    folder = client.get(id, output or Path(Path(manifest.name if manifest else id).name or id))
    files = sorted(manifest.files) if manifest else []
    answer = {"artifact": id, "folder": str(folder), "files": files}
    return Answer(answer, lambda: say(f"{len(files)} files in {folder}"))


@command(app, "ethogram artifacts rm 3f9c...", "ethogram artifacts rm job_abc/zoo")
def rm(client: Client, source: Source) -> Answer:
    """Delete an artifact that no job needs, with its retired models."""
    id = _resolve(client, source)
    client.delete_artifact(id)
    return Answer({"deleted": id}, lambda: pairs({"deleted": id}))


@command(models, "ethogram models publish my-codec job_abc/codec")
def publish(
    client: Client,
    name: ModelName,
    source: Source,
    version: Annotated[str | None, typer.Option(help="Version of the model; by default the next number.")] = None,
) -> Answer:
    """Publish an artifact as a model; the inference service serves it within seconds."""
    return _shown(client.publish(name, _resolve(client, source), version))


@command(models, "ethogram models retire my-codec 1")
def retire(
    client: Client,
    name: ModelName,
    version: Annotated[str, typer.Argument(metavar="VERSION", help="Version of the model.")],
) -> Answer:
    """Stop serving a version, except to requests that name it."""
    return _shown(client.retire(name, version))


@command(models, "ethogram models ls", name="ls")
def models_ls(client: Client) -> Answer:
    """List published models."""
    models = client.models()
    times = [datetime.fromisoformat(str(model.created)) if model.created else None for model in models]
    states = ["retired" if model.retired else "" for model in models]
    rows = [(m.name, m.version, m.artifact, *more) for m, *more in zip(models, times, states, strict=True)]
    return Answer(models, lambda: table(["Name", "Version", "Artifact", "Created", ""], rows))


@command(models, "ethogram models get my-codec", "ethogram models get my-codec --version 1", name="get")
def models_get(client: Client, name: ModelName, version: Version = None) -> Answer:
    """Show a published model."""
    return _shown(client.model(name, version))


@command(models, "ethogram models behaviors my-codec")
def behaviors(client: Client, name: ModelName, version: Version = None) -> Answer:
    """List the behaviours that a model can steer."""
    with client.inference() as inference:
        behaviors, model, served = inference.behaviors(name, version=version)
    value = {"model": model, "version": served, "behaviors": [behavior._asdict() for behavior in behaviors]}
    return Answer(value, lambda: table(["Behavior", "Meaning", "Positives"], behaviors))


def _shown(model: Model) -> Answer:
    state = "retired" if model.retired else ""
    shown = {"model": model.name, "version": model.version, "artifact": model.artifact, "state": state}
    return Answer(model, lambda: pairs(shown))


def _name(path: Path, type: str) -> str:
    """The name of the file or folder as it was typed; where no artifact can have it, one like it, which is said."""
    typed = Path(os.path.abspath(path)).name  # noqa: PTH100  (resolve() would follow a link)
    if re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,79}", typed):
        return typed
    letters = unicodedata.normalize("NFKD", typed).encode("ascii", "ignore").decode()
    made = re.sub(r"[^A-Za-z0-9_.-]+", "-", letters).strip("-.")[:80] or type
    say(f"{typed!r} cannot be the name of an artifact, so this one is called {made}; --name gives it another")
    return made


def _resolve(client: Client, source: str) -> str:
    job, slash, name = source.partition("/")
    return client.output(job, name).id if slash else source
