"""What a process must not load: torch takes 1.5 s and 300 MB that a gateway or a worker has no use for."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ethogram.specs.kinds import KINDS

HEAVY = {"torch", "datasets", "transformers", "matplotlib", "pandas"}
_LIGHT: set[str] = set()


@pytest.mark.parametrize(
    "module",
    [
        "gateway.app",
        "workers.app",
        "workers.reconciler",
        "workers.child",
        "services.kinds",
        "services.jobs.registry",
        "services.artifacts.store",
        "ethogram.client",
        "ethogram.inference",
        "ethogram.cli.main",
        "ethogram.platform.stack",
        *sorted({kind.spec.__module__ for kind in KINDS.values()}),
    ],
)
def test_light_processes_stay_light(module: str) -> None:
    # What loads with another module, and nothing heavy beside them, loads nothing heavy alone.
    if module not in _LIGHT:
        code = f"import sys, {module}; print(*sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        loaded = set(done.stdout.split())
        assert loaded & HEAVY == set() and module in loaded
        _LIGHT.update(loaded)
