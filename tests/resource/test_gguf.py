"""Language models from GGUF files. Those that convert one need the packages of the extra `gguf`."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers

from ethogram.errors import InvalidInput, Unavailable
from services.language import gguf
from services.language.gguf import import_gguf
from services.language.models import load_language_model
from tests.resource.made import call

HIDDEN, FORWARD, LAYERS, HEADS = 32, 64, 2, 4
INSTALLED = all(importlib.util.find_spec(name) for name in gguf.PACKAGES)
needs_packages = pytest.mark.skipif(not INSTALLED, reason="needs pip install '.[gguf]'")


def write_gguf(file: Path, architecture: str = "llama", **more: int | str) -> Path:
    """A tiny Llama with random weights and a tokenizer of bytes, in float32 and 4 bits."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter, quantize

    writer = GGUFWriter(file, architecture)
    for name, value in more.items():
        key = name.replace("__", ".")
        _ = writer.add_string(key, value) if isinstance(value, str) else writer.add_uint16(key, value)
    tokens = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    for add, number in (
        (writer.add_context_length, 128),
        (writer.add_embedding_length, HIDDEN),
        (writer.add_block_count, LAYERS),
        (writer.add_feed_forward_length, FORWARD),
        (writer.add_head_count, HEADS),
        (writer.add_head_count_kv, HEADS),
        (writer.add_vocab_size, len(tokens)),
        (writer.add_eos_token_id, 0),
        (writer.add_bos_token_id, 0),
    ):
        add(number)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["t h"])
    rng = np.random.default_rng(0)

    def tensor(name: str, *shape: int) -> None:
        values = rng.normal(0, 0.1, shape).astype(np.float32)
        if len(shape) > 1 and "blk" in name:
            values = quantize(values, GGMLQuantizationType.Q4_1)
            writer.add_tensor(name, values, raw_dtype=GGMLQuantizationType.Q4_1)
        else:
            writer.add_tensor(name, values)

    tensor("token_embd.weight", len(tokens), HIDDEN)
    tensor("output_norm.weight", HIDDEN)
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensor(f"blk.{layer}.{name}.weight", HIDDEN, HIDDEN)
        tensor(f"blk.{layer}.ffn_gate.weight", FORWARD, HIDDEN)
        tensor(f"blk.{layer}.ffn_up.weight", FORWARD, HIDDEN)
        tensor(f"blk.{layer}.ffn_down.weight", HIDDEN, FORWARD)
        for name in ("attn_norm", "ffn_norm"):
            tensor(f"blk.{layer}.{name}.weight", HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@needs_packages
def test_a_file_becomes_a_folder_that_can_be_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    assert call("language-model", "import", file, "-o", tmp_path / "lm") == 0
    assert "llama" in capsys.readouterr().out
    language = load_language_model(str(tmp_path / "lm"))
    assert language.model.dtype == torch.float32 and language.model.config.hidden_size == HIDDEN
    (tokens,) = language.tokenize(["42 ms"])
    assert language.tokenizer.decode(tokens) == "42 ms" and len(tokens) == 5
    assert language.end_of_text == 0
    # A weight of 4 bits: 32 numbers have at most 16 values.
    weight: Any = language.model.model.layers[1].mlp.up_proj.weight
    assert max(len(torch.unique(row)) for row in weight.view(-1, 32)) <= 16 and weight.abs().max() > 0.05
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert call("language-model", "import", file, "-o", tmp_path / "lm") == 2
    assert "exists already" in capsys.readouterr().err


@needs_packages
@pytest.mark.parametrize(
    ("architecture", "more", "says"),
    [
        ("bert", {}, "of the architecture bert, cannot be converted"),
        ("clip", {"general__type": "mmproj"}, "holds a mmproj, not a whole model"),
        ("llama", {"split__count": 3}, "is one of 3 parts; merge them"),
    ],
)
def test_kinds_that_cannot_be_converted(architecture: str, more: dict[str, Any], says: str, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "other.gguf", architecture, **more)
    with pytest.raises(InvalidInput, match=says) as caught:
        import_gguf(file, tmp_path / "lm")
    assert caught.value.violations[0].field == "FILE"
    assert list(tmp_path.iterdir()) == [file]


@needs_packages
def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "tiny.gguf").read_bytes()
    for kept in (12, 1000, len(whole) - 100):
        (tmp_path / "cut.gguf").write_bytes(whole[:kept])
        with pytest.raises(InvalidInput, match=r"broken|cannot be converted"):
            import_gguf(tmp_path / "cut.gguf", tmp_path / "lm")
    assert not (tmp_path / "lm").exists()


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\x03\x04 a zip file"])
def test_what_is_not_a_gguf_file(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file.gguf").write_bytes(content)
    assert call("language-model", "import", tmp_path / "file.gguf", "-o", tmp_path / "lm") == 2
    assert "is not a GGUF file" in capsys.readouterr().err
    assert call("language-model", "import", tmp_path / "none.gguf", "-o", tmp_path / "lm") == 2
    assert "cannot be read (No such file" in capsys.readouterr().err
    assert call("language-model", "import", tmp_path, "-o", tmp_path / "lm") == 2
    assert "cannot be read (Is a directory" in capsys.readouterr().err
    assert not (tmp_path / "lm").exists()


def test_packages_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(gguf.MAGIC + struct.pack("<IQQ", 3, 0, 0))
    found = importlib.util.find_spec
    monkeypatch.setattr(gguf, "find_spec", lambda name: None if name in gguf.PACKAGES else found(name))
    with pytest.raises(Unavailable, match=r"needs the packages gguf and accelerate: pip install .*\.\[gguf\]"):
        import_gguf(file, tmp_path / "lm")
    monkeypatch.setattr(gguf, "find_spec", lambda name: None if name == "accelerate" else found("os"))
    with pytest.raises(Unavailable, match="needs the package accelerate"):
        import_gguf(file, tmp_path / "lm")
