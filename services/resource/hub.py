"""Upload encoders, their exports and the default language model to the Hugging Face Hub and download them: a model
repository with a folder of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ethogram.specs.base import HubSpec
from services.artifacts.hub import Repository, fetch
from services.resource.codec import ResourceCodec
from services.resource.export import validate
from services.resource.sources import OUTPUT, check_schema

ENCODER, EXPORT = "encoder", "export"
CARD = """---
library_name: ethogram
tags:
- tabular
- embeddings
---

# {repo}

An encoder of configurations: {count} fields of {tools} tools ({names}) become a vector of {size} numbers, {tokens} soft
token{plural} of the language model {language}, which describes it. `encoder/` holds the encoder and the {rows}
measurements that it was trained on.{export}{reader}

```python
from services.resource.codec import ResourceCodec
from services.resource.hub import pull

codec = ResourceCodec.load(pull("{repo}") / "encoder")
embeddings = codec.embed(*codec.vectors([{example}]))
```
"""
_READER = "\n`language_model/` holds the language model, which `describe` finds there."
_EXPORT = "\n`export/` holds the vectors of {configurations} configurations as the rows of a classifier head."


def push(
    encoder: Path,
    export: Path | None,
    spec: HubSpec,
    field: str = "spec.hub.repo",
    *,
    language_model: Path | None = None,
) -> None:
    """Upload an encoder, its export and its ``language_model`` with a model card, in one commit. ``field``: where the
    repository was named, for error messages.

    Raises :class:`InvalidInput` for a folder that is no encoder or no export, for an export of another schema or
    registry, and without permission; and :class:`Unavailable` if the Hub cannot be reached.
    """
    codec = ResourceCodec.load(encoder)
    found = None if export is None else validate(export)
    if found is not None:
        check_schema(codec, found.schema)
    repository = Repository(spec, "model", field)
    repository.open()
    files: dict[str, Path | bytes] = {
        "README.md": _card(codec, spec, found and len(found.weights), language_model is not None).encode()
    }
    for name, folder in ((ENCODER, encoder), (EXPORT, export), (OUTPUT, language_model)):
        if folder is not None:
            files |= {f"{name}/{file.name}": file for file in sorted(folder.iterdir()) if file.is_file()}
    repository.upload(files, "An encoder of configurations")


def pull(repo: str, parts: Sequence[str] = (ENCODER, EXPORT, OUTPUT), field: str = "REPO") -> Path:
    """Download an encoder, its export and its language model, or only ``parts``. Returns their folder in the Hub's
    cache."""
    return fetch(repo, "model", [f"{part}/*" for part in parts], field=field)


def _card(codec: ResourceCodec, spec: HubSpec, configurations: int | None, reader: bool) -> str:
    schema, tokens = codec.schema, codec.spec.encoder.tokens
    # Of a folder its path says nothing elsewhere.
    language = codec.spec.llm_model if codec.spec.language_model is None else "of the user's own"
    example = {
        dimension.name: dimension.labels[0] if dimension.labels else dimension.low or 0.0
        for dimension in schema.dimensions
        if not dimension.measured
    }
    return CARD.format(
        repo=spec.repo,
        count=len(schema.names),
        tools=len(schema.tools),
        names=", ".join(schema.tools),
        size=codec.size,
        tokens=tokens,
        plural="" if tokens == 1 else "s",
        language=Path(language).name,
        rows="" if codec.table is None else f"{len(codec.table):,}",
        reader=_READER if reader else "",
        export="" if configurations is None else _EXPORT.format(configurations=f"{configurations:,}"),
        example=example,
    )
