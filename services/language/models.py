"""Causal language models of ``transformers``, frozen, by folder or by name on the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ethogram.errors import InvalidInput
from services.artifacts.hub import fetch
from services.runtime.reading import first_line


@dataclass(frozen=True)
class LanguageModel:
    """A model and its tokenizer."""

    name: str
    """Folder or name that it was loaded by."""
    folder: Path
    """Where its files are."""
    model: Any
    """``transformers`` model, in evaluation mode; no parameter requires a gradient."""
    tokenizer: Any
    field: str
    """Where errors say that it was named."""
    embeddings: int
    """Tokens that the model has embeddings of, from 0 on."""
    missing: Sequence[str]
    """Weights of the model's head that its files lack: they are random."""

    @property
    def end_of_text(self) -> int:
        """The token between two texts. Raises :class:`InvalidInput` for a tokenizer that has none."""
        for token in (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id):
            if token is not None:
                self._check([token])
                return int(token)
        raise InvalidInput.field(self.field, "its tokenizer has no token for the end of a text (eos_token, sep_token)")

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, without special ones. Raises :class:`InvalidInput` for texts that the tokenizer
        cannot process, and for tokens that the model has no embedding of."""
        try:
            tokens: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        # The library of tokenizers raises the base class.
        except Exception as error:
            raise InvalidInput.field(self.field, f"its tokenizer fails on a text ({first_line(error)})") from None
        for row in tokens:
            self._check(row)
        return tokens

    def _check(self, tokens: Sequence[int | None]) -> None:
        for token in tokens:
            # A tokenizer that is larger than its model does no harm until such a token occurs.
            if token is None or not 0 <= token < self.embeddings:
                name = "None" if token is None else f"{self.tokenizer.convert_ids_to_tokens(token)!r} ({token})"
                text = (
                    f"its tokenizer gives the token {name}, and the model has embeddings of 0 to {self.embeddings - 1}"
                )
                raise InvalidInput.field(self.field, f"{text}; give a model with its own tokenizer")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the configuration and the weights."""
        config = json.loads(self.model.config.to_json_string())
        # That of the installed library, not of the model.
        config.pop("transformers_version", None)
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @cached_property
    def tokenizer_digest(self) -> str:
        """SHA-256 of the tokenizer's vocabulary and rules."""
        fast = getattr(self.tokenizer, "backend_tokenizer", None)
        rules = fast.to_str() if fast is not None else json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        special = {name: str(token) for name, token in sorted(self.tokenizer.special_tokens_map.items())}
        return hashlib.sha256(f"{rules} {special}".encode()).hexdigest()


def load_language_model(
    name: str, device: str = "cpu", dtype: str | torch.dtype = "auto", *, field: str = "model"
) -> LanguageModel:
    """Load the model ``name`` onto ``device``; ``dtype`` ``auto``: the precision that its weights were saved in.

    Of a model that processes images too its whole is loaded. Only safetensors weights are read, and no code of the
    repository runs. Raises :class:`InvalidInput` of ``field`` for what cannot be loaded or has not all its weights but
    those of the head, and :class:`ethogram.errors.Unavailable` without a Hub.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoTokenizer,
    )

    folder = Path(name)
    if not folder.exists():
        if folder.is_absolute() or name.count("/") > 1:
            raise InvalidInput.field(field, f"{name} does not exist")
        include = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
        folder = fetch(name, "model", include, ["*/*"], field=field, described=f"{name}, which is not a folder here")
    safe: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    try:
        config: Any = type(AutoConfig.from_pretrained(folder, **safe))
        images = config in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and config not in MODEL_FOR_CAUSAL_LM_MAPPING
        loader: Any = AutoModelForImageTextToText if images else AutoModelForCausalLM
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, **safe)
        safe |= {"use_safetensors": True, "dtype": dtype, "output_loading_info": True}
        model, info = loader.from_pretrained(folder, **safe)
        embeddings = len(model.get_input_embeddings().weight)
    # Files that are missing, broken, or hold something else: the libraries raise anything, the base class too.
    except Exception as error:
        text = f"{name} cannot be loaded as a causal language model with safetensors weights ({first_line(error)})"
        raise InvalidInput.field(field, text) from None
    tensors, missing = model.state_dict(keep_vars=True), sorted(info["missing_keys"])
    inner = {id(tensor) for tensor in model.base_model.state_dict(keep_vars=True).values()}
    if lacking := [weight for weight in missing if id(tensors.get(weight)) in inner]:
        text = f"{name} lacks {len(lacking)} of the weights of {type(model).__name__}, first {lacking[0]}"
        raise InvalidInput.field(field, f"{text}; give a folder with all of them")
    return LanguageModel(
        name, folder, model.eval().requires_grad_(False).to(device), tokenizer, field, embeddings, missing
    )
