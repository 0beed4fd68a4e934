"""``python -m tests.golden.record`` rewrites ``golden.json`` with the results of the code as it is now.

Results are bit-equal on machines of one :func:`fingerprint`. They are computed in a child process with one thread and
without newer vector units, so that they depend on the processor as little as possible.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent / "golden.json"
ROOT = Path(__file__).parents[2]
PLAIN = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "NUMBA_CPU_NAME": "generic",
    "NUMBA_CPU_FEATURES": "",
    "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR",
    "OPENBLAS_CORETYPE": "Nehalem",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
"""Environment of the computation."""
RELATIVE, ABSOLUTE = 1e-4, 1e-6
"""How far numbers may differ on a machine of another fingerprint."""


def fingerprint() -> dict[str, str]:
    """What decides the bits of results in the environment :data:`PLAIN`: libraries, and the kind of processor."""
    kind, cpu = platform.machine(), Path("/proc/cpuinfo")
    cpu_words = cpu.read_text().split() if cpu.exists() else []
    vendor = next((name for name in ("AuthenticAMD", "GenuineIntel") if name in cpu_words), "other")
    vectors = next((unit for unit in ("avx512f", "avx2") if unit in cpu_words), "none")
    packages = {name: version(name) for name in ("torch", "numpy", "scipy", "numba", "scikit-learn")}
    return {"machine": kind, "vendor": vendor, "vectors": vectors, "libc": platform.libc_ver()[1], **packages}


def computed() -> dict[str, Any]:
    """What the code gives now: see :mod:`tests.golden.compute`."""
    command = [sys.executable, "-m", "tests.golden.compute"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | PLAIN, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def unequal(found: dict[str, Any], golden: dict[str, Any] | None = None) -> list[str]:
    """What differs from ``golden`` (by default the recorded one): by digests where the fingerprint is the recorded one,
    else by numbers. What is new is no difference."""
    golden = golden or json.loads(GOLDEN.read_text())
    exact = golden["fingerprint"] == fingerprint()
    differ = []
    for case, recorded in golden["cases"].items():
        now = found.get(case, {"digests": {}, "numbers": {}})
        for name, value in recorded["numbers"].items():
            close = name in now["numbers"] and math.isclose(
                value, now["numbers"][name], rel_tol=RELATIVE, abs_tol=ABSOLUTE
            )
            if not close:
                differ.append(f"{case}: {name} is {now['numbers'].get(name)}, not {value}")
        if exact:
            pairs = recorded["digests"].items()
            differ += [f"{case}: other bits of {name}" for name, sha in pairs if now["digests"].get(name) != sha]
    return differ


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({"fingerprint": fingerprint(), "cases": computed()}, indent=1) + "\n")
