"""Checks of what the platform needs on this machine, and what to do about what is missing."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import NamedTuple

from ethogram.errors import EthogramError
from ethogram.platform import redis
from ethogram.platform.defaults import HOST, PORT
from ethogram.platform.state import StateDir

_SERVER_PACKAGES = ("fastapi", "uvicorn", "celery", "redis", "sqlalchemy", "alembic", "fsspec", "datasets")
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
    return [
        _python(),
        _server(),
        _torch(),
        _redis(),
        _state(state),
        _disk(state),
        _memory(),
        _port(state),
        _gpu(),
    ]


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    return Finding("python", sys.version_info[:2] == (3, 11), found, "run Ethogram with Python 3.11")


def _server() -> Finding:
    missing = [name for name in _SERVER_PACKAGES if find_spec(name) is None]
    if find_spec("gateway") is None:
        return Finding("server", False, "not installed", "run `make up` in a clone of the repository")
    if missing:
        advice = "run `make up`, or pip install -c constraints.txt -e '.[server]'"
        return Finding("server", False, f"without {', '.join(missing)}", advice)
    return Finding("server", True, "installed")


def _torch() -> Finding:
    try:
        return Finding("torch", True, version("torch"))
    except PackageNotFoundError:
        return Finding("torch", False, "not installed", "pip install -c constraints.txt -e '.[server]'")


def _redis() -> Finding:
    url = os.environ.get("REDIS_URL")
    try:
        if url:
            redis.ping(url)
            return Finding("redis", True, "the server that REDIS_URL names answers")
        binary = redis.find_server()
        return Finding("redis", True, f"{binary} {redis.server_version(binary)}")
    except EthogramError as error:
        return Finding("redis", False, "none", error.message)


def _state(state: StateDir) -> Finding:
    running = state.read_record()
    if running is not None:
        return Finding("state", True, f"{state.root}, a platform runs: process {running['pid']}, {running['url']}")
    folder = next(folder for folder in (state.root, *state.root.parents) if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return Finding("state", False, f"{folder} cannot be written", "name another folder with --state")
    return Finding("state", True, f"{state.root}, no platform runs")


def _disk(state: StateDir) -> Finding:
    folder = next(folder for folder in (state.root, *state.root.parents) if folder.exists())
    free = shutil.disk_usage(folder).free
    return Finding("disk", free >= _WANTED_DISK, f"{free / 2**30:.1f} GiB free", "free 2 GiB, or name another --state")


def _memory() -> Finding:
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Finding("memory", size >= _WANTED_MEMORY, f"{size / 2**30:.1f} GiB", "the demo needs 4 GiB")


def _port(state: StateDir) -> Finding:
    running = state.read_record()
    if running is not None and str(running["url"]).endswith(f":{PORT}"):
        return Finding("port", True, f"{PORT} is this platform's")
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, PORT))
        except OSError as error:
            advice = "start with `ethogram up --port 0` (any free port), or name one"
            return Finding("port", False, f"{PORT}: {error.strerror}", advice)
    return Finding("port", True, f"{PORT} is free")


def _gpu() -> Finding:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Finding("gpu", True, "none; jobs run on the CPU")
    try:
        told = subprocess.run(
            [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return Finding("gpu", False, "nvidia-smi does not answer", "look at the driver with nvidia-smi")
    names = "; ".join(told.stdout.split("\n")).strip("; ")
    if told.returncode != 0 or not names:
        return Finding("gpu", True, "none; jobs run on the CPU")
    try:
        has_cuda = "+cpu" not in version("torch")
    except PackageNotFoundError:
        has_cuda = True
    return Finding("gpu", has_cuda, names, "this torch is built for the CPU alone: install the CUDA build of torch")
