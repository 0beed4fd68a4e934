"""Codecs of every form, and of zoos whose subjects differ in shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ethogram.errors import InvalidInput
from ethogram.specs.generation import SubjectSpec
from services.crossmodal.codec import Codec
from services.crossmodal.evaluate import evaluate, judge_reconstruction
from services.crossmodal.job import run as run_job
from services.crossmodal.train import CodecTrainer, train
from services.generation.pipeline import generate
from services.zoo.dataset import Zoo
from services.zoo.subjects import flatten, unflatten
from tests.crossmodal.conftest import SMALL, ZOO, tiny_spec
from tests.recorder import Recorder


@pytest.fixture(scope="module")
def mixed() -> Zoo:
    subject = {
        "layers": {"min": 1, "max": 2},
        "neurons": {"min": 7, "max": 8},
        "activations": ["relu", "tanh"],
        "init": "independent",
    }
    spec = ZOO.model_copy(update={"subjects": 96, "subject": SubjectSpec.model_validate(subject)})
    return generate(spec.model_copy(update={"min_accuracy": 0.3}))


FORMS: list[dict[str, Any]] = [
    {},
    {"inputs": "both", "pooling": "mean", "positions": "sinusoidal"},
    {"pooling": "max"},
    SMALL,
    {**SMALL, "pooling": "cls", "inputs": "weights", "granularity": "chunk", "chunk": 40},
    {**SMALL, "pooling": "mean", "inputs": "both", "positions": "sinusoidal"},
]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_learns_saves_and_steers(zoo: Zoo, form: dict[str, Any], tmp_path: Path) -> None:
    trainer = CodecTrainer(tiny_spec(codec=form), zoo)
    first = trainer.validate()["validation_loss"]
    for _ in range(12):
        trainer.advance()
    assert trainer.validate()["validation_loss"] < first
    codec = trainer.codec()
    codec.save(tmp_path)
    networks = {name: tensor[:3] for name, tensor in zoo.params.items()}
    for mode in ("residual", "direct"):
        steered, latents = codec.steer(networks, [("add", "has_majority")], mode)
        again, same = Codec.load(tmp_path).steer(networks, [("add", "has_majority")], mode)
        assert torch.equal(flatten(steered), flatten(again)) and torch.equal(latents, same)


@pytest.mark.parametrize("form", FORMS)
def test_the_whole_model_goes_to_another_device(zoo: Zoo, form: dict[str, Any]) -> None:
    model = CodecTrainer(tiny_spec(codec=form), zoo).model.to("meta")
    assert {tensor.device.type for tensor in tensors(model)} == {"meta"}


def tensors(held: object) -> Iterator[torch.Tensor]:
    """Every tensor that an object holds, in whatever it holds them."""
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, dict):
        for value in held.values():
            yield from tensors(value)
    elif isinstance(held, list | tuple):
        for value in held:
            yield from tensors(value)
    elif isinstance(held, torch.nn.Module):
        yield from tensors(vars(held))


@pytest.mark.parametrize("form", [{}, {**SMALL, "pooling": "mean"}])
def test_a_zoo_of_several_shapes(mixed: Zoo, form: dict[str, Any], tmp_path: Path) -> None:
    assert len(mixed.layout.shapes) == 8
    mixed.save(tmp_path / "zoo")
    assert (
        run_job(tiny_spec(codec=form), Recorder(tmp_path, inputs={"zoo": tmp_path / "zoo"}))["subjects"]["held_out"]
        == 19
    )
    codec = Codec.load(tmp_path / "codec")
    edits = [("add", "starts_with(A)"), ("remove", "has_majority")]
    for which, shape in enumerate(mixed.layout.shapes):
        rows = (mixed.shape == which).nonzero().squeeze(1)[:2]
        networks = unflatten(mixed.layout.strip(mixed.weights[rows], which), shape)
        steered, latents = codec.steer(networks, edits, activation=shape.activation)
        assert {name: tuple(tensor.shape[1:]) for name, tensor in steered.items()} == shape.shapes
        assert not torch.equal(flatten(steered), flatten(networks))
        null, _ = codec.steer(networks, edits, strength=0.0, activation=shape.activation)
        assert all(torch.equal(null[name], networks[name]) for name in networks)
        assert {n: t.shape for n, t in codec.decode(latents, shape).items()} == {n: t.shape for n, t in steered.items()}
    with pytest.raises(InvalidInput, match=r"networks\.activation.*say which"):
        codec.encode(networks)
    with pytest.raises(InvalidInput, match=r"networks\.activation.*it knows relu, tanh"):
        codec.encode(networks, "gelu")
    wide = {name: torch.zeros(1, *[20 if n == 8 else n for n in shape]) for name, shape in shape.shapes.items()}
    with pytest.raises(InvalidInput, match="not trained on; this model knows 30-7-1 relu"):
        codec.encode(wide)
    with pytest.raises(InvalidInput, match=r"shape: .*say which"):
        codec.decode(latents)


def test_judged_subjects_have_the_layers_and_neurons_of_their_own_shapes(
    mixed: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = CodecTrainer(tiny_spec(), mixed).codec()
    absent, asked, yes = ~mixed.layout.present, 0, Codec.yes

    def checked(codec: Codec, vectors: torch.Tensor, shape: torch.Tensor, *more: Any) -> torch.Tensor:
        nonlocal asked
        asked += 1
        assert not vectors[absent[shape]].any()
        return yes(codec, vectors, shape, *more)

    monkeypatch.setattr(Codec, "yes", checked)
    ways = {row["variant"] for row in evaluate(codec, mixed)["others"]}
    assert "task_arithmetic" in ways and asked > 20
    # None of these has the second hidden layer.
    shallow = torch.tensor([len(mixed.layout.shapes[which].hidden) == 1 for which in mixed.shape.tolist()])
    subjects = codec.preprocessor.subjects(mixed, shallow.nonzero().squeeze(1))
    latents = codec.latents(subjects.inputs, subjects.shape)
    errors = judge_reconstruction(codec, subjects, codec.decodings(latents, subjects.shape))
    assert set(errors) == {"all", "layers.0", "layers.2"}


def test_subjects_that_all_have_shapes_of_their_own_cannot_be_held_out(mixed: Zoo) -> None:
    firsts = torch.tensor([int((mixed.shape == which).nonzero()[0]) for which in range(len(mixed.layout.shapes))])
    parts = {name: getattr(mixed, name)[firsts] for name in ("index", "shape", "weights", "labels", "accuracy")}
    with pytest.raises(InvalidInput, match=r"have \d+ shapes, so none can be held out; add subjects") as caught:
        train(tiny_spec(), replace(mixed, **parts))
    assert caught.value.violations[0].field == "zoo"
