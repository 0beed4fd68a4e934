"""Figures of descriptions, controls and retrieval, with readers that are known to be right or wrong."""

from __future__ import annotations

import json
import math
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from services.language.models import LanguageModel
from services.resource import evaluate
from services.resource.codec import ResourceCodec
from services.resource.data import Table
from services.resource.describe import Describer
from services.resource.evaluate import controls, describe_figures, read_back, retrieval_figures
from services.resource.texts import Template
from services.runtime.seeds import generator
from tests.recorder import Recorder
from tests.resource.conftest import small_trainer


class Reader(Describer):
    """Knows the vectors of a codec, and says for each the description of its row, with ``error`` added to the latency;
    for a vector that it does not know, something that is no description."""

    def __init__(self, language: LanguageModel, codec: ResourceCodec, values: Tensor, error: float = 0.0) -> None:
        super().__init__(language, codec.schema)
        self.known, self.values = codec.embed(values), values.clone()
        self.values[:, -1] += error

    def write(self, soft: Tensor, template: Template) -> list[str]:
        texts = []
        for vector in soft.flatten(1):
            found = (self.known == vector).all(1).nonzero().flatten().tolist()
            texts.append(template.write(self.values[found[0]].tolist()) if found else "I cannot say.")
        return texts


@pytest.fixture(scope="module")
def codec(table: Table, language: LanguageModel) -> ResourceCodec:
    return small_trainer(table, language).codec()


def test_a_right_reader_has_all_figures(codec: ResourceCodec, table: Table, language: LanguageModel) -> None:
    run = Recorder()
    found = describe_figures(codec, Reader(language, codec, table.values), table.values, run, "seen")
    assert found["exact_match"] == 1 and found["by_template"] == {"plain": 1.0, "reordered": 1.0}
    assert found["field_accuracy"] == {"tool": 1.0, "size": 1.0, "cores": 1.0, "latency_ms": 1.0}
    assert found["digits"] == {0: 1.0, 1: 1.0, 2: 1.0}
    assert 0 < found["cross_entropy"] < math.inf
    assert run.stages == [("seen", 32, "descriptions")] and run.done[-1] == 32
    json.dumps(found, allow_nan=False)


def test_what_is_wrong_is_wrong_in_its_field_and_place_alone(
    codec: ResourceCodec, table: Table, language: LanguageModel
) -> None:
    # No latency of the table ends in 9, so the last digit alone is wrong.
    reader = Reader(language, codec, table.values, error=1.0)
    kept = table.values[:, -1] % 10 < 9
    found = describe_figures(codec, reader, table.values[kept], Recorder())
    assert found["exact_match"] == 0
    assert found["field_accuracy"] == {"tool": 1.0, "size": 1.0, "cores": 1.0, "latency_ms": 0.0}
    # The cores have one digit each, which is right.
    assert found["digits"] == {0: 0.5, 1: 1.0, 2: 1.0}


def test_a_text_that_is_no_description_is_wrong_in_every_field(
    codec: ResourceCodec, table: Table, language: LanguageModel
) -> None:
    template = table.schema.templates[0]
    reader = Reader(language, codec, table.values)
    reading = read_back(reader, torch.zeros(3, 1, 16), table.values[:3], template)
    assert reading.texts == ["I cannot say."] * 3
    assert not reading.right.any() and not reading.exact.any() and bool(reading.values.isnan().all())


def test_numbers_are_compared_as_descriptions_have_them(
    codec: ResourceCodec, table: Table, language: LanguageModel
) -> None:
    values = table.values.clone()
    values[:, -1] += 0.25
    reading = read_back(
        Reader(language, codec, values), codec.soft(codec.embed(values)), values, table.schema.templates[1]
    )
    assert bool(reading.exact.all())


def test_controls_of_a_right_reader_are_zero(codec: ResourceCodec, table: Table, language: LanguageModel) -> None:
    found = controls(codec, Reader(language, codec, table.values), table.values, seed=0)
    assert found == {"zero": 0.0, "shuffled": 0.0, "other_tool": 0.0}


def test_a_reader_that_ignores_the_vector_is_found_out(
    codec: ResourceCodec, table: Table, language: LanguageModel
) -> None:
    class Deaf(Reader):
        said = 0

        def write(self, soft: Tensor, template: Template) -> list[str]:
            rows = self.values[self.said : self.said + len(soft)]
            return [template.write(row) for row in rows.tolist()]

    order = torch.randperm(len(table), generator=generator(0, "controls"))
    found = controls(codec, Deaf(language, codec, table.values[order]), table.values, seed=0)
    assert found == {"zero": 1.0, "shuffled": 1.0, "other_tool": 1.0}


def test_a_table_of_one_tool_has_no_other_one(table: Table, language: LanguageModel) -> None:
    one = Table(type(table.schema)(table.schema.spec, table.schema.tools[:1]), table.values[:8])
    codec = small_trainer(one, language).codec()
    assert set(controls(codec, Reader(language, codec, one.values), one.values, 0)) == {"zero", "shuffled"}


def test_retrieval(codec: ResourceCodec, table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    found = retrieval_figures(codec, table.values, seed=0)
    assert found["self_retrieval"] == 1 and 0 <= found["jitter_retrieval"] <= 1
    assert found == retrieval_figures(codec, table.values, seed=0)
    monkeypatch.setattr(evaluate, "JITTER", 0.0)
    assert retrieval_figures(codec, table.values, seed=0)["jitter_retrieval"] == 1
    # Measurements may be there twice.
    twice = table.values.repeat(2, 1)
    assert retrieval_figures(codec, twice, seed=0)["self_retrieval"] == 1


def test_retrieval_moves_measured_numbers_alone(codec: ResourceCodec, table: Table) -> None:
    class Noting(ResourceCodec):
        embedded: ClassVar[list[Tensor]] = []

        def embed(self, values: Tensor, unknown: Tensor | None = None) -> Tensor:
            self.embedded.append(values)
            return super().embed(values, unknown)

    noting = Noting(codec.spec, codec.schema, codec.model)
    retrieval_figures(noting, table.values, 0)
    rows, jittered = noting.embedded
    assert torch.equal(rows, table.values) and torch.equal(jittered[:, :-1], table.values[:, :-1])
    ratio = jittered[:, -1] / table.values[:, -1]
    assert 0.98 <= float(ratio.min()) < 0.985 and 1.015 < float(ratio.max()) <= 1.02
