"""The table of the seven tools: every configuration on the grid, with a latency by a known formula.

Latency is a product of a base and a factor of each resource, times uniform noise within 5 %; so its logarithm is linear
in the configuration, and no prediction from one measurement has a mean relative error below 2.5 %.
"""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path

import torch

from services.resource.schema import default_schema
from services.runtime.seeds import generator

NOISE = 0.05
"""Most relative deviation of a latency from the formula."""
TOOLS = {
    "image_classification": (620.0, "Assigns one of a thousand labels to an image."),
    "object_detection": (1150.0, "Finds the objects of an image, with a box and a label each."),
    "text_summarization": (1480.0, "Shortens an article to a few sentences."),
    "machine_translation": (930.0, "Translates a text into another language."),
    "speech_recognition": (1720.0, "Writes down what is said in a recording."),
    "sentiment_analysis": (380.0, "Says whether a text is positive or negative."),
    "image_generation": (2100.0, "Draws an image from a text."),
}
"""Base latency in ms, and description, of each tool."""
FACTORS = {
    "input_size": (0.5, 1.0, 2.5),
    "cpu_cores": (1.5, 1.0, 0.7),
    "memory_gb": (1.3, 1.0, 0.75),
    "gpu_sm": (1.4, 1.0, 0.65),
    "gpu_memory_gb": (1.35, 1.0, 0.7),
}
"""Factor of the latency for each of the three levels of a dimension."""


def write_table(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """Write ``tools.json`` and ``profiling.csv`` into ``folder``: 7 tools with 243 configurations each, in the order of
    the grid. Returns both paths."""
    schema = default_schema()
    chosen = [dimension for dimension in schema.dimensions if not dimension.measured]
    (latency,) = (dimension for dimension in schema.dimensions if dimension.measured)
    rng = generator(seed, "table")
    folder.mkdir(parents=True, exist_ok=True)
    tools, profiling = folder / "tools.json", folder / "profiling.csv"
    entries = [{"name": name, "description": text} for name, (_, text) in TOOLS.items()]
    tools.write_text(json.dumps(entries, indent=2), encoding="utf-8")
    with profiling.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([schema.tool_column, *(dimension.column or dimension.name for dimension in [*chosen, latency])])
        for tool, (base, _) in TOOLS.items():
            grid = [list(enumerate(dimension.labels or dimension.levels)) for dimension in chosen]
            for levels in itertools.product(*grid):
                milliseconds = base
                for dimension, (index, _) in zip(chosen, levels, strict=True):
                    milliseconds *= FACTORS[dimension.name][index]
                milliseconds *= 1 + NOISE * (2 * float(torch.rand((), generator=rng, dtype=torch.float64)) - 1)
                cells = [f"{value:g}" if isinstance(value, float) else value for _, value in levels]
                writer.writerow([tool, *cells, f"{milliseconds:.{latency.decimals}f}"])
    return tools, profiling
