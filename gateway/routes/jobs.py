"""Jobs: submit, list, show, cancel, retry, delete, and the stream of their events."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Header, Query, Request, Response
from pydantic import BaseModel, Field
from starlette.responses import StreamingResponse

from ethogram.errors import InvalidInput
from ethogram.specs.kinds import KINDS
from gateway.inputs import Cursor, Id, IdempotencyKey, Limit, Page
from gateway.problems import request_id_of
from gateway.services import TENANT, Parts
from gateway.sse import EventStream
from gateway.submissions import JOB_EXAMPLES, PIPELINE_EXAMPLES, Pipeline, Submission
from services.jobs.records import Job
from services.jobs.states import JobState

router = APIRouter(prefix="/v1", tags=["jobs"])

MAX_SEQ = 2**53


class SubmittedPipeline(BaseModel):
    """The jobs of a pipeline, by their names in it."""

    jobs: dict[str, Job]


class DryRun(BaseModel):
    """A submission that would be accepted, with every default filled in."""

    kind: str
    spec: dict[str, Any]
    queue: str
    priority: int
    not_before: str | None
    max_attempts: int
    time_limit_seconds: float | None
    stall_limit_seconds: float | None
    labels: dict[str, str]
    dry_run: bool = Field(True, description="Nothing was queued.")


@router.post(
    "/jobs",
    status_code=201,
    response_model=Job | DryRun,
    responses={200: {"description": "Repeated `Idempotency-Key`, or a dry run", "model": Job | DryRun}},
)
def submit(
    submission: Annotated[Submission, Body(openapi_examples=JOB_EXAMPLES)],
    services: Parts,
    request: Request,
    response: Response,
    *,
    idempotency_key: IdempotencyKey = None,
    dry_run: Annotated[bool, Query(description="Check everything, queue nothing.")] = False,
) -> Job | DryRun:
    """Queue a job. It runs when a worker is free and its inputs exist."""
    if dry_run:
        response.status_code = 200
        services.registry.check(submission.kind, submission.spec, tenant=TENANT, **submission.options)
        values = submission.model_dump(mode="json")
        return DryRun.model_validate(values | {"queue": submission.queue or KINDS[submission.kind].queue})
    job, created = services.registry.submit(
        submission.kind,
        submission.spec,
        tenant=TENANT,
        idempotency_key=idempotency_key,
        trace=request_id_of(request),
        **submission.options,
    )
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    if created:
        services.announce(job)
    else:
        response.status_code = 200
    return job


@router.post("/pipelines", status_code=201)
def submit_pipeline(
    pipeline: Annotated[Pipeline, Body(openapi_examples=PIPELINE_EXAMPLES)],
    services: Parts,
    request: Request,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> SubmittedPipeline:
    """Queue several jobs, all or none. Answers 200 instead of 201 for a repeated `Idempotency-Key`."""
    jobs, created = services.registry.submit_pipeline(
        {name: (job.kind, job.spec, job.options) for name, job in pipeline.jobs.items()},
        tenant=TENANT,
        idempotency_key=idempotency_key,
        trace=request_id_of(request),
    )
    if created:
        for job in jobs.values():
            services.announce(job)
    else:
        response.status_code = 200
    return SubmittedPipeline(jobs=jobs)


@router.get("/jobs")
def list_jobs(
    services: Parts,
    *,
    kind: Annotated[str | None, Query(description=f"One of: {', '.join(KINDS)}.")] = None,
    state: JobState | None = None,
    parent: Annotated[str | None, Query(description="Only children of this job.")] = None,
    label: Annotated[list[str] | None, Query(description="`key=value`; may be repeated, and all must match.")] = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Page[Job]:
    """Jobs, newest first."""
    if kind is not None and kind not in KINDS:
        raise InvalidInput.field("kind", f"unknown kind; there are: {', '.join(KINDS)}")
    labels = {}
    for item in label or ():
        key, equals, value = item.partition("=")
        if not equals:
            raise InvalidInput.field("label", f"{item!r} must be written key=value")
        labels[key] = value
    items, after = services.registry.list(
        TENANT, kind=kind, state=state, labels=labels or None, parent=parent, limit=limit, cursor=cursor
    )
    return Page(items=items, next_cursor=after)


@router.get("/jobs/{job_id}")
def get_job(job_id: Id, services: Parts) -> Job:
    """One job in its current state."""
    return services.registry.get(job_id)


@router.post("/jobs/{job_id}/cancel")
def cancel(job_id: Id, services: Parts) -> Job:
    """Cancel a job: a queued one at once, a running one at its worker's next heartbeat."""
    job = services.registry.request_cancel(job_id)
    services.announce(job)
    return job


@router.post("/jobs/{job_id}/retry")
def retry(
    job_id: Id,
    services: Parts,
    from_start: Annotated[bool, Query(description="Ignore its last checkpoint.")] = False,
) -> Job:
    """Queue a failed or cancelled job again; it resumes from its last checkpoint."""
    job = services.registry.retry(job_id, from_start=from_start)
    services.announce(job)
    return job


@router.delete("/jobs/{job_id}")
def delete(job_id: Id, services: Parts) -> Job:
    """Delete a job that has ended, with its events, outputs and children. Published models stay."""
    return services.registry.delete_job(job_id, services.store.published())


@router.get(
    "/jobs/{job_id}/events",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "A stream of: `state`, `log`, `checkpoint` and `artifact`, whose `id` is the event's `seq` "
            "and whose `data` is the Event; `progress`, without an id, whose `data` is the newest progress; "
            "finally `end`, when the job has ended and all events were sent.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        }
    },
)
async def events(
    job_id: Id,
    services: Parts,
    after: Annotated[int, Query(ge=0, le=MAX_SEQ, description="Skip events up to this `seq`.")] = 0,
    follow: Annotated[bool, Query(description="False: send the events so far, then `end`.")] = True,
    last_event_id: Annotated[
        str | None, Header(description="Like `after`, and takes precedence; browsers send it.")
    ] = None,
) -> EventStream:
    """All events of a job, once each and in order, past ones first. A broken stream resumes after `Last-Event-ID`."""
    if last_event_id:
        if not (last_event_id.isascii() and last_event_id.isdecimal() and len(last_event_id) <= len(str(MAX_SEQ))):
            raise InvalidInput.field("Last-Event-ID", "must be the id of an event of this stream, a whole number")
        after = int(last_event_id)
    return EventStream(await services.tails.open(job_id, after, follow))
