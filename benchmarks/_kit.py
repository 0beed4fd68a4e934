"""What benchmarks share: their commands, children, progress, and figures that are kept from one run to the next."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ethogram.bench import Figure, form, versions

Figures = dict[str, Figure]
Part = Callable[[argparse.Namespace], Figures]
REPOSITORY = Path(__file__).parents[1]
TIMES = ("minutes", "seconds")
"""Figures that are never kept: a time is of the run that took it."""
_BEGAN = time.monotonic()


def say(text: str) -> None:
    """Progress, for people."""
    sys.stderr.write(f"{time.monotonic() - _BEGAN:6.0f} s  {text}\n")
    sys.stderr.flush()


def parser(doc: str | None, parts: Collection[str] = ()) -> argparse.ArgumentParser:
    """A benchmark's command line, with ``--part`` where it has several."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{Path(sys.argv[0]).stem}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if parts:
        made.add_argument("--part", choices=["all", *parts], default="all")
    return made


def run(bench: str, given: argparse.Namespace, parts: Mapping[str, Part]) -> NoReturn:
    """Measure the parts that are asked for, print the form as the last line, and leave."""
    figures: Figures = {}
    for name, part in parts.items():
        if given.part in ("all", name):
            figures |= part(given)
    finish(bench, figures)


def finish(bench: str, figures: Figures) -> NoReturn:
    """Print the form and leave, with 1 where a bar is missed."""
    whole = form(bench, figures)
    print(json.dumps(whole))
    sys.exit(0 if whole["ok"] else 1)


def start(module: str, *arguments: object, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """A process of a module of the benchmarks, whose output can be read."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | dict(env or {}))


def call(module: str, *arguments: object, env: Mapping[str, str] | None = None) -> str:
    """The output of such a process. Raises :class:`subprocess.CalledProcessError` where it fails."""
    with start(module, *arguments, env=env) as process:
        output, _ = process.communicate()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return output


class Measured(NamedTuple):
    """Numbers by name."""

    numbers: dict[str, float]
    kept: bool
    """Whether an earlier run measured them; there are no times then."""

    def figure(self, name: str, op: str | None = None, bar: float | None = None, **more: Any) -> Figure:
        """One of them as a figure; a time that this run has not taken is null and not judged."""
        if name in TIMES and name not in self.numbers:
            return Figure(None)
        return Figure(self.numbers.get(name), op, bar, kept=self.kept, **more)


class Cache:
    """What a benchmark keeps below ``runs/bench-NAME``: each thing in a folder of its own, whose name is the hash of
    what was asked for and of all that the answer follows from."""

    def __init__(self, bench: str) -> None:
        self.root = Path("runs", f"bench-{bench}")

    def folder(self, name: str, asked: object, sources: Collection[str]) -> Path:
        """Where the answer to ``asked`` is kept. It follows from the product's ``sources`` (files and folders), from
        the benchmark's own files, and from versions, threads and the machine."""
        key = json.dumps([asked, _code(sources), _setting()], sort_keys=True, default=_plain)
        return self.root / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"

    def measured(
        self,
        name: str,
        asked: object,
        sources: Collection[str],
        measure: Callable[[Path], dict[str, float]],
        *,
        afresh: bool = False,
    ) -> Measured:
        """What ``measure`` gives, in that folder, or all of it but times from an earlier run."""
        folder = self.folder(name, asked, sources)
        file = folder / "figures.json"
        if afresh:
            shutil.rmtree(folder, ignore_errors=True)
        if file.exists():
            say(f"{name}: kept from {folder}; --afresh measures again")
            return Measured(json.loads(file.read_text()), kept=True)
        folder.mkdir(parents=True, exist_ok=True)
        found = measure(folder)
        file.write_text(json.dumps({key: value for key, value in found.items() if key not in TIMES}, indent=2))
        return Measured(found, kept=False)


def _plain(value: Any) -> Any:
    """A spec as JSON."""
    return value.model_dump(mode="json")


def _code(sources: Collection[str]) -> str:
    """Hash of the code that figures follow from: ``sources``, and every module of the benchmarks that is loaded."""
    files = {Path(module.__file__) for module in _own_modules() if module.__file__}
    for source in (REPOSITORY / source for source in sources):
        source.stat()
        files |= {source} if source.is_file() else set(source.rglob("*.py"))
    digest = hashlib.sha256()
    for file in sorted(file.absolute() for file in files):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _own_modules() -> Iterator[Any]:
    for name, module in sorted(sys.modules.items()):
        if name == "__main__" or name.startswith("benchmarks"):
            yield module


def _setting() -> list[object]:
    """What figures are taken with: versions, threads, and the machine."""
    import torch

    cpu = Path("/proc/cpuinfo")
    models = {line for line in cpu.read_text().splitlines() if line.startswith("model name")} if cpu.exists() else set()
    return [versions(), torch.get_num_threads(), len(os.sched_getaffinity(0)), sorted(models)]
