"""A kind of a new system takes a spec module, an entry, a job module and a proto service; all else is generated."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.contract.toy_kind import add_toy_kind, files_by_hand


def test_a_new_kind_touches_four_files_by_hand_and_runs(tmp_path: Path) -> None:
    assert len(files_by_hand()) <= 4
    root = tmp_path / "copy"
    root.mkdir()
    add_toy_kind(root)
    ran = subprocess.run(
        [sys.executable, Path(__file__).with_name("toy_run.py"), tmp_path / "run"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert "parts.N.value" in ran.stdout
    assert "| `toy` | add up numbers | `services.toy.job` |" in (root / "docs" / "architecture.md").read_text()
    assert (root / "services" / "toy" / "__init__.py").read_text() == ""
    buf = Path(sys.executable).with_name("buf")
    for check in (["lint"], ["breaking", "--against", "contract.binpb"]):
        subprocess.run([buf, *check], cwd=root / "protos", check=True)


def test_the_documents_name_the_files_that_a_new_kind_touches() -> None:
    page = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text()
    assert all(f"`{name.replace('toy', 'NAME')}`" in page for name in files_by_hand())
