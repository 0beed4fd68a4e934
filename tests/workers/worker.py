"""``python -m workers``, but that jobs of kind ``generation`` are run by the function of :mod:`tests.workers.science`
that the first argument names, or by ``module:function``."""

from __future__ import annotations

import sys
from dataclasses import replace

from ethogram.specs.kinds import KINDS
from workers.app import main

if __name__ == "__main__":
    job = sys.argv.pop(1)
    kind = replace(KINDS["generation"], job=job if ":" in job else f"tests.workers.science:{job}")
    if job == "unknown":
        # A kind that the job's process has not heard of.
        kind = replace(kind, name=job)
    main({"generation": kind})
