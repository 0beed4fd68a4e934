"""What may be deleted: jobs that have ended, artifacts that nothing needs."""

from __future__ import annotations

from services.jobs.attempts import Attempts


class Retention(Attempts):
    """The registry's side of deletion."""
