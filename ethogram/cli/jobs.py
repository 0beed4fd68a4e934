"""Commands about jobs: submit, pipeline, and ``jobs ...``."""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ethogram.cli.files import read_mapping, set_values
from ethogram.cli.options import Json, KindName, Limit, Set, Url, Wait, connect, examples, seconds, show_help
from ethogram.cli.output import console, pairs, print_json, result, table
from ethogram.errors import InvalidInput

if TYPE_CHECKING:
    from ethogram.client import Client
    from ethogram.resources import Event, Job

top = typer.Typer()
"""Commands without the word jobs."""
app = typer.Typer(
    help="List, show, follow, cancel, retry and delete jobs.", invoke_without_command=True, callback=show_help
)
JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id of the job.", show_default=False)]


@top.command(
    epilog=examples(
        "ethogram submit generation -f zoo.yaml --set subjects=512 --wait",
        "ethogram submit crossmodal --set zoo.job=job_abc --set zoo.artifact=zoo --label owner=me",
        "ethogram submit generation --dry-run",
    )
)
def submit(
    kind: KindName,
    *,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", metavar="FILE", help="The spec as YAML; - for standard input.")
    ] = None,
    values: Set = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Value of the label `name`, to find the job again.")
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="Label of the job. Repeatable.")
    ] = None,
    priority: Annotated[int, typer.Option("--priority", help="Jobs of higher priority run first.")] = 0,
    queue: Annotated[str | None, typer.Option("--queue", help="Machine class; by default that of the kind.")] = None,
    max_attempts: Annotated[
        int | None,
        typer.Option("--max-attempts", help="Attempts before a job that crashes or stalls fails.", show_default="3"),
    ] = None,
    time_limit: Annotated[
        float | None,
        typer.Option(
            "--time-limit",
            metavar="TIME",
            parser=seconds,
            help="Running time of all attempts after which the job fails: 90, 90s, 30m, 2h, 1d.",
            show_default=False,
        ),
    ] = None,
    stall_limit: Annotated[
        float | None,
        typer.Option(
            "--stall-limit",
            metavar="TIME",
            parser=seconds,
            help="Silence after which an attempt is ended and retried; none: never.",
            show_default="30m",
        ),
    ] = None,
    wait: Wait = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the job and print it with every default; queue nothing.")
    ] = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Queue a job. Fields that neither the file nor --set gives have their defaults."""
    from ethogram.transport import SubmitOptions

    spec = set_values(read_mapping(file, "spec"), values or (), "spec")
    labels = _labels(label or ()) | ({"name": name} if name is not None else {})
    options: SubmitOptions = {
        "priority": priority,
        "queue": queue,
        "max_attempts": max_attempts,
        "labels": labels or None,
    }
    if time_limit is not None:
        options["time_limit_seconds"] = _finite(time_limit)
    if stall_limit is not None:
        options["stall_limit_seconds"] = _finite(stall_limit)
    with connect(url) as client:
        if dry_run:
            print_json(client.dry_run(kind, spec, **options))
            return
        job = client.submit(kind, spec, **options)
        if wait:
            job = _follow(client, job, name or kind)
    result(job, as_json, lambda: _show(job) if wait else pairs({"job": job.id, "state": job.state}))
    if wait:
        _exit_unless_succeeded([job])


@top.command(epilog=examples("ethogram pipeline examples/main.yaml --set jobs.zoo.spec.subjects=256 --wait"))
def pipeline(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML with `jobs:`, name to kind and spec.")],
    values: Set = None,
    wait: Wait = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Queue several jobs that use each other's outputs: all of them, or none if one is wrong."""
    plan = set_values(read_mapping(file, "pipeline"), values or (), "pipeline")
    jobs = plan.get("jobs")
    if not isinstance(jobs, dict) or set(plan) != {"jobs"}:
        raise InvalidInput(f"{file} must hold `jobs:`, a mapping of names to jobs, and nothing else")
    with connect(url) as client:
        made = client.pipeline(jobs)
        if wait:
            made = {name: _follow(client, job, name) for name, job in made.items()}
    rows = [(name, job.id, job.kind, job.state) for name, job in made.items()]
    result({"jobs": made}, as_json, lambda: table(["Name", "Job", "Kind", "State"], rows))
    if wait:
        _exit_unless_succeeded(list(made.values()))


@app.command("list", epilog=examples("ethogram jobs list --kind generation --state FAILED"))
def list_(
    *,
    kind: Annotated[str | None, typer.Option("--kind", help="Only jobs of this kind.")] = None,
    state: Annotated[str | None, typer.Option("--state", help="Only jobs in this state, e.g. RUNNING.")] = None,
    label: Annotated[
        list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="Only jobs with this label. Repeatable.")
    ] = None,
    parent: Annotated[str | None, typer.Option("--parent", metavar="JOB", help="Only child jobs of this job.")] = None,
    limit: Limit = 20,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """List jobs, newest first."""
    with connect(url) as client:
        state = state.upper() if state else None
        jobs = client.jobs(kind=kind, state=state, labels=_labels(label or ()), parent=parent, limit=limit)
    rows = [(j.id, j.kind, j.name or j.labels.get("name", ""), j.state, _share(j), j.created_at) for j in jobs]
    result(jobs, as_json, lambda: table(["Job", "Kind", "Name", "State", "Progress", "Created"], rows))


@app.command(epilog=examples("ethogram jobs get job_abc", "ethogram jobs get job_abc --json | jq .result"))
def get(id: JobId, url: Url = None, as_json: Json = False) -> None:
    """Show one job."""
    with connect(url) as client:
        job = client.job(id)
    result(job, as_json, lambda: _show(job))


@app.command(epilog=examples("ethogram jobs watch job_abc", "ethogram jobs watch job_abc --json | jq .type"))
def watch(id: JobId, url: Url = None, as_json: Json = False) -> None:
    """Follow a job to its end; exit code 1 unless it succeeds. With --json, print one event per line."""
    with connect(url) as client:
        if as_json:
            job = client.wait(id, on_event=lambda event: print_json(event, indent=None))
        else:
            first = client.job(id)
            job = _follow(client, first, first.labels.get("name") or first.kind)
            _show(job)
    _exit_unless_succeeded([job])


@app.command(epilog=examples("ethogram jobs logs job_abc", "ethogram jobs logs job_abc --follow --tail 20"))
def logs(
    id: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Follow until the job ends.")] = False,
    tail: Annotated[
        int | None, typer.Option("--tail", "-n", min=0, metavar="N", help="Begin with the last N lines.")
    ] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Print the log of a job."""
    out = console()

    def show(event: Event) -> None:
        if as_json:
            print_json(event, indent=None)
        else:
            time = event.time.astimezone().strftime("%H:%M:%S") if event.time else ""
            out.print(f"{time} {event.data.get('level', 'info'):<7} {event.data.get('message', '')}")

    with connect(url) as client:
        after = 0
        if tail is not None:
            last: deque[Event] = deque(maxlen=tail)
            for event in client.events(id, follow=False):
                after = event.seq or after
                if event.type == "log":
                    last.append(event)
            for event in last:
                show(event)
        if follow or tail is None:
            for event in client.events(id, after=after, follow=follow):
                if event.type == "log":
                    show(event)


@app.command(epilog=examples("ethogram jobs cancel job_abc"))
def cancel(id: JobId, url: Url = None, as_json: Json = False) -> None:
    """Cancel a job."""
    with connect(url) as client:
        job = client.cancel(id)
    result(job, as_json, lambda: pairs({"job": job.id, "state": job.state}))


@app.command(epilog=examples("ethogram jobs retry job_abc --wait", "ethogram jobs retry job_abc --from-start"))
def retry(
    id: JobId,
    from_start: Annotated[bool, typer.Option("--from-start", help="Ignore the last checkpoint.")] = False,
    wait: Wait = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Queue a failed or cancelled job again; it resumes from its last checkpoint."""
    with connect(url) as client:
        job = client.retry(id, from_start=from_start)
        if wait:
            job = _follow(client, job, job.labels.get("name") or job.kind)
    result(job, as_json, lambda: _show(job) if wait else pairs({"job": job.id, "state": job.state}))
    if wait:
        _exit_unless_succeeded([job])


def _finite(seconds: float) -> float | None:
    return seconds if math.isfinite(seconds) else None


def _follow(client: Client, job: Job, name: str) -> Job:
    from ethogram.cli.watch import Watch

    # The events of the earlier attempts of a retried job are not shown again.
    with Watch(name) as shown:
        for event in client.events(job.id, after=job.seq):
            shown.event(event)
    return client.job(job.id)


def _exit_unless_succeeded(jobs: list[Job]) -> None:
    if any(job.state != "SUCCEEDED" for job in jobs):
        raise typer.Exit(1)


def _show(job: Job) -> None:
    error: dict[str, Any] = job.error or {}
    pairs(
        {
            "job": job.id,
            "kind": job.kind,
            "state": job.state,
            "labels": " ".join(f"{key}={value}" for key, value in job.labels.items()),
            "queue": job.queue,
            "part of": f"{job.parent} ({job.name})" if job.parent else "",
            "waits for": " ".join(job.waits_for),
            "progress": _share(job),
            "attempts": f"{job.attempts} of {job.max_attempts}" if job.attempts else "",
            "time limit": f"{job.time_limit_seconds:g} s" if job.time_limit_seconds else "",
            "ran": f"{job.ran_seconds:.1f} s" if job.ran_seconds else "",
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
    labels = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise InvalidInput(f"--label {item}: write KEY=VALUE, e.g. owner=me")
        labels[key] = value
    return labels


@app.command(epilog=examples("ethogram jobs rm job_abc"))
def rm(id: JobId, url: Url = None, as_json: Json = False) -> None:
    """Delete a job that has ended, with its events, outputs and child jobs; published outputs stay."""
    with connect(url) as client:
        client.delete_job(id)
    result({"deleted": id}, as_json, lambda: pairs({"deleted": id}))
