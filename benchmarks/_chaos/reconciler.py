"""``python -m workers.reconciler``, with the arena's points. Its first argument is its name in the arena."""

from __future__ import annotations

import sys

from benchmarks._chaos import points
from services.jobs.registry import JobRegistry
from workers.reconciler import main

if __name__ == "__main__":
    folder = points.folder_of_faults()
    points.stepped_clock(folder, sys.argv.pop(1))
    points.failing_database(folder, "reconciler")
    Registry = JobRegistry
    Registry.release = points.after(folder, "loss recorded, not told", Registry.release)  # type: ignore[method-assign]
    main()
