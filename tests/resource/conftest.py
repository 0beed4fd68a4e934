"""A small table of two tools, and tiny frozen language models that read any text."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ethogram.specs.resource import DecoderSpec, ReaderSpec, ResourceSpec, SchemaSpec
from services.language.models import LanguageModel, load_language_model
from services.resource.data import Table, read_measurements, read_tools
from services.resource.describe import Describer
from services.resource.train import ResourceTrainer
from tests.conftest import Once

SCHEMA: dict[str, Any] = {
    "dimensions": [
        {"name": "size", "labels": ["small", "large"]},
        {"name": "cores", "column": "cpu", "levels": [1, 2, 4, 8], "price": 1.0},
        {"name": "latency_ms", "unit": "ms", "low": 1, "high": 999, "measured": True},
    ],
    "templates": [
        {"name": "plain", "text": "{tool} {size} c {cores} ms {latency_ms}"},
        {"name": "reordered", "text": "{latency_ms} ms: {cores} cores, {size} {tool}."},
    ],
}
TOOLS = ("detect", "translate")
COLUMNS = ("tool", "size", "cpu", "latency_ms")


def rows() -> list[dict[str, Any]]:
    """Every configuration of two tools, two sizes and four numbers of cores."""
    grid = [(tool, size, cores) for tool in TOOLS for size in ("small", "large") for cores in (1, 2, 4, 8)]
    return [
        {"tool": tool, "size": size, "cpu": cores, "latency_ms": 100 + 7 * number}
        for number, (tool, size, cores) in enumerate(grid)
    ]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    """A CSV file of ``rows``, whose columns are those of the first one."""
    with file.open("w", newline="") as target:
        writer = csv.DictWriter(target, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return file


def write_registry(file: Path, names: Any = TOOLS) -> Path:
    """A registry of tools with these ``names``."""
    file.write_text(json.dumps([{"name": name, "description": "a tool"} for name in names]))
    return file


def write_language_model(folder: Path, hidden: int = 16, context: int = 1024) -> Path:
    """A model with random weights that reads and writes text byte by byte."""
    vocabulary = {symbol: index for index, symbol in enumerate(["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made: Any = transformers.PreTrainedTokenizerFast
    made(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=len(vocabulary),
        max_position_embeddings=context,
        bos_token_id=0,
        eos_token_id=0,
        # Large enough that what the model says depends on what it reads.
        initializer_range=0.5,
    )
    model: Any = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return folder


def write_tables(folder: Path) -> None:
    """Write ``profiling.csv`` and ``tools.json`` of the small table."""
    folder.mkdir()
    write_rows(folder / "profiling.csv", rows())
    write_registry(folder / "tools.json")


def _merged(given: dict[str, Any], sections: dict[str, Any]) -> dict[str, Any]:
    """``given`` with ``sections`` merged into its own."""
    merged = {name: given.get(name, {}) | section for name, section in sections.items() if isinstance(section, dict)}
    return given | sections | merged


def tiny_reader_spec(**sections: Any) -> ReaderSpec:
    """A language model as small as can be."""
    training = {"copying": 1, "steps": 1, "batch_size": 4, "schemas": 2, "warm_up": 1, "validate_every": 2}
    sections["training"] = training | sections.get("training", {})
    model = {"hidden_dim": 16, "layers": 2, "heads": 2, "feed_forward": 8, "vocabulary": 512}
    return ReaderSpec.model_validate({"model": model, "fields": 3, **sections})


def tiny_decoder_spec(**sections: Any) -> DecoderSpec:
    """A decoder as small as can be, and two steps of training."""
    given: dict[str, Any] = {
        "export": {"artifact": "export"},
        "model": {"hidden_dim": 8, "layers": 1, "heads": 2},
        "training": {"steps": 2, "batch_size": 8, "warm_up": 1, "validate_every": 2, "validation": 8},
        "evaluation": 20,
    }
    return DecoderSpec.model_validate(_merged(given, sections))


def tiny_spec(**sections: Any) -> ResourceSpec:
    """Two steps of training on the small table; ``sections`` are merged into it."""
    given: dict[str, Any] = {
        "table": SCHEMA,
        "encoder": {"hidden_dim": 12},
        "augmentation": {"copies": 2},
        "training": {"steps": 2, "batch_size": 8, "warm_up": 1, "validate_every": 2, "learning_rate": 5e-3},
        "held_out": 0.25,
    }
    return ResourceSpec.model_validate(_merged(given, sections))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """These networks are too small to share among threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tables(once: Once) -> Path:
    """A folder with the ``profiling.csv`` and ``tools.json`` of the small table."""

    return once("resource-tables", write_tables)


@pytest.fixture(scope="session")
def language_folder(once: Once) -> Path:
    return once("resource-language-model", write_language_model)


@pytest.fixture(scope="session")
def language(language_folder: Path) -> LanguageModel:
    return load_language_model(str(language_folder))


@pytest.fixture(scope="session")
def table(tables: Path) -> Table:
    return small_table(tables)


def small_table(tables: Path, **schema: Any) -> Table:
    """The small table, with changes of its schema."""
    spec = SchemaSpec.model_validate(SCHEMA | schema)
    return read_measurements(tables / "profiling.csv", spec, read_tools(tables / "tools.json"))


def small_trainer(table: Table, language: LanguageModel, **sections: Any) -> ResourceTrainer:
    """A trainer on all rows of the small table."""
    return ResourceTrainer(tiny_spec(**sections), table, torch.arange(len(table)), Describer(language, table.schema))
