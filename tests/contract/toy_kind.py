"""A kind of a new system: the files that are written by hand for it, all others being generated."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What a new kind could touch, were it not for the table.
COPIED = ("ethogram", "services", "workers", "gateway", "protos", "scripts", "docs", "pyproject.toml", "Makefile")

SPEC = '''"""Spec of a toy job: add up numbers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ethogram.specs.base import ArtifactRef, Seed, Spec


class ToyPartSpec(Spec):
    """One summand."""

    value: float = Field(0.0, ge=-100, le=100)
    """The number."""
    label: str | None = None
    """Its name."""


class ToySpec(Spec):
    """Add up numbers."""

    seed: Seed = 0
    """Everything random flows from it."""
    mode: Literal["sum", "mean"] = "sum"
    """``sum``: of all; ``mean``: divided by their number."""
    parts: list[ToyPartSpec] = []
    """The numbers."""
    zoo: ArtifactRef | None = None
    """Not used."""
'''

JOB = '''"""The toy job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ethogram.specs.toy import ToySpec
from services.runtime.run import Run


def run(spec: ToySpec, run: Run) -> dict[str, Any]:
    """Artifact: ``total``, of type ``number``."""
    run.stage("add", len(spec.parts), "numbers")
    total = 0.0
    for done, part in enumerate(spec.parts, 1):
        total += part.value
        run.advance(done)
    total /= len(spec.parts) if spec.mode == "mean" else 1
    folder = Path("total")
    folder.mkdir()
    (folder / "total.txt").write_text(repr(total))
    run.artifact("total", "number", folder)
    return {"total": total}
'''

SERVICE = """// Adds up numbers.
syntax = "proto3";

package ethogram.v1;

import "ethogram/v1/common.proto";
import "ethogram/v1/jobs.proto";

// Runs toy jobs.
service ToyService {
  // Adds up numbers and streams its progress.
  rpc Run(RunToyRequest) returns (stream JobEvent);
}

// One run.
message RunToyRequest {
  // What the job is given.
  RunContext context = 1;
  // What to do.
  ToySpec spec = 2;
}
"""

ENTRY = """        Kind(
            name="toy",
            summary="add up numbers",
            spec=ToySpec,
            job="services.toy.job:run",
            rpc="/ethogram.v1.ToyService/Run",
            inputs={"zoo": "zoo"},
            outputs={"total": "number"},
            example={"mode": "mean", "parts": [{"value": 1.0}, {"value": 2.0}]},
        ),
"""


def _with_entry(table: str) -> str:
    last_import = "from ethogram.specs.generation import GenerationSpec\n"
    assert last_import in table and table.endswith("    )\n}\n")
    return table.replace(last_import, last_import + "from ethogram.specs.toy import ToySpec\n").replace(
        "    )\n}\n", f"{ENTRY}    )\n}}\n"
    )


BY_HAND: dict[str, Callable[[str], str]] = {
    "ethogram/specs/toy.py": lambda _: SPEC,
    "ethogram/specs/kinds.py": _with_entry,
    "services/toy/job.py": lambda _: JOB,
    "protos/ethogram/v1/toy.proto": lambda _: SERVICE,
}
"""What becomes of the text of each file; nothing else is written by hand."""


def files_by_hand() -> list[str]:
    """The files that a kind of a new system touches by hand."""
    return list(BY_HAND)


def add_toy_kind(root: Path) -> None:
    """Copy the repository to ``root``, write the files by hand, and generate the others."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, root / name)
    for name, edit in BY_HAND.items():
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(edit(path.read_text() if path.exists() else ""))
    subprocess.run([sys.executable, "-m", "scripts.protos"], cwd=root, check=True, capture_output=True)
