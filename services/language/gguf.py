"""Language models from GGUF files, the format of llama.cpp: converted once to a folder that ``transformers`` reads."""

from __future__ import annotations

import copy
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ethogram.errors import InvalidInput, Unavailable
from services.language.models import load_language_model
from services.runtime.reading import first_line, reason_of

MAGIC = b"GGUF"
PACKAGES = ("gguf", "accelerate")
"""What ``transformers`` needs to read such a file."""


def import_gguf(file: Path, folder: Path, field: str = "FILE") -> dict[str, Any]:
    """Write the model and the tokenizer of ``file`` into the new ``folder``, in float32. Returns its ``architecture``,
    and the numbers of ``parameters``, ``layers``, of the ``hidden`` size and of the ``vocabulary``.

    Raises :class:`InvalidInput` of ``field`` for a file that is not GGUF, holds a part of a model, or one of an
    architecture or with weights that ``transformers`` cannot read; and :class:`Unavailable` without the packages that
    it needs.
    """
    _check(file, field)
    # They are optional.
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        text = f"reading GGUF files needs the {'package' if len(missing) == 1 else 'packages'} {' and '.join(missing)}"
        raise Unavailable(f"{text}: pip install -c constraints.txt -e '.[gguf]', or pip install {' '.join(missing)}")
    import transformers

    architecture = _architecture(file, field)
    options: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        made = Path(scratch, "model")
        try:
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(file.parent, **options)
            if config := getattr(transformers, "GgufConfig", None):
                options["quantization_config"] = config(dequantize=True)
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **options, dtype="float32")
            _plain(model).save_pretrained(made)
            tokenizer.save_pretrained(made)
        # The libraries raise anything for files that they do not know.
        except Exception as error:
            text = f"{file}, of the architecture {architecture}, cannot be converted ({first_line(error)})"
            raise InvalidInput.field(field, text) from None
        # What is left in the folder must be usable.
        language = load_language_model(str(made), field=field)
        language.tokenize(["0123456789"])
        config = language.model.config.get_text_config()
        figures = {
            "architecture": architecture,
            "parameters": sum(parameter.numel() for parameter in language.model.parameters()),
            "layers": config.num_hidden_layers,
            "hidden": config.hidden_size,
            "vocabulary": language.embeddings,
        }
        shutil.move(made, folder)
    return figures


def _check(file: Path, field: str) -> None:
    """Raise :class:`InvalidInput` unless ``file`` begins as a GGUF file does."""
    try:
        with file.open("rb") as data:
            start = data.read(len(MAGIC))
    except OSError as error:
        raise InvalidInput.field(field, f"{file} cannot be read ({reason_of(error)})") from None
    if start != MAGIC:
        raise InvalidInput.field(field, f"{file} is not a GGUF file")


def _architecture(file: Path, field: str) -> str:
    """The architecture of the model in ``file``. Raises :class:`InvalidInput` for a file without a whole model."""
    from gguf import GGUFReader

    try:
        fields = GGUFReader(file).fields
        architecture = str(fields["general.architecture"].contents())
        parts = fields["split.count"].contents() if "split.count" in fields else 1
        kind = str(fields["general.type"].contents()) if "general.type" in fields else "model"
    # Its parser raises anything for a file that is cut off.
    except Exception as error:
        raise InvalidInput.field(field, f"{file} is a broken GGUF file ({first_line(error)})") from None
    if parts > 1:
        raise InvalidInput.field(field, f"{file} is one of {parts} parts; merge them with llama-gguf-split first")
    if kind != "model":
        raise InvalidInput.field(field, f"{file} holds a {kind}, not a whole model")
    return architecture


def _plain(model: Any) -> Any:
    """The model without the mark of a quantized one, which ``transformers`` refuses to save."""
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    return plain.to(model.dtype)
