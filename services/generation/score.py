"""An interpreter's answers on a zoo, read back and scored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ethogram.errors import InvalidInput
from services.generation.format import score_classification, score_modification
from services.zoo.dataset import read_about, read_records
from services.zoo.pools import JUDGED, JUDGED_NONE, Evaluation
from services.zoo.universe import Universe


def score_answers(zoo: Path, answers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The figures of each answer, with its ``index`` (of the record) and ``task``; an answer has also a ``completion``.

    ``modification``: ``parsed`` (1 for a network of the right shape; anything else counts as no change), ``gain`` on
    the target pattern beside the record's own ``reference_gain``, and ``others``, the mean change elsewhere.
    ``classification``: ``precision``, ``recall`` and ``exact``. Raises :class:`InvalidInput` naming the answer that is
    malformed.
    """
    _, spec, patterns = read_about(zoo)
    records: dict[int, dict[str, Any]] = {}
    for i, answer in enumerate(answers):
        if not isinstance(answer, Mapping):
            raise InvalidInput.field(f"answers.{i}", "must be an object")
        for name, kind in (("index", int), ("task", str), ("completion", str)):
            if not isinstance(answer.get(name), kind):
                raise InvalidInput.field(f"answers.{i}.{name}", f"must be a {kind.__name__}")
        if answer["task"] not in ("modification", "classification"):
            raise InvalidInput.field(f"answers.{i}.task", "must be modification or classification")
        if answer["task"] == "modification" and spec.staged is None:
            raise InvalidInput.field(
                f"answers.{i}.task", "the zoo was trained in one stage, so there is nothing to modify"
            )
        records[answer["index"]] = {}
    for table in read_records(zoo):
        for record in table.to_pylist():
            if record["index"] in records:
                records[record["index"]] = record
    benchmark = Evaluation.build(
        Universe(spec.vocab_size, spec.sequence_length, patterns), JUDGED, JUDGED_NONE, seed=spec.seed
    )
    scores = []
    for i, answer in enumerate(answers):
        record, text = records[answer["index"]], answer["completion"]
        if not record:
            raise InvalidInput.field(f"answers.{i}.index", f"the zoo has no record {answer['index']}")
        if answer["task"] == "classification":
            score = score_classification(text, record, patterns)
            row = {name: float(value) for name, value in score._asdict().items()}
        else:
            try:
                scored = score_modification(text, record, spec, patterns, benchmark)
                row = {"parsed": 1.0, "gain": scored.gain, "others": scored.others}
            except InvalidInput:
                row = {"parsed": 0.0, "gain": 0.0, "others": 0.0}
            row["reference_gain"] = record["improvement"]
        scores.append({"index": answer["index"], "task": answer["task"]} | row)
    return scores


def means(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean scores by task, of what :func:`score_answers` returns."""
    by_task: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_task.setdefault(row["task"], []).append(row)
    return {
        task: {"answers": len(scores)}
        | {name: fmean(row[name] for row in scores) for name in scores[0] if name not in ("index", "task")}
        for task, scores in by_task.items()
    }
