"""The events of a job, as server-sent events."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Query
from starlette.responses import StreamingResponse

from ethogram.errors import InvalidInput
from gateway.inputs import Id
from gateway.services import Parts
from gateway.sse import EventStream

router = APIRouter(prefix="/v1", tags=["jobs"])

MAX_SEQ = 2**53


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
