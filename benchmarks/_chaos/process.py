"""``python -m benchmarks._chaos.process NAME``: a process of the platform with the arena's fault points.

NAME is its name in the arena: ``gateway-0``, ``worker-1``, ``reconciler``.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks._chaos import points
from ethogram.specs.kinds import KINDS
from services.jobs.registry import JobRegistry


def main() -> None:
    folder, name = Path(os.environ[points.VARIABLE]), sys.argv.pop(1)
    role = name.partition("-")[0]
    points.step_clock(folder, name)
    points.fail_database(folder, role)
    if role == "gateway":
        import gateway.__main__
        from gateway.services import Services

        points.fill_store(folder, "gateway: store full")
        points.die_at(folder, Services, "announce", before="submission committed, bell not rung")
        gateway.__main__.main()
    elif role == "worker":
        from kombu.transport.redis import QoS

        import workers.app

        points.die_at(folder, QoS, "append", before="bell popped, not recorded")
        points.die_at(folder, JobRegistry, "claim_next", after="claimed")
        points.die_at(folder, JobRegistry, "commit_checkpoint", before="checkpoint uploaded, not committed")
        terminal = {"before": "before the terminal commit", "after": "after the terminal commit"}
        points.die_at(folder, JobRegistry, "succeed", **terminal)
        workers.app.main({name: replace(KINDS[name], job=f"benchmarks._chaos.jobs:{name}") for name in KINDS})
    else:
        import workers.reconciler

        points.die_at(folder, JobRegistry, "release", after="loss recorded, not told")
        workers.reconciler.main()


if __name__ == "__main__":
    main()
