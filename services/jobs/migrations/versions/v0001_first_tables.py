"""The first tables."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision: str | None = None

SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TEXT, INTEGER, BOOLEAN, TIME = sa.Text(), sa.BigInteger(), sa.Boolean(), sa.DateTime(timezone=True)
FLOAT: sa.Double[float] = sa.Double()
JSON = sa.JSON(none_as_null=True)
CLAIM: tuple[Any, ...] = ("state", "queue", "ready", sa.literal_column("priority DESC"), "number")


def columns(type_: Any, *names: str, nullable: bool = False) -> list[sa.Column[Any]]:
    """Columns of one type."""
    return [sa.Column(name, type_, nullable=nullable) for name in names]


def upgrade() -> None:
    """From an empty database."""
    op.create_table(
        "jobs",
        *columns(SERIAL, "number"),
        *columns(TEXT, "id", "tenant", "kind", "queue", "state"),
        *columns(JSON, "spec", "labels"),
        *columns(INTEGER, "priority", "waiting", "attempts", "claims", "max_attempts", "seq"),
        *columns(BOOLEAN, "ready", "cancel_requested"),
        *columns(TIME, "created_at"),
        *columns(TIME, "not_before", "started_at", "finished_at", nullable=True),
        *columns(TEXT, "attempt", "checkpoint_artifact", "trace", nullable=True),
        *columns(INTEGER, "checkpoint_step", nullable=True),
        *columns(JSON, "progress", "result", "error", nullable=True),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_jobs")),
        sa.UniqueConstraint("attempt", name=op.f("uq_jobs_attempt")),
        sa.UniqueConstraint("id", name=op.f("uq_jobs_id")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_jobs_claim", "jobs", CLAIM)
    op.create_index("ix_jobs_due", "jobs", ["state", "queue", "ready", "waiting", "not_before"])
    op.create_index("ix_jobs_tenant", "jobs", ["tenant", "number"])
    op.create_index("ix_jobs_tenant_kind", "jobs", ["tenant", "kind", "number"])
    op.create_index("ix_jobs_tenant_state", "jobs", ["tenant", "state", "number"])
    op.create_table(
        "submissions",
        *columns(TEXT, "tenant", "key", "body_hash"),
        *columns(JSON, "jobs"),
        *columns(TIME, "created_at"),
        sa.PrimaryKeyConstraint("tenant", "key", name=op.f("pk_submissions")),
    )
    op.create_table(
        "artifacts",
        *columns(SERIAL, "number"),
        *columns(TEXT, "id", "name", "type", "tenant"),
        *columns(TEXT, "job", "attempt", nullable=True),
        *columns(INTEGER, "size"),
        *columns(BOOLEAN, "superseded"),
        *columns(TIME, "created_at"),
        sa.ForeignKeyConstraint(["job"], ["jobs.id"], name=op.f("fk_artifacts_job")),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_artifacts")),
        sa.UniqueConstraint("id", name=op.f("uq_artifacts_id")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_artifacts_job", "artifacts", ["job", "name"])
    op.create_index("ix_artifacts_tenant", "artifacts", ["tenant", "number"])
    op.create_index("ix_artifacts_tenant_type", "artifacts", ["tenant", "type", "number"])
    op.create_table(
        "attempts",
        *columns(TEXT, "id", "job", "worker"),
        *columns(INTEGER, "number", "heartbeat"),
        *columns(FLOAT, "lease_seconds"),
        *columns(TIME, "started_at"),
        *columns(TIME, "ended_at", nullable=True),
        *columns(TEXT, "outcome", "message", nullable=True),
        sa.ForeignKeyConstraint(["job"], ["jobs.id"], name=op.f("fk_attempts_job")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_attempts")),
        sa.UniqueConstraint("job", "number", name=op.f("uq_attempts_job")),
    )
    op.create_table(
        "events",
        *columns(TEXT, "job", "type"),
        *columns(INTEGER, "seq"),
        *columns(TEXT, "attempt", nullable=True),
        *columns(JSON, "data"),
        *columns(TIME, "time"),
        sa.ForeignKeyConstraint(["job"], ["jobs.id"], name=op.f("fk_events_job")),
        sa.PrimaryKeyConstraint("job", "seq", name=op.f("pk_events")),
    )
    op.create_table(
        "inputs",
        *columns(TEXT, "job", "path"),
        *columns(TEXT, "needs", "name", "artifact", nullable=True),
        sa.ForeignKeyConstraint(["job"], ["jobs.id"], name=op.f("fk_inputs_job")),
        sa.ForeignKeyConstraint(["needs"], ["jobs.id"], name=op.f("fk_inputs_needs")),
        sa.PrimaryKeyConstraint("job", "path", name=op.f("pk_inputs")),
    )
    op.create_index(op.f("ix_inputs_artifact"), "inputs", ["artifact"])
    op.create_index(op.f("ix_inputs_needs"), "inputs", ["needs"])


def downgrade() -> None:
    """Back to an empty database."""
    for table in ("inputs", "events", "attempts", "artifacts", "submissions", "jobs"):
        op.drop_table(table)
