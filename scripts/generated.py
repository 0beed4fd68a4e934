"""What the generators share: they write files, or with ``--check`` fail if what is committed differs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path


def write(texts: Mapping[Path, str | None], command: str) -> None:
    """Write each text to its file; None: remove the file.

    With ``--check``, nothing is written: raises ``SystemExit`` that names the stale files and ``command``.
    """
    stale = {
        path: text
        for path, text in texts.items()
        if (path.read_text(encoding="utf-8") if path.exists() else None) != text
    }
    if "--check" in sys.argv and stale:
        raise SystemExit(f"generated files are stale, run '{command}': {', '.join(sorted(map(str, stale)))}")
    for path, text in stale.items():
        if text is None:
            path.unlink()
        else:
            path.write_text(text, encoding="utf-8")
