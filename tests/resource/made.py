"""A run of the small table that the command line made, and a table whose latency follows a formula."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ethogram.cli.output import execute
from ethogram.specs.resource import SchemaSpec
from services.language.models import LanguageModel
from services.resource.__main__ import app
from services.resource.codec import ResourceCodec
from services.resource.data import Table, _resolved
from services.resource.schema import Schema
from services.runtime.seeds import generator
from tests.resource.conftest import small_trainer, tiny_spec

FACTORS: dict[str, tuple[float, ...]] = {
    "size": (0.5, 1.0, 2.5),
    "cores": (1.5, 1.0, 0.7, 0.5),
    "memory_gb": (1.3, 1.0, 0.75, 0.7),
}
FORMULA: dict[str, Any] = {
    "dimensions": [
        {"name": "size", "labels": ["small", "medium", "large"]},
        {"name": "cores", "levels": [2, 4, 8, 16], "price": 1.0},
        {"name": "memory_gb", "unit": "GB", "levels": [4, 8, 16, 32], "price": 0.125},
        {"name": "latency_ms", "unit": "ms", "low": 1, "high": 9999, "measured": True},
    ],
    "templates": [{"name": "plain", "text": "{tool} {size} c {cores} m {memory_gb} ms {latency_ms}"}],
}
NOISE = 0.05


def call(*arguments: str | Path) -> int:
    """Exit code of a command as it is typed."""
    with pytest.raises(SystemExit) as left:
        execute(app, "resource", [str(argument) for argument in arguments])
    return int(left.value.code or 0)


def make_run(folder: Path, tables: Path, language_folder: Path) -> None:
    """Train on the small table with snapshots, as a user does."""
    spec = folder.with_suffix(".json")
    chosen = {"training": {"steps": 8, "batch_size": 8, "warm_up": 1, "validate_every": 2}}
    spec.write_text(json.dumps(tiny_spec(**chosen).model_dump(mode="json", exclude_unset=True)))
    files = ("--tool_registry", tables / "tools.json", "--profiling_data", tables / "profiling.csv")
    language = ("--llm_model", language_folder, "--device", "cpu", "--checkpoint_freq", "1")
    assert call("train", "--config", spec, *files, *language, "--output_dir", folder) == 0


def formula_table() -> Table:
    """Every configuration of two tools, with a latency that is a product of factors and 5 % of noise."""
    spec = SchemaSpec.model_validate(FORMULA)
    rows = []
    rng = generator(0, "formula")
    for tool, base in enumerate((300.0, 900.0)):
        for size in range(3):
            for cores in range(4):
                for memory in range(4):
                    latency = base * math.prod(
                        FACTORS[name][level]
                        for name, level in (("size", size), ("cores", cores), ("memory_gb", memory))
                    )
                    latency *= 1 + NOISE * (2 * float(torch.rand((), generator=rng)) - 1)
                    rows.append([tool, size, 2.0 ** (cores + 1), 2.0 ** (memory + 2), round(latency)])
    schema = Schema(_resolved(spec, rows), ("detect", "translate"))
    return Table(schema, torch.tensor(rows, dtype=torch.float64))


def untrained(table: Table, language: LanguageModel) -> ResourceCodec:
    """An encoder of ``table`` before its first step."""
    return small_trainer(table, language).codec()
