"""The hierarchical decoder: its masks, where its weights begin, and what it learns."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ethogram.errors import InvalidInput
from ethogram.specs.resource import DecoderModelSpec
from services.resource.decoder import job
from services.resource.decoder.model import LONGEST, UNKNOWN, HierarchicalDecoder, split
from services.resource.decoder.tasks import TaskTexts
from services.resource.decoder.train import DecoderTrainer
from services.resource.export import Export
from services.runtime.parallel import World
from services.runtime.training import fit
from tests.recorder import Recorder
from tests.resource.conftest import tiny_decoder_spec

TOOLS = torch.tensor([0, 0, 1, 0, 1, 2])
"""Tools whose configurations are not one after the other."""
WORDS = ["!", "1", "4", "cores", "run", "small"]


def decoder(seed: int = 0, **spec: object) -> HierarchicalDecoder:
    weights = torch.randn(6, 5, generator=torch.Generator().manual_seed(9))
    given = DecoderModelSpec.model_validate({"hidden_dim": 8, "layers": 1, "heads": 2, **spec})
    return HierarchicalDecoder(given, weights, TOOLS, WORDS, torch.Generator().manual_seed(seed))


def trainer(exported: Export, **sections: object) -> DecoderTrainer:
    return DecoderTrainer(tiny_decoder_spec(**sections), exported, TaskTexts(exported))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.text(max_size=30).map("x{}".format), min_size=1, max_size=4), st.integers(0, 5))
def test_a_choice_is_always_one_of_the_tools(texts: list[str], seed: int) -> None:
    """Whatever the weights and the text: letters of other scripts, too."""
    tools, chosen = decoder(seed).eval().choose(texts)
    assert torch.equal(TOOLS[chosen], tools)


def test_the_best_configuration_of_another_tool_is_not_chosen() -> None:
    model = decoder().eval()
    with torch.no_grad():
        model.config_head.bias.copy_(torch.tensor([0.0, 0, 100, 0, 200, 0]))
        model.tool_head.bias.copy_(torch.tensor([50.0, 0, 0]))
        tools, chosen = model.choose(["anything"])
        assert int(tools) == 0 and int(TOOLS[chosen]) == 0
        model.tool_head.bias.copy_(torch.tensor([0.0, 50, 0]))
        assert [int(part) for part in model.choose(["anything"])] == [1, 4]


def test_a_decision_has_its_probabilities() -> None:
    model, texts = decoder().eval(), ["run 4 cores", "small!"]
    decision = model.decide(texts)
    with torch.no_grad():
        scores = model(model.tokenize(texts))
    for row, tool in enumerate(decision.tools.tolist()):
        own = (tool == TOOLS).nonzero().flatten()
        of_tools, of_own = scores.tools[row].softmax(0), scores.configurations[row, own].softmax(0)
        torch.testing.assert_close(decision.tool_probability[row], of_tools.max())
        # Among those of the tool, whatever the others have.
        torch.testing.assert_close(decision.probability[row], of_own.max())
        assert int(decision.configurations[row]) == int(own[of_own.argmax()])
    assert all(torch.equal(*pair) for pair in zip(model.choose(texts), decision[:2], strict=True))


def test_what_stands_with_a_text_in_a_batch_does_not_matter() -> None:
    model = decoder().eval()
    short, long = "small", "a much longer text, with 12 cores and more words than the other"
    with torch.no_grad():
        alone, together = model(model.tokenize([short])), model(model.tokenize([short, long]))
    torch.testing.assert_close(alone.configurations[0], together.configurations[0])
    torch.testing.assert_close(alone.tools[0], together.tools[0])


def test_words_are_tokens_and_digits_one_by_one() -> None:
    rows = decoder().tokenize(["Run 14 cores!", "run 4 CORES", "a run of 1"])
    assert rows.tolist() == [[6, 3, 4, 5, 2], [6, 4, 5, 0, 0], [UNKNOWN, 6, UNKNOWN, 3, 0]]


def test_every_word_of_a_text_is_known_and_no_two_are_the_same(exported: Export) -> None:
    made = trainer(exported)
    texts, _ = made.draw(200, "words")
    assert {word for text in texts for word in split(text)} <= {*made.model.words}
    assert not bool((made.model.tokenize(texts) == UNKNOWN).any())
    assert len({*made.model.words}) == len(made.model.words) == len(made.model.embedding.weight) - 2


def test_a_text_that_is_too_long_or_empty_is_refused() -> None:
    tokenize = decoder().tokenize
    tokenize(["a " * LONGEST])
    with pytest.raises(InvalidInput, match=r"texts\.1: has no words"):
        tokenize(["a", " \n"])
    with pytest.raises(InvalidInput, match=rf"texts\.1: has 600 words, digits and marks; at most {LONGEST} are read"):
        tokenize(["a", "a " * 600])


def test_the_configuration_head_begins_as_the_export(exported: Export) -> None:
    head = trainer(exported).model.config_head.weight.detach()
    centered = exported.weights - exported.weights.mean(0)
    torch.testing.assert_close(head, centered / centered.norm(dim=1).mean())
    assert head.shape == (16, 32)
    random = trainer(exported, model={"initialization": "random"}).model.config_head.weight.detach()
    assert not torch.allclose(random, head, atol=0.01)
    assert 0.5 < float(random.norm(dim=1).mean() / head.norm(dim=1).mean()) < 2


def test_each_tool_has_the_configurations_of_the_mask_map(exported: Export) -> None:
    mask = trainer(exported).model.mask
    assert mask.tolist() == [[True] * 8 + [False] * 8, [False] * 8 + [True] * 8]


def test_accuracy_grows_and_a_choice_is_valid_from_the_beginning(exported: Export) -> None:
    made = trainer(
        exported,
        model={"hidden_dim": 32, "layers": 1, "heads": 2},
        training={"steps": 150, "batch_size": 64, "learning_rate": 5e-3, "validate_every": 150, "validation": 64},
    )
    before, _ = job.evaluate(made, 64)
    fit(made)
    after, rows = job.evaluate(made, 64)
    assert before["valid"] == after["valid"] == 1
    assert before["chance"] == after["chance"] == pytest.approx(1 / 8)
    assert before["accuracy"] < 0.3
    assert after["accuracy"] > 0.6 and after["tool_accuracy"] > 0.95
    assert len(rows) == job.EXAMPLES and after["steps"] == 150


def test_a_choice_is_valid_by_the_lookup_not_by_the_mask(exported: Export) -> None:
    """A mask that is wrong allows for configurations of other tools."""
    first, second = exported.masks.values()
    wrong = {"detect": [*first[1:], second[0]], "translate": [*second[1:], first[0]]}
    assert job.evaluate(trainer(exported), 64)[0]["valid"] == 1
    made = trainer(exported._replace(masks=wrong))
    with torch.no_grad():
        made.model.config_head.bias[[first[0], second[0]]] = 1e6
    figures, _ = job.evaluate(made, 64)
    assert figures["valid"] == 0 and figures["chance"] == pytest.approx(1 / 8)


def test_a_batch_of_fewer_texts_than_processes_is_refused(exported: Export) -> None:
    spec = tiny_decoder_spec(training={"batch_size": 1})
    with pytest.raises(InvalidInput, match="1 texts are too few for 2 processes") as caught:
        DecoderTrainer(spec, exported, TaskTexts(exported), world=World(0, 2))
    assert caught.value.violations[0].field == "spec.training.batch_size"


def test_validation_and_evaluation_have_texts_of_their_own(exported: Export) -> None:
    made = trainer(exported)
    drawn = [made.draw(8, *purpose)[0] for purpose in (("step", 0), ("step", 1), ("validation",), ("evaluation",))]
    assert len({tuple(texts) for texts in drawn}) == 4


def test_training_ends_at_its_target(exported: Export) -> None:
    made = trainer(exported, training={"steps": 8, "target_accuracy": 1e-9, "validation": 64})
    fit(made)
    assert made.step < 8 and made.progress.reached


@pytest.mark.pictures
def test_job_keeps_a_decoder_and_a_report(export_folder: Path, exported: Export, tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, inputs={"export": export_folder})
    result = job.run(tiny_decoder_spec(), recorder)
    assert recorder.artifacts == [("decoder", "decoder"), ("report", "report")]
    json.dumps(result, allow_nan=False)
    assert result["figures"]["valid"] == 1
    assert (tmp_path / "report" / "history.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "report" / "report.json").read_text())
    assert written["figures"] == result["figures"]

    loaded, config = job.load(tmp_path / "decoder")
    made = trainer(exported)
    fit(made)
    texts, _ = made.draw(20, "anything")
    for one, other in zip(loaded.choose(texts), made.model.eval().choose(texts), strict=True):
        assert torch.equal(one, other)
    assert config["lookup"] == exported.lookup and config["tools"] == ["detect", "translate"]
    assert config["export"] == exported.digest


def test_an_export_that_was_changed_is_refused(export_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(export_folder, tmp_path / "export")
    (copy / "tool_mask_map.json").write_text(json.dumps({"detect": list(range(16)), "translate": []}))
    with pytest.raises(InvalidInput, match=r"tool_mask_map\.json: was changed since the export"):
        job.run(tiny_decoder_spec(), Recorder(inputs={"export": copy}))
