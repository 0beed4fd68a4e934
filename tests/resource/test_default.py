"""The default language model and an encoder for it, as a user gets them: a quarter of an hour, and once trained a few
minutes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ethogram.specs.resource import ResourceSpec
from services.resource.codec import ResourceCodec
from services.resource.describe import Describer
from services.resource.generator import write_table
from services.resource.job import run
from services.resource.sources import language_model_for
from tests.recorder import Recorder

KNOWN = ("tool", "input_size", "cpu_cores", "latency_ms")


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_one_tool_is_described_and_predicted_with_the_default_language_model(tmp_path: Path) -> None:
    _, profiling = write_table(tmp_path / "table")
    lines = profiling.read_text().splitlines()[:244]
    profiling.write_text("\n".join(lines) + "\n")
    recorder = Recorder(tmp_path, inputs={"profiling": profiling})
    spec = ResourceSpec.model_validate({"profiling": {"artifact": "x"}, "held_out": 0.2})
    figures = run(spec, recorder)["figures"]
    assert figures["exact_match_seen"] >= 0.99 and figures["exact_match_unseen"] >= 0.98
    assert figures["control_exact_match"] <= 0.01 and figures["self_retrieval"] == 1
    assert ("language_model", "language-model") in recorder.artifacts

    # From the cache, and what is known is read also where fields that a user chooses are unknown.
    codec = ResourceCodec.load(tmp_path / "encoder")
    assert codec.table is not None
    values = codec.table.values[::5]
    known = torch.tensor([name in KNOWN for name in codec.schema.names])
    unknown = (~known).expand(len(values), -1)
    describer, template = Describer(language_model_for(codec), codec.schema), codec.schema.templates[0]
    texts = describer.write(codec.soft(codec.embed(values, unknown)), template)
    read = torch.tensor([template.read(text) or [-1.0] * len(known) for text in texts], dtype=torch.float64)
    assert float((read == values)[:, known].double().mean()) >= 0.98
    # What is said of the others is a configuration of the grid.
    for index, dimension in enumerate(codec.schema.dimensions):
        if dimension.levels and not known[index]:
            assert float(torch.isin(read[:, index], torch.tensor(dimension.levels).double()).double().mean()) >= 0.98

    predictions = json.loads((tmp_path / "report" / "report.json").read_text())["predictions"]
    (covered,) = [row["covered"] for row in predictions["coverage"] if row["level"] == pytest.approx(0.9)]
    assert covered >= 0.75
    assert predictions["errors"]["vector"]["median"] <= 0.1
