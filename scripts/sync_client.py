"""Generate ``ethogram/client.py`` from ``ethogram/aio.py``; with ``--check``, fail if what is committed differs.

The two clients differ in nothing but who waits, so one is written and the other is made of it, word by word.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from scripts.generated import write

ROOT = Path(__file__).resolve().parent.parent
SOURCE, TARGET = ROOT / "ethogram" / "aio.py", ROOT / "ethogram" / "client.py"

_PATTERNS = (
    (r", for ``asyncio``:", ":"),
    (
        r"    async with AsyncClient\(\) as client: +# (.*)\n",
        r"    client = Client()                                   # \1\n",
    ),
    (r"^        (job = )await (client.*)$", r"    \1\2"),
    (r"^        \(await (client.wait.*?)\)\.check", r"    \1.check"),
    (r"tasks of one event loop", "threads"),
    (r" Its calls block\.", ""),
    (r"^import asyncio$", "import time"),
    (r"AsyncIterator, Awaitable, ", "AsyncIterator, "),
    (r"await asyncio\.sleep", "time.sleep"),
    (r"await asyncio\.to_thread\(([\w.]+), ", r"\1("),
    (r"(?<!\w)\(await ([^()]*\((?:[^()]|\([^()]*\))*\))\)", r"\1"),
    (r"\b(?:async|await) ", ""),
    (r"\bAsyncGenerator\[(.*?)\]", r"Generator[\1, None, None]"),
    (r"\bAwaitable\[(.*?)\]", r"\1"),
    (r"\bAsync(Client|Embedding|Iterator|Generator)\b", r"\1"),
    (r"\b__a(enter|exit)__\b", r"__\1__"),
    (r"\ba(close|closing|read|iter_bytes)\b", r"\1"),
)


def generate() -> str:
    """The synchronous client's source."""
    text = SOURCE.read_text(encoding="utf-8")
    for pattern, replacement in _PATTERNS:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    text = text.replace("from __future__", "# Generated from aio.py by scripts.sync_client.\n\nfrom __future__", 1)
    for command in (["check", "--fix", "--unsafe-fixes", "--select=I,UP028"], ["format"]):
        done = subprocess.run(
            [Path(sys.executable).parent / "ruff", *command, "--quiet", f"--stdin-filename={TARGET}", "-"],
            input=text,
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        if done.returncode != 0:
            raise SystemExit(done.stderr or done.stdout)
        text = done.stdout
    return text


if __name__ == "__main__":
    write({TARGET: generate()}, "make client")
