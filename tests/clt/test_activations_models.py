"""Activations of models, tokenizers and files of texts as people have them."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ethogram.errors import InvalidInput
from ethogram.specs.clt import ActivationsSpec
from services.clt.activations.collect import collect, plan
from services.clt.activations.hooks import HookPoint, SourceKind, mlp_pairs
from services.clt.activations.sources import ActivationSource, LanguageModelSource
from services.clt.activations.store import SPLITS, ActivationStore
from services.runtime.run import Run
from tests.clt.test_activations_language import spec_of
from tests.tiny_models import TEXTS, WORDS, save_model, token_sequences, words_tokenizer

BATCH = 8
"""As long as a sequence: shapes do not tell instances from positions."""


class Logged(Run):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def log(self, message: str, level: str = "info") -> None:
        self.messages.append(f"{level}: {message}")


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_text("\n".join(TEXTS))
    return file


def by_hand(model: Any, modules: Sequence[str], tokens: Tensor) -> dict[str, list[Tensor]]:
    """What enters (``:input``) and leaves ``modules`` in a forward pass on each sequence of ``tokens`` alone, as
    ``[positions, width]``."""
    found: dict[str, list[Tensor]] = {}

    def keep(name: str, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) else value
        found.setdefault(name, []).append(value.detach().clone().reshape(tokens.shape[1], -1))

    for name in modules:
        module = model.get_submodule(name.removesuffix(":input"))
        if name.endswith(":input"):
            module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: keep(name, [*args, *kwargs.values()][0]), with_kwargs=True
            )
        else:
            module.register_forward_hook(lambda _, args, value, name=name: keep(name, value))
    with torch.no_grad():
        for sequence in tokens:
            model.eval()(input_ids=sequence.unsqueeze(0))
    return found


def check_values(store: ActivationStore, expected: dict[str, list[Tensor]]) -> None:
    for split in SPLITS:
        for number in range(len(store.shards(split))):
            instances, positions, *rows = store.read(split, number, ["instance", "position", *store.hooks])
            for name, values in zip(store.hooks, rows, strict=True):
                for row, instance, position in zip(values, instances.tolist(), positions.tolist(), strict=True):
                    torch.testing.assert_close(row, expected[name][instance][position], rtol=1e-4, atol=1e-5)


DEFAULTS = {
    "opt": "model.decoder.layers.{}.fc1:input->model.decoder.layers.{}.fc2",
    "roberta": "roberta.encoder.layer.{}.intermediate:input->roberta.encoder.layer.{}.output.dense",
    "mpt": "transformer.blocks.{}.ffn:input->transformer.blocks.{}.ffn",
    "mixtral": "model.layers.{}.mlp:input->model.layers.{}.mlp",
    "xlnet": "transformer.layer.{}.ff:input->transformer.layer.{}.ff",
    "gemma3": "model.language_model.layers.{}.mlp:input->model.language_model.layers.{}.mlp",
    "llava": "model.language_model.layers.{}.mlp:input->model.language_model.layers.{}.mlp",
    "qwen2_vl": "model.language_model.layers.{}.mlp:input->model.language_model.layers.{}.mlp",
}
VISION = {"gemma3": 4, "llava": 3, "qwen2_vl": 4}
"""MLPs of models that see, those of the vision part included."""


@pytest.mark.parametrize("kind", list(DEFAULTS))
def test_the_mlps_of_any_model_are_recorded(kind: str, lines: Path, tmp_path: Path) -> None:
    folder, run = save_model(tmp_path / "model", kind), Logged()
    store = collect(spec_of(folder, lines, instances=20, batch_size=BATCH), tmp_path / "store", run)
    pairs = [tuple(DEFAULTS[kind].format(i, i).split("->")) for i in range(2)]
    assert store.manifest.pairs == pairs == store.mlp_pairs()
    assert set(store.widths.values()) == {8}
    several = kind in VISION
    left_out = f"warning: {VISION.get(kind, 0) - 2} of {VISION.get(kind)} MLPs are left out (no tensor passes model.vis"
    assert [message[: len(left_out)] for message in run.messages] == ([left_out] if several else [])
    auto: Any = transformers.AutoModelForImageTextToText if several else transformers.AutoModelForCausalLM
    check_values(store, by_hand(auto.from_pretrained(folder), store.hooks, token_sequences(8)[:20]))


@pytest.mark.parametrize("context", [2, 3])
def test_instances_are_told_from_positions_in_short_sequences(context: int, lines: Path, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "xlnet")
    spec = spec_of(folder, lines, instances=20, batch_size=context, language={"context": context, "skip_first": False})
    store = collect(spec, tmp_path / "store", Run())
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    check_values(store, by_hand(model, store.hooks, token_sequences(context)[:20]))


def test_mlps_within_mlps_are_no_pairs_of_their_own() -> None:
    inner = ["h.0.mlp", "h.0.mlp.fc1", "h.0.mlp.fc2", "h.0.mlp.gate.ffn", "h.1.fc1", "h.1.fc2", "h.1.my_mlp"]
    names = [name for module in inner for name in (f"{module}:input", module)]
    assert mlp_pairs("language_model", names) == [("h.0.mlp:input", "h.0.mlp"), ("h.1.fc1:input", "h.1.fc2")]
    # Whatever the order in which the names of MLPs are looked for.
    for outer, inner_name in itertools.permutations(("mlp", "feed_forward", "ffn", "ff", "block_sparse_moe"), 2):
        module, within = f"a.{outer}", f"a.{outer}.{inner_name}"
        assert mlp_pairs("language_model", [f"{module}:input", f"{within}:input", within, module]) == [
            (f"{module}:input", module)
        ]


def test_hooks_of_the_vision_part_that_are_asked_for_are_an_error_of_their_field(lines: Path, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llava")
    hooks = ["model.language_model.layers.0", "model.vision_tower.encoder.layers.0.mlp"]
    with pytest.raises(InvalidInput, match=r"^spec\.hooks\.1: no tensor passes model\.vision_tower.*in a forward pass"):
        collect(spec_of(folder, lines, hooks=hooks), tmp_path / "store", Run())


@pytest.mark.parametrize(
    ("kind", "context", "works"), [("roberta", 17, 16), ("gpt2", 17, 16), ("mpt", 17, 16), ("llama", 33, 32)]
)
def test_a_context_that_the_model_cannot_process(
    kind: str, context: int, works: int, lines: Path, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model", kind)
    with pytest.raises(InvalidInput, match=r"^spec\.language_model\.context: the model "):
        collect(spec_of(folder, lines, language={"context": context}), tmp_path / "store", Run())
    language = {"context": works}
    store = collect(spec_of(folder, lines, instances=10, language=language), tmp_path / "store", Run())
    assert store.manifest.rows_per_instance == works - 1


def test_a_model_that_needs_more_than_text_says_so(lines: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"^spec\.language_model\.model: .*cannot be loaded as a causal .*T5Config"):
        collect(spec_of(save_model(tmp_path / "t5", "t5"), lines), tmp_path / "store", Run())
    folder = save_model(tmp_path / "model", "gpt2")
    vision = transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8)
    text = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=16, vocab_size=len(WORDS))
    config: Any = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    transformers.VisionEncoderDecoderModel(config).save_pretrained(folder)
    with pytest.raises(InvalidInput, match=r"^spec\.language_model\.model: the model fails .*processes text alone"):
        collect(spec_of(folder, lines), tmp_path / "store", Run())


def test_slow_tokenizers_and_those_without_an_end(lines: Path, tmp_path: Path) -> None:
    def recorded(name: str, tokenizer: Any) -> ActivationStore:
        folder = save_model(tmp_path / name, "llama", tokenizer)
        return collect(spec_of(folder, lines, instances=20), tmp_path / f"{name}-store", Run())

    usual = recorded("usual", None)
    # None of them pads or begins a text; one ends it with a separator.
    separated = recorded("separated", words_tokenizer(sep_token="<end>"))
    assert separated.manifest.splits == usual.manifest.splits
    with pytest.raises(InvalidInput, match=r"^spec\.language_model\.model: its tokenizer has no token for the end"):
        recorded("endless", words_tokenizer(unk_token="<end>"))


def test_a_slow_tokenizer(lines: Path, tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=16, vocab_size=384)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    tokenizer: Any = transformers.ByT5Tokenizer()
    assert not tokenizer.is_fast
    tokenizer.save_pretrained(tmp_path / "model")
    source = LanguageModelSource(spec_of(tmp_path / "model", lines).language_model, "cpu")  # type: ignore[arg-type]
    text = "".join(f"{text}\0" for text in TEXTS)
    expected = [{"\0": tokenizer.eos_token_id}.get(letter, ord(letter) + 3) for letter in text[: 8 * 5]]
    assert next(source.chunks(0))[:5].flatten().tolist() == expected


@pytest.mark.parametrize(
    ("tokenizer", "fault"),
    [
        # As a published model of a billion parameters has it: a token for padding that no text has.
        (words_tokenizer([*WORDS, "<pad>"], eos_token="<end>", pad_token="<pad>"), None),
        (words_tokenizer([*WORDS, "u", "v"]), None),
        (words_tokenizer(["<end>", "new", *WORDS[1:]]), r"gives the token 't' \(21\), and the model has .* 0 to 20;"),
        (words_tokenizer(eos_token="<new>"), r"gives the token '<new>' \(21\)"),
        (words_tokenizer(WORDS[:5], unknown=None), r"its tokenizer fails on a text \(.*UNK"),
    ],
)
def test_tokens_that_the_model_does_not_have(tokenizer: Any, fault: str | None, lines: Path, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "gpt2", tokenizer)
    if fault is None:
        store = collect(spec_of(folder, lines, instances=20), tmp_path / "store", Run())
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
        check_values(store, by_hand(model, store.hooks, token_sequences(8)[:20]))
    else:
        with pytest.raises(InvalidInput, match=rf"^spec\.language_model\.model: .*{fault}"):
            collect(spec_of(folder, lines, instances=20), tmp_path / "store", Run())


def test_weights_that_are_missing_are_not_random_ones_in_silence(lines: Path, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    weights = load_file(folder / "model.safetensors")
    headless = {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    save_file(headless, folder / "model.safetensors", {"format": "pt"})
    store = collect(spec_of(folder, lines, instances=20), tmp_path / "store", Run())
    assert store.hooks[0] == "model.layers.0.mlp:input"
    with pytest.raises(InvalidInput, match=r"^spec\.hooks: .* no weights for lm_head\.weight; hook modules of model"):
        collect(spec_of(folder, lines, hooks=["lm_head"]), tmp_path / "other", Run())
    del headless["model.layers.1.mlp.up_proj.weight"]
    save_file(headless, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidInput, match=r"^spec\.language_model\.model: .*lacks 1 of .*first model\.layers\.1\.mlp"):
        collect(spec_of(folder, lines), tmp_path / "other", Run())


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "none"}}'),
        ("tokenizer_config.json", "[]"),
        ("config.json", "\ufeff{}"),
        ("config.json", '{"model_type": "llama", "hidden_size": "wide"}'),
        ("model.safetensors", "not weights"),
        ("model.safetensors", ""),
    ],
)
def test_files_of_a_model_that_are_broken(file: str, content: str, lines: Path, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    (folder / file).write_text(content)
    with pytest.raises(InvalidInput, match=r"^spec\.language_model\.model: .*cannot be loaded"):
        collect(spec_of(folder, lines), tmp_path / "store", Run())


def test_what_is_left_out_of_the_texts_is_counted(lines: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": text} for text in TEXTS]
    rows[3:3] = [{"text": None}, {"text": ""}, {"other": "a"}]
    rows[10:10] = [{"text": 7}, {"text": "\ud800"}]
    folder, run = tmp_path / "texts", Logged()
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "README.md").write_text("About these texts.")
    for hidden in ("._a.txt", ".DS_Store", ".ipynb_checkpoints/a-checkpoint.txt"):
        (folder / hidden).parent.mkdir(exist_ok=True)
        (folder / hidden).write_bytes(b"\0\xff")
    model = save_model(tmp_path / "model", "gpt2")
    instances = len(token_sequences(8))
    store = collect(spec_of(model, folder, instances=instances), tmp_path / "store", run)
    alone = collect(spec_of(model, lines, instances=instances), tmp_path / "alone", Run())
    assert store.manifest.splits == alone.manifest.splits
    (message,) = run.messages
    assert message.startswith("warning: left out of the texts: ")
    assert f"3 rows without a text (first: {folder / 'a.jsonl'}:4)" in message
    assert f"1 rows whose text is not a text (first: {folder / 'a.jsonl'}:11)" in message
    assert f"1 files other than .txt, .jsonl, .parquet (first: {folder / 'README.md'})" in message
    assert "surrogate" in message
    with pytest.raises(InvalidInput, match=r"^spec\.instances: the texts make .*\(left out: .*3 rows without a text"):
        collect(spec_of(model, folder, instances=instances + 1), tmp_path / "more", Run())


class Experts(nn.Module):
    """Two experts; the first value of a position says which one it goes to."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))

    def forward(self, values: Tensor) -> None:
        rows = values.flatten(0, 1)
        for which, expert in enumerate(self.experts):
            if bool((chosen := rows[:, 0] == which).any()):
                expert(rows[chosen])


class Routed(ActivationSource):
    """Instances of which the first two go to the first expert alone, as in the trial; ``later``: where others go."""

    kind: SourceKind = "language_model"
    digest, name, positions = "0" * 64, "experts", 3

    def __init__(self, later: float) -> None:
        self.model, self.later = Experts(), later

    def points(self) -> dict[str, HookPoint]:
        return {"expert": HookPoint("expert", "experts.0", "output")}

    def chunks(self, first: int) -> Iterator[Tensor]:
        values = torch.zeros(1024, 3, 2)
        values[4:, :, 0] = self.later
        if self.later == 0.5:
            values[4:, 0, 0] = 0
        yield values

    def forward(self, instances: Tensor, points: Sequence[HookPoint]) -> None:
        self.model(instances)

    def example(self) -> Tensor:
        return torch.zeros(2, 3, 2)


@pytest.mark.parametrize("later", [1.0, 0.5])
def test_a_module_that_a_batch_reaches_with_some_of_its_positions(
    later: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Routed(later)
    spec = ActivationsSpec.model_validate(
        {"language_model": {"model": "-", "dataset": "-"}, "hooks": ["expert"], "instances": 20, "batch_size": 2}
    )
    monkeypatch.setattr("services.clt.activations.collect.open_source", lambda *_: source)
    with torch.no_grad():
        assert plan(spec, source, Run())[1].hooks[0].width == 2
    with pytest.raises(InvalidInput, match=r"^spec\.hooks: expert has shape .* for 2 instances of 3 positions"):
        collect(spec, tmp_path / "store", Run())


def test_the_model_may_be_reached_by_a_link(lines: Path, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "gpt2")
    (tmp_path / "link").symlink_to(folder)
    store = collect(spec_of(tmp_path / "link", lines, instances=20), tmp_path / "store", Run())
    assert store.rows() == 18 * 7
    shutil.rmtree(folder)
    with pytest.raises(InvalidInput, match=r"^spec\.language_model\.model: .*link does not exist"):
        collect(spec_of(tmp_path / "link", lines), tmp_path / "store", Run())
