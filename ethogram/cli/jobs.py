"""Commands about jobs: submit, pipeline, and ``jobs ...``."""

from __future__ import annotations

import math
from collections import deque
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ethogram.cli.files import in_options, read_mapping, set_values
from ethogram.cli.options import Answer, Json, KindName, Limit, Set, Wait, assignment, command, group, seconds
from ethogram.cli.output import console, pairs, print_json, table
from ethogram.errors import InvalidInput

if TYPE_CHECKING:
    from ethogram.client import Client
    from ethogram.resources import Event, Job

top = typer.Typer()
"""Commands without the word jobs."""
app = group(
    "List, show, follow, cancel, retry and delete jobs.",
    "ethogram jobs list --state RUNNING",
    "ethogram jobs watch job_abc",
)
_TIME = partial(typer.Option, metavar="TIME", parser=seconds)
JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id of the job.")]


@command(
    top,
    "ethogram submit generation -f zoo.yaml --set subjects=512 --wait",
    "ethogram submit crossmodal --set zoo.job=job_abc --set zoo.artifact=zoo --label owner=me",
    "ethogram submit generation --dry-run",
)
def submit(
    client: Client,
    kind: KindName,
    *,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", metavar="FILE", help="The spec as YAML; - for standard input.")
    ] = None,
    values: Set = None,
    name: Annotated[str | None, typer.Option(help="Value of the label `name`, to find the job again.")] = None,
    label: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Label of the job. Repeatable.")] = None,
    priority: Annotated[int, typer.Option(help="Jobs of higher priority run first.")] = 0,
    queue: Annotated[str | None, typer.Option(help="Machine class; by default that of the kind.")] = None,
    max_attempts: Annotated[
        int | None, typer.Option(help="Attempts before a job that crashes or stalls fails.", show_default="3")
    ] = None,
    time_limit: Annotated[
        float | None, _TIME(help="Running time of all attempts after which the job fails: 90, 90s, 30m, 2h, 1d.")
    ] = None,
    stall_limit: Annotated[
        float | None,
        _TIME(help="Silence after which an attempt is ended and retried, or none.", show_default="30m"),
    ] = None,
    wait: Wait = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the job and print it with every default; queue nothing.")
    ] = False,
) -> Answer:
    """Queue a job. Fields that neither the file nor --set gives have their defaults."""
    from ethogram.transport import SubmitOptions

    spec = set_values(read_mapping(file, "spec"), values or (), "spec")
    labels = _labels(label) | ({"name": name} if name is not None else {})
    options: SubmitOptions = {"priority": priority, "queue": queue, "max_attempts": max_attempts, "labels": labels}
    if time_limit not in (None, math.inf):
        options["time_limit_seconds"] = time_limit
    if stall_limit is not None:
        options["stall_limit_seconds"] = stall_limit if math.isfinite(stall_limit) else None
    with in_options("spec."):
        if dry_run:
            checked = client.dry_run(kind, spec, **options)
            return Answer(checked, lambda: print_json(checked))
        job = client.submit(kind, spec, **options)
    return _queued(client, job, wait)


@command(top, "ethogram pipeline examples/main.yaml --set jobs.zoo.spec.subjects=256 --wait")
def pipeline(
    client: Client,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML with `jobs:`, name to kind and spec.")],
    values: Set = None,
    wait: Wait = False,
) -> Answer:
    """Queue several jobs that use each other's outputs: all of them, or none if one is wrong."""
    plan = set_values(read_mapping(file, "pipeline"), values or (), "pipeline")
    jobs = plan.get("jobs")
    if not isinstance(jobs, dict) or set(plan) != {"jobs"}:
        raise InvalidInput(f"{file} must hold `jobs:`, a mapping of names to jobs, and nothing else")
    with in_options(""):
        queued = client.pipeline(jobs)
    if wait:
        queued = {name: _follow(client, job, name) for name, job in queued.items()}
    rows = [(name, job.id, job.kind, job.state) for name, job in queued.items()]
    succeeded = all(job.state == "SUCCEEDED" for job in queued.values())
    return Answer({"jobs": queued}, lambda: table(["Name", "Job", "Kind", "State"], rows), ok=succeeded or not wait)


@command(app, "ethogram jobs list --kind generation --state FAILED", name="list")
def list_(
    client: Client,
    *,
    kind: Annotated[str | None, typer.Option(help="Only jobs of this kind.")] = None,
    state: Annotated[str | None, typer.Option(help="Only jobs in this state, e.g. RUNNING.")] = None,
    label: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Only jobs with this label. Repeatable.")
    ] = None,
    parent: Annotated[str | None, typer.Option(metavar="JOB", help="Only child jobs of this job.")] = None,
    limit: Limit = 20,
) -> Answer:
    """List jobs, newest first."""
    state = state.upper() if state else None
    jobs = client.jobs(kind=kind, state=state, labels=_labels(label), parent=parent, limit=limit)
    rows = [(j.id, j.kind, j.name or j.labels.get("name", ""), j.state, _share(j), j.created_at) for j in jobs]
    return Answer(jobs, lambda: table(["Job", "Kind", "Name", "State", "Progress", "Created"], rows))


@command(app, "ethogram jobs get job_abc", "ethogram jobs get job_abc --json | jq .result")
def get(client: Client, id: JobId) -> Answer:
    """Show one job."""
    return _shown(client.job(id))


@command(app, "ethogram jobs watch job_abc", "ethogram jobs watch job_abc --json | jq .type")
def watch(client: Client, id: JobId, as_json: Json = False) -> None:
    """Follow a job to its end; exit code 1 unless it succeeds. With --json, print one event per line."""
    if as_json:
        job = client.wait(id, on_event=lambda event: print_json(event, indent=None))
    else:
        job = _follow(client, client.job(id))
        _shown(job).show()
    if job.state != "SUCCEEDED":
        raise typer.Exit(1)


@command(app, "ethogram jobs logs job_abc", "ethogram jobs logs job_abc --follow --tail 20")
def logs(
    client: Client,
    id: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Follow until the job ends.")] = False,
    tail: Annotated[
        int | None, typer.Option("--tail", "-n", min=0, metavar="N", help="Begin with the last N lines.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the log of a job."""
    out = console()

    def show(event: Event) -> None:
        if event.type != "log":
            return
        if as_json:
            print_json(event, indent=None)
        else:
            time = event.time.astimezone().strftime("%H:%M:%S") if event.time else ""
            out.print(f"{time} {event.data.get('level', 'info'):<7} {event.data.get('message', '')}")

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
            show(event)


@command(app, "ethogram jobs cancel job_abc")
def cancel(client: Client, id: JobId) -> Answer:
    """Cancel a job."""
    return _shown(client.cancel(id), brief=True)


@command(app, "ethogram jobs retry job_abc --wait", "ethogram jobs retry job_abc --from-start")
def retry(
    client: Client,
    id: JobId,
    from_start: Annotated[bool, typer.Option("--from-start", help="Ignore the last checkpoint.")] = False,
    wait: Wait = False,
) -> Answer:
    """Queue a failed or cancelled job again; it resumes from its last checkpoint."""
    return _queued(client, client.retry(id, from_start=from_start), wait)


@command(app, "ethogram jobs rm job_abc")
def rm(client: Client, id: JobId) -> Answer:
    """Delete a job that has ended, with its events, outputs and child jobs; published outputs stay."""
    client.delete_job(id)
    return Answer({"deleted": id}, lambda: pairs({"deleted": id}))


def _queued(client: Client, job: Job, wait: bool) -> Answer:
    """A job that was queued just now, or with ``wait`` has been followed to its end."""
    if not wait:
        return _shown(job, brief=True)
    job = _follow(client, job)
    return _shown(job)._replace(ok=job.state == "SUCCEEDED")


def _follow(client: Client, job: Job, name: str | None = None) -> Job:
    from ethogram.progress import Watch

    # The events of the earlier attempts of a retried job are not shown again.
    with Watch(name or job.labels.get("name") or job.kind) as shown:
        shown.log(f"{job.id} {job.state} in the queue {job.queue}")
        try:
            for event in client.events(job.id, after=job.seq):
                shown.event(event)
        except KeyboardInterrupt:
            shown.log(f"the job goes on: `ethogram jobs watch {job.id}` follows it, `ethogram jobs cancel` ends it")
            raise
    return client.job(job.id)


def _shown(job: Job, brief: bool = False) -> Answer:
    fields: dict[str, object] = {"job": job.id, "kind": "" if brief else job.kind, "state": job.state}
    if not brief:
        fields |= {
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
            "error": (job.error or {}).get("message", ""),
        }
    return Answer(job, lambda: pairs(fields))


def _share(job: Job) -> str:
    at = job.progress
    if not at or job.terminal:
        return ""
    return f"{at.get('stage', '')} {at.get('done', 0)}/{at.get('total', 0)} {at.get('unit', '')}".strip()


def _labels(given: list[str] | None) -> dict[str, str]:
    return dict(assignment("--label", pair, "KEY=VALUE", empty=True) for pair in given or ())
