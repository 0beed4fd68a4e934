"""What a trained encoder was made with, found again and checked: its language model and its table."""

from __future__ import annotations

from pathlib import Path

from ethogram.errors import InvalidInput
from services.language.models import LanguageModel, load_language_model
from services.resource.codec import ResourceCodec
from services.resource.data import Table, read_measurements, read_tools
from services.resource.schema import Schema
from services.runtime.cache import cache_folder
from services.runtime.folders import artifact_in

DEFAULT = "default"
OUTPUT = "language_model"
"""Where a run keeps the default language model."""


def located(name: str, field: str = "llm_model") -> str:
    """``name`` of a language model, or its folder where ``name`` is the folder of the run that made it. Raises
    :class:`InvalidInput` of ``field``."""
    return str(artifact_in(Path(name), "language-model", field)) if Path(name).exists() else name


def language_model_for(
    codec: ResourceCodec,
    name: str | None = None,
    device: str = "cpu",
    field: str = "llm_model",
    *,
    run: Path | None = None,
) -> LanguageModel:
    """The language model that ``codec`` was trained with, on ``device``; ``name``: its folder or name on the Hub, by
    default where it was then. The default one is also looked for in the cache, and in ``run``, the folder of the run.

    Raises :class:`InvalidInput` of ``field`` for a model that is not there, and for another one, or one with another
    tokenizer.
    """
    trained = Path(str(codec.about.get("language_model", "")))
    name = located(name, field) if name and name != DEFAULT else _where(codec, trained, run, field)
    # The digest is that of the weights in this precision.
    dtype = str(codec.about.get("language_model_dtype", "auto"))
    language = load_language_model(name, device, dtype, field=field)
    check_language_model(codec, language, field)
    return language


def _where(codec: ResourceCodec, trained: Path, run: Path | None, field: str) -> str:
    """Where the language model is that was at ``trained`` in training."""
    if trained.exists() or not trained.is_absolute():
        return str(trained)
    if codec.spec.llm_model == DEFAULT and codec.spec.language_model is None:
        # Caches differ from machine to machine; the name in them does not.
        kept = cache_folder(f"language-models/{trained.parent.name}") / trained.name
        for folder in (kept, *([] if run is None else [run / OUTPUT])):
            if folder.exists():
                return str(folder)
        # One that is trained here may differ in its last bits, and would be refused.
        text = "the default language model that the encoder was trained with is not on this machine"
        advice = f"take the folder {OUTPUT} of the encoder's run: name it, or copy it to {kept}"
        raise InvalidInput.field(field, f"{text}; {advice}")
    text = f"{trained}, the language model that the encoder was trained with, is no longer there; name its folder"
    raise InvalidInput.field(field, text)


def check_language_model(codec: ResourceCodec, language: LanguageModel, field: str = "llm_model") -> None:
    """Raise :class:`InvalidInput` of ``field`` unless ``language`` is the model that ``codec`` was trained with."""
    trained, wanted = codec.about.get("language_model", "another one"), codec.hidden
    hidden = int(language.model.get_input_embeddings().weight.shape[1])
    if hidden != wanted:
        text = f"{language.name} has the hidden size {hidden}, and the encoder was trained with {wanted} ({trained})"
        raise InvalidInput.field(field, text)
    for key, digest, what in (
        ("language_model_digest", language.digest, "is not the language model"),
        ("tokenizer_digest", language.tokenizer_digest, "does not have the tokenizer"),
    ):
        if codec.about.get(key, digest) != digest:
            raise InvalidInput.field(field, f"{language.name} {what} that the encoder was trained with ({trained})")


def table_for(
    codec: ResourceCodec, profiling: Path | None = None, tools: Path | None = None, *, partial: bool = False
) -> Table:
    """The measurements in ``profiling``, by default those that ``codec`` was trained on; ``tools``: the registry.
    ``partial``: there need not be a row of every tool.

    Raises :class:`InvalidInput` for a file that cannot be read, a registry that is not the encoder's, and without
    measurements.
    """
    if tools is not None:
        check_tools(codec, read_tools(tools, "tool_registry"))
    if profiling is not None:
        schema = codec.schema
        return read_measurements(
            profiling,
            schema.spec,
            schema.tools,
            "profiling_data",
            every_tool=not partial,
            inferred=schema.inferred,
        )
    if codec.table is None:
        text = "is missing: the encoder was saved without its measurements"
        raise InvalidInput.field("profiling_data", text)
    return codec.table


def check_schema(codec: ResourceCodec, schema: Schema) -> None:
    """Raise :class:`InvalidInput` unless ``schema`` is the one that the encoder was trained with."""
    check_tools(codec, schema.tools)
    trained, given = codec.schema.spec.model_dump(), schema.spec.model_dump()
    if trained != given:
        names = [name for name in trained if trained[name] != given[name]]
        raise InvalidInput.field("table", f"has another schema than the encoder was trained with ({', '.join(names)})")


def check_tools(codec: ResourceCodec, tools: tuple[str, ...]) -> None:
    """Raise :class:`InvalidInput` unless ``tools`` is the registry that the encoder was trained with."""
    if codec.schema.tools != tools:
        there, here = ", ".join(codec.schema.tools), ", ".join(tools)
        raise InvalidInput.field("tool_registry", f"the encoder was trained with {there}, and the registry has {here}")
