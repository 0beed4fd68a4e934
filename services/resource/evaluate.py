"""Evaluation of an encoder: what the language model says of its vectors, beside controls that must fail."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from services.resource.codec import ResourceCodec
from services.resource.describe import Describer
from services.resource.schema import Schema
from services.resource.texts import Template
from services.runtime.run import Run
from services.runtime.seeds import generator

NEIGHBOURS = 256
"""Vectors whose nearest one is looked for at once."""
JITTER = 0.02
"""How far measured numbers differ in the retrieval of jittered vectors, as a share."""
CONTROLLED = 256
"""Most rows on which a control is measured."""


class Reading(NamedTuple):
    """Descriptions of some rows, read back."""

    texts: list[str]
    values: Tensor
    """``[rows, fields]``; NaN where a text could not be read."""
    right: Tensor
    """Whether each field has the row's value, as its description has it, ``[rows, fields]``."""

    @property
    def exact(self) -> Tensor:
        """Whether all fields are right, ``[rows]``."""
        return self.right.all(1)


def read_back(
    describer: Describer, soft: Tensor, values: Tensor, template: Template, advance: Callable[[int], None] | None = None
) -> Reading:
    """Describe ``soft`` ``[rows, tokens, hidden]`` by greedy decoding, and compare with ``values``."""
    texts: list[str] = []
    for part in torch.split(soft, describer.batch):
        texts += describer.write(part.to(describer.device), template)
        if advance is not None:
            advance(len(part))
    unread = [float("nan")] * values.shape[1]
    found = torch.tensor([template.read(text) or unread for text in texts], dtype=torch.float64)
    wanted = torch.tensor([template.read(template.write(row)) for row in values.tolist()], dtype=torch.float64)
    return Reading(texts, found.view_as(values), (found == wanted).view_as(values))


def describe_figures(
    codec: ResourceCodec, describer: Describer, values: Tensor, run: Run, name: str = "describe"
) -> dict[str, Any]:
    """Figures of the descriptions of ``values`` ``[rows, fields]`` by the templates of training: ``rows``, their
    number; ``exact_match``, ``by_template``, ``field_accuracy`` by field, ``field_error`` by number, ``cross_entropy``,
    and ``digits``: share of right digits by place, from the last. ``name``: of the stage."""
    embeddings = codec.embed(values)
    templates = codec.schema.templates if codec.spec.augmentation.varies else codec.schema.templates[:1]
    advance = counted(run, name, len(values) * len(templates), "descriptions")
    by_template, readings, losses = {}, [], []
    for template in templates:
        readings.append(read_back(describer, codec.soft(embeddings), values, template, advance))
        by_template[template.name] = float(readings[-1].exact.float().mean())
        losses.append(cross_entropy(codec, describer, embeddings, values, template))
    return {
        "rows": len(values),
        "exact_match": sum(by_template.values()) / len(by_template),
        "by_template": by_template,
        **field_figures(readings, values, templates),
        "cross_entropy": sum(losses) / len(losses),
    }


def counted(run: Run, stage: str, total: int, unit: str) -> Callable[[int], None]:
    """Begin a ``stage``; what is returned is called with the units that are done since the last call."""
    run.stage(stage, total, unit)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        run.advance(done)

    return advance


def field_figures(readings: Sequence[Reading], values: Tensor, templates: Sequence[Template]) -> dict[str, Any]:
    """``field_accuracy``, ``field_error`` and ``digits`` of descriptions of ``values``, one reading by each template.
    The error is the mean relative error of a number, at most 1, which it is where the text cannot be read."""
    fields, labels = templates[0].fields, templates[0].labels
    accuracy = torch.cat([reading.right for reading in readings]).float().mean(0).tolist()
    error = torch.cat([read_error(reading, values) for reading in readings]).mean(0).tolist()
    digits = defaultdict[int, list[bool]](list)
    for reading, template in zip(readings, templates, strict=True):
        for wanted, found in zip(values.tolist(), reading.values.tolist(), strict=True):
            _count_digits(template, wanted, found, digits)
    return {
        "field_accuracy": dict(zip(fields, accuracy, strict=True)),
        "field_error": {
            name: value for name, value, category in zip(fields, error, labels, strict=True) if not category
        },
        "digits": {place: sum(hits) / len(hits) for place, hits in sorted(digits.items())},
    }


def guess_figures(schema: Schema, values: Tensor) -> dict[str, dict[str, float]]:
    """What no vector is needed for: ``field_accuracy`` of the most frequent value of each field, and ``field_error`` of
    the median of each number."""
    accuracy, error = {}, {}
    for index, dimension in enumerate(schema.dimensions):
        column = values[:, index]
        accuracy[dimension.name] = float(torch.unique(column, return_counts=True)[1].max()) / len(column)
        if dimension.number:
            error[dimension.name] = float(relative_error(column.median(), column).clamp_max(1).mean())
    return {"field_accuracy": accuracy, "field_error": error}


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Relative error of numbers from 0 on; of 0 the absolute one."""
    return (found - wanted).abs() / wanted.masked_fill(wanted == 0, 1.0)


def read_error(reading: Reading, values: Tensor) -> Tensor:
    """Relative error of each field, at most 1, which it is where the text cannot be read, ``[rows, fields]``."""
    error = relative_error(reading.values, values).nan_to_num(1.0).clamp_max(1.0)
    return error.masked_fill(reading.right, 0.0)


@torch.no_grad()
def cross_entropy(
    codec: ResourceCodec, describer: Describer, embeddings: Tensor, values: Tensor, template: Template
) -> float:
    """Mean cross-entropy per token of the descriptions of ``values`` by a template."""
    total = 0.0
    for part, rows in zip(torch.split(embeddings, describer.batch), torch.split(values, describer.batch), strict=True):
        soft = codec.soft(part).to(describer.device)
        total += float(describer.scores(soft, rows, template).loss) * len(rows)
    return total / len(values)


def _count_digits(
    template: Template, wanted: Sequence[float], found: Sequence[float], digits: dict[int, list[bool]]
) -> None:
    """Add to ``digits``, by place from the last, whether each digit of the numbers is right."""
    for index, labels in enumerate(template.labels):
        if labels:
            continue
        right = template.value_text(index, wanted[index]).replace(".", "")[::-1]
        said = "" if found[index] != found[index] else template.value_text(index, found[index]).replace(".", "")[::-1]
        for place, digit in enumerate(right):
            digits[place].append(place < len(said) and said[place] == digit)


def control_figures(
    codec: ResourceCodec, describer: Describer, values: Tensor, seed: int, run: Run
) -> dict[str, dict[str, Any]]:
    """Figures of descriptions where the vector is not that of the row, which must be near 0: a ``zero`` vector, another
    row's (``shuffled``), and that of the same configuration of another tool (``other_tool``). Each has ``rows``,
    ``exact_match`` and what :func:`field_figures` has."""
    rng = generator(seed, "controls")
    values = values[torch.randperm(len(values), generator=rng)[:CONTROLLED]]
    embeddings, template = codec.embed(values), codec.schema.templates[0]
    vectors = {"zero": torch.zeros_like(embeddings), "shuffled": embeddings.roll(1, 0)}
    if len(codec.schema.tools) > 1:
        other = values.clone()
        step = torch.randint(1, len(codec.schema.tools), (len(values),), generator=rng)
        other[:, 0] = (other[:, 0] + step) % len(codec.schema.tools)
        vectors["other_tool"] = codec.embed(other)
    figures = {}
    advance = counted(run, "evaluation/controls", len(vectors) * len(values), "descriptions")
    for name, vector in vectors.items():
        reading = read_back(describer, codec.soft(vector), values, template, advance)
        exact = float(reading.exact.float().mean())
        figures[name] = {"rows": len(values), "exact_match": exact, **field_figures([reading], values, [template])}
    return figures


def controls(codec: ResourceCodec, describer: Describer, values: Tensor, seed: int) -> dict[str, float]:
    """Exact match of each of :func:`control_figures`."""
    figures = control_figures(codec, describer, values, seed, Run())
    return {name: figure["exact_match"] for name, figure in figures.items()}


def retrieval_figures(codec: ResourceCodec, values: Tensor, seed: int) -> dict[str, float]:
    """Share of the rows whose vector is nearest to that of the same row, or of one with the same values, by cosine:
    ``self_retrieval``, and ``jitter_retrieval`` with measured numbers that differ by up to 2 %."""
    embeddings = nn.functional.normalize(codec.embed(values), dim=1)
    measured = torch.tensor([dimension.measured and dimension.number for dimension in codec.schema.dimensions])
    factor = 1 + JITTER * (2 * torch.rand(values.shape, generator=generator(seed, "jitter"), dtype=torch.float64) - 1)
    jittered = nn.functional.normalize(codec.embed(torch.where(measured, values * factor, values)), dim=1)
    figures = {}
    for name, queries in (("self_retrieval", embeddings), ("jitter_retrieval", jittered)):
        nearest = torch.cat([(part @ embeddings.T).argmax(1) for part in torch.split(queries, NEIGHBOURS)])
        figures[name] = float((values[nearest] == values).all(1).float().mean())
    return figures
