"""The gates' arithmetic, on answers and networks made by hand."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from math import isfinite
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ethogram.specs.edits import Edit
from ethogram.specs.generation import SignatureSpec
from services.crossmodal import baselines
from services.crossmodal import evaluate as judging
from services.crossmodal.baselines import FINE_STEPS, Baselines, fine_tuned
from services.crossmodal.codec import Codec
from services.crossmodal.data import Queries, split_subjects
from services.crossmodal.evaluate import (
    CONTROLS,
    evaluate,
    judge_decoding,
    judge_reconstruction,
    possible_edits,
    same_label_partner,
    summary,
)
from services.crossmodal.report import steering_plot, write_report
from services.crossmodal.steering import every_edit, score, signs
from services.crossmodal.train import CodecTrainer
from services.zoo.dataset import Zoo
from services.zoo.pools import Evaluation
from services.zoo.subjects import encode, forward, select
from tests.crossmodal.conftest import tiny_spec


def test_score_counts_inside_and_outside_of_what_the_edit_decides() -> None:
    before = torch.tensor([[False] * 20 + [True] * 50 + [False] * 50])
    after = torch.tensor([[True] * 20 + [True] * 50 + [False] * 50])
    source = before.clone()
    source[0, 20:25] = False  # wrong on 5 of the 100 outside
    said = after.clone()
    said[0, :3] = False  # wrong on 3 of the 20 inside
    said[0, 20:27] = False  # wrong on 7 of the 100 outside
    found = score(said, source, before, after)
    assert float(found.target) == pytest.approx(17 / 20)
    assert float(found.local) == pytest.approx(-0.02)
    assert float(found.kept) == pytest.approx(0.98)
    assert found.target_gate.tolist() == [True]
    assert found.all_gate.tolist() == [True]
    said[0, 27] = False
    worse = score(said, source, before, after)
    assert worse.target_gate.tolist() == [True]
    assert worse.all_gate.tolist() == [False]


def test_a_perfect_edit_passes_and_a_null_edit_does_not() -> None:
    before = torch.tensor([[False] * 16 + [True] * 30 + [False] * 30])
    after = before.clone()
    after[0, :16] = True
    assert score(after, before, before, after).all_gate.tolist() == [True]
    null = score(before, before, before, after)
    assert (float(null.target), float(null.local), null.all_gate.tolist()) == (0, 0, [False])
    assert float(null.kept) == 1
    # Where the edit decides nothing, or everything, there is nothing to measure.
    none = score(after, before, before, before)
    assert bool(none.target.isnan().all()) and none.all_gate.tolist() == [False]
    assert bool(score(~before, before, before, ~before).kept.isnan().all())


def test_behaviours_without_sequences_count_in_no_mean(zoo: Zoo, untrained: Codec) -> None:
    contents = replace(untrained.contents, evaluation=without(untrained.evaluation, 2))
    codec, networks = Codec(contents), select(zoo.params, torch.arange(5))
    recall, _ = codec.evaluate(networks)
    assert recall[:, 2].isnan().all() and not recall[:, [0, 1, 3]].isnan().any()
    effect = codec.effect(networks, [("add", "has_majority")])
    assert effect.recall[:, :, 2].isnan().all() and not effect.recall[:, :, 3].isnan().any()
    result = evaluate(codec, zoo)
    assert all(isfinite(value) for value in result["figures"].values())
    # An edit that no sequence decides is none that failed, and none that passed.
    assert {row["pattern"] for row in result["steering"] if not row["edits"]} == {"sorted_ascending"}


def without(evaluation: Evaluation, pattern: int) -> Evaluation:
    """The evaluation set without the sequences that match ``pattern``."""
    rows = ~evaluation.membership[:, pattern]
    return Evaluation(*(getattr(evaluation, name)[rows] for name in ("sequences", "membership", "stratum")))


def made_by_hand(counts: dict[tuple[int, ...], int], patterns: int) -> Evaluation:
    """An evaluation set with ``counts`` sequences of each set of patterns."""
    membership = torch.zeros(sum(counts.values()), patterns, dtype=torch.bool)
    row = 0
    for chosen, count in counts.items():
        for pattern in chosen:
            membership[row : row + count, pattern] = True
        row += count
    stratum = torch.where(membership.any(1), membership.int().argmax(1), torch.tensor(patterns))
    return Evaluation(torch.zeros(len(membership), 5, dtype=torch.int64), membership, stratum)


def an_edit(operation: str, pattern: int) -> tuple[Edit, torch.Tensor]:
    """Of one of two patterns, and its signs."""
    edit = next(
        one for one in every_edit("ab", replace=False) if (one.operation, one.label) == (operation, "ab"[pattern])
    )
    return edit, signs([edit], "ab")


def test_replacements_are_of_the_one_behavior_that_a_subject_has() -> None:
    evaluation = made_by_hand({(0,): 20, (1,): 18, (0, 1): 5, (): 30}, patterns=3)
    labels = torch.tensor([[True, False, False], [False, True, False]])
    every = every_edit("abc", replace=True)
    assert [(one.operation, one.label) for one in every[:6]] == [
        (operation, name) for name in "abc" for operation in ("add", "remove")
    ]
    asked = every[6:]
    assert [one.label for one in asked] == ["a -> b", "a -> c", "b -> a", "b -> c", "c -> a", "c -> b"]
    found = possible_edits(evaluation, labels, evaluation.labels(labels), asked[0], signs(asked[:1], "abc"))
    assert (found.subject.tolist(), found.skipped) == ([0], 0)
    assert torch.equal(found.after[0], evaluation.membership[:, 1])
    assert int((found.before != found.after).sum()) == 38
    found = possible_edits(evaluation, labels, evaluation.labels(labels), asked[4], signs(asked[4:5], "abc"))
    assert found.subject.tolist() == []


def test_edits_that_decide_too_little_are_skipped_and_counted() -> None:
    # 20 sequences match 0 alone, 10 match 0 and 1, 12 match 1 alone.
    evaluation = made_by_hand({(0,): 20, (0, 1): 10, (1,): 12, (): 30}, patterns=2)
    labels = torch.tensor([[True, False], [False, True], [True, True]])
    source = torch.stack([evaluation.membership[:, 0], evaluation.membership[:, 1], evaluation.membership.any(1)])
    adding = possible_edits(evaluation, labels, source, *an_edit("add", 0))
    assert (adding.subject.tolist(), adding.skipped) == ([1], 0)
    assert int((adding.before != adding.after).sum()) == 20
    overlapping = possible_edits(evaluation, labels, source, *an_edit("add", 1))
    assert (overlapping.subject.tolist(), overlapping.skipped) == ([], 1)
    # Only subjects with another pattern can lose one.
    removing = possible_edits(evaluation, labels, source, *an_edit("remove", 0))
    assert (removing.subject.tolist(), removing.skipped) == ([2], 0)
    assert int((removing.before & ~removing.after).sum()) == 20


def test_a_subject_that_never_had_the_behaviour_cannot_lose_it() -> None:
    evaluation = made_by_hand({(0,): 20, (1,): 20, (): 30}, patterns=2)
    labels = torch.tensor([[True, True]])
    source = evaluation.labels(labels)
    source[0, :5] = False  # right on 15 of 20
    assert possible_edits(evaluation, labels, source, *an_edit("remove", 0)).skipped == 1
    source[0, 0] = True
    assert possible_edits(evaluation, labels, source, *an_edit("remove", 0)).subject.tolist() == [0]


def test_summary_is_a_macro_mean_over_patterns_and_finds_the_worst_control() -> None:
    def row(pattern: str, variant: str, value: float, edits: int = 7) -> dict[str, Any]:
        same = dict.fromkeys(("target_mean", "target_gate", "local_mean", "kept_mean", "all_gate"), value)
        return {"pattern": pattern, "operation": "add", "mode": "residual", "variant": variant, "edits": edits, **same}

    rows = [
        row("a", "edit", 1.0, edits=100),
        row("b", "edit", 0.5, edits=1),
        row("a", "null", 0.0),
        row("b", "null", 0.2),
        {"pattern": "c", "operation": "add", "edits": 0, "skipped": 9},
    ]
    figures = summary(rows)
    assert figures["add.all_gate"] == 0.75
    assert figures["add.min_pattern_all_gate"] == 0.5
    assert figures["add.null.all_gate"] == figures["controls.max_all_gate"] == pytest.approx(0.1)


def test_partners_have_the_same_patterns_and_are_someone_else() -> None:
    labels = torch.tensor([[1, 0], [0, 1], [1, 0], [1, 1], [1, 0]]).bool()
    partner = same_label_partner(labels)
    assert partner[[1, 3]].tolist() == [-1, -1]
    assert sorted(partner[[0, 2, 4]].tolist()) == [0, 2, 4]
    assert all(int(partner[i]) != i for i in range(5))


def test_evaluation_of_an_untrained_codec(zoo: Zoo, untrained: Codec) -> None:
    result = evaluate(untrained, zoo)
    figures = result["figures"]
    assert result["subjects"] == {"train": 120, "held_out": 32}
    assert figures["add.null.target_mean"] < 0.4
    assert figures["add.null.local_mean"] == 0
    # What an untrained codec decodes has lost behaviours, so direct removals need no edit.
    residual_and_added = [f"{edit}.{name}" for edit in ("add", "remove", "direct.add") for name in CONTROLS]
    assert max(figures[f"{name}.all_gate"] for name in residual_and_added) <= 0.05
    assert set(result["reconstruction"]) == {"all", "layers.0", "layers.1", "layers.2"}
    assert set(result["probes"]) == {"starts_with(A)", "ends_with(B)", "sorted_ascending", "has_majority"}
    assert all(0 <= row["auc"] <= 1 for row in result["probes"].values())
    edits = [row for row in result["steering"] if row.get("variant") == "edit"]
    assert {(row["operation"], row["mode"]) for row in edits} >= {("add", "residual"), ("add", "direct")}
    assert all(0 <= row["all_gate"] <= row["target_gate"] <= 1 for row in edits)
    assert evaluate(untrained, zoo) == result
    # Least squares needs no training; what no probe shows of a network of relu stays unknown.
    assert figures["oracle.agreement"] > 0.97 > figures["agreement"]
    assert set(result["oracle"]) == {"all", "layers.0", "layers.1", "layers.2"}
    solved, decoded = (result[name]["layers.0"]["relative_error"] for name in ("oracle", "reconstruction"))
    assert solved < 1e-3 < decoded
    # It keeps what it does not change, which is no merit.
    assert "better than a lookup: nothing of this" in result["summary"][-3] and "Least squares" in result["summary"][-1]


def test_lookups_are_judged_on_all_edits_and_tuning_on_some(
    zoo: Zoo, untrained: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = evaluate(untrained, zoo)
    monkeypatch.setattr(judging, "CHUNK", 5)
    result = evaluate(untrained, zoo)
    edits = {(r["operation"], r["pattern"]): r["edits"] for r in result["steering"] if r.get("variant") == "edit"}
    assert max(edits.values()) > 10
    for row in result["others"]:
        count = edits[row["operation"], row["pattern"]]
        if row["variant"] == "fine_tuning":
            assert row["edits"] == min(5, count)
        elif row["variant"] not in ("same_label", "centroid"):
            assert row["edits"] == count
    for way in ("same_label", "nearest_train", "centroid", "task_arithmetic"):
        found, expected = ([row for row in r["others"] if row["variant"] == way] for r in (result, every))
        assert found == [pytest.approx(row) for row in expected]
        for name in ("all_gate", "target_mean", "kept_mean", "local_mean"):
            of_add = [row[name] for row in found if row["operation"] == "add"]
            assert result["figures"][f"add.{way}.{name}"] == pytest.approx(sum(of_add) / len(of_add))
    asked = sum(count for (operation, _), count in edits.items() if operation == "add")
    looked_up = sum(
        row["edits"] for row in result["others"] if (row["operation"], row["variant"]) == ("add", "same_label")
    )
    assert result["figures"]["add.same_label.available"] == pytest.approx(looked_up / asked)
    # An addition asks for up to three behaviours, and training networks have one or two.
    assert looked_up < asked
    for mode, prefix in (("residual", ""), ("direct", "direct.")):
        for way in ("same_label", "nearest_train"):
            rows = [row for row in result["others"] if (row["operation"], row["variant"]) == ("add", way)]
            kept = [row[f"{mode}.kept_mean"] for row in rows]
            assert result["figures"][f"{prefix}add.where_{way}.kept_mean"] == pytest.approx(sum(kept) / len(kept))
            kept_of_all = [
                row["kept_mean"]
                for row in result["steering"]
                if (row["operation"], row.get("mode"), row.get("variant")) == ("add", mode, "edit")
            ]
            assert (kept == pytest.approx(kept_of_all)) == (way == "nearest_train")


def test_same_label_is_the_nearest_of_those(zoo: Zoo, untrained: Codec) -> None:
    train = untrained.preprocessor.subjects(zoo, torch.arange(60), untrained.device)
    ways = Baselines(untrained, train, Queries.build(zoo.universe, zoo.architecture, 0))
    edit = every_edit([p.name for p in zoo.patterns], replace=False)[0]
    subjects = train.at((~train.labels[:, 0]).nonzero().squeeze(1))
    latents = untrained.latents(subjects.inputs, subjects.shape)
    found, available = ways.edit(subjects, latents, edit, tune=False)["same_label"]
    steered = latents + untrained.signs([edit]) @ untrained.directions["learned"]
    wanted = subjects.labels | (untrained.signs([edit]) > 0)
    choices = 0
    for row in range(len(found)):
        fitting = [i for i in range(60) if torch.equal(train.labels[i], wanted[row])]
        assert bool(available[row]) == bool(fitting)
        if fitting:
            nearest = min(fitting, key=lambda i: float((ways._latents[i] - steered[row]).norm()))
            assert torch.equal(found[row], train.weights[nearest])
            choices += nearest != fitting[0]
    assert choices


def test_a_network_of_another_shape_is_never_the_nearest(zoo: Zoo, untrained: Codec) -> None:
    subjects = untrained.preprocessor.subjects(zoo, torch.arange(20))
    edit, _ = next((one, 0) for one in every_edit([p.name for p in zoo.patterns], replace=False))
    # At a distance of 0, but of a shape that is not the edited networks'.
    others = subjects._replace(shape=torch.ones(20, dtype=torch.int64))
    ways = Baselines(untrained, others, Queries.build(zoo.universe, zoo.architecture, 0))
    latents = ways._latents - untrained.signs([edit]) @ untrained.directions["learned"]
    assert not ways.edit(subjects, latents, edit, tune=False)["nearest_train"][1].any()


@pytest.mark.parametrize("signature", [{"methods": ["mean", "std"]}, {"activations": "post"}])
def test_without_raw_activations_there_is_nothing_to_solve(zoo: Zoo, tmp_path: Path, signature: dict[str, Any]) -> None:
    spec = zoo.spec.model_copy(update={"signature": SignatureSpec(probes=len(zoo.probes), **signature)})
    other = replace(zoo, spec=spec)
    codec = CodecTrainer(tiny_spec(), other).codec()
    result = evaluate(codec, other)
    assert result["oracle"] == {} and "oracle.agreement" not in result["figures"]
    unclear = "methods" in signature
    assert ("cannot determine the weights" in result["summary"][-1]) == unclear
    write_report(tmp_path, codec, other, result)
    page = (tmp_path / "report.html").read_text()
    assert ("cannot determine the weights" in page) == unclear and "least squares" not in page


def test_a_zoo_of_one_behavior_each_is_judged_on_additions_and_replacements(zoo: Zoo, tmp_path: Path) -> None:
    alone = zoo.labels.sum(1) == 1
    parts = {name: getattr(zoo, name)[alone] for name in ("index", "shape", "weights", "labels", "accuracy")}
    ones = replace(zoo, **parts)
    codec = CodecTrainer(tiny_spec(), ones).codec()
    result = evaluate(codec, ones)
    rows = result["steering"]
    edits = {operation: [r for r in rows if r["operation"] == operation] for operation in ("add", "remove", "replace")}
    assert {row["pattern"] for row in edits["add"]} == {row["pattern"] for row in edits["remove"]}
    assert len({row["pattern"] for row in edits["replace"]}) == 12
    assert [row["edits"] for row in edits["remove"]] == [0] * 4
    figures = set(result["figures"])
    assert {"add.all_gate", "replace.all_gate"} <= figures and "remove.all_gate" not in figures
    write_report(tmp_path, codec, ones, result)
    page = (tmp_path / "report.html").read_text()
    assert "has_majority -&gt; ends_with(B)" in page and page.count("<img ") == 3
    # Each operation has a line of its own, with its own behaviours.
    result["steering"] += [row | {"operation": "remove"} for row in edits["add"]]
    axes = steering_plot(result).axes
    assert [axis.get_title(loc="left").split(":")[0] for axis in axes[::3]] == ["ADD", "REMOVE", "REPLACE"]
    assert [len(axis.get_yticks()) for axis in axes[::3]] == [4, 4, 12]


def test_short_fine_tuning_is_an_oracle_and_nothing_else_is_trained(
    zoo: Zoo, untrained: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "FINE_STEPS", FINE_STEPS)
    subjects = untrained.preprocessor.subjects(zoo, torch.arange(40))
    asked = next(one for one in every_edit([p.name for p in zoo.patterns], replace=False) if one.operation == "add")
    source = untrained.yes(subjects.weights, subjects.shape)
    possible = possible_edits(untrained.evaluation, subjects.labels, source, asked, untrained.signs([asked]))
    own = subjects.at(possible.subject)
    wanted = own.labels | (untrained.signs([asked]) > 0)
    queries = Queries.build(zoo.universe, zoo.architecture, 0)
    tuned = fine_tuned(untrained, queries, own, wanted, asked)
    said = untrained.yes(tuned, own.shape)
    found = score(said, source[possible.subject], possible.before, possible.after)
    assert float(found.target.mean()) > 0.9 and float(found.local.mean()) > -0.1
    alone = fine_tuned(untrained, queries, own.at(torch.tensor([1])), wanted[1:2], asked)
    assert alone.shape == (1, zoo.layout.size)


def test_errors_of_reconstruction_against_loops(zoo: Zoo, untrained: Codec) -> None:
    subjects = untrained.preprocessor.subjects(zoo, torch.arange(5))
    weights = subjects.weights + 0.1 * torch.randn(subjects.weights.shape, generator=torch.Generator().manual_seed(0))
    found = judge_reconstruction(untrained, subjects, weights)
    last = subjects.weights[:, -13:], weights[:, -13:]
    mean = untrained.model.decoder.standard.mean[-13:]
    pairs = [(float(s), float(w)) for s, w in zip(last[0].flatten(), last[1].flatten(), strict=True)]
    squared = [(s - w) ** 2 for s, w in pairs]
    own = found["layers.2"]
    assert own["mse"] == pytest.approx(sum(squared) / len(pairs), rel=1e-4)
    assert own["rmse"] == pytest.approx(own["mse"] ** 0.5)
    assert own["mae"] == pytest.approx(sum(abs(s - w) for s, w in pairs) / len(pairs), rel=1e-4)
    relative = [float((w - s).norm() / s.norm()) for s, w in zip(*last, strict=True)]
    assert own["relative_error"] == pytest.approx(sum(relative) / 5, rel=1e-4)
    cosine = [float(s @ w / s.norm() / w.norm()) for s, w in zip(*last, strict=True)]
    assert own["cosine"] == pytest.approx(sum(cosine) / 5, rel=1e-4)
    around = sum(float((s - mean).square().sum()) for s in last[0])
    assert own["r2"] == pytest.approx(1 - sum(squared) / around, rel=1e-4)
    perfect = judge_reconstruction(untrained, subjects, subjects.weights)["all"]
    assert (perfect["mse"], perfect["relative_error"], perfect["r2"]) == (0, 0, 1)
    assert perfect["cosine"] == pytest.approx(1)


@pytest.mark.parametrize("count", [50, 150, 400, 750])
def test_a_loss_of_exactly_two_percent_passes_the_gate(count: int) -> None:
    lost = count // 50
    before = torch.zeros(count - lost, 20 + count, dtype=torch.bool)
    after = before.clone()
    after[:, :20] = True
    # Row by row, the source is wrong on one more of those outside of what the edit decides.
    source = before.clone()
    source[:, 20:] = torch.ones(count - lost, count, dtype=torch.bool).tril(-1)
    said = after | source
    said[:, -lost:] = True
    assert score(said, source, before, after).all_gate.all()
    said[:, -lost - 1] = True
    assert not score(said, source, before, after).all_gate[:-1].any()


def test_figures_of_decoding_of_a_perfect_and_of_a_constant_decoder(zoo: Zoo, untrained: Codec) -> None:
    split = split_subjects(zoo.labels, zoo.shape, untrained.spec)
    train, judged = (untrained.preprocessor.subjects(zoo, index) for index in (split.train, split.held_out))

    def figures(weights: torch.Tensor) -> dict[str, float]:
        codec = copy(untrained)
        codec.model = SimpleNamespace(encoder=untrained.model.encoder, decoder=lambda *_: weights)  # type: ignore[assignment]
        return judge_decoding(codec, train, judged)[0]

    perfect = figures(judged.weights)
    assert perfect["agreement"] == perfect["agreement_balanced"] == pytest.approx(1)
    assert perfect["spread"] == pytest.approx(1)
    # Subjects of the same patterns may give the very same answers: a tie is no win.
    assert 0 < perfect["matched_beats_same_label"] < 1 and perfect["same_label.agreement"] < 1
    # Says no to everything: right where the source says no, in each stratum.
    silent = torch.zeros_like(judged.weights)
    silent[:, -1] = -1
    constant = figures(silent)
    assert constant["agreement"] == pytest.approx(constant["agreement_constant"])
    assert constant["agreement_balanced"] == pytest.approx(0.5)
    assert constant["spread"] == constant["matched_beats_same_label"] == 0
    answers = forward(select(zoo.params, split.held_out), encode(zoo.architecture, untrained.evaluation.sequences)) > 0
    strata = [(~answers)[:, untrained.evaluation.stratum == s].float().mean(1) for s in range(5)]
    assert constant["agreement"] == pytest.approx(float(torch.stack(strata).mean()), abs=1e-5)
