"""Size, repetition, import directions, training loops and test time of this repository; whether results still match.

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
from itertools import combinations, count
from pathlib import Path
from typing import NamedTuple

import grimp
import numpy as np
from scipy.sparse.csgraph import connected_components

from benchmarks import _kit
from benchmarks._kit import Figures
from ethogram.bench import Figure
from scripts.contracts import SYSTEMS
from tests.contract.toy_kind import files_by_hand
from tests.golden import record

LINES_BEFORE = 34_586
"""Lines of Python outside tests and generated code, before the systems shared their common parts."""
GENERATED = ("ethogram/v1/", "ethogram/client.py")
EQUAL_LINES = 10
ARROWS = {
    "ethogram": ("services", "workers", "gateway", "benchmarks", "tests"),
    "services": ("workers", "gateway", "benchmarks", "tests"),
    "services.runtime": (*SYSTEMS, "services.zoo", "services.language", "services.inference", "ethogram.cli"),
    "services.zoo": (*SYSTEMS, "services.inference", "services.jobs"),
    "services.language": (*SYSTEMS, "services.zoo", "services.inference", "services.jobs"),
    "services.artifacts": (*SYSTEMS, "services.zoo", "services.language", "services.inference", "services.jobs"),
    **{system: (*({*SYSTEMS} - {system}), "services.inference", "services.jobs") for system in SYSTEMS},
    "gateway": ("workers", "benchmarks", "tests"),
    "workers": ("gateway", "benchmarks", "tests"),
}
"""Packages that a package never imports, not even within a function. The contracts of import-linter come on top."""


class Module(NamedTuple):
    """A module's file, source and syntax tree."""

    path: Path
    text: str
    tree: ast.Module


class Place(NamedTuple):
    """Lines of a file, ``last`` included."""

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
            text = path.read_text(encoding="utf-8")
            sources[name] = Module(relative, text, ast.parse(text))
    return sources


def lines(sources: Mapping[str, Module]) -> int:
    """Lines of all modules but generated ones."""
    counted = (module for module in sources.values() if not str(module.path).startswith(GENERATED))
    return sum(len(module.text.splitlines()) for module in counted)


def statements(module: Module) -> list[tuple[int, str]]:
    """Line numbers and stripped lines, without imports, docstrings, comments, blank lines and field declarations."""
    left_out: set[int] = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ClassDef):
            declarations: list[ast.stmt] = [field for field in node.body if isinstance(field, ast.AnnAssign)]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            declarations = [node]
        else:
            declarations = [node] if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) else []
        for statement in declarations:
            left_out.update(range(statement.lineno, (statement.end_lineno or statement.lineno) + 1))
    numbered = ((number, line.strip()) for number, line in enumerate(module.text.splitlines(), 1))
    return [(number, line) for number, line in numbered if line and line[0] != "#" and number not in left_out]


def duplicates(sources: Mapping[str, Module], equal: int = EQUAL_LINES) -> list[tuple[Place, Place]]:
    """Pairs of places with at least ``equal`` successive lines that are the same but for their indentation. Each pair
    is as long as it can be without overlap."""
    texts = {str(module.path): statements(module) for module in sources.values()}
    windows: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    for path, numbered in texts.items():
        if not path.startswith(GENERATED):
            for start in range(len(numbered) - equal + 1):
                windows[tuple(line for _, line in numbered[start : start + equal])].append((path, start))
    matches = {
        (a, i, b, j)
        for starts in windows.values()
        for (a, i), (b, j) in combinations(starts, 2)
        if a != b or j - i >= equal
    }
    pairs = []
    for a, i, b, j in matches:
        if (a, i - 1, b, j - 1) not in matches:
            more = next(more for more in count(1) if (a, i + more, b, j + more) not in matches)
            last = min(more + equal - 1, j - i if a == b else sys.maxsize) - 1
            pairs.append(
                (Place(a, texts[a][i][0], texts[a][i + last][0]), Place(b, texts[b][j][0], texts[b][j + last][0]))
            )
    return sorted(pairs)


def imports(*packages: str) -> dict[str, set[str]]:
    """For each module of ``packages``, those that it imports, inside functions too, but not only for type checkers."""
    graph = grimp.build_graph(*packages, exclude_type_checking_imports=True, cache_dir=None)
    return {module: graph.find_modules_directly_imported_by(module) for module in sorted(graph.modules)}


def cycles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import one another, directly or through others."""
    matrix = np.array([[target in targets for target in edges] for targets in edges.values()])
    number, group_of = connected_components(matrix, connection="strong")
    groups = [[name for name, own in zip(edges, group_of, strict=True) if own == group] for group in range(number)]
    return sorted(group for group in groups if len(group) > 1)


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
    """Training loops of the services: those in which an optimiser or a trainer takes steps, there or in a called
    function of the same module. Without population training, which is of another kind."""
    places = []
    for name, module in sources.items():
        if not name.startswith("services.") or name.startswith("services.generation."):
            continue
        nodes = list(ast.walk(module.tree))
        functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        steppers = {node.name for node in functions if _steps(node, set())}
        places += [
            Place(str(module.path), node.lineno, node.end_lineno or node.lineno)
            for node in nodes
            if isinstance(node, _LOOPS) and _steps(node, steppers)
        ]
    return places


def _steps(node: ast.AST, steppers: set[str]) -> bool:
    """Whether an optimiser's ``step``, a trainer's ``advance`` or one of ``steppers`` is called outside inner loops."""
    if isinstance(node, ast.Call):
        owner, _, name = ast.unparse(node.func).rpartition(".")
        last = owner.rpartition(".")[2].lower()
        if (name == "step" and "optim" in last) or (name == "advance" and "trainer" in last):
            return True
        if owner in ("", "self", "cls") and name in steppers:
            return True
    return any(_steps(child, steppers) for child in ast.iter_child_nodes(node) if not isinstance(child, _LOOPS))


def listed(title: str, rows: Sequence[object]) -> int:
    """Print ``rows`` on standard error. Returns how many there are."""
    _kit.say(f"{title}: {len(rows)}" + "".join(f"\n    {row}" for row in rows))
    return len(rows)


def structure() -> Figures:
    """Figures of the source in the current folder."""
    sources = modules(Path())
    edges = imports("ethogram", "services", "workers", "gateway", "benchmarks", "scripts")
    pairs = [f"{a} = {b}" for a, b in duplicates(sources)]
    against = upward(edges) + broken_contracts()
    return {
        "lines": Figure(lines(sources), peer=LINES_BEFORE),
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


if __name__ == "__main__":
    parser = _kit.parser(__doc__)
    parser.add_argument("--no-tests", dest="tests", action="store_false", help="leave out test_seconds")
    arguments = parser.parse_args()
    figures = structure()
    figures["new_kind_files"] = Figure(listed("files that a new kind touches by hand", files_by_hand()), "<=", 4)
    unequal = record.unequal(record.computed())
    figures["golden_unequal"] = Figure(listed("results other than those recorded", unequal), "==", 0)
    figures["test_seconds"] = Figure(test_seconds(), "<=", 360) if arguments.tests else Figure(None)
    _kit.finish("house", figures)
