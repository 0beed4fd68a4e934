"""What benchmarks share: command lines, child processes, progress, and figures that are kept between runs."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar

from ethogram.bench import Figure, form, versions

if TYPE_CHECKING:
    from services.runtime.run import Run

T = TypeVar("T")
Figures = dict[str, Figure]
Part = Callable[[argparse.Namespace], Figures]
Bars = Mapping[str, tuple[str, str | None, float | None]]
"""For each figure the number it is of, and its bar. Without a bar ``>=`` says that more is better, ``<=`` that less is;
None that neither is."""
Ask = Callable[..., dict[str, Any]]
"""Calls a function of others' process by name, and returns its result."""
REPOSITORY = Path(__file__).parents[1]
TIMES = ("minutes", "seconds")
"""Figures that are never kept: a time belongs to the run that took it."""
_STARTED = time.monotonic()


def say(text: str) -> None:
    """Print progress on standard error."""
    print(f"{time.monotonic() - _STARTED:6.0f} s  {text}", file=sys.stderr, flush=True)


def parser(doc: str | None, parts: Collection[str] = ()) -> argparse.ArgumentParser:
    """A benchmark's command line, with ``--part`` where it has several."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{Path(sys.argv[0]).stem}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if parts:
        parser.add_argument("--part", choices=["all", *parts], default="all")
    return parser


def run(bench: str, arguments: argparse.Namespace, parts: Mapping[str, Part]) -> NoReturn:
    """Measure the requested parts, print the form as the last line, and exit."""
    figures: Figures = {}
    for name, part in parts.items():
        if arguments.part in ("all", name):
            figures |= part(arguments)
    finish(bench, figures)


def finish(bench: str, figures: Figures) -> NoReturn:
    """Print the form and exit, with 1 where a bar is missed."""
    result = form(bench, figures)
    print(json.dumps(result))
    sys.exit(0 if result["ok"] else 1)


def call(module: str, *arguments: object, env: Mapping[str, str] | None = None) -> str:
    """The output of a module of the benchmarks, run as a process with ``env`` beside this process's environment.
    Raises :class:`subprocess.CalledProcessError` where it fails."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | dict(env or {}))
    return done.stdout


def in_child(function: Callable[..., T], *arguments: Any) -> T:
    """What a function of a module returns in a new process, e.g. to measure its memory."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def trained(
    folder: Path, train: Callable[[Run], T], evaluate: Callable[[T, Run], dict[str, float]]
) -> dict[str, float]:
    """Train in a run in ``folder``, which resumes there. Returns the figures of ``evaluate``, and the ``minutes`` of
    training unless it resumed: then they are not known."""
    from services.runtime.console import ConsoleRun

    with ConsoleRun(folder, checkpoint_seconds=30) as run:
        resumed, started = run.resume is not None, time.monotonic()
        model = train(run)
        minutes = {} if resumed else {"minutes": (time.monotonic() - started) / 60}
        return evaluate(model, run) | minutes


class Measured(NamedTuple):
    """Numbers by name."""

    numbers: dict[str, float]
    kept: bool
    """Whether an earlier run measured them; then there are no times."""

    def figure(self, name: str, op: str | None = None, bar: float | None = None) -> Figure:
        """One of them as a figure; a time that this run has not taken is null and not judged."""
        if name in TIMES and name not in self.numbers:
            return Figure(None)
        return Figure(self.numbers.get(name), op, bar, kept=self.kept)


def over_seeds(rows: Sequence[Measured], bars: Bars) -> Figures:
    """The mean over the seeds, which is judged, and beside it the worst of them, where there is a better and a worse.
    A figure that a seed lacks passes no bar, but a time that this run has not taken is not judged."""
    figures: Figures = {}
    kept = any(row.kept for row in rows)
    for name, (key, op, bar) in bars.items():
        values = [row.numbers[key] for row in rows if key in row.numbers]
        if len(values) < len(rows):
            figures[name] = Figure(None) if key in TIMES else Figure(None, op, bar)
        else:
            figures[name] = Figure(sum(values) / len(values), op, bar, kept=kept)
        if op is not None:
            worst = _worst(values, op, bar) if len(values) == len(rows) else None
            figures[f"{name}.worst"] = Figure(worst, kept=kept and worst is not None)
    return figures


def _worst(values: Sequence[float], op: str, bar: float | None) -> float:
    if op == "==":
        assert bar is not None, "what a figure must be equal to is its bar"
        return max(values, key=lambda value: abs(value - bar))
    return min(values) if op == ">=" else max(values)


def installed(folder: Path, packages: Sequence[str]) -> Path:
    """``folder`` with others' ``packages``, installed if they are not there. All else, e.g. torch, is what is here."""
    folder = folder.absolute()
    stamp = folder / "ready"
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != "\n".join(packages):
        say(f"installing {', '.join(packages)}")
        shutil.rmtree(folder, ignore_errors=True)
        pip("install", "--target", folder, *packages)
        stamp.write_text("\n".join(packages), encoding="utf-8")
    return folder


def pip(command: str, *arguments: object) -> None:
    """Run a command of pip, without what packages depend on."""
    options = ["--quiet", "--disable-pip-version-check", "--no-deps"]
    line = [sys.executable, "-m", "pip", command, *options, *map(str, arguments)]
    subprocess.run(line, check=True, stdout=sys.stderr)


@contextmanager
def peer(file: Path, packages: Path, env: Mapping[str, str] | None = None) -> Iterator[Ask]:
    """A process of others' code, with ``packages``: calls a function of ``file`` by name and returns its result."""
    hidden = {"PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1"} | dict(env or {})
    # -P: this folder has a platform.py.
    command, pipe = [sys.executable, "-P", str(file)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=os.environ | hidden) as process:
        requests, answers = process.stdin, process.stdout
        assert requests is not None and answers is not None

        def ask(function: str, **arguments: Any) -> dict[str, Any]:
            print(json.dumps([function, arguments]), file=requests, flush=True)
            answer = answers.readline()
            if not answer:
                raise RuntimeError(f"the others' process ended with {process.wait()}")
            found: dict[str, Any] = json.loads(answer)
            return found

        yield ask


class Cache:
    """What a benchmark keeps below ``runs/bench-NAME``. Each result has a folder, named by the hash of the request and
    of everything that the result depends on."""

    afresh = False
    """Measure again what was measured before."""

    def __init__(self, bench: str) -> None:
        self.root = Path("runs", f"bench-{bench}")

    def folder(self, name: str, request: object, sources: Collection[str], *, own: bool = True) -> Path:
        """Folder of the result of ``request`` (JSON with specs). It depends on the product's ``sources`` (files and
        folders), on the benchmark's ``own`` files, and on versions, threads and the machine."""
        key = json.dumps(
            [request, _code(sources, own=own), _setting()],
            sort_keys=True,
            default=lambda spec: spec.model_dump(mode="json"),
        )
        return self.root / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"

    def measured(
        self, name: str, request: object, sources: Collection[str], measure: Callable[[Path], dict[str, float]]
    ) -> Measured:
        """What ``measure`` returns, called with that folder; or all of it but times, from an earlier run."""
        folder = self.folder(name, request, sources)
        file = folder / "figures.json"
        if self.afresh:
            shutil.rmtree(folder, ignore_errors=True)
        if file.exists():
            say(f"{name}: kept from {folder}; --afresh measures again")
            return Measured(json.loads(file.read_text(encoding="utf-8")), kept=True)
        folder.mkdir(parents=True, exist_ok=True)
        numbers = measure(folder)
        file.write_text(
            json.dumps({key: value for key, value in numbers.items() if key not in TIMES}, indent=2), encoding="utf-8"
        )
        return Measured(numbers, kept=False)


def _code(sources: Collection[str], *, own: bool) -> str:
    """Hash of the code that figures depend on: ``sources``, and the benchmark's ``own``: every loaded module of the
    benchmarks."""
    modules = (module for name, module in sys.modules.items() if name == "__main__" or name.startswith("benchmarks"))
    files = {Path(file) for module in modules if own and (file := getattr(module, "__file__", None))}
    for source in (REPOSITORY / source for source in sources):
        source.stat()
        files |= {source} if source.is_file() else set(source.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(file.absolute() for file in files))).hexdigest()


def _setting() -> list[object]:
    """What figures are taken with: versions, threads, and the machine."""
    import torch

    cpu = Path("/proc/cpuinfo")
    models = (
        {line for line in cpu.read_text(encoding="utf-8").splitlines() if line.startswith("model name")}
        if cpu.exists()
        else set()
    )
    return [versions(), torch.get_num_threads(), len(os.sched_getaffinity(0)), sorted(models)]
