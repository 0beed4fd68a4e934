"""An interpreter's answers on a zoo, read back and scored."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, TypeAdapter, ValidationError
from torch import Tensor

from ethogram.errors import InvalidInput
from ethogram.specs.generation import GenerationSpec
from services.generation.format import parse_patterns, parse_weights
from services.zoo.dataset import architecture_of, network_of, positive_columns, read_about, read_networks
from services.zoo.patterns import Pattern
from services.zoo.pools import JUDGED, JUDGED_NONE, Evaluation
from services.zoo.subjects import Params, encode
from services.zoo.universe import Universe


def benchmark_of(spec: GenerationSpec, patterns: Sequence[Pattern]) -> Evaluation:
    """The held-out sequences on which networks of a zoo are judged."""
    universe = Universe(spec.vocab_size, spec.sequence_length, patterns)
    return Evaluation.build(universe, JUDGED, JUDGED_NONE, seed=spec.seed)


def with_positive(
    record: Mapping[str, Any], spec: GenerationSpec, patterns: Sequence[Pattern], benchmark: Callable[[], Evaluation]
) -> Mapping[str, Any]:
    """``record`` with the patterns that its network classifies as positive, measured if they are not in it: by an
    earlier version, or where the zoo was saved from memory."""
    if record.get("positive_patterns") is not None:
        return record
    shape, held_out = architecture_of(spec, record), benchmark()
    inputs, network = encode(shape, held_out.sequences), network_of(record, "weights", shape)
    yes_share = held_out.by_stratum(held_out.predictions(network, inputs, shape.activation))[0]
    return {**record, **positive_columns(yes_share, [pattern.name for pattern in patterns], spec)}


class Answer(BaseModel, strict=True):
    """How an interpreter completed the prompt of one task of one record."""

    index: int
    task: Literal["modification", "classification"]
    completion: str


_ANSWERS = TypeAdapter(list[Answer])


class ModificationScore(NamedTuple):
    """What a network that an interpreter has written does on benchmark sequences."""

    gain: float
    """On the target pattern, over the degraded network."""
    reference_gain: float
    """That of the improved network of the record."""
    others: float
    """Mean change of accuracy on all other strata."""


class ClassificationScore(NamedTuple):
    """How the patterns that an interpreter names compare with those that the network classifies as positive."""

    precision: float
    recall: float | None
    """None of a network without patterns."""
    exact: bool


def score_modification(
    text: str, record: Mapping[str, Any], spec: GenerationSpec, patterns: Sequence[Pattern], benchmark: Evaluation
) -> ModificationScore:
    """Score an answer to a modification task. Raises what :func:`parse_weights` raises."""
    shape, names = architecture_of(spec, record), [pattern.name for pattern in patterns]
    selected = torch.tensor([[name in record["patterns"] for name in names]])
    inputs = encode(shape, benchmark.sequences)

    def accuracy(params: Params) -> Tensor:
        return benchmark.accuracy(params, inputs, shape.activation, selected)[0]

    written = accuracy(parse_weights(text, shape))
    before, after = (accuracy(network_of(record, column, shape)) for column in ("degraded_weights", "weights"))
    target = names.index(record["target_pattern"])
    change = written - before
    rest = torch.cat([change[:target], change[target + 1 :]])
    return ModificationScore(float(change[target]), float((after - before)[target]), float(rest.nanmean()))


def score_classification(text: str, record: Mapping[str, Any], patterns: Sequence[Pattern]) -> ClassificationScore:
    """Score an answer to a classification task, against what the network was measured to classify as positive."""
    parsed, actual = parse_patterns(text, patterns), set(record["positive_patterns"])
    named = set(parsed or ())
    right = len(named & actual)
    recall, exact = right / len(actual) if actual else None, parsed is not None and named == actual
    return ClassificationScore(right / len(named) if named else float(exact), recall, exact)


def score_answers(zoo: Path, answers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The figures of each answer, with its ``index`` (of the record) and ``task``; an answer has also a ``completion``.

    ``modification``: ``parsed`` (1 for a network of the right shape; anything else counts as no change), ``gain`` on
    the target pattern beside the record's own ``reference_gain``, and ``others``, the mean change elsewhere.
    ``classification``: ``precision``, ``recall`` and ``exact``. Raises :class:`InvalidInput` naming the answer that is
    malformed.
    """
    _, spec, patterns = read_about(zoo)
    try:
        checked = _ANSWERS.validate_python(answers)
    except ValidationError as error:
        raise InvalidInput.from_pydantic(error, "answers") from None
    indices = {answer.index for answer in checked}
    records: dict[int, dict[str, Any]] = {}
    for table in read_networks(zoo, spec):
        records |= {row["index"]: row for row in table.to_pylist() if row["index"] in indices}
    benchmark = benchmark_of(spec, patterns)
    scores: list[dict[str, Any]] = []
    for i, answer in enumerate(checked):
        record, text = records.get(answer.index), answer.completion
        if record is None:
            raise InvalidInput.field(f"answers.{i}.index", f"the zoo has no record {answer.index}")
        score: dict[str, float | None] = {"parsed": 0.0, "gain": 0.0, "others": 0.0}
        if answer.task == "classification":
            measured = with_positive(record, spec, patterns, lambda: benchmark)
            scores_of = score_classification(text, measured, patterns)._asdict()
            score = {name: None if value is None else float(value) for name, value in scores_of.items()}
        elif spec.staged is None:
            one_stage = "the zoo was trained in one stage, so there is nothing to modify"
            raise InvalidInput.field(f"answers.{i}.task", one_stage)
        else:
            with suppress(InvalidInput):
                scored = score_modification(text, record, spec, patterns, benchmark)
                score = {"parsed": 1.0, "gain": scored.gain, "others": scored.others}
            score["reference_gain"] = record["improvement"]
        # NaN of a pattern without held-out sequences.
        known = {name: None if value is None or math.isnan(value) else value for name, value in score.items()}
        scores.append({"index": answer.index, "task": answer.task} | known)
    return scores


def means(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean scores by task, of what :func:`score_answers` returns, each over the answers that have one."""
    by_task: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_task.setdefault(row["task"], []).append(row)
    return {
        task: {"answers": len(scores)}
        | {name: _mean(row[name] for row in scores) for name in scores[0] if name not in ("index", "task")}
        for task, scores in by_task.items()
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
