"""Limits on time, fair shares of tenants, child jobs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from services.jobs.migrations.versions.v0001_first_tables import CLAIM, FLOAT, INTEGER, TEXT, columns

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """From 0001."""
    zero = sa.text("0")
    for column in (
        *columns(TEXT, "parent", "name", nullable=True),
        *columns(FLOAT, "time_limit_seconds", "stall_limit_seconds", "backoff_seconds", nullable=True),
        sa.Column("ran_seconds", FLOAT, nullable=False, server_default=zero),
    ):
        op.add_column("jobs", column)
    op.add_column("attempts", sa.Column("seconds", FLOAT, nullable=False, server_default=zero))
    op.add_column("attempts", sa.Column("batch", INTEGER, nullable=False, server_default=zero))
    op.create_index("ix_jobs_parent", "jobs", ["parent", "name"], unique=True)
    op.drop_index("ix_jobs_claim", "jobs")
    op.create_index("ix_jobs_claim", "jobs", [*CLAIM[:-1], "tenant", "number"])
    op.create_table(
        "turns",
        *columns(TEXT, "queue", "tenant"),
        *columns(INTEGER, "turn"),
        sa.PrimaryKeyConstraint("queue", "tenant", name=op.f("pk_turns")),
    )


def downgrade() -> None:
    """Back to 0001."""
    op.drop_table("turns")
    op.drop_index("ix_jobs_claim", "jobs")
    op.create_index("ix_jobs_claim", "jobs", CLAIM)
    op.drop_index("ix_jobs_parent", "jobs")
    for column in ("batch", "seconds"):
        op.drop_column("attempts", column)
    for column in (*("backoff_seconds", "ran_seconds", "stall_limit_seconds", "time_limit_seconds", "name", "parent"),):
        op.drop_column("jobs", column)
