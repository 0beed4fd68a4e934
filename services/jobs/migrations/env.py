"""Run by Alembic, inside the transaction of ``services.jobs.database``: all migrations are applied, or none."""

from __future__ import annotations

import logging

from alembic import context

from services.jobs.tables import Base

logging.getLogger("alembic.runtime.migration").setLevel(logging.WARNING)
context.configure(connection=context.config.attributes["connection"], target_metadata=Base.metadata)
context.run_migrations()
