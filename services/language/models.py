"""Causal language models of ``transformers``, frozen, by folder or by name on the Hugging Face Hub."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ethogram.errors import InvalidInput
from services.artifacts.hub import fetch

# Raised by transformers for files that are missing, broken, or hold something else.
_LOAD_ERRORS = (OSError, ValueError, TypeError, AttributeError, LookupError, ImportError, RuntimeError, SafetensorError)


@dataclass(frozen=True)
class LanguageModel:
    """A model and its tokenizer."""

    name: str
    """Folder or name that it was loaded by."""
    model: Any
    """``transformers`` model, in evaluation mode; no parameter requires a gradient."""
    tokenizer: Any

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the configuration and the weights."""
        digest = hashlib.sha256(self.model.config.to_json_string().encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def load_language_model(
    name: str, device: str = "cpu", dtype: str | torch.dtype = "auto", *, field: str = "model"
) -> LanguageModel:
    """Load the model ``name`` onto ``device``; ``dtype`` ``auto``: the precision that its weights were saved in.

    Only safetensors weights are read, and no code of the repository runs. Raises :class:`InvalidInput` of ``field`` for
    what cannot be loaded, and :class:`ethogram.errors.Unavailable` without a Hub.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(name)
    if not folder.exists():
        if folder.is_absolute() or name.count("/") > 1:
            raise InvalidInput.field(field, f"{name} does not exist")
        include = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
        folder = fetch(name, "model", include, ["*/*"], field=field, described=f"{name}, which is not a folder here")
    safe: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, **safe)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, dtype=dtype, **safe)
    except _LOAD_ERRORS as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        text = f"{name} cannot be loaded as a causal language model with safetensors weights ({reason})"
        raise InvalidInput.field(field, text) from None
    tokens, embeddings = len(tokenizer), model.get_input_embeddings().num_embeddings
    if tokens > embeddings:
        text = f"its tokenizer has {tokens} tokens and the model {embeddings}; give a model with its own tokenizer"
        raise InvalidInput.field(field, text)
    return LanguageModel(name, model.eval().requires_grad_(False).to(device), tokenizer)
