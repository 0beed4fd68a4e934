"""The demo at full size from nothing, and what the platform costs: all figures of ``runs/demo/report.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks import _kit, platform
from ethogram import demo
from ethogram.bench import form

OUTPUT = Path("runs/demo")


if __name__ == "__main__":
    _kit.parser(__doc__).parse_args()
    report = demo.run(OUTPUT, fresh=True)
    costs = {name: figure.dump() for name, figure in platform.measure().items()}
    # What the demo measured of itself stands: it is the colder of the two.
    report["figures"] = costs | report["figures"]
    report["ok"] = all(figure["ok"] for figure in report["figures"].values())
    (OUTPUT / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: report[key] for key in form("demo", {})}))
    sys.exit(0 if report["ok"] else 1)
