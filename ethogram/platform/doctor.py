"""Checks this machine for what the platform needs, and says what to do about what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from ethogram.bench import versions
from ethogram.errors import Conflict, EthogramError
from ethogram.platform import redis
from ethogram.platform.stack import check_port
from ethogram.platform.state import PORT, StateDir

_SERVER_PACKAGES = ("fastapi", "uvicorn", "celery", "redis", "sqlalchemy", "alembic", "fsspec", "datasets")
_INSTALL = "pip install -c constraints.txt -e '.[server]'"
_WANTED_DISK = 2 * 2**30
_WANTED_MEMORY = 4 * 2**30


class Finding(NamedTuple):
    """Result of one check."""

    name: str
    ok: bool
    found: str
    advice: str = ""
    """What to do when it is not ok."""


def examine(state: StateDir) -> list[Finding]:
    """Check everything that ``ethogram up`` and its jobs need. Starts nothing and changes nothing."""
    folder = next(folder for folder in (state.root, *state.root.parents) if folder.exists())
    free = shutil.disk_usage(folder).free
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    installed = versions()
    torch = installed.get("torch")
    return [
        Finding("python", sys.version_info >= (3, 11), installed["python"], "run Ethogram with Python 3.11 or newer"),
        _server(),
        Finding("torch", torch is not None, torch or "not installed", _INSTALL),
        _redis(),
        _state(state, folder),
        Finding("disk", free >= _WANTED_DISK, f"{free / 2**30:.1f} GiB free", "free 2 GiB, or name another --state"),
        Finding("memory", memory >= _WANTED_MEMORY, f"{memory / 2**30:.1f} GiB", "the demo needs 4 GiB"),
        _port(state),
        _gpu(torch),
    ]


def _server() -> Finding:
    if find_spec("gateway") is None:
        return Finding("server", False, "not installed", "run `make up` in a clone of the repository")
    missing = [name for name in _SERVER_PACKAGES if find_spec(name) is None]
    found = f"without {', '.join(missing)}" if missing else "installed"
    return Finding("server", not missing, found, f"run `make up`, or {_INSTALL}")


def _redis() -> Finding:
    url = os.environ.get("REDIS_URL")
    try:
        if url:
            redis.check(url)
            return Finding("redis", True, "the server that REDIS_URL names answers")
        binary = redis.find_server()
        return Finding("redis", True, f"{binary} {redis.server_version(binary)}")
    except EthogramError as error:
        return Finding("redis", False, "none", error.message)


def _state(state: StateDir, folder: Path) -> Finding:
    running = state.read_record()
    if running is not None:
        return Finding("state", True, f"{state.root}, a platform runs: process {running['pid']}, {running['url']}")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return Finding("state", False, f"{folder} cannot be written", "name another folder with --state")
    return Finding("state", True, f"{state.root}, no platform runs")


def _port(state: StateDir) -> Finding:
    running = state.read_record()
    if running is not None and str(running["url"]).endswith(f":{PORT}"):
        return Finding("port", True, f"{PORT} is this platform's")
    try:
        check_port(PORT)
    except Conflict as error:
        return Finding("port", False, str(PORT), error.message)
    return Finding("port", True, f"{PORT} is free")


def _gpu(torch: str | None) -> Finding:
    tool = shutil.which("nvidia-smi")
    names = ""
    if tool is not None:
        try:
            answer = subprocess.run(
                [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"],
                capture_output=True,
                text=True,
                timeout=20,
            )
        except (OSError, subprocess.TimeoutExpired):
            return Finding("gpu", False, "nvidia-smi does not answer", "check the driver with nvidia-smi")
        names = "; ".join(answer.stdout.strip().splitlines()) if answer.returncode == 0 else ""
    if not names:
        return Finding("gpu", True, "none; jobs run on the CPU")
    advice = "this torch is built for the CPU alone: install the CUDA build of torch"
    return Finding("gpu", "+cpu" not in (torch or ""), names, advice)
