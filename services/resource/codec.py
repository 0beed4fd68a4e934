"""A trained encoder: configurations to vectors. Needs no language model, unless it is to describe what it embeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ethogram.errors import InvalidInput, Violation
from ethogram.specs.resource import MOST, ResourceSpec, SchemaSpec
from services.resource.model import ResourceEncoder
from services.resource.schema import Schema
from services.runtime.reading import reading
from services.runtime.tensors import write_tensors

CONFIG, WEIGHTS = "encoder.json", "encoder.safetensors"
FORMAT = 1
UNKNOWN = "unknown"
"""What stands for the value of a dimension that is not known."""
CHUNK = 4096
"""Vectors that go through the encoder at once."""


class ResourceCodec:
    """An encoder with its schema; see :meth:`load`."""

    def __init__(
        self, spec: ResourceSpec, schema: Schema, model: ResourceEncoder, about: Mapping[str, Any] | None = None
    ) -> None:
        """``about``: what it was trained with: digests of the table and the language model, and that model's name."""
        self.spec, self.schema, self.model = spec, schema, model.eval()
        self.about = dict(about or {})

    @property
    def device(self) -> torch.device:
        return self.model.gain.device

    @property
    def hidden(self) -> int:
        """The language model's hidden size."""
        return self.model.tool_vectors.shape[1]

    @property
    def size(self) -> int:
        """Length of an embedding: soft tokens times the language model's hidden size."""
        return self.spec.encoder.tokens * self.hidden

    def vectors(self, rows: Sequence[Mapping[str, Any]], field: str = "rows") -> tuple[Tensor, Tensor]:
        """Vectors ``[rows, fields]``, float64, of configurations by name, and which fields are unknown: those that are
        ``unknown`` or None, and measured dimensions that are left out.

        Raises :class:`InvalidInput` that names the row and the field for a tool, a label or a field that the schema
        does not have, a number that is not finite or negative, a missing value, and an unknown tool.
        """
        values = torch.zeros(len(rows), len(self.schema.dimensions), dtype=torch.float64)
        unknown = torch.zeros_like(values, dtype=torch.bool)
        wrong: list[Violation] = []
        for number, row in enumerate(rows):
            for name in row.keys() - set(self.schema.names):
                wrong.append(
                    Violation(
                        f"{field}.{number}.{name}", f"there is no such field; there are {', '.join(self.schema.names)}"
                    )
                )
            for index, dimension in enumerate(self.schema.dimensions):
                value, where = row.get(dimension.name), f"{field}.{number}.{dimension.name}"
                if (value is None and dimension.name in row) or (value == UNKNOWN and UNKNOWN not in dimension.labels):
                    known = False
                else:
                    known = dimension.name in row
                    if not known and not dimension.measured:
                        wrong.append(Violation(where, "is missing; give its value, or unknown"))
                        continue
                if not known:
                    if index == 0:
                        wrong.append(Violation(where, "the tool must be known"))
                    unknown[number, index] = True
                elif dimension.number:
                    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MOST:
                        wrong.append(Violation(where, f"must be a number from 0 to {MOST}, not {value!r}"))
                    else:
                        values[number, index] = value
                elif value not in dimension.labels:
                    wrong.append(Violation(where, f"{value!r} is none of {', '.join(dimension.labels)}"))
                else:
                    values[number, index] = dimension.labels.index(str(value))
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise InvalidInput(f"{wrong[0].field}: {wrong[0].description}{more}", wrong)
        return values, unknown

    def outside(self, values: Tensor, unknown: Tensor) -> list[list[str]]:
        """Names of the numbers of each row that are outside the range of training; embeddings of these are less
        exact."""
        names = []
        for row, hidden in zip(values.tolist(), unknown.tolist(), strict=True):
            names.append(
                [
                    dimension.name
                    for value, masked, dimension in zip(row, hidden, self.schema.dimensions, strict=True)
                    if dimension.number and not masked and not (dimension.low or 0) <= value <= (dimension.high or MOST)
                ]
            )
        return names

    @torch.no_grad()
    def embed(self, values: Tensor, unknown: Tensor | None = None) -> Tensor:
        """Embeddings ``[rows, size]``, float32 on the CPU, of vectors ``[rows, fields]``."""
        unknown = torch.zeros_like(values, dtype=torch.bool) if unknown is None else unknown
        parts = [
            self.model(part.to(self.device), hidden.to(self.device)).flatten(1).float().cpu()
            for part, hidden in zip(torch.split(values, CHUNK), torch.split(unknown, CHUNK), strict=True)
        ]
        return torch.cat(parts) if parts else torch.zeros(0, self.size)

    def soft(self, embeddings: Tensor) -> Tensor:
        """Embeddings ``[rows, size]`` as soft tokens ``[rows, tokens, hidden]``."""
        return torch.unflatten(embeddings, 1, (self.spec.encoder.tokens, -1))

    def save(self, folder: Path) -> None:
        """Write ``encoder.json`` and ``encoder.safetensors`` into ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / WEIGHTS, self.model.state_dict())
        (folder / CONFIG).write_text(json.dumps(self.config(), indent=2), encoding="utf-8")

    def config(self) -> dict[str, Any]:
        """All but the tensors, as JSON has it."""
        return {
            "format": FORMAT,
            "spec": self.spec.model_dump(mode="json"),
            "schema": self.schema.spec.model_dump(mode="json"),
            "tools": list(self.schema.tools),
            **self.about,
        }

    @staticmethod
    def load(folder: Path, device: str = "cpu") -> ResourceCodec:
        """Read what :meth:`save` wrote. Raises :class:`InvalidInput`."""
        with _reading(folder, CONFIG) as path:
            config = json.loads(path.read_text(encoding="utf-8"))
            if config["format"] != FORMAT:
                raise InvalidInput.field(path.name, f"has format {config['format']!r}; this version reads {FORMAT}")
        with _reading(folder, WEIGHTS) as path:
            return ResourceCodec.of(config, load_file(path), device)

    @staticmethod
    def of(config: Mapping[str, Any], state: Mapping[str, Tensor], device: str = "cpu") -> ResourceCodec:
        """The encoder with this :meth:`config` and these weights."""
        spec = ResourceSpec.model_validate(config["spec"])
        schema = Schema(SchemaSpec.model_validate(config["schema"]), tuple(config["tools"]))
        values = torch.zeros(2, len(schema.dimensions), dtype=torch.float64)
        model = ResourceEncoder(spec.encoder, schema, values, state["tool_vectors"], torch.Generator())
        model.load_state_dict(state)
        about = {name: value for name, value in config.items() if name not in ("format", "spec", "schema", "tools")}
        return ResourceCodec(spec, schema, model.to(device), about)


_reading = partial(reading, what="resource encoder")
