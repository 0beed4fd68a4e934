"""The tables. A change here needs a migration in ``migrations/versions`` and the new ``REVISION``."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

REVISION = "0004"
"""The migration that these tables correspond to."""


class UtcDateTime(sa.TypeDecorator[datetime]):
    """Aware UTC datetimes on every database; SQLite alone would drop the time zone."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """To the database."""
        if value is None:
            return None
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """From the database."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


# SQLite increments only a column that is exactly INTEGER.
Serial = sa.BigInteger().with_variant(sa.Integer, "sqlite")
Json = sa.JSON(none_as_null=True)


class Base(DeclarativeBase):
    """Base of the tables."""

    # Later migrations can change only constraints that have names.
    metadata = sa.MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ix": "ix_%(table_name)s_%(column_0_name)s",
        }
    )
    type_annotation_map = {
        str: sa.Text(),
        int: sa.BigInteger(),
        float: sa.Double(),
        datetime: UtcDateTime(),
        dict[str, Any]: Json,
    }


class Job(Base):
    """A job. ``number`` is its position in the order of submission, independent of any clock."""

    __tablename__ = "jobs"
    # A number is never given twice, even when rows are deleted: cursors rely on it.
    __table_args__ = {"sqlite_autoincrement": True}

    number: Mapped[int] = mapped_column(Serial, primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    tenant: Mapped[str]
    kind: Mapped[str]
    queue: Mapped[str]
    spec: Mapped[dict[str, Any]]
    labels: Mapped[dict[str, Any]]
    priority: Mapped[int]
    state: Mapped[str]
    ready: Mapped[bool]
    """Whether it is queued, its inputs are there, and ``not_before`` has passed."""
    ready_at: Mapped[datetime | None]
    """Since when it is ready."""
    waiting: Mapped[int]
    """Number of inputs or children that it still waits for."""
    not_before: Mapped[datetime | None]
    attempt: Mapped[str | None] = mapped_column(unique=True)
    """The attempt that owns the job now."""
    attempts: Mapped[int] = mapped_column(default=0)
    """Attempts that count against ``max_attempts``."""
    claims: Mapped[int] = mapped_column(default=0)
    """All attempts ever."""
    max_attempts: Mapped[int]
    parent: Mapped[str | None]
    """The job that made this one, as its child ``name``. No foreign key: SQLite could not drop the column again."""
    name: Mapped[str | None]
    time_limit_seconds: Mapped[float | None]
    stall_limit_seconds: Mapped[float | None]
    ran_seconds: Mapped[float] = mapped_column(default=0.0, server_default=sa.text("0"))
    """Running time of the attempts that have ended, since the submission or the last retry."""
    backoff_seconds: Mapped[float | None]
    """How long a queued job waits after a crash; ``not_before`` is the same by the wall clock."""
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    progress: Mapped[dict[str, Any] | None]
    checkpoint_artifact: Mapped[str | None]
    checkpoint_step: Mapped[int | None]
    result: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    trace: Mapped[str | None]
    seq: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]

    inputs: Mapped[list[Input]] = relationship(lazy="selectin", order_by="Input.path", foreign_keys="Input.job")


# The first serves claims (see services.jobs.shares) and all queries by state.
sa.Index("ix_jobs_claim", Job.state, Job.queue, Job.ready, Job.priority.desc(), Job.tenant, Job.number)
sa.Index("ix_jobs_parent", Job.parent, Job.name, unique=True)
sa.Index("ix_jobs_due", Job.state, Job.queue, Job.ready, Job.waiting, Job.not_before)
sa.Index("ix_jobs_checkpoint", Job.checkpoint_artifact)
sa.Index("ix_jobs_tenant", Job.tenant, Job.number)
sa.Index("ix_jobs_tenant_kind", Job.tenant, Job.kind, Job.number)
sa.Index("ix_jobs_tenant_state", Job.tenant, Job.state, Job.number)


class Input(Base):
    """An artifact that a job needs: there already (``artifact``), or the output ``name`` of job ``needs``."""

    __tablename__ = "inputs"

    job: Mapped[str] = mapped_column(sa.ForeignKey("jobs.id"), primary_key=True)
    path: Mapped[str] = mapped_column(primary_key=True)
    needs: Mapped[str | None] = mapped_column(sa.ForeignKey("jobs.id"), index=True)
    name: Mapped[str | None]
    artifact: Mapped[str | None] = mapped_column(index=True)


class Attempt(Base):
    """One attempt of a worker to run a job."""

    __tablename__ = "attempts"
    __table_args__ = (sa.UniqueConstraint("job", "number"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    job: Mapped[str] = mapped_column(sa.ForeignKey("jobs.id"))
    number: Mapped[int]
    worker: Mapped[str]
    lease_seconds: Mapped[float]
    heartbeat: Mapped[int] = mapped_column(default=0)
    """Counts up; the reconciler watches it change, by its own clock."""
    seconds: Mapped[float] = mapped_column(default=0.0, server_default=sa.text("0"))
    """Running time by the worker's monotonic clock, as of the last heartbeat."""
    batch: Mapped[int] = mapped_column(default=0, server_default=sa.text("0"))
    """Number of the last batch of events that was recorded."""
    started_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
    outcome: Mapped[str | None]
    """``succeeded``, ``failed``, ``timed out``, ``cancelled``, ``crashed``, ``stalled``, ``lost``, ``stopped`` or
    ``waiting``."""
    message: Mapped[str | None]


class Event(Base):
    """An event of a job."""

    __tablename__ = "events"

    job: Mapped[str] = mapped_column(sa.ForeignKey("jobs.id"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    attempt: Mapped[str | None]
    type: Mapped[str]
    data: Mapped[dict[str, Any]]
    time: Mapped[datetime]


class Artifact(Base):
    """An artifact in the store, made by a job or uploaded."""

    __tablename__ = "artifacts"
    __table_args__ = {"sqlite_autoincrement": True}

    number: Mapped[int] = mapped_column(Serial, primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str]
    type: Mapped[str]
    tenant: Mapped[str]
    job: Mapped[str | None] = mapped_column(sa.ForeignKey("jobs.id"))
    attempt: Mapped[str | None]
    size: Mapped[int]
    superseded: Mapped[bool] = mapped_column(default=False)
    """A later attempt of the same job made an output of the same name."""
    created_at: Mapped[datetime]


sa.Index("ix_artifacts_job", Artifact.job, Artifact.name)
sa.Index("ix_artifacts_tenant", Artifact.tenant, Artifact.number)
sa.Index("ix_artifacts_tenant_type", Artifact.tenant, Artifact.type, Artifact.number)


class Submission(Base):
    """A submission with an idempotency key: the digest of its request, and the jobs that it made."""

    __tablename__ = "submissions"

    tenant: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    body_hash: Mapped[str]
    jobs: Mapped[dict[str, Any]]
    """Name -> job id; the name of a single job is empty."""
    created_at: Mapped[datetime]


class SubmissionJob(Base):
    """A job, not yet deleted, that a submission with an idempotency key made."""

    __tablename__ = "submission_jobs"

    job: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    key: Mapped[str]


sa.Index("ix_submission_jobs_key", SubmissionJob.tenant, SubmissionJob.key)


class Turn(Base):
    """When a tenant was last served in a queue: ``turn`` counts the claims of the queue."""

    __tablename__ = "turns"

    queue: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(primary_key=True)
    turn: Mapped[int]


class Identity(Base):
    """The one row with the id of this registry."""

    __tablename__ = "identity"

    id: Mapped[str] = mapped_column(primary_key=True)


TRUE, FALSE = sa.true(), sa.false()
