"""Measurements in one form, for the demo's report and for every benchmark.

{"bench": NAME, "versions": {...}, "figures": {NAME: FIGURE}, "ok": BOOL}, where a FIGURE is
{"value", "op", "bar", "ok", "peer", "ratio", "judged"}: ``judged`` says whether the bar applies to the ``value`` or the
``ratio``. A figure that an earlier run measured has ``"kept": true`` too.
"""

from __future__ import annotations

import math
import operator
import os
import platform
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, NamedTuple, Self

_OPERATORS: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le, "==": operator.eq}


class Figure(NamedTuple):
    """One number, and the bar it has to pass, if there is one.

    Without a ``bar``, ``op`` says which way is better: ``>=`` more, ``<=`` less. ``peer`` is the same number of what it
    is compared with, and ``ratio`` the value over it.
    """

    value: float | None
    op: str | None = None
    bar: float | None = None
    peer: float | None = None
    judged: Literal["value", "ratio"] = "value"
    """What the bar applies to."""
    kept: bool = False
    """Whether it was measured by an earlier run."""

    def dump(self) -> dict[str, Any]:
        """The figure's place in the form. A number that is missing or not finite passes no bar."""
        value = self.value if self.value is not None and math.isfinite(self.value) else None
        ratio = value / self.peer if value is not None and self.peer else None
        number = ratio if self.judged == "ratio" else value
        ok = True
        if self.op is not None and self.bar is not None:
            ok = number is not None and _OPERATORS[self.op](number, self.bar)
        dumped = {"value": value, "op": self.op, "bar": self.bar, "ok": ok, "peer": self.peer, "ratio": ratio}
        return dumped | {"judged": self.judged} | ({"kept": True} if self.kept else {})


def form(bench: str, figures: Mapping[str, Figure]) -> dict[str, Any]:
    """The complete form; ``ok`` when every figure is."""
    dumped = {name: figure.dump() for name, figure in figures.items()}
    return {
        "bench": bench,
        "versions": versions(),
        "figures": dumped,
        "ok": all(figure["ok"] for figure in dumped.values()),
    }


def versions() -> dict[str, str]:
    """Versions of what the numbers were measured with."""
    versions = {"python": platform.python_version(), "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    for name in ("ethogram", "torch", "numpy"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


class PeakMemory:
    """Highest sum of the resident memory of process trees, sampled twice a second, as a ``with`` block.

    ``pids`` are the trees' roots. Pages that processes share are counted for each. Needs psutil.
    """

    def __init__(self, *pids: int) -> None:
        self.mib = 0.0
        self._pids = set(pids)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.mib = max(self.mib, _resident(self._pids) / 2**20)
            if self._stop.wait(0.5):
                return


def _resident(pids: set[int]) -> int:
    import psutil

    total, processes = 0, set()
    for pid in pids:
        with suppress(psutil.Error):
            root = psutil.Process(pid)
            processes |= {root, *root.children(recursive=True)}
    for process in processes:
        with suppress(psutil.Error):
            total += process.memory_info().rss
    return total
