"""Evaluation of an encoder: what the language model says of its vectors, beside controls that must fail."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from services.resource.codec import ResourceCodec
from services.resource.describe import Describer
from services.resource.texts import Template
from services.runtime.run import Run
from services.runtime.seeds import generator

BATCH = 256
"""Vectors that are described at once."""
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
    for part in torch.split(soft, BATCH):
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
    """Figures of the descriptions of ``values`` ``[rows, fields]`` by the templates of training: ``exact_match``,
    ``by_template``, ``field_accuracy`` by field, ``cross_entropy``, and ``digits``: share of right digits by place,
    from the last. ``name``: of the stage."""
    embeddings = codec.embed(values)
    templates = codec.schema.templates if codec.spec.augmentation.varies else codec.schema.templates[:1]
    run.stage(name, len(values) * len(templates), "descriptions")
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        run.advance(done)

    by_template, right, losses, digits = {}, [], [], defaultdict[int, list[bool]](list)
    for template in templates:
        reading = read_back(describer, codec.soft(embeddings), values, template, advance)
        by_template[template.name] = float(reading.exact.float().mean())
        right.append(reading.right)
        losses.append(cross_entropy(codec, describer, embeddings, values, template))
        for wanted, found in zip(values.tolist(), reading.values.tolist(), strict=True):
            _count_digits(template, wanted, found, digits)
    fields = torch.cat(right).float().mean(0).tolist()
    return {
        "exact_match": sum(by_template.values()) / len(by_template),
        "by_template": by_template,
        "field_accuracy": dict(zip(codec.schema.names, fields, strict=True)),
        "cross_entropy": sum(losses) / len(losses),
        "digits": {place: sum(hits) / len(hits) for place, hits in sorted(digits.items())},
    }


@torch.no_grad()
def cross_entropy(
    codec: ResourceCodec, describer: Describer, embeddings: Tensor, values: Tensor, template: Template
) -> float:
    """Mean cross-entropy per token of the descriptions of ``values`` by a template."""
    total = 0.0
    for part, rows in zip(torch.split(embeddings, BATCH), torch.split(values, BATCH), strict=True):
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


def controls(codec: ResourceCodec, describer: Describer, values: Tensor, seed: int) -> dict[str, float]:
    """Exact match where the vector is not that of the row, which must be near 0: a ``zero`` vector, another row's
    (``shuffled``), and the same configuration of another tool (``other_tool``)."""
    rng = generator(seed, "controls")
    values = values[torch.randperm(len(values), generator=rng)[:CONTROLLED]]
    embeddings, template = codec.embed(values), codec.schema.templates[0]
    vectors = {"zero": torch.zeros_like(embeddings), "shuffled": embeddings.roll(1, 0)}
    if len(codec.schema.tools) > 1:
        other = values.clone()
        step = torch.randint(1, len(codec.schema.tools), (len(values),), generator=rng)
        other[:, 0] = (other[:, 0] + step) % len(codec.schema.tools)
        vectors["other_tool"] = codec.embed(other)
    return {
        name: float(read_back(describer, codec.soft(vector), values, template).exact.float().mean())
        for name, vector in vectors.items()
    }


def retrieval_figures(codec: ResourceCodec, values: Tensor, seed: int) -> dict[str, float]:
    """Share of the rows whose vector is nearest to that of the same row, or of one with the same values, by cosine:
    ``self_retrieval``, and ``jitter_retrieval`` with measured numbers that differ by up to 2 %."""
    embeddings = nn.functional.normalize(codec.embed(values), dim=1)
    measured = torch.tensor([dimension.measured and dimension.number for dimension in codec.schema.dimensions])
    factor = 1 + JITTER * (2 * torch.rand(values.shape, generator=generator(seed, "jitter"), dtype=torch.float64) - 1)
    jittered = nn.functional.normalize(codec.embed(torch.where(measured, values * factor, values)), dim=1)
    figures = {}
    for name, queries in (("self_retrieval", embeddings), ("jitter_retrieval", jittered)):
        nearest = torch.cat([(part @ embeddings.T).argmax(1) for part in torch.split(queries, BATCH)])
        figures[name] = float((values[nearest] == values).all(1).float().mean())
    return figures
