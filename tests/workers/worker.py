"""``python -m workers``, but that the kind ``generation`` is run by the test system that the first argument names."""

from __future__ import annotations

import sys
from dataclasses import replace

from services.kinds import KINDS
from workers.app import main

if __name__ == "__main__":
    system = sys.argv.pop(1)
    main({"generation": replace(KINDS["generation"], servicer=f"tests.workers.systems:{system}")})
