"""The export: a vector of each configuration of a table, as the rows of a classifier head, and what they stand for."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from ethogram.errors import InvalidInput
from ethogram.specs.resource import SchemaSpec
from services.artifacts.backends import sha256_of
from services.resource.codec import CHUNK, ResourceCodec
from services.resource.data import Table
from services.resource.schema import TOOL, Schema
from services.resource.sources import check_schema
from services.runtime.reading import first_line, reading
from services.runtime.tensors import write_tensors

WEIGHTS, TENSORS = "config_weights.pt", "config_weights.safetensors"
LOOKUP, MASKS, ABOUT = "config_lookup.json", "tool_mask_map.json", "export.json"
ENCODER, CHECKPOINTS = "pretrained_encoder.pt", "snapshot-*/encoder_checkpoint_epoch*.pt"
FILES = (WEIGHTS, TENSORS, ENCODER, LOOKUP, MASKS)
"""What every export has, beside :data:`ABOUT`."""
TOOL_NAME = "tool_name"
"""Field of the tool in the lookup."""


class Export(NamedTuple):
    """What an export holds."""

    weights: Tensor
    """A vector of each configuration, ``[configurations, size]``, float32."""
    lookup: dict[str, dict[str, Any]]
    """Its fields, by its id as text."""
    masks: dict[str, list[int]]
    """Ids of the configurations of each tool."""
    schema: Schema
    files: dict[str, str]
    """SHA-256 of each file, by its name."""

    @property
    def digest(self) -> str:
        """SHA-256 of all files."""
        return hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()


def checkpoint_name(epoch: float) -> str:
    """Name of the file of an encoder during training."""
    return f"encoder_checkpoint_epoch{epoch:g}.pt"


def write_checkpoint(codec: ResourceCodec, file: Path) -> None:
    """Write an encoder as one file, which torch loads with ``weights_only``."""
    state = {name: tensor.cpu() for name, tensor in codec.model.state_dict().items()}
    content = {"model_state_dict": state, "config": codec.config(), "epoch": codec.about.get("epoch", 0.0)}
    if codec.table is not None:
        content["table"] = codec.table.values
    torch.save(content, file)


def read_checkpoint(file: Path, device: str = "cpu", field: str = "encoder_checkpoint") -> ResourceCodec:
    """The encoder in a file of :func:`write_checkpoint`. Raises :class:`InvalidInput` of ``field``."""
    with reading(file.parent, file.name, "encoder", field):
        content = _loaded(file, field)
        return ResourceCodec.of(content["config"], content["model_state_dict"], content.get("table"), device)


def _loaded(file: Path, field: str) -> dict[str, Any]:
    """What :func:`torch.save` wrote. Raises :class:`InvalidInput` of ``field`` for anything but weights."""
    try:
        content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InvalidInput.field(field, f"{file} is not a file of weights ({first_line(error)})") from None
    return content


def export(
    codec: ResourceCodec,
    table: Table,
    folder: Path,
    checkpoints: Sequence[Path] = (),
    *,
    batch_size: int = CHUNK,
) -> Export:
    """Write the vectors of ``table`` into ``folder``, with copies of ``checkpoints``: files of the encoder during its
    training. ``batch_size``: configurations that pass through the encoder at once. Raises :class:`InvalidInput` for a
    table of another schema or registry than the encoder's."""
    check_schema(codec, table.schema)
    folder.mkdir(parents=True, exist_ok=True)
    weights = torch.cat([codec.embed(part) for part in torch.split(table.values, batch_size)])
    content = {"weights": weights, "num_configs": len(weights), "hidden_dim": weights.shape[1]}
    torch.save(content, folder / WEIGHTS)
    write_tensors(folder / TENSORS, {"weights": weights})
    write_checkpoint(codec, folder / ENCODER)
    copies = [Path(shutil.copy2(file, folder)).name for file in checkpoints]
    lookup = {str(index): fields(table.schema, row) for index, row in enumerate(table.values.tolist())}
    masks = {tool: (table.tools == index).nonzero().flatten().tolist() for index, tool in enumerate(table.schema.tools)}
    for name, value in ((LOOKUP, lookup), (MASKS, masks)):
        (folder / name).write_text(json.dumps(value, indent=1), encoding="utf-8")
    hashes = {name: sha256_of(folder / name) for name in (*FILES, *copies)}
    about = {
        "files": hashes,
        "schema": table.schema.spec.model_dump(mode="json"),
        "tools": list(table.schema.tools),
        "table": table.digest,
        "encoder": codec.about,
    }
    (folder / ABOUT).write_text(json.dumps(about, indent=2), encoding="utf-8")
    return Export(weights, lookup, masks, table.schema, hashes)


def fields(schema: Schema, row: Sequence[float]) -> dict[str, Any]:
    """A configuration as the lookup has it."""
    values = named(schema, row)
    return {TOOL_NAME: values.pop(TOOL), **values}


def named(schema: Schema, row: Sequence[float]) -> dict[str, Any]:
    """A vector ``[fields]`` by names: labels of categories, and counts, which have no unit, as integers."""
    values: dict[str, Any] = {}
    for dimension, value in zip(schema.dimensions, row, strict=True):
        count = not dimension.unit and float(value).is_integer()
        values[dimension.name] = dimension.labels[int(value)] if dimension.labels else int(value) if count else value
    return values


def validate(folder: Path) -> Export:
    """Read an export and check that its parts fit together.

    Raises :class:`InvalidInput` for a file that is missing, was changed, or does not fit the others: a vector for each
    configuration, finite, no two of them equal, and each configuration in the list of its tool and in no other.
    """
    with reading(folder, ABOUT, "export") as path:
        about = json.loads(path.read_text(encoding="utf-8"))
        hashes = {str(name): str(sha256) for name, sha256 in about["files"].items()}
        schema = Schema(SchemaSpec.model_validate(about["schema"]), tuple(about["tools"]))
    if missing := [name for name in FILES if name not in hashes]:
        raise InvalidInput.field(ABOUT, f"has no hash of {missing[0]}; export again")
    for name, sha256 in hashes.items():
        with reading(folder, name, "export") as path:
            if sha256_of(path) != sha256:
                raise InvalidInput.field(name, "was changed since the export; export again")
    with reading(folder, WEIGHTS, "export") as path:
        content = _loaded(path, WEIGHTS)
        weights: Tensor = content["weights"]
        if weights.shape != (content["num_configs"], content["hidden_dim"]):
            raise InvalidInput.field(WEIGHTS, f"has weights {list(weights.shape)}, not as its own numbers say")
        if not bool(weights.isfinite().all()):
            raise InvalidInput.field(WEIGHTS, "has a weight that is NaN or infinite")
    with reading(folder, TENSORS, "export") as path:
        if not torch.equal(load_file(path)["weights"], weights):
            raise InvalidInput.field(TENSORS, f"has other weights than {WEIGHTS}")
    with reading(folder, LOOKUP, "export") as path:
        lookup: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    # Repeated measurements may be equal.
    different = len({json.dumps(row) for row in lookup.values()})
    if len(torch.unique(weights, dim=0)) < different:
        raise InvalidInput.field(WEIGHTS, "has the same vector for two configurations")
    if list(lookup) != [str(index) for index in range(len(weights))]:
        raise InvalidInput.field(LOOKUP, f"has other configurations than the {len(weights)} of {WEIGHTS}")
    with reading(folder, MASKS, "export") as path:
        masks: dict[str, list[int]] = json.loads(path.read_text(encoding="utf-8"))
        listed = {index: tool for tool, indices in masks.items() for index in indices}
        if sum(map(len, masks.values())) != len(weights) or any(
            listed.get(int(index)) != row[TOOL_NAME] for index, row in lookup.items()
        ):
            raise InvalidInput.field(MASKS, f"has not each configuration of {LOOKUP} in the list of its tool alone")
    return Export(weights, lookup, masks, schema, hashes)
