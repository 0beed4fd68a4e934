"""The codec: save and load, any batch, and wrong input."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ethogram.errors import InvalidInput
from ethogram.specs.generation import PatternSpec, SignatureSpec
from services.crossmodal import codec as codec_module
from services.crossmodal.codec import Codec
from services.crossmodal.evaluate import evaluate
from services.crossmodal.report import all_latents
from services.crossmodal.train import CodecTrainer
from services.zoo.dataset import Zoo
from services.zoo.hashing import hash_sequences
from services.zoo.pools import Evaluation
from services.zoo.subjects import Architecture, Params, flatten, init, select
from services.zoo.universe import HELD_OUT, SELECTION
from tests.crossmodal.conftest import tiny_spec


@pytest.fixture
def networks(zoo: Zoo) -> Params:
    return select(zoo.params, torch.arange(7))


def test_round_trip_needs_nothing_else(zoo: Zoo, untrained: Codec, networks: Params, tmp_path: Path) -> None:
    untrained.save(tmp_path)
    loaded = Codec.load(tmp_path)
    assert loaded.behaviors == untrained.behaviors
    assert loaded.layout.shapes == untrained.layout.shapes
    assert loaded.spec == untrained.spec
    assert torch.equal(loaded.encode(networks), untrained.encode(networks))
    edits = [("add", "starts_with(A)")]
    for mode in ("residual", "direct"):
        (one, z), (two, y) = (codec.steer(networks, edits, mode) for codec in (loaded, untrained))
        assert torch.equal(flatten(one), flatten(two))
        assert torch.equal(z, y)
    for mine, theirs in zip(loaded.evaluate(networks), untrained.evaluate(networks), strict=True):
        assert torch.equal(mine, theirs)


def test_round_trip_with_patterns_of_ones_own(zoo: Zoo, networks: Params, tmp_path: Path) -> None:
    patterns = [*zoo.spec.patterns[:3], PatternSpec(name="contains_ba", regex=".*BA.*")]
    own = replace(zoo, spec=zoo.spec.model_copy(update={"patterns": patterns}))
    codec = CodecTrainer(tiny_spec(), own).codec()
    codec.save(tmp_path)
    loaded = Codec.load(tmp_path)
    assert loaded.patterns == codec.patterns and loaded.behaviors == codec.behaviors
    assert torch.equal(loaded.evaluation.membership, codec.evaluation.membership)
    for mine, theirs in zip(loaded.evaluate(networks), codec.evaluate(networks), strict=True):
        assert torch.equal(mine, theirs)
    config = (tmp_path / "config.json").read_text()
    for wrong, text in (
        ('"regex": ".*(BA.*"', "the end should be"),
        ('"regex": null', "there is no pattern contains_ba"),
    ):
        (tmp_path / "config.json").write_text(config.replace('"regex": ".*BA.*"', wrong))
        with pytest.raises(InvalidInput, match=rf"^config\.json.*{text}"):
            Codec.load(tmp_path)


def test_probes_are_neither_judged_on_nor_in_the_support_set(zoo: Zoo, networks: Params) -> None:
    # A zoo from elsewhere: half of its probes are what the codec would be judged on, and they are all that the support
    # set has of a behaviour.
    own = [Evaluation.build(zoo.universe, split=split) for split in (HELD_OUT, SELECTION)]
    sorted_ones = own[1].sequences[own[1].stratum == 2]
    assert 0 < len(sorted_ones) < 45
    probes = torch.cat([sorted_ones, own[0].sequences[:: len(own[0].sequences) // 24]])[:48]
    spec = tiny_spec(codec={"inputs": "weights"})
    codec = CodecTrainer(spec, replace(zoo, probes=probes)).codec()
    hashes = hash_sequences(probes)
    for asked in (codec.evaluation, codec.support):
        assert len(asked.sequences) > 50
        assert not torch.isin(hash_sequences(asked.sequences), hashes).any()
    assert not (codec.support.stratum == 2).any()
    had = codec.effect(networks, [("add", "ends_with(B)")]).had[:, 2]
    assert torch.equal(had, codec.probe(codec.encode(networks))[:, 2] > 0)


def test_many_networks_go_through_in_parts(
    zoo: Zoo, untrained: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, seen = untrained.encode(zoo.params), list[int]()
    monkeypatch.setattr(codec_module, "CHUNK", 50)
    codec = CodecTrainer(tiny_spec(), zoo).codec()
    for part in (codec.model.encoder, codec.model.decoder):
        part.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    torch.testing.assert_close(codec.encode(zoo.params), whole)
    torch.testing.assert_close(all_latents(codec, zoo), whole)
    evaluate(codec, zoo)
    assert sum(seen) > 4 * len(zoo) and max(seen) <= 64


def test_a_codec_of_one_part_is_loaded_but_not_saved(untrained: Codec, networks: Params, tmp_path: Path) -> None:
    untrained.save(tmp_path / "codec")
    part = Codec.load(tmp_path / "codec", parts=["encoder"])
    assert torch.equal(part.encode(networks), untrained.encode(networks))
    for call in (lambda: part.save(tmp_path / "other"), lambda: part.steer(networks, [("add", "has_majority")])):
        with pytest.raises(InvalidInput, match="model: the codec was loaded without its decoder"):
            call()
    assert not (tmp_path / "other").exists()
    with pytest.raises(InvalidInput, match="parts: 'enc' is none of encoder, decoder"):
        Codec.load(tmp_path / "codec", parts=["enc"])  # type: ignore[list-item]


def test_behaviors_say_what_they_are(untrained: Codec) -> None:
    assert [behavior.name for behavior in untrained.behaviors] == [
        "starts_with(A)",
        "ends_with(B)",
        "sorted_ascending",
        "has_majority",
    ]
    assert all(behavior.description and behavior.positives > 0 for behavior in untrained.behaviors)


def test_networks_and_their_signatures_encode_alike(zoo: Zoo, untrained: Codec, networks: Params) -> None:
    torch.testing.assert_close(untrained.encode(networks), untrained.encode_signatures(zoo.signatures[:7]))


def test_a_batch_equals_its_rows_one_by_one(untrained: Codec, networks: Params) -> None:
    edits = [("add", "ends_with(B)"), ("remove", "has_majority")]
    together, latents = untrained.steer(networks, edits)
    recall, wrong = untrained.evaluate(networks)
    for i in range(7):
        alone = select(networks, torch.tensor([i]))
        steered, latent = untrained.steer(alone, edits)
        torch.testing.assert_close(flatten(steered), flatten(select(together, torch.tensor([i]))), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(latent, latents[i : i + 1], rtol=1e-4, atol=1e-5)
        one_recall, one_wrong = untrained.evaluate(alone)
        torch.testing.assert_close(one_recall[0], recall[i])
        torch.testing.assert_close(one_wrong[0], wrong[i])


def test_a_network_from_outside_the_zoo_encodes(zoo: Zoo, untrained: Codec) -> None:
    mine = init(zoo.architecture, torch.tensor([1]))
    latents = untrained.encode({name: tensor.double() for name, tensor in mine.items()})
    assert latents.shape == (1, untrained.latent_dim)
    assert latents.dtype == torch.float32
    decoded = untrained.decode(latents)
    assert {name: tuple(t.shape[1:]) for name, t in decoded.items()} == zoo.architecture.shapes


def test_the_order_of_a_state_dict_does_not_matter(zoo: Zoo) -> None:
    """Layer 10 comes after layer 9, and before it in a dictionary that is sorted by name."""
    subject = zoo.spec.subject.model_validate({"layers": 10, "neurons": 4, "init": "independent"})
    deep = Architecture(5, 6, "one_hot", (4,) * 10, "tanh")
    spec = zoo.spec.model_copy(update={"subject": subject})
    parts = {"labels": zoo.labels[:40], "accuracy": zoo.accuracy[:40], "probes": zoo.probes}
    params = init(deep, torch.arange(40), kaiming=True)
    networks = [(deep, row) for row in flatten(params)]
    own = Zoo.of_shapes(spec, torch.arange(40), networks, **parts)
    form = {"architecture": "transformer", "hidden_dim": 32, "heads": 4, "depth": 1, "inputs": "both"}
    codec = CodecTrainer(tiny_spec(codec=form), own).codec()
    by_name = dict(sorted(params.items()))
    assert list(by_name) != list(params)
    assert torch.equal(codec.encode(by_name), codec.encode(params))
    assert list(codec.steer(by_name, [("add", "has_majority")])[0]) == list(params)


def test_evaluate_measures_recall_and_false_positives(zoo: Zoo, untrained: Codec) -> None:
    says_yes = {name: torch.zeros_like(tensor[:1]) for name, tensor in zoo.params.items()}
    says_yes["layers.2.bias"] += 1
    recall, wrong = untrained.evaluate(says_yes)
    assert recall.tolist() == [[1.0] * 4]
    assert wrong.tolist() == [1.0]
    recall, wrong = untrained.evaluate(zoo.params)
    for pattern in range(4):
        has = zoo.labels[:, pattern]
        assert float(recall[has, pattern].mean()) > 0.7
        assert float(recall[has, pattern].mean()) > float(recall[~has, pattern].mean()) + 0.2
    assert float(wrong.mean()) < 0.1


P = "networks.parameters"


@pytest.mark.parametrize(
    ("change", "field", "text"),
    [
        (lambda p: p.pop("layers.1.bias"), f"{P}.layers.1.bias", "missing; a network of this model has"),
        (lambda p: p.update({"layers.9.bias": p["layers.1.bias"]}), f"{P}.layers.9.bias", "no such parameter"),
        (lambda p: p.update({"layers.1.bias": p["layers.1.bias"][:3]}), f"{P}.layers.1.bias", "a batch of 3"),
        (
            lambda p: p.update({"layers.0.weight": p["layers.0.weight"][:, :5]}),
            f"{P}.layers.0.weight",
            r"takes \[batch, 12, 30\]",
        ),
        (lambda p: p.update({"layers.0.bias": p["layers.0.bias"].sum()}), f"{P}.layers.0.bias", r"shape \[\]"),
        (lambda p: p.update({k: v[:0] for k, v in p.items()}), f"{P}.layers.0.weight", "empty"),
        (lambda p: p.update({"layers.0.bias": p["layers.0.bias"].long()}), f"{P}.layers.0.bias", "int64"),
        (lambda p: p["layers.2.bias"].fill_(float("nan")), f"{P}.layers.2.bias", "NaN"),
        (lambda p: p.update({"layers.2.bias": p["layers.2.bias"].double() + 1e300}), f"{P}.layers.2.bias", "infinity"),
    ],
)
def test_wrong_networks(
    untrained: Codec, networks: Params, change: Callable[[Params], object], field: str, text: str
) -> None:
    wrong = {name: tensor.clone() for name, tensor in networks.items()}
    change(wrong)
    for call in (untrained.encode, untrained.evaluate, lambda p: untrained.steer(p, [("add", "has_majority")])):
        with pytest.raises(InvalidInput, match=text) as caught:
            call(wrong)
        assert caught.value.violations[0].field == field


@pytest.mark.parametrize(
    ("methods", "canonicalize", "factor"),
    # Activations that are no numbers, and those that just are.
    [(["raw"], False, 1e30), (["entropy", "pca"], True, 1e30), (["raw"], False, 3e12)],
)
def test_networks_whose_activations_overflow(
    zoo: Zoo, networks: Params, methods: list[str], canonicalize: bool, factor: float
) -> None:
    signature = SignatureSpec.model_validate({"probes": 48, "methods": methods})
    own = replace(zoo, spec=zoo.spec.model_copy(update={"signature": signature}))
    codec = CodecTrainer(tiny_spec(codec={"canonicalize": canonicalize}), own).codec()
    huge = {name: tensor * factor for name, tensor in networks.items()}
    edits = [("add", "has_majority")]
    for call in (codec.encode, lambda p: codec.steer(p, edits), lambda p: codec.effect(p, edits)):
        call(networks)
        with pytest.raises(InvalidInput, match="so large that activations overflow") as caught:
            call(huge)
        assert caught.value.violations[0].field == "networks"


@pytest.mark.parametrize(
    ("edits", "options", "field"),
    [
        ([], {}, "edits"),
        ([("add", "palindrome")], {}, "edits.0.behavior"),
        ([("add", "has_majority"), ("turn", "has_majority")], {}, "edits.1.operation"),
        ([("add", "has_majority"), ("remove",)], {}, "edits.1"),
        ([("add", "has_majority"), ("remove", "has_majority")], {}, "edits.1.behavior"),
        ([("add", "has_majority")], {"mode": "sideways"}, "mode"),
        ([("add", "has_majority")], {"strength": float("inf")}, "strength"),
    ],
)
def test_wrong_edits(
    untrained: Codec, networks: Params, edits: list[tuple[str, ...]], options: dict[str, object], field: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        untrained.steer(networks, edits, **options)  # type: ignore[arg-type]
    assert caught.value.violations[0].field == field


def test_wrong_latents_and_signatures(zoo: Zoo, untrained: Codec) -> None:
    wrong = (torch.zeros(2, 23), torch.zeros(0, 24), torch.full((1, 24), float("nan")), torch.zeros(24))
    for latents in (*wrong, torch.full((1, 24), 3e38)):
        with pytest.raises(InvalidInput, match="latents"):
            untrained.decode(latents)
    for signatures in (
        zoo.signatures[:2, :, :5],
        zoo.signatures[:2, :5],
        zoo.signatures[:0],
        zoo.signatures[0],
        3e38 * zoo.signatures[:2].sign(),
    ):
        with pytest.raises(InvalidInput, match="signatures"):
            untrained.encode_signatures(signatures)


def test_broken_files(untrained: Codec, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"config\.json"):
        Codec.load(tmp_path)
    untrained.save(tmp_path)
    (tmp_path / "decoder.safetensors").write_bytes(b"nothing")
    with pytest.raises(InvalidInput, match=r"decoder\.safetensors"):
        Codec.load(tmp_path)
    (tmp_path / "decoder.safetensors").unlink()
    with pytest.raises(InvalidInput, match="missing"):
        Codec.load(tmp_path)
    untrained.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["spec"]["codec"]["hidden_dim"] = 5
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidInput, match="does not fit"):
        Codec.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "format": 99}))
    with pytest.raises(InvalidInput, match="format 99"):
        Codec.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InvalidInput, match=r"config\.json"):
        Codec.load(tmp_path)
    for entry, wrong in (("shapes", {}), ("spec", {"seed": -1}), ("behaviors", 7)):
        (tmp_path / "config.json").write_text(json.dumps({**config, entry: wrong}))
        with pytest.raises(InvalidInput, match=r"config\.json"):
            Codec.load(tmp_path)
    learned = torch.zeros(4, 24)
    for name, tensors, text in (
        ("directions", {"other": torch.zeros(4)}, "has no learned"),
        ("directions", {"learned": learned}, "has no mean_difference"),
        ("directions", {"learned": learned[:3]}, "cannot be read, or does not fit"),
    ):
        untrained.save(tmp_path)
        run = json.loads((tmp_path / "config.json").read_text())["run"]
        save_file(tensors, tmp_path / f"{name}.safetensors", {"run": run})
        with pytest.raises(InvalidInput, match=rf"{name}\.safetensors: {text}"):
            Codec.load(tmp_path)


def test_former_attributes_still_work(zoo: Zoo, untrained: Codec) -> None:
    with pytest.warns(DeprecationWarning, match=r"Codec\.history"):
        assert untrained.course is untrained.history
    assert untrained.signature == zoo.spec.signature and torch.equal(untrained.probes, zoo.probes)
    assert untrained.signature_shape == (zoo.layout.neurons, zoo.extractor.values)


def test_the_former_module_warns() -> None:
    with pytest.warns(DeprecationWarning, match=r"services\.crossmodal\.codec"):
        former = importlib.import_module("services.crossmodal.bundle")
    assert former.Codec is Codec
    assert former.Effect is codec_module.Effect
    assert former.Behavior is codec_module.Behavior
