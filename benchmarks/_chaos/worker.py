"""``python -m workers``, with the arena's jobs and points. Its one argument is the process' name in the arena."""

from __future__ import annotations

import sys
from dataclasses import replace

from kombu.transport.redis import QoS

from benchmarks._chaos import points
from ethogram.specs.kinds import KINDS
from services.jobs.registry import JobRegistry
from workers.app import main

if __name__ == "__main__":
    folder = points.folder_of_faults()
    points.stepped_clock(folder, sys.argv.pop(1))
    points.failing_database(folder, "worker")
    QoS.append = points.before(folder, "bell popped, not recorded", QoS.append)  # type: ignore[method-assign]
    Registry = JobRegistry
    Registry.claim_next = points.after(folder, "claimed", Registry.claim_next)  # type: ignore[method-assign]
    Registry.commit_checkpoint = points.before(  # type: ignore[method-assign]
        folder, "checkpoint uploaded, not committed", Registry.commit_checkpoint
    )
    Registry.succeed = points.after(  # type: ignore[method-assign]
        folder,
        "after the terminal commit",
        points.before(folder, "before the terminal commit", Registry.succeed),
    )
    main({name: replace(KINDS[name], job=f"benchmarks._chaos.systems:{name}") for name in KINDS})
