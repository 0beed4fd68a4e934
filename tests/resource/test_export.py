"""The export: files as the classifier's training wants them, and what keeps parts together that belong together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ethogram.errors import InvalidInput
from ethogram.specs.resource import SchemaSpec
from services.language.models import LanguageModel, load_language_model
from services.resource.codec import ResourceCodec
from services.resource.data import Table, read_measurements, read_tools
from services.resource.export import checkpoint_name, export, read_checkpoint, validate, write_checkpoint
from services.resource.generator import write_table
from services.resource.schema import default_schema
from services.resource.sources import check_language_model, language_model_for, table_for
from tests.conftest import Once
from tests.resource.conftest import SCHEMA, small_table, small_trainer, write_language_model, write_registry, write_rows


@pytest.fixture(scope="module")
def codec(table: Table, language: LanguageModel) -> ResourceCodec:
    return small_trainer(table, language).codec()


@pytest.fixture(scope="session")
def exported(once: Once, table: Table, language: LanguageModel) -> Path:
    """The export of the small table."""
    return once("resource-export", lambda folder: export(small_trainer(table, language).codec(), table, folder))


def test_the_export_of_the_seven_tools(language: LanguageModel, tmp_path: Path) -> None:
    tools, profiling = write_table(tmp_path)
    table = read_measurements(profiling, default_schema(), read_tools(tools))
    codec = small_trainer(table, language, encoder={"tokens": 2}).codec()
    written = export(codec, table, tmp_path / "export")
    data = torch.load(tmp_path / "export" / "config_weights.pt", weights_only=True)
    assert data["weights"].shape == (1701, 32) and (data["num_configs"], data["hidden_dim"]) == (1701, 32)
    assert torch.equal(data["weights"], load_file(tmp_path / "export" / "config_weights.safetensors")["weights"])
    assert torch.equal(data["weights"], codec.embed(table.values))
    lookup = json.loads((tmp_path / "export" / "config_lookup.json").read_text())
    assert list(lookup) == [str(number) for number in range(1701)]
    line = profiling.read_text().splitlines()[1].split(",")
    assert lookup["0"] == {
        "tool_name": "image_classification",
        "input_size": "small",
        "cpu_cores": 2,
        "memory_gb": 4.0,
        "gpu_sm": 20,
        "gpu_memory_gb": 2.0,
        "latency_ms": float(line[-1]),
    }
    kinds = [type(value) for value in lookup["0"].values()]
    assert kinds == [str, str, int, float, int, float, float]
    masks = json.loads((tmp_path / "export" / "tool_mask_map.json").read_text())
    assert masks["image_classification"] == list(range(243))
    assert [len(ids) for ids in masks.values()] == [243] * 7
    read = validate(tmp_path / "export")
    assert read.digest == written.digest and torch.equal(read.weights, written.weights)


def test_an_encoder_is_one_file_too(codec: ResourceCodec, table: Table, tmp_path: Path) -> None:
    file = tmp_path / checkpoint_name(0)
    assert file.name == "encoder_checkpoint_epoch0.pt"
    write_checkpoint(codec, file)
    content = torch.load(file, weights_only=True)
    assert content["epoch"] == 0 and content["model_state_dict"].keys() == codec.model.state_dict().keys()
    again = read_checkpoint(file)
    assert torch.equal(again.embed(table.values), codec.embed(table.values))
    assert again.about == codec.about and again.table is not None and again.table.digest == table.digest
    export(codec, table, tmp_path / "export", [file])
    assert file.name in validate(tmp_path / "export").files


@pytest.mark.parametrize("content", [b"", b"what is this", None])
def test_a_file_that_is_no_encoder(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "encoder.pt"
    if content is None:
        torch.save({"model_state_dict": {}}, file)
    else:
        file.write_bytes(content)
    with pytest.raises(InvalidInput) as caught:
        read_checkpoint(file)
    assert caught.value.violations[0].field == "encoder_checkpoint" and str(file) in caught.value.message


def test_no_code_in_a_file_is_run(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "harm",)

    torch.save({"model_state_dict": Harm()}, tmp_path / "encoder.pt")
    with pytest.raises(InvalidInput, match="is not a file of weights"):
        read_checkpoint(tmp_path / "encoder.pt")
    assert not (tmp_path / "harm").exists()


def rehash(folder: Path) -> None:
    """As if the files had been exported as they are."""
    from services.artifacts.backends import sha256_of

    about = json.loads((folder / "export.json").read_text())
    about["files"] = {name: sha256_of(folder / name) for name in about["files"]}
    (folder / "export.json").write_text(json.dumps(about))


def change(name: str, edit: Callable[[Any], Any]) -> Callable[[Path], None]:
    """An edit of a JSON file of an export."""

    def apply(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(edit(value)))
        rehash(folder)

    return apply


def save_weights(edit: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = torch.load(folder / "config_weights.pt", weights_only=True)
        edit(content)
        torch.save(content, folder / "config_weights.pt")
        from safetensors.torch import save_file

        save_file({"weights": content["weights"]}, folder / "config_weights.safetensors")
        rehash(folder)

    return apply


def without_hashes(folder: Path) -> None:
    about = json.loads((folder / "export.json").read_text())
    (folder / "export.json").write_text(json.dumps(about | {"files": {}}))


def not_weights(folder: Path) -> None:
    torch.save({"weights": Path("a path")}, folder / "config_weights.pt")
    rehash(folder)


def nan(content: dict[str, Any]) -> None:
    content["weights"][1, 1] = float("nan")


def twice(content: dict[str, Any]) -> None:
    content["weights"][1] = content["weights"][0]


def fewer(content: dict[str, Any]) -> None:
    content["weights"] = content["weights"][1:].clone()


@pytest.mark.parametrize(
    ("damage", "field", "says"),
    [
        (lambda folder: (folder / "export.json").unlink(), "export.json", "is missing"),
        (lambda folder: (folder / "config_weights.pt").unlink(), "config_weights.pt", "is missing"),
        (without_hashes, "export.json", "has no hash of config_weights.pt; export again"),
        (not_weights, "config_weights.pt", "is not a file of weights"),
        (lambda folder: (folder / "tool_mask_map.json").write_text("{}"), "tool_mask_map.json", "was changed since"),
        (lambda folder: (folder / "config_lookup.json").write_text("{"), "config_lookup.json", "was changed since"),
        (lambda folder: (folder / "pretrained_encoder.pt").write_bytes(b""), "pretrained_encoder.pt", "was changed"),
        (save_weights(nan), "config_weights.pt", "NaN or infinite"),
        (save_weights(twice), "config_weights.pt", "the same vector for two"),
        (save_weights(fewer), "config_weights.pt", "not as its own numbers say"),
        (change("config_lookup.json", lambda lookup: dict(list(lookup.items())[1:])), "config_lookup.json", "other"),
        (change("tool_mask_map.json", lambda masks: masks | {"detect": [0]}), "tool_mask_map.json", "the list of its"),
        (change("tool_mask_map.json", list), "tool_mask_map.json", "cannot be read"),
    ],
)
def test_damage_is_named(
    exported: Path, tmp_path: Path, *, damage: Callable[[Path], Any], field: str, says: str
) -> None:
    folder = shutil.copytree(exported, tmp_path / "export")
    assert len(validate(folder).lookup) == 16
    damage(folder)
    with pytest.raises(InvalidInput, match=says) as caught:
        validate(folder)
    assert caught.value.violations[0].field == field


def test_repeated_measurements_may_have_equal_vectors(tables: Path, language: LanguageModel, tmp_path: Path) -> None:
    table = small_table(tables, repeated=True)
    table = Table(table.schema, torch.cat([table.values, table.values[:2]]))
    export(small_trainer(table, language).codec(), table, tmp_path / "export")
    assert len(validate(tmp_path / "export").weights) == 18


def test_a_table_of_another_schema_or_registry(
    codec: ResourceCodec, tables: Path, table: Table, tmp_path: Path
) -> None:
    spec = SchemaSpec.model_validate(SCHEMA)
    turned = read_measurements(tables / "profiling.csv", spec, ("translate", "detect"))
    with pytest.raises(InvalidInput, match="was trained with detect, translate, and the registry has translate, det"):
        export(codec, turned, tmp_path / "export")
    priced = [dict(dimension, price=2.0) if "price" in dimension else dimension for dimension in SCHEMA["dimensions"]]
    with pytest.raises(InvalidInput, match=r"table: has another schema than .* \(dimensions\)"):
        export(codec, small_table(tables, dimensions=priced), tmp_path / "export")
    assert not (tmp_path / "export").exists()
    registry = write_registry(tmp_path / "tools.json", ("detect", "swim"))
    with pytest.raises(InvalidInput) as caught:
        table_for(codec, tools=registry)
    assert caught.value.violations[0].field == "tool_registry"
    assert table_for(codec, tables / "profiling.csv", tables / "tools.json").digest == table.digest


def test_part_of_a_table(codec: ResourceCodec, tmp_path: Path) -> None:
    one = [{"tool": "detect", "size": "small", "cpu": cores, "latency_ms": 100} for cores in (1, 2)]
    file = write_rows(tmp_path / "part.csv", one)
    assert len(table_for(codec, file, partial=True)) == 2
    with pytest.raises(InvalidInput, match="no row of the tool translate"):
        table_for(codec, file)
    codec = ResourceCodec(codec.spec, codec.schema, codec.model, codec.about)
    with pytest.raises(InvalidInput, match="profiling_data: is missing"):
        table_for(codec)


def test_another_language_model_is_refused(codec: ResourceCodec, language_folder: Path, tmp_path: Path) -> None:
    def refused(says: str, name: Path) -> None:
        with pytest.raises(InvalidInput, match=says) as caught:
            language_model_for(codec, str(name))
        assert caught.value.violations[0].field == "llm_model"

    assert language_model_for(codec).digest == codec.about["language_model_digest"]
    moved = shutil.copytree(language_folder, tmp_path / "moved")
    assert language_model_for(codec, str(moved)).digest == codec.about["language_model_digest"]
    refused("has the hidden size 24, and the encoder was trained with 16", write_language_model(tmp_path / "wide", 24))
    refused("is not the language model", write_language_model(tmp_path / "long", context=600))
    refused("does not exist", tmp_path / "none")
    # Two words have each other's token.
    text = (moved / "tokenizer.json").read_text()
    assert '"a":' in text and '"b":' in text
    (moved / "tokenizer.json").write_text(text.replace('"a":', '"?":').replace('"b":', '"a":').replace('"?":', '"b":'))
    refused("does not have the tokenizer", moved)
    check_language_model(codec, load_language_model(str(language_folder), dtype=torch.float32))


def test_a_language_model_that_is_no_longer_there(codec: ResourceCodec, tmp_path: Path) -> None:
    about = codec.about | {"language_model": str(tmp_path / "gone")}
    spec = codec.spec.model_copy(update={"llm_model": str(tmp_path / "gone")})
    with pytest.raises(InvalidInput, match="is no longer there; name its folder"):
        language_model_for(ResourceCodec(spec, codec.schema, codec.model, about))


def test_the_default_language_model_is_found_elsewhere_and_never_made_again(
    codec: ResourceCodec, language_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ETHOGRAM_CACHE", str(tmp_path / "cache"))
    about = codec.about | {"language_model": str(tmp_path / "0123" / "model")}
    moved = ResourceCodec(codec.spec, codec.schema, codec.model, about)
    kept = tmp_path / "cache" / "language-models" / "0123" / "model"
    for run in (None, tmp_path / "run"):
        with pytest.raises(InvalidInput, match=f"is not on this machine; take the folder language_model .* {kept}"):
            language_model_for(moved, run=run)
    shutil.copytree(language_folder, tmp_path / "run" / "language_model")
    assert language_model_for(moved, run=tmp_path / "run").digest == about["language_model_digest"]
    shutil.copytree(language_folder, kept)
    assert language_model_for(moved).digest == about["language_model_digest"]
