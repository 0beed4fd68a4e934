"""Limits on time, fair shares of tenants, child jobs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision: str | None = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """From 0001."""
    op.add_column("jobs", sa.Column("parent", sa.Text(), nullable=True))
    op.add_column("jobs", sa.Column("name", sa.Text(), nullable=True))
    op.add_column("jobs", sa.Column("time_limit_seconds", sa.Double(), nullable=True))
    op.add_column("jobs", sa.Column("stall_limit_seconds", sa.Double(), nullable=True))
    op.add_column("jobs", sa.Column("ran_seconds", sa.Double(), nullable=False, server_default=sa.text("0")))
    op.add_column("jobs", sa.Column("backoff_seconds", sa.Double(), nullable=True))
    op.add_column("attempts", sa.Column("seconds", sa.Double(), nullable=False, server_default=sa.text("0")))
    op.add_column("attempts", sa.Column("batch", sa.BigInteger(), nullable=False, server_default=sa.text("0")))
    op.create_index("ix_jobs_parent", "jobs", ["parent", "name"], unique=True)
    op.drop_index("ix_jobs_claim", "jobs")
    op.create_index(
        "ix_jobs_claim", "jobs", ["state", "queue", "ready", sa.literal_column("priority DESC"), "tenant", "number"]
    )
    op.create_table(
        "turns",
        sa.Column("queue", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("turn", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("queue", "tenant", name=op.f("pk_turns")),
    )


def downgrade() -> None:
    """Back to 0001."""
    op.drop_table("turns")
    op.drop_index("ix_jobs_claim", "jobs")
    op.create_index(
        "ix_jobs_claim", "jobs", ["state", "queue", "ready", sa.literal_column("priority DESC"), "number"], unique=False
    )
    op.drop_index("ix_jobs_parent", "jobs")
    for column in ("batch", "seconds"):
        op.drop_column("attempts", column)
    for column in (*("backoff_seconds", "ran_seconds", "stall_limit_seconds", "time_limit_seconds", "name", "parent"),):
        op.drop_column("jobs", column)
