"""Since when a job is ready; the key of a job without a search; who uses a checkpoint without a search."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from services.jobs.migrations.versions.v0001_first_tables import TEXT, columns

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """From 0003."""
    op.add_column("jobs", sa.Column("ready_at", sa.DateTime(timezone=True), nullable=True))
    op.execute("UPDATE jobs SET ready_at = created_at WHERE ready")
    op.create_index("ix_jobs_checkpoint", "jobs", ["checkpoint_artifact"])
    made = op.create_table(
        "submission_jobs",
        *columns(TEXT, "job", "tenant", "key"),
        sa.PrimaryKeyConstraint("job", name=op.f("pk_submission_jobs")),
    )
    op.create_index("ix_submission_jobs_key", "submission_jobs", ["tenant", "key"])
    known = sa.table("submissions", sa.column("tenant"), sa.column("key"), sa.column("jobs", sa.JSON()))
    there: set[str] = set(op.get_bind().scalars(sa.select(sa.column("id")).select_from(sa.table("jobs"))))
    rows = [
        {"job": job, "tenant": tenant, "key": key}
        for tenant, key, jobs in op.get_bind().execute(sa.select(known.c.tenant, known.c.key, known.c.jobs))
        for job in jobs.values()
        if job in there
    ]
    op.bulk_insert(made, rows)


def downgrade() -> None:
    """Back to 0003."""
    op.drop_table("submission_jobs")
    op.drop_index("ix_jobs_checkpoint", "jobs")
    op.drop_column("jobs", "ready_at")
