"""From a request to rows: checks, idempotency keys, inputs, and the order of a pipeline's jobs.

Functions here work inside a write transaction of the caller.
"""

from __future__ import annotations

import graphlib
import hashlib
import json
import re
import secrets
from base64 import b32encode
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic import ValidationError
from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from ethogram.errors import Conflict, IllegalState, InvalidInput, NotFound, did_you_mean
from ethogram.specs.base import ArtifactRef, Spec
from ethogram.specs.kinds import KINDS
from services.jobs import tables, text, transitions
from services.jobs.database import Collision, insert_for
from services.jobs.records import Options
from services.jobs.states import UNSUCCESSFUL, JobState
from services.kinds import input_refs

MAX_PIPELINE = 1000
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def new_id(prefix: str) -> str:
    """A random id: ``prefix``, ``_`` and 20 base32 characters (100 bits)."""
    return f"{prefix}_{b32encode(secrets.token_bytes(13)).decode().lower()[:20]}"


@dataclass
class Request:
    """One requested job. ``prefix``: put before the paths of its fields in errors."""

    kind: str
    spec: Spec
    options: Options
    prefix: str = ""
    parent: str | None = None
    name: str | None = None
    """Name of a child job at its parent."""
    refused: InvalidInput | None = None
    """What keeps it from becoming a job. Earlier versions took such requests: an old idempotency key still answers."""

    @classmethod
    def make(
        cls,
        kind: str,
        spec: Spec,
        options: Mapping[str, Any],
        prefix: str = "",
        *,
        parent: str | None = None,
        name: str | None = None,
    ) -> Request:
        """Check everything except its inputs. Raises :class:`InvalidInput`; see also ``refused``."""
        if kind not in KINDS:
            raise InvalidInput.field(
                f"{prefix}kind", f"is none of {', '.join(sorted(KINDS))}{did_you_mean(kind, KINDS)}"
            )
        if not isinstance(spec, KINDS[kind].spec):
            raise InvalidInput.field(f"{prefix}spec", f"is a {type(spec).__name__}, not the spec of a {kind} job")
        try:
            made = cls(kind, spec, Options.model_validate(dict(options)), prefix, parent, name)
        except ValidationError as error:
            raise InvalidInput.from_pydantic(error, prefix.rstrip("."), Options) from None
        if parent is None:
            # A child's spec follows from its parent's.
            try:
                spec.refuse_new(f"{prefix}spec.")
            except InvalidInput as error:
                made.refused = error
        text.check(spec.model_dump(mode="json"), f"{prefix}spec")
        text.check(made.options.labels, f"{prefix}labels")
        return made

    @property
    def body(self) -> dict[str, Any]:
        """The request as JSON values, without defaults, so that options of newer versions do not change its digest."""
        return {
            "kind": self.kind,
            "spec": self.spec.model_dump(mode="json", exclude_defaults=True),
            "options": self.options.model_dump(mode="json", exclude_defaults=True),
        }


class ResolvedInput(NamedTuple):
    """An input of a job: its path in the spec, the output ``name`` of job ``needs``, and the artifact once there."""

    path: str
    needs: str | None
    name: str | None
    artifact: str | None


def check_name(name: str, field: str) -> None:
    """Raise :class:`InvalidInput` for the name of a job or tenant that is not plain."""
    if not _NAME.fullmatch(name):
        raise InvalidInput.field(field, f"the name {name[:80]!r} must be 1 to 64 letters, digits, '_' or '-'")


def check_key(key: str | None) -> None:
    """Raise :class:`InvalidInput` for an idempotency key that cannot be stored."""
    if key is not None and not 1 <= len(key) <= 255:
        raise InvalidInput.field("idempotency_key", "must be 1 to 255 characters long")
    text.check(key, "idempotency_key")


def body_hash(body: Any) -> str:
    """Sha256 of a request's JSON form, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def seen(session: Session, tenant: str, key: str, digest: str) -> dict[str, str] | None:
    """The jobs (name -> id) that this key made before. Raises :class:`Conflict` if that was for another body, or if
    some of them were deleted."""
    row = session.get(tables.Submission, (tenant, key))
    if row is None:
        return None
    if row.body_hash != digest:
        raise Conflict(f"the idempotency key {key!r} was used with another request: send a new key for a new request")
    there = session.scalars(select(tables.Job.id).where(tables.Job.id.in_(row.jobs.values())))
    if gone := set(row.jobs.values()) - set(there):
        raise Conflict(f"job {min(gone)}, which this idempotency key made, was deleted: send a new key")
    return dict(row.jobs)


def remember(session: Session, tenant: str, key: str, digest: str, jobs: Mapping[str, str]) -> None:
    """Record the jobs that this key made. Raises :class:`Collision` if another request with it was committed first."""
    row = {"tenant": tenant, "key": key, "body_hash": digest, "jobs": dict(jobs), "created_at": transitions.now()}
    added = insert_for(session, tables.Submission).values(**row).on_conflict_do_nothing()
    if session.execute(added.returning(tables.Submission.key)).one_or_none() is None:
        raise Collision(f"another request with the idempotency key {key!r} is being answered: try again")
    session.execute(insert(tables.SubmissionJob), [{"job": job, "tenant": tenant, "key": key} for job in jobs.values()])


def resolve_inputs(
    session: Session, request: Request, *, tenant: str, names: Mapping[str, str] | None = None
) -> list[ResolvedInput]:
    """Resolve each input of ``request``; ``names``: name -> id of other jobs of its pipeline.

    Raises what refuses the request, :class:`NotFound` for an input that does not exist, and :class:`IllegalState` for
    one that will never be.
    """
    if request.refused is not None:
        raise request.refused
    inputs = []
    for path, ref in input_refs(request.spec).items():
        job = names.get(ref.job, ref.job) if names and ref.job is not None else ref.job
        inputs.append(resolve(session, path, ref.model_copy(update={"job": job}), tenant, request.prefix))
    return inputs


def insert_job(
    session: Session, request: Request, *, tenant: str, trace: str | None, names: Mapping[str, str] | None = None
) -> str:
    """Insert the row of one job with its inputs and first event; return its id. Raises as :func:`resolve_inputs`."""
    spec = request.spec.model_dump(mode="json")
    inputs = resolve_inputs(session, request, tenant=tenant, names=names)
    for found in inputs:
        if found.needs is not None:
            _set(spec, f"{found.path}.job", found.needs)
    waiting = sum(found.artifact is None for found in inputs)
    options, time, job = request.options, transitions.now(), new_id("job")
    ready = waiting == 0 and (options.not_before is None or options.not_before <= time)
    session.execute(
        insert(tables.Job).values(
            id=job,
            tenant=tenant,
            kind=request.kind,
            queue=options.queue or KINDS[request.kind].queue,
            spec=spec,
            state=JobState.QUEUED,
            ready=ready,
            ready_at=time if ready else None,
            waiting=waiting,
            parent=request.parent,
            name=request.name,
            trace=trace,
            seq=1,
            created_at=time,
            **options.model_dump(exclude={"queue"}),
        )
    )
    if inputs:
        session.execute(insert(tables.Input), [{"job": job, **found._asdict()} for found in inputs])
    transitions.add_events(session, job, None, 1, [("state", {"state": JobState.QUEUED})])
    return job


def insert_pipeline(
    session: Session, requests: Mapping[str, Request], *, tenant: str, trace: str | None
) -> dict[str, str]:
    """Insert all jobs, each after those that it needs; return name -> id, in the order of ``requests``.

    Raises :class:`InvalidInput` for a circle, and what :func:`insert_job` raises.
    """
    needs = {
        name: {ref.job for ref in input_refs(request.spec).values() if ref.job is not None} & requests.keys()
        for name, request in requests.items()
    }
    try:
        order = list(graphlib.TopologicalSorter(needs).static_order())
    except graphlib.CycleError as error:
        circle = " -> ".join(reversed(error.args[1]))
        raise InvalidInput.field("jobs", f"wait for each other in a circle: {circle}") from None
    ids: dict[str, str] = {}
    for name in order:
        ids[name] = insert_job(session, requests[name], tenant=tenant, trace=trace, names=ids)
    return {name: ids[name] for name in requests}


def make_pipeline(jobs: Mapping[str, tuple[str, Spec, Mapping[str, Any]]]) -> dict[str, Request]:
    """The checked requests of a pipeline, by name. Raises :class:`InvalidInput`."""
    if not 1 <= len(jobs) <= MAX_PIPELINE:
        raise InvalidInput.field("jobs", f"must hold 1 to {MAX_PIPELINE} jobs")
    for name in jobs:
        check_name(name, "jobs")
    requests = {
        name: Request.make(kind, spec, options, prefix=f"jobs.{name}.") for name, (kind, spec, options) in jobs.items()
    }
    for name, request in requests.items():
        for path, ref in input_refs(request.spec).items():
            if ref.job is not None and ref.job not in jobs and not ref.job.startswith("job_"):
                known = ", ".join(sorted(set(jobs) - {name})) or "no others"
                raise InvalidInput.field(
                    f"jobs.{name}.spec.{path}.job", f"there is no job {ref.job!r} in this pipeline; there are: {known}"
                )
    return requests


def resolve(session: Session, path: str, ref: ArtifactRef, tenant: str, prefix: str = "") -> ResolvedInput:
    """Resolve ``ref``; the result has no ``artifact`` while its job has not finished."""
    if ref.job is None:
        query = select(tables.Artifact.id).where(tables.Artifact.id == ref.artifact, tables.Artifact.tenant == tenant)
        # The lock makes a deletion wait for us, so that it finds this job.
        if session.scalar(query.with_for_update(read=True)) is None:
            raise NotFound.field(f"{prefix}spec.{path}.artifact", f"there is no artifact {ref.artifact!r}")
        return ResolvedInput(path, None, None, ref.artifact)
    # The lock makes a finishing job wait for us, so that it finds this dependent (SQLite: there is one writer anyway).
    made_by = select(tables.Job.state).where(tables.Job.id == ref.job, tables.Job.tenant == tenant)
    state = session.scalar(made_by.with_for_update(read=True))
    if state is None:
        raise NotFound.field(f"{prefix}spec.{path}.job", f"there is no job {ref.job!r}")
    if state in UNSUCCESSFUL:
        what = f"job {ref.job} has {'failed' if state == JobState.FAILED else 'been cancelled'}: retry it first"
        raise IllegalState.field(f"{prefix}spec.{path}.job", what)
    if state != JobState.SUCCEEDED:
        return ResolvedInput(path, ref.job, ref.artifact, None)
    made = transitions.outputs(session, ref.job)
    if ref.artifact not in made:
        what = f"job {ref.job} made no artifact named {ref.artifact!r}; it made: {', '.join(sorted(made)) or 'none'}"
        raise NotFound.field(f"{prefix}spec.{path}.artifact", what)
    return ResolvedInput(path, ref.job, ref.artifact, made[ref.artifact])


def _set(values: Any, path: str, value: str | None) -> None:
    *parents, last = path.split(".")
    for key in parents:
        values = values[int(key)] if isinstance(values, list) else values[key]
    values[last] = value
