"""``python -m workers.reconciler`` with a clock that can be set. Its first argument is its name in the arena."""

from __future__ import annotations

import sys

from benchmarks._chaos import points
from workers.reconciler import main

if __name__ == "__main__":
    points.stepped_clock(points.folder_of_faults(), sys.argv.pop(1))
    main()
