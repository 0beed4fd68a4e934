"""Tiny language models of many architectures, with a tokenizer of words, saved as users have them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

WORDS = ["<end>", *"abcdefghijklmnopqrst"]
TEXTS = [" ".join(WORDS[1 + (i * j) % 20] for j in range(1, 3 + i % 9)) for i in range(1, 90)]
# Larger than the vocabulary, where models need tokens of their own: images and padding.
_ROOM = 4

_TOKENS: dict[str, Any] = {"vocab_size": len(WORDS), "bos_token_id": 0, "eos_token_id": 0}
_LLAMA = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 32,
    **_TOKENS,
}
_VISION = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def _llava() -> Any:
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config={"model_type": "clip_vision_model", **_VISION},
            text_config={"model_type": "llama", **_LLAMA, "vocab_size": len(WORDS) + _ROOM},
            image_token_index=len(WORDS),
        )
    )


def _gemma3() -> Any:
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            vision_config={"model_type": "siglip_vision_model", **_VISION},
            text_config={**_LLAMA, "vocab_size": len(WORDS) + _ROOM, "pad_token_id": 0},
            image_token_index=len(WORDS),
            boi_token_index=len(WORDS) + 1,
            eoi_token_index=len(WORDS) + 2,
            mm_tokens_per_image=4,
        )
    )


def _qwen2_vl() -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}
    text = {**_LLAMA, "vocab_size": len(WORDS) + _ROOM, "rope_scaling": rope, "rope_parameters": rope}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    tokens: dict[str, Any] = {name: len(WORDS) + number for number, name in enumerate(names)}
    return transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(
            text_config=text,
            vision_config={"depth": 1, "embed_dim": 8, "hidden_size": 8, "num_heads": 2, "mlp_ratio": 2},
            **tokens,
        )
    )


MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=16, **_TOKENS)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LLAMA)),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            hidden_size=8,
            ffn_dim=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            word_embed_proj_dim=8,
            max_position_embeddings=32,
            pad_token_id=1,
            **_TOKENS,
        )
    ),
    # As published: two of the positions are for padding.
    "roberta": lambda: transformers.RobertaForMaskedLM(
        transformers.RobertaConfig(
            **{**_LLAMA, "max_position_embeddings": 18, "vocab_size": len(WORDS) + 1}, pad_token_id=1
        )
    ),
    "mpt": lambda: transformers.MptForCausalLM(
        transformers.MptConfig(d_model=8, n_heads=2, n_layers=2, max_seq_len=16, **_TOKENS)
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**_LLAMA, num_local_experts=2, num_experts_per_tok=1)
    ),
    # Its layers keep positions first.
    "xlnet": lambda: transformers.XLNetLMHeadModel(
        transformers.XLNetConfig(d_model=8, n_layer=2, n_head=2, d_inner=12, **_TOKENS)
    ),
    "gemma3": _gemma3,
    "llava": _llava,
    "qwen2_vl": _qwen2_vl,
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, vocab_size=len(WORDS))
    ),
}


def words_tokenizer(words: list[str] = WORDS, unknown: str | None = "<end>", **special: str) -> Any:
    """A tokenizer of ``words``, with ``<end>`` after a text unless ``special`` tokens are given."""
    made: Any = transformers.PreTrainedTokenizerFast
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=unknown))
    tokenizer.pre_tokenizer = Whitespace()
    return made(tokenizer_object=tokenizer, **(special or {"eos_token": "<end>"}))


def save_model(folder: Path, kind: str, tokenizer: Any = None) -> Path:
    """Save a tiny model of :data:`MODELS`, and its tokenizer or another one."""
    torch.manual_seed(0)
    MODELS[kind]().save_pretrained(folder)
    (tokenizer or words_tokenizer()).save_pretrained(folder)
    return folder


def token_sequences(context: int) -> torch.Tensor:
    """Tokens of :data:`TEXTS`, each with its end, joined and cut: ``[sequences, context]``."""
    stream = [WORDS.index(word) for text in TEXTS for word in [*text.split(), "<end>"]]
    return torch.tensor(stream[: len(stream) // context * context]).view(-1, context)
