"""Tables of the resource benchmark: one of another kind than the generator's, and the user's measurements of models."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML

from ethogram.specs.resource import SchemaSpec
from services.resource.data import Table, read_measurements, read_tools
from services.runtime.seeds import generator

REACTOR = """
tool_column: process
repeated: false
dimensions:
  - {name: solvent, labels: [water, ethanol, acetone, hexane]}
  - {name: stirrer, labels: [anchor, paddle, turbine]}
  - {name: feed_mode, labels: [batch, semi-batch, continuous]}
  - {name: temperature, unit: K, low: 270, high: 450}
  - {name: pressure, unit: bar, low: 1, high: 80, decimals: 1}
  - {name: speed, unit: rpm, low: 50, high: 1800}
  - {name: ph, low: 1, high: 13, decimals: 1}
  - {name: reagent, unit: g, low: 5, high: 900, price: 0.2}
  - {name: catalyst, unit: mg, low: 10, high: 5000, price: 0.01}
  - {name: volume, unit: mL, low: 100, high: 20000, price: 0.001}
  - {name: flow, unit: mL/min, low: 0, high: 250, decimals: 1}
  - {name: hold, unit: min, low: 5, high: 720, price: 0.05}
  - {name: cooling, unit: W, low: 0, high: 3000}
  - {name: particle, unit: um, low: 1, high: 400}
  - {name: moisture, unit: "%", low: 0, high: 30, decimals: 2}
  - {name: yield_g, unit: g, low: 0, high: 900, decimals: 1, measured: true}
templates:
  - name: record
    text: >-
      {tool} in {solvent} with a {stirrer} stirrer, {feed_mode}: {temperature} K, {pressure} bar, {speed} rpm,
      pH {ph}, {reagent} g with {catalyst} mg of catalyst in {volume} mL, {flow} mL/min for {hold} min, {cooling} W,
      {particle} um, {moisture} % moisture; yields {yield_g} g
"""
"""A schema of another kind than the default: 13 numbers and 3 categories, beside the process, of chemistry."""
PROCESSES = ("esterification", "hydrogenation", "nitration", "crystallization", "polymerization")

MODELS = """
tool_column: tool
repeated: true
dimensions:
  - {name: model_id, labels: []}
  - {name: weight_precision, labels: []}
  - {name: gpu_model, labels: []}
  - {name: total_params_b, unit: B, decimals: 1}
  - {name: activated_params_b, unit: B, decimals: 1}
  - {name: num_gpus, low: 1, high: 8, price: 1.0}
  - {name: tensor_parallel, low: 1, high: 8}
  - {name: expert_parallel, low: 1, high: 8}
  - {name: data_parallel, low: 1, high: 8}
  - {name: ulysses_degree, low: 1, high: 8}
  - {name: ring_degree, low: 1, high: 8}
  - {name: height, unit: px}
  - {name: width, unit: px}
  - {name: frames}
  - {name: steps}
  - {name: batch}
  - {name: latency_ms, unit: ms, decimals: 2, measured: true}
  - {name: power_w, unit: W, decimals: 1, measured: true}
  - {name: energy_j, unit: J, decimals: 1, measured: true}
templates:
  - name: record
    text: >-
      {tool} by {model_id} ({total_params_b} B, {activated_params_b} B active, {weight_precision}) on {num_gpus}
      {gpu_model}: tensor {tensor_parallel}, expert {expert_parallel}, data {data_parallel}, ulysses {ulysses_degree},
      ring {ring_degree}; {height} x {width}, {frames} frames, {steps} steps, batch {batch}: {latency_ms} ms,
      {power_w} W, {energy_j} J
"""
"""The ML.ENERGY table: measured configurations of generative models. Labels are those of the file."""


def reactor_table(folder: Path, rows: int, seed: int) -> Table:
    """Write a table of ``rows`` random runs of :data:`REACTOR` into ``folder`` and read it as a user's."""
    spec = SchemaSpec.model_validate(_loaded(REACTOR))
    rng = generator(seed, "reactor")
    folder.mkdir(parents=True, exist_ok=True)
    tools, profiling = folder / "tools.json", folder / "profiling.csv"
    tools.write_text(json.dumps([{"name": name} for name in PROCESSES]), encoding="utf-8")
    with profiling.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([spec.tool_column, *(dimension.name for dimension in spec.dimensions)])
        for number in range(rows):
            shares = torch.rand(len(spec.dimensions), generator=rng, dtype=torch.float64).tolist()
            cells = [PROCESSES[number % len(PROCESSES)]]
            reagent = 0.0
            for dimension, share in zip(spec.dimensions, shares, strict=True):
                if dimension.labels:
                    cells.append(dimension.labels[int(share * len(dimension.labels))])
                    continue
                low, high = dimension.low or 0.0, dimension.high or 0.0
                value = reagent * (0.5 + 0.5 * share) if dimension.measured else low + (high - low) * share
                reagent = value if dimension.name == "reagent" else reagent
                cells.append(f"{value:.{dimension.decimals}f}")
            writer.writerow(cells)
    return read_measurements(profiling, spec, read_tools(tools))


def models_table(file: Path) -> Table:
    """The table in ``file``, with the columns of :data:`MODELS`. Raises :class:`ethogram.errors.InvalidInput`."""
    content = _loaded(MODELS)
    with file.open(encoding="utf-8-sig", newline="") as source:
        rows = list(csv.DictReader(source))
    for dimension in content["dimensions"]:
        if "labels" in dimension:
            dimension["labels"] = sorted({row[dimension["name"]] for row in rows if row.get(dimension["name"])})
    return read_measurements(file, SchemaSpec.model_validate(content), field="--real")


def _loaded(text: str) -> dict[str, Any]:
    loaded: dict[str, Any] = YAML(typ="safe").load(text)
    return loaded
