"""Commands about jobs: submit, pipeline, and ``jobs ...``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ethogram.cli.options import Json, Limit, Set, Url, Wait, examples, show_help

if TYPE_CHECKING:
    from ethogram.client import Client
    from ethogram.resources import Job

app = typer.Typer(help="Look at jobs, follow, cancel and retry them.", invoke_without_command=True, callback=show_help)
JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id of the job.", show_default=False)]


def submit(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="See `ethogram kinds`.", show_default=False)],
    *,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", metavar="FILE", help="The spec as YAML; - for standard input.")
    ] = None,
    values: Set = None,
    name: Annotated[str | None, typer.Option("--name", help="The label `name`, to find the job again.")] = None,
    label: Annotated[list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="Repeatable.")] = None,
    priority: Annotated[int, typer.Option("--priority", help="Higher runs first.")] = 0,
    queue: Annotated[str | None, typer.Option("--queue", help="Machine class; else the kind's own.")] = None,
    wait: Wait = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check it and show it with every default; queue nothing.")
    ] = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Queue one job. What the file and --set leave out has its default."""
    from ethogram.cli.files import read_mapping, set_values
    from ethogram.cli.output import pairs, print_json, result
    from ethogram.client import Client, SubmitOptions

    spec = set_values(read_mapping(file, "spec"), values or (), "spec")
    labels = _labels(label or ()) | ({"name": name} if name is not None else {})
    options: SubmitOptions = {"priority": priority, "queue": queue, "labels": labels or None}
    with Client(url) as client:
        if dry_run:
            print_json(client.dry_run(kind, spec, **options))
            return
        job = client.submit(kind, spec, **options)
        if wait:
            job = _follow(client, job, name or kind)
    result(job, as_json, lambda: _show(job) if wait else pairs({"job": job.id, "state": job.state}))
    if wait:
        _exit_unless_succeeded([job])


submit_examples = examples(
    "ethogram submit generation -f zoo.yaml --set subjects=512 --wait",
    "ethogram submit crossmodal --set zoo.job=job_abc --set zoo.artifact=zoo --label owner=me",
    "ethogram submit generation --dry-run",
)


def pipeline(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML with `jobs:`, name to kind and spec.")],
    values: Set = None,
    wait: Wait = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Queue several jobs that use each other's outputs: all of them, or none when one is wrong."""
    from ethogram.cli.files import read_mapping, set_values
    from ethogram.cli.output import result, table
    from ethogram.client import Client
    from ethogram.errors import InvalidInput

    plan = set_values(read_mapping(file, "pipeline"), values or (), "pipeline")
    jobs = plan.get("jobs")
    if not isinstance(jobs, dict) or set(plan) != {"jobs"}:
        raise InvalidInput(f"{file} must hold `jobs:`, a mapping of names to jobs, and nothing else")
    with Client(url) as client:
        made = client.pipeline(jobs)
        if wait:
            made = {name: _follow(client, job, name) for name, job in made.items()}
    rows = [(name, job.id, job.kind, job.state) for name, job in made.items()]
    result({"jobs": made}, as_json, lambda: table(["Name", "Job", "Kind", "State"], rows))
    if wait:
        _exit_unless_succeeded(list(made.values()))


pipeline_examples = examples("ethogram pipeline examples/main.yaml --set jobs.zoo.spec.subjects=256 --wait")


@app.command("list", epilog=examples("ethogram jobs list --kind generation --state FAILED"))
def list_(
    *,
    kind: Annotated[str | None, typer.Option("--kind", help="Only this kind.")] = None,
    state: Annotated[str | None, typer.Option("--state", help="Only in this state, e.g. RUNNING.")] = None,
    label: Annotated[list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="Only with it.")] = None,
    limit: Limit = 20,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """List jobs, newest first."""
    from ethogram.cli.output import result, table
    from ethogram.client import Client

    with Client(url) as client:
        jobs = client.jobs(kind=kind, state=state.upper() if state else None, labels=_labels(label or ()), limit=limit)
    rows = [(j.id, j.kind, j.labels.get("name", ""), j.state, _share(j), j.created_at) for j in jobs]
    result(jobs, as_json, lambda: table(["Job", "Kind", "Name", "State", "Progress", "Created"], rows))


@app.command(epilog=examples("ethogram jobs get job_abc", "ethogram jobs get job_abc --json | jq .result"))
def get(id: JobId, url: Url = None, as_json: Json = False) -> None:
    """Show one job."""
    from ethogram.cli.output import result
    from ethogram.client import Client

    with Client(url) as client:
        job = client.job(id)
    result(job, as_json, lambda: _show(job))


@app.command(epilog=examples("ethogram jobs watch job_abc", "ethogram jobs watch job_abc --json | jq .type"))
def watch(id: JobId, url: Url = None, as_json: Json = False) -> None:
    """Follow a job to its end; exit code 1 unless it succeeds. With --json, one event a line."""
    from ethogram.cli.output import print_json
    from ethogram.client import Client

    with Client(url) as client:
        if as_json:
            job = client.wait(id, on_event=lambda event: print_json(event, indent=None))
        else:
            first = client.job(id)
            job = _follow(client, first, first.labels.get("name") or first.kind)
            _show(job)
    _exit_unless_succeeded([job])


@app.command(epilog=examples("ethogram jobs logs job_abc", "ethogram jobs logs job_abc --follow"))
def logs(
    id: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Print what a job said."""
    from ethogram.cli.output import console, print_json
    from ethogram.client import Client

    out = console()
    with Client(url) as client:
        for event in client.events(id, follow=follow):
            if event.type != "log":
                continue
            if as_json:
                print_json(event, indent=None)
            else:
                time = event.time.astimezone().strftime("%H:%M:%S") if event.time else ""
                out.print(f"{time} {event.data.get('level', 'info'):<7} {event.data.get('message', '')}")


@app.command(epilog=examples("ethogram jobs cancel job_abc"))
def cancel(id: JobId, url: Url = None, as_json: Json = False) -> None:
    """Ask a job to end."""
    from ethogram.cli.output import pairs, result
    from ethogram.client import Client

    with Client(url) as client:
        job = client.cancel(id)
    result(job, as_json, lambda: pairs({"job": job.id, "state": job.state}))


@app.command(epilog=examples("ethogram jobs retry job_abc --wait"))
def retry(id: JobId, wait: Wait = False, url: Url = None, as_json: Json = False) -> None:
    """Queue a failed or cancelled job again; it goes on from its last checkpoint."""
    from ethogram.cli.output import pairs, result
    from ethogram.client import Client

    with Client(url) as client:
        job = client.retry(id)
        if wait:
            job = _follow(client, job, job.labels.get("name") or job.kind)
    result(job, as_json, lambda: _show(job) if wait else pairs({"job": job.id, "state": job.state}))
    if wait:
        _exit_unless_succeeded([job])


def _follow(client: Client, job: Job, name: str) -> Job:
    from ethogram.cli.watch import watch as watch_of

    # A job that is tried again begins with the events of its earlier attempts; these are history.
    with watch_of(name) as shown:
        for event in client.events(job.id, after=job.seq):
            shown.event(event)
    return client.job(job.id)


def _exit_unless_succeeded(jobs: list[Job]) -> None:
    if any(job.state != "SUCCEEDED" for job in jobs):
        raise typer.Exit(1)


def _show(job: Job) -> None:
    from ethogram.cli.output import pairs

    error: dict[str, Any] = job.error or {}
    pairs(
        {
            "job": job.id,
            "kind": job.kind,
            "state": job.state,
            "labels": " ".join(f"{key}={value}" for key, value in job.labels.items()),
            "queue": job.queue,
            "waits for": " ".join(job.waits_for),
            "progress": _share(job),
            "attempts": f"{job.attempts} of {job.max_attempts}" if job.attempts else "",
            "created": job.created_at,
            "started": job.started_at,
            "finished": job.finished_at,
            "spec": job.spec,
            "inputs": job.inputs,
            "result": job.result,
            "error": error.get("message", ""),
        }
    )


def _share(job: Job) -> str:
    at = job.progress
    if not at or job.terminal:
        return ""
    return f"{at.get('stage', '')} {at.get('done', 0)}/{at.get('total', 0)} {at.get('unit', '')}".strip()


def _labels(given: list[str] | tuple[()]) -> dict[str, str]:
    from ethogram.errors import InvalidInput

    labels = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise InvalidInput(f"--label {item}: write KEY=VALUE, e.g. owner=me")
        labels[key] = value
    return labels


@app.command(epilog=examples("ethogram jobs rm job_abc"))
def rm(id: JobId, url: Url = None, as_json: Json = False) -> None:
    """Delete a job that has ended, with its events, outputs and children; what is published stays."""
    from ethogram.cli.output import pairs, result
    from ethogram.client import Client

    with Client(url) as client:
        job = client.delete_job(id)
    result(job, as_json, lambda: pairs({"deleted": job.id, "kind": job.kind, "state": job.state}))
