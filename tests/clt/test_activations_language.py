"""Activations of language models: any causal one of transformers, by the names of its modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ethogram.errors import InvalidInput
from ethogram.specs.clt import ActivationsSpec
from services.clt.activations.collect import collect
from services.clt.activations.hooks import capture, language_points
from services.clt.activations.sources import LanguageModelSource
from services.clt.activations.store import SPLITS, TRAIN, ActivationStore
from services.runtime.run import Run
from tests.tiny_models import TEXTS, WORDS, save_model, token_sequences


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("gpt2"), "gpt2")


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """The texts as lines, some of them blank."""
    file = tmp_path / "texts.txt"
    file.write_text("\n\n".join(TEXTS))
    return file


def spec_of(model: Path, dataset: Path, **changes: Any) -> ActivationsSpec:
    language: dict[str, Any] = {"model": str(model), "dataset": str(dataset), "context": 8}
    language |= changes.pop("language", {})
    given = {"instances": 40, "validation": 0.1, "shard_rows": 56, "batch_size": 5, "dtype": "float32"} | changes
    return ActivationsSpec.model_validate({"language_model": language, **given})


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_what_enters_and_leaves_each_mlp_of_each_token(kind: str, lines: Path, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", kind)
    found = collect(spec_of(folder, lines), tmp_path / "store", Run())
    stem = "transformer.h" if kind == "gpt2" else "model.layers"
    assert found.hooks == [f"{stem}.{i}.mlp{side}" for i in range(2) for side in (":input", "")]
    assert found.manifest.pairs[1] == (f"{stem}.1.mlp:input", f"{stem}.1.mlp")
    assert found.rows() + found.rows("validation") == 40 * 7
    found = ActivationStore.open(tmp_path / "store")

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    model.eval()
    points = language_points(model)
    with torch.no_grad(), capture(model, [points[name] for name in found.hooks]) as by_hand:
        model(input_ids=token_sequences(8)[:40])
    for split in SPLITS:
        for number in range(len(found.shards(split))):
            instance, position, *rows = found.read(split, number, ["instance", "position", *found.hooks])
            assert int(position.min()) == 1 and int(position.max()) == 7
            for name, values in zip(found.hooks, rows, strict=True):
                expected = by_hand[name][instance.long(), position.long()]
                torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)


def test_any_module_can_be_hooked_and_the_first_position_kept(gpt2: Path, lines: Path, tmp_path: Path) -> None:
    hooks, pairs = ["lm_head", "transformer.h.1.attn"], ["transformer.h.0:input->transformer.h.1"]
    spec = spec_of(gpt2, lines, hooks=hooks, pairs=pairs, language={"skip_first": False})
    found = collect(spec, tmp_path / "store", Run())
    assert found.hooks == ["transformer.h.0:input", "transformer.h.1.attn", "transformer.h.1", "lm_head"]
    assert found.widths["lm_head"] == len(WORDS)
    assert found.rows(TRAIN) == 36 * 8


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"hooks": ["transformer.h.0.mpl"]}, r"spec\.hooks\.0: .*did you mean.*transformer\.h\.0\.mlp"),
        ({"hooks": ["transformer.wpe"]}, r"spec\.hooks\.0: transformer\.wpe has shape .*not a vector"),
        ({"pairs": ["transformer.h.1->transformer.h.0"]}, r"spec\.pairs\.0: .*comes after"),
        ({"instances": 4000}, r"spec\.instances: the texts make \d+ sequences of 8 tokens, not 4000"),
        ({"language": {"context": 17}}, r"spec\.language_model\.context: the model has 16 positions"),
        ({"language": {"model": "/nowhere"}}, r"spec\.language_model\.model: /nowhere does not exist"),
        ({"language": {"dataset": "/nowhere.txt"}}, r"spec\.language_model\.dataset: /nowhere\.txt does not exist"),
    ],
)
def test_what_is_not_possible_is_told(
    changes: dict[str, Any], error: str, gpt2: Path, lines: Path, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match=error) as told:
        collect(spec_of(gpt2, lines, **changes), tmp_path / "store", Run())
    if "instances" in changes:
        assert f" {len(token_sequences(8))} " in str(told.value)


def test_a_model_without_mlps_needs_hooks(gpt2: Path, lines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = LanguageModelSource
    check = source._check

    def renamed(self: LanguageModelSource) -> None:
        check(self)
        for block in self.model.transformer.h:
            block.feed = block._modules.pop("mlp")

    monkeypatch.setattr(source, "_check", renamed)
    with pytest.raises(
        InvalidInput, match=r"spec\.hooks: no module of the model has the usual name of an MLP.*transformer"
    ):
        collect(spec_of(gpt2, lines), lines.parent / "store", Run())


def test_a_folder_without_a_model_and_weights_that_are_no_safetensors(lines: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"spec\.language_model\.model: .*cannot be loaded"):
        collect(spec_of(tmp_path, lines), tmp_path / "store", Run())
    folder = save_model(tmp_path / "model", "gpt2")
    (folder / "model.safetensors").unlink()
    for config in ("[1]", '{"model_type": ["gpt2"]}', "{"):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(InvalidInput, match=r"spec\.language_model\.model: .*cannot be loaded"):
            collect(spec_of(tmp_path, lines), tmp_path / "store", Run())
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(InvalidInput, match=r"spec\.language_model\.model: .*cannot be loaded"):
        collect(spec_of(folder, lines), tmp_path / "store", Run())
