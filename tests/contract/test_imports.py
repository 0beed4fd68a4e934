"""What a process must not load: torch takes 1.5 s and 300 MB that a gateway or a worker has no use for."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ethogram.specs.kinds import KINDS

HEAVY = {"torch", "datasets", "transformers", "matplotlib", "pandas"}


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
    code = f"import sys, {module}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert loaded == []
