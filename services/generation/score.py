"""An interpreter's answers on a zoo, read back and scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ethogram.errors import InvalidInput
from services.generation.format import score_classification, score_modification
from services.generation.sampler import JUDGED, JUDGED_NONE
from services.zoo.dataset import read_about, read_records
from services.zoo.pools import Evaluation
from services.zoo.universe import Universe


def score_answers(zoo: Path, answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the answers, by task. Each answer has ``index`` (of the record), ``task`` and ``completion``.

    ``modification``: ``parsed`` (share of answers that are a network of the right shape; others count as no change),
    ``gain`` on the target pattern beside the record's own ``reference_gain``, and ``others``, the mean change
    elsewhere. ``classification``: ``precision``, ``recall`` and ``exact``. Raises :class:`InvalidInput` naming the
    answer that is no answer.
    """
    _, spec, patterns = read_about(zoo)
    asked: dict[int, dict[str, Any]] = {}
    for i, answer in enumerate(answers):
        if not isinstance(answer, Mapping):
            raise InvalidInput.field(f"answers.{i}", "is no object")
        for name, kind in (("index", int), ("task", str), ("completion", str)):
            if not isinstance(answer.get(name), kind):
                raise InvalidInput.field(f"answers.{i}.{name}", f"must be a {kind.__name__}")
        if answer["task"] not in ("modification", "classification"):
            raise InvalidInput.field(f"answers.{i}.task", "must be modification or classification")
        if answer["task"] == "modification" and spec.staged is None:
            raise InvalidInput.field(
                f"answers.{i}.task", "the zoo was trained in one stage, so there is nothing to modify"
            )
        asked[answer["index"]] = {}
    for table in read_records(zoo):
        for record in table.to_pylist():
            if record["index"] in asked:
                asked[record["index"]] = record
    benchmark = Evaluation.build(
        Universe(spec.vocab_size, spec.sequence_length, patterns), JUDGED, JUDGED_NONE, seed=spec.seed
    )
    found: dict[str, list[dict[str, float]]] = {}
    for i, answer in enumerate(answers):
        record, text = asked[answer["index"]], answer["completion"]
        if not record:
            raise InvalidInput.field(f"answers.{i}.index", f"the zoo has no record {answer['index']}")
        if answer["task"] == "classification":
            named = score_classification(text, record, patterns)
            row = {name: float(value) for name, value in named._asdict().items()}
        else:
            try:
                scored = score_modification(text, record, spec, patterns, benchmark)
                row = {"parsed": 1.0, "gain": scored.gain, "others": scored.others}
            except InvalidInput:
                row = {"parsed": 0.0, "gain": 0.0, "others": 0.0}
            row["reference_gain"] = record["improvement"]
        found.setdefault(answer["task"], []).append(row)
    return {
        task: {"answers": len(rows)} | {name: fmean(row[name] for row in rows) for name in rows[0]}
        for task, rows in found.items()
    }
