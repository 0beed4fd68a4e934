"""The client on every supported Python that is installed here, with the newest and with the lowest libraries.

A wheel is built and installed into an empty environment, without the server side, and talks to a real platform.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ethogram.platform.stack import Platform

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ("3.11", "3.12", "3.13")
SMOKE = """
import pkgutil, sys
from importlib import import_module
import ethogram
from ethogram.client import Client
from ethogram.specs.kinds import KINDS

server = ("ethogram.platform", "ethogram.demo", "ethogram.bench")
for module in pkgutil.walk_packages(ethogram.__path__, "ethogram."):
    if not module.name.startswith(server) and "__main__" not in module.name:
        import_module(module.name)
with Client(sys.argv[1]) as client:
    job = client.submit("generation", {"subjects": 3, "seed": 7}, queue="nobody")
    assert client.job(job.id).state == "QUEUED"
    assert client.cancel(job.id).state == "CANCELLED"
print(" ".join(KINDS))
"""


def run(*command: str | Path, environment: dict[str, str] | None = None) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def interpreters() -> dict[str, str]:
    """The Pythons of :data:`PYTHONS` that are installed, by version."""
    found = {}
    for version in PYTHONS:
        candidates = [shutil.which(f"python{version}"), sys.executable]
        candidates += map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
        for candidate in filter(None, candidates):
            asked = [candidate, "-c", "import sys, ensurepip; print('%d.%d' % sys.version_info[:2])"]
            done = subprocess.run(asked, capture_output=True, text=True)
            if done.stdout.strip() == version:
                found[version] = candidate
                break
    return found


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is published."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT)
    (built,) = folder.glob("*.whl")
    return built


def lowest_versions() -> list[str]:
    """The dependencies of the client, each at the lowest version that pyproject.toml allows."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert all(re.fullmatch(r"[\w.-]+>=[\w.]+", requirement) for requirement in declared)
    return [requirement.replace(">=", "==") for requirement in declared]


@pytest.mark.parametrize("libraries", ["newest", "lowest"])
@pytest.mark.parametrize("version", PYTHONS)
def test_the_client_works_alone(version: str, libraries: str, wheel: Path, platform: Platform, tmp_path: Path) -> None:
    python = interpreters().get(version)
    if python is None:
        pytest.skip(f"Python {version} is not installed here")
    run(python, "-m", "venv", tmp_path / "venv")
    binaries = tmp_path / "venv" / "bin"
    pins = lowest_versions() if libraries == "lowest" else []
    run(binaries / "python", "-m", "pip", "install", "--quiet", wheel, *pins)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("ETHOGRAM_", "PYTHON"))}
    assert "generation" in run(binaries / "python", "-c", SMOKE, platform.url, environment=clean)
    assert "training.steps" in run(binaries / "ethogram", "kinds", "crossmodal", environment=clean)
    assert "--help" in run(binaries / "ethogram", "--help", environment=clean)
    outside = run(binaries / "python", "-m", "pip", "list", "--format=freeze")
    assert "torch" not in outside and "fastapi" not in outside
