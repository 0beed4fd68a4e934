"""``python -m gateway``, with the arena's points. Its first argument is the process' name in the arena."""

from __future__ import annotations

import sys

from benchmarks._chaos import points
from gateway.__main__ import main
from gateway.services import Services

if __name__ == "__main__":
    folder = points.folder_of_faults()
    points.stepped_clock(folder, sys.argv.pop(1))
    points.failing_database(folder, "gateway")
    points.full_store(folder, "gateway: store full")
    Services.announce = points.before(  # type: ignore[method-assign]
        folder, "submission committed, bell not rung", Services.announce
    )
    main()
