"""Size, repetition, import arrows, training loops and test time of this repository, and whether results still match.

    make bench BENCH=house                      every figure; about the time of the tests
    make bench BENCH=house ARGS="--no-tests"    without running the tests: seconds

What is counted is listed on standard error.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import grimp
import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from benchmarks import _kit
from benchmarks._kit import Figures
from ethogram.bench import Figure
from ethogram.specs.kinds import KINDS
from tests.contract.toy_kind import files_by_hand
from tests.golden import record

LINES_BEFORE = 34_996
"""Lines of Python outside tests and the protobuf code, before common parts were made common."""
GENERATED = ("ethogram/v1/", "ethogram/client.py")
EQUAL_LINES = 10
_SYSTEMS = sorted({".".join(kind.job.split(".")[:2]) for kind in KINDS.values()})
ARROWS = {
    "ethogram": ("services", "workers", "gateway", "benchmarks", "tests"),
    "services": ("workers", "gateway", "benchmarks", "tests"),
    "services.runtime": (*_SYSTEMS, "services.zoo", "services.language", "services.inference", "ethogram.cli"),
    "services.zoo": (*_SYSTEMS, "services.inference", "services.jobs"),
    "services.language": (*_SYSTEMS, "services.zoo", "services.inference", "services.jobs"),
    "services.artifacts": (*_SYSTEMS, "services.zoo", "services.language", "services.inference", "services.jobs"),
    **{system: (*({*_SYSTEMS} - {system}), "services.inference", "services.jobs") for system in _SYSTEMS},
    "gateway": ("workers", "benchmarks", "tests"),
    "workers": ("gateway", "benchmarks", "tests"),
}
"""Packages that a package never imports, not even within a function. The contracts of import-linter come on top."""


class Module(NamedTuple):
    """A module's file and its tree."""

    path: Path
    text: str
    tree: ast.Module


class Place(NamedTuple):
    """Lines of a file, both ends included."""

    path: str
    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.path}:{self.first}-{self.last}"


def modules(root: Path) -> dict[str, Module]:
    """Every module below ``root`` by its dotted name, without tests; a package is its ``__init__``."""
    sources = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        if folder.name in ("tests", "build", "dist", "runs") or folder.name.startswith("."):
            continue
        for path in sorted(folder.rglob("*.py")):
            relative = path.relative_to(root)
            name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
            text = path.read_text()
            sources[name] = Module(relative, text, ast.parse(text))
    return sources


def lines(sources: Mapping[str, Module]) -> int:
    """Lines of all modules but those of the protobuf code."""
    return sum(
        len(module.text.splitlines()) for module in sources.values() if not str(module.path).startswith(GENERATED[0])
    )


def statements(module: Module) -> list[tuple[int, str]]:
    """Line numbers and stripped lines, without imports, docstrings, comments, blank lines and field declarations."""
    left_out: set[int] = set()
    for node in ast.walk(module.tree):
        aside: list[ast.stmt] = []
        if isinstance(node, ast.ClassDef):
            aside = [field for field in node.body if isinstance(field, ast.AnnAssign)]
        elif isinstance(node, ast.Import | ast.ImportFrom | ast.Expr):
            aside = [] if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant) else [node]
        for part in aside:
            left_out.update(range(part.lineno, (part.end_lineno or part.lineno) + 1))
    numbered = ((number, line.strip()) for number, line in enumerate(module.text.splitlines(), 1))
    return [(number, line) for number, line in numbered if line and line[0] != "#" and number not in left_out]


def duplicates(sources: Mapping[str, Module], equal: int = EQUAL_LINES) -> list[tuple[Place, Place]]:
    """Pairs of places of which at least ``equal`` lines in a row are the same but for their indentation. Each pair is
    as long as it can be, and the two do not overlap."""
    texts = {
        str(module.path): statements(module)
        for module in sources.values()
        if not str(module.path).startswith(GENERATED)
    }
    windows: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    for path, kept in texts.items():
        for start in range(len(kept) - equal + 1):
            windows[tuple(line for _, line in kept[start : start + equal])].append((path, start))
    pairs = []
    for starts in windows.values():
        for (a, i), (b, j) in combinations(starts, 2):
            ours, theirs = texts[a], texts[b]
            if i and j and ours[i - 1][1] == theirs[j - 1][1] and (a != b or j - i >= equal):
                continue
            most = min(len(ours) - i, len(theirs) - j, j - i if a == b else len(ours))
            length = 0
            while length < most and ours[i + length][1] == theirs[j + length][1]:
                length += 1
            if length >= equal:
                pairs.append(
                    (
                        Place(a, ours[i][0], ours[i + length - 1][0]),
                        Place(b, theirs[j][0], theirs[j + length - 1][0]),
                    )
                )
    return sorted(pairs)


def imports(*packages: str) -> dict[str, set[str]]:
    """What modules of ``packages`` each of them imports, inside functions too, but not for type checkers alone."""
    graph = grimp.build_graph(*packages, exclude_type_checking_imports=True, cache_dir=None)
    return {module: graph.find_modules_directly_imported_by(module) for module in sorted(graph.modules)}


def cycles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import one another, directly or by way of others."""
    place = {name: i for i, name in enumerate(edges)}
    ends = [(place[name], place[target]) for name, targets in edges.items() for target in targets]
    graph = coo_array((np.ones(len(ends)), np.array(ends).reshape(-1, 2).T), shape=(len(place), len(place)))
    _, group_of = connected_components(graph, connection="strong")
    groups: dict[int, list[str]] = defaultdict(list)
    for name, i in place.items():
        groups[group_of[i]].append(name)
    return [group for group in groups.values() if len(group) > 1]


def upward(edges: Mapping[str, set[str]]) -> list[str]:
    """Imports against :data:`ARROWS`."""
    return sorted(
        f"{name} imports {target}"
        for name, targets in edges.items()
        for target in targets
        for source, never in ARROWS.items()
        if _within(name, source) and any(_within(target, package) for package in never)
    )


def _within(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


_LOOPS = (ast.While, ast.For, ast.AsyncFor, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def loops(sources: Mapping[str, Module]) -> list[Place]:
    """Training loops: those in which an optimiser or a trainer takes steps, either there or in a function of the same
    module that is called there. Only of services; population training, which is of another kind, is left out."""
    places = []
    for name, module in sources.items():
        if not name.startswith("services.") or name.startswith("services.generation."):
            continue
        functions = [node for node in ast.walk(module.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        steppers = {node.name for node in functions if _steps(node, set())}
        places += [
            Place(str(module.path), node.lineno, node.end_lineno or node.lineno)
            for node in ast.walk(module.tree)
            if isinstance(node, _LOOPS) and _steps(node, steppers)
        ]
    return places


def _steps(node: ast.AST, steppers: set[str]) -> bool:
    """Whether an optimiser's ``step``, a trainer's ``advance`` or one of ``steppers`` is called; not by inner loops."""
    for part in ast.iter_child_nodes(node):
        if isinstance(part, _LOOPS):
            continue
        if isinstance(part, ast.Call):
            owner, _, name = ast.unparse(part.func).rpartition(".")
            last = owner.rpartition(".")[2].lower()
            stepped = (name == "step" and "optim" in last) or (name == "advance" and "trainer" in last)
            if stepped or (owner in ("", "self", "cls") and name in steppers):
                return True
        if _steps(part, steppers):
            return True
    return False


def listed(title: str, rows: Sequence[object]) -> int:
    """List ``rows`` for people. Returns how many there are."""
    _kit.say(f"{title}: {len(rows)}" + "".join(f"\n    {row}" for row in rows))
    return len(rows)


def structure() -> Figures:
    """Figures that follow from the source alone, of the current folder."""
    sources = modules(Path())
    edges = imports("ethogram", "services", "workers", "gateway", "benchmarks", "scripts")
    pairs = [f"{a} = {b}" for a, b in duplicates(sources)]
    against = upward(edges) + broken_contracts()
    return {
        "lines": Figure(lines(sources), "<=", 0.95, LINES_BEFORE, judged="ratio"),
        "duplicates_10": Figure(listed("pairs of places with ten or more equal lines", pairs), "<=", 3),
        "cycles": Figure(listed("cycles", [" <-> ".join(group) for group in cycles(edges)]), "==", 0),
        "upward": Figure(listed("imports against the arrows", against), "==", 0),
        "loops": Figure(listed("training loops", loops(sources)), "==", 1),
    }


def broken_contracts() -> list[str]:
    """The contracts of import-linter that are broken."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, capture_output=True, text=True)
    broken = [line.removesuffix(" BROKEN") for line in done.stdout.splitlines() if line.endswith(" BROKEN")]
    if done.returncode and not broken:
        raise RuntimeError(f"lint-imports failed:\n{done.stdout}{done.stderr}")
    return broken


def test_seconds() -> float:
    """Seconds that ``make test`` takes; infinite where it fails."""
    began = time.monotonic()
    failed = subprocess.run(["make", "test"], stdout=sys.stderr).returncode
    return float("inf") if failed else time.monotonic() - began


def main() -> None:
    """The benchmark."""
    parser = _kit.parser(__doc__)
    parser.add_argument("--no-tests", dest="tests", action="store_false", help="leave out test_seconds")
    given = parser.parse_args()
    figures = structure()
    figures["new_kind_files"] = Figure(listed("files that a new kind touches by hand", files_by_hand()), "<=", 4)
    differ = record.unequal(record.computed())
    figures["golden_unequal"] = Figure(listed("results other than those recorded", differ), "==", 0)
    figures["test_seconds"] = Figure(test_seconds(), "<=", 360) if given.tests else Figure(None)
    _kit.finish("house", figures)


if __name__ == "__main__":
    main()
