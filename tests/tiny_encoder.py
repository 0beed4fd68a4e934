"""A tiny encoder of configurations with random weights, and the random language model of characters behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex
from tokenizers.decoders import Fuse
from tokenizers.pre_tokenizers import Split

from ethogram.specs.resource import ResourceSpec, SchemaSpec
from services.language.models import load_language_model
from services.resource.codec import ResourceCodec
from services.resource.data import Table
from services.resource.describe import Describer
from services.resource.model import ResourceEncoder
from services.resource.schema import Schema
from tests.tiny_models import words_tokenizer

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 :;,._{}[]"
SCHEMA = {
    "dimensions": [
        {"name": "size", "labels": ["small", "large"], "column": "input_size"},
        {"name": "cores", "levels": [2, 4, 8], "low": 1, "high": 8, "price": 1.0, "unit": "cores"},
        {"name": "memory", "levels": [4, 8, 16], "low": 4, "high": 16, "price": 0.5},
        {"name": "latency", "low": 0, "high": 1000, "measured": True, "decimals": 1},
    ],
    "templates": [
        {"name": "short", "text": "{tool}: {size}, {cores} c, {memory} m, {latency}"},
        {"name": "other", "text": "{latency} of {tool} with {cores} and {memory}; {size}"},
    ],
}
TOOLS = ("read", "write")
ROWS: list[dict[str, Any]] = [
    {"tool": "read", "size": "small", "cores": 2, "memory": 4, "latency": 120.5},
    {"tool": "write", "size": "large", "cores": 8, "memory": 16, "latency": 40},
    {"tool": "write", "size": "small", "cores": 4, "memory": 8, "latency": "unknown"},
]


def save_characters(folder: Path) -> Path:
    """Save a language model whose tokens are characters."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        vocab_size=len(CHARACTERS) + 1,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = words_tokenizer(["<end>", *CHARACTERS])
    tokenizer.backend_tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    tokenizer.backend_tokenizer.decoder = Fuse()
    tokenizer.save_pretrained(folder)
    return folder


def random_encoder(language_folder: Path) -> ResourceCodec:
    """An encoder of :data:`SCHEMA` and the table of every configuration, whose latency has a known form."""
    values = {"llm_model": str(language_folder), "encoder": {"hidden_dim": 16, "heads": 2, "tokens": 2}}
    spec = ResourceSpec.model_validate(values)
    schema = Schema(SchemaSpec.model_validate(SCHEMA), TOOLS)
    rows = [
        [tool, size, cores, memory, 100.0 * (1 + tool) * (1 + 2 * size) / cores + 40 / memory]
        for tool in range(2)
        for size in range(2)
        for cores in (2, 4, 8)
        for memory in (4, 8, 16)
    ]
    table = Table(schema, torch.tensor(rows, dtype=torch.float64))
    language = load_language_model(str(language_folder))
    vectors = Describer(language, schema).tool_vectors()
    model = ResourceEncoder(spec.encoder, schema, table.values, vectors, torch.Generator().manual_seed(0))
    about = {
        "language_model": language.name,
        "language_model_digest": language.digest,
        "language_model_dtype": "float32",
    }
    return ResourceCodec(spec, schema, model, about, table)
