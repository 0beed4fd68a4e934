"""What an edit asks for, and how edited networks are run."""

from __future__ import annotations

import pytest
import torch

from ethogram.errors import InvalidInput
from ethogram.specs.edits import DIRECTIONS, Edit
from ethogram.specs.generation import PatternSpec
from services.crossmodal.codec import AUTO, MIN_EXCLUSIVE, Codec
from services.crossmodal.data import Queries
from services.crossmodal.steering import (
    REMOVALS,
    Probe,
    choose,
    classifier_normals,
    edited,
    mean_differences,
    signs,
    toggle,
)
from services.crossmodal.train import CodecTrainer
from services.generation.pipeline import generate
from services.zoo.dataset import Zoo
from services.zoo.layout import logits_of
from services.zoo.subjects import encode, flatten, forward, select
from services.zoo.universe import TRAIN
from tests.crossmodal.conftest import ZOO, tiny_spec


def test_signs_are_of_behaviors_that_are_known() -> None:
    names = ["a", "b", "c", "d"]
    assert signs([Edit("add", "a"), Edit("replace", "b", "c")], names).tolist() == [1, -1, 1, 0]
    with pytest.raises(ValueError, match="not in list"):
        signs([Edit("add", "a"), Edit("remove", "e")], names)


def test_toggle_adds_what_is_missing_and_removes_what_is_there() -> None:
    selected = torch.tensor([[True, False, True], [False, False, True]])
    after, changes = toggle(selected, torch.tensor([[0, 0], [1, 2]]))
    assert after.tolist() == [[False, False, True], [False, True, False]]
    assert changes.tolist() == [[-1, 0, 0], [0, 1, -1]]
    assert selected.tolist() == [[True, False, True], [False, False, True]]


def test_removals_have_their_share_whatever_the_number_of_patterns() -> None:
    selected = torch.zeros(4000, 10, dtype=torch.bool)
    selected[:2000, 3] = True
    selected[2000:, 1:5] = True
    pattern = choose(selected, 0.0, torch.Generator().manual_seed(0))
    assert torch.equal(pattern[:, 0], pattern[:, 1])
    removed = selected.gather(1, pattern[:, :1]).squeeze(1).float()
    assert abs(float(removed[:2000].mean()) - REMOVALS) < 0.04
    assert abs(float(removed[2000:].mean()) - REMOVALS) < 0.04
    assert set(pattern[2000:, 0].tolist()) == set(range(10))
    extremes = torch.tensor([[True] * 3, [False] * 3])
    assert choose(extremes, 1.0, torch.Generator().manual_seed(0)).diff(dim=1).abs().sum() == 0


def test_a_second_edit_is_the_other_way_round() -> None:
    selected = torch.zeros(2000, 6, dtype=torch.bool)
    selected[:, :2] = True
    pattern = choose(selected, 0.25, torch.Generator().manual_seed(0))
    several = pattern[:, 0] != pattern[:, 1]
    assert abs(float(several.float().mean()) - 0.25) < 0.04
    gained, lost = (selected.gather(1, pattern[several, i : i + 1].cpu()) for i in (0, 1))
    assert bool((gained != lost).all())


def test_labels_after_an_edit_are_those_of_the_exact_union(zoo: Zoo) -> None:
    """Over every pattern, subject and drawn sequence; predicates overlap (sorted sequences may start with A)."""
    queries = Queries.build(zoo.universe, zoo.architecture, seed=0)
    labels = zoo.labels[:24]
    for column, _ in enumerate(zoo.patterns):
        pattern = torch.full((24, 1), column)
        rows = queries.draw(pattern, 40, torch.Generator().manual_seed(column))
        after, _ = toggle(labels, pattern)
        got = queries.pools.labels(rows, after)
        for subject in range(24):
            sequences = queries.pools.sequences[rows[subject]]
            chosen = [zoo.patterns[k] for k in after[subject].nonzero().flatten().tolist()]
            expected = torch.zeros(40, dtype=torch.bool)
            for one in chosen:
                expected |= one.matches(sequences)
            assert got[subject].tolist() == expected.tolist()


def test_queries_come_from_the_training_split_with_a_quarter_of_the_edited_pattern(zoo: Zoo) -> None:
    queries = Queries.build(zoo.universe, zoo.architecture, seed=0)
    pattern = torch.arange(len(zoo.patterns)).unsqueeze(1)
    rows = queries.draw(pattern, 64, torch.Generator().manual_seed(0))
    assert rows.shape == (len(zoo.patterns), 64)
    assert (zoo.universe.split_of(queries.pools.sequences[rows.flatten()]) == TRAIN).all()
    own = queries.pools.membership[rows[:, :16]]
    assert all(own[p, :, p].all() for p in range(len(pattern)))
    inputs = queries.network_inputs(rows)
    wanted = encode(zoo.architecture, queries.pools.sequences[rows[1]])
    assert torch.equal(inputs[1].T, wanted)


def test_answers_equal_the_plain_forward_pass(zoo: Zoo) -> None:
    weights = flatten(select(zoo.params, torch.arange(6)))
    inputs = zoo.probe_inputs
    plain = forward(select(zoo.params, torch.arange(6)), inputs)
    shared = logits_of(weights.view(3, 2, -1), inputs.T, zoo.architecture)
    torch.testing.assert_close(shared.reshape(6, -1), plain, rtol=1e-4, atol=1e-4)
    own = logits_of(weights.view(3, 2, -1), inputs.T.expand(3, -1, -1), zoo.architecture)
    torch.testing.assert_close(own.reshape(6, -1), plain, rtol=1e-4, atol=1e-4)


def test_residual_null_edit_returns_the_source_exactly(zoo: Zoo, untrained: Codec) -> None:
    networks = select(zoo.params, torch.arange(5))
    edits = [("add", untrained.behaviors[0].name), ("remove", untrained.behaviors[2].name)]
    steered, _ = untrained.steer(networks, edits, strength=0.0)
    assert all(torch.equal(steered[name], networks[name]) for name in networks)


def test_fixed_directions_point_at_their_own_behavior_alone() -> None:
    draws = torch.Generator().manual_seed(0)
    labels = torch.rand(600, 3, generator=draws) < 0.4
    # Behaviours move latents along axes that are not orthogonal, under noise.
    axes = torch.tensor([[3.0, 0, 0, 0], [2.0, 2, 0, 0], [0, 0, 4, 0]])
    latents = labels.float() @ axes + 0.3 * torch.randn(600, 4, generator=draws)
    probe = Probe.fit(latents, labels)
    assert bool((((probe(latents) > 0) == labels).float().mean(0) > 0.98).all())
    apart = mean_differences(latents, labels)
    torch.testing.assert_close(apart[2], axes[2], atol=0.3, rtol=0.1)
    normals = classifier_normals(latents, labels)
    for own in range(3):
        for other in range(3):
            moved = float(probe.weights[:, other] @ normals[own])
            assert moved > 0.1 if own == other else abs(moved) < 1e-3
    assert float(normals[0] @ apart[0] / normals[0].norm()) == pytest.approx(float(normals[0].norm()), rel=1e-4)


def test_every_kind_of_direction_steers(zoo: Zoo, untrained: Codec) -> None:
    networks = select(zoo.params, torch.arange(3))
    found = [untrained.steer(networks, [("add", "has_majority")], direction=kind)[1] for kind in DIRECTIONS]
    assert not any(torch.equal(found[i], found[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    with pytest.raises(InvalidInput, match="direction"):
        untrained.steer(networks, [("add", "has_majority")], direction="sideways")  # type: ignore[arg-type]


def test_effect_is_what_steering_and_evaluation_say(zoo: Zoo, untrained: Codec) -> None:
    networks = select(zoo.params, torch.arange(6))
    edits = [("add", "has_majority")]
    found = untrained.effect(networks, edits, strength=1.25)
    steered, latents = untrained.steer(networks, edits, strength=1.25)
    assert torch.equal(flatten(found.networks), flatten(steered)) and torch.equal(found.latents, latents)
    for place, nets in ((0, networks), (1, steered)):
        recall, rate = untrained.evaluate(nets)
        assert torch.equal(found.recall[:, place], recall)
        assert torch.equal(found.false_positive_rate[:, place], rate)
    # These subjects do what they were trained to do, and what they have of has_majority cannot be gained.
    assert float((found.had == zoo.labels[:6]).float().mean()) > 0.8
    assert bool((found.scores.target.isnan() == found.had[:, 3]).all())
    assert found.predicted.shape == (6, 2, 4) and bool(((found.predicted >= 0) & (found.predicted <= 1)).all())
    null = untrained.effect(networks, edits, strength=0.0)
    assert bool((null.scores.local == 0).all()) and torch.equal(null.predicted[:, 0], null.predicted[:, 1])


def test_automatic_strength_is_the_best_on_the_support_set(zoo: Zoo, untrained: Codec) -> None:
    networks = select(zoo.params, torch.arange(8))
    edits = [("remove", "starts_with(A)"), ("add", "ends_with(B)")]
    found = untrained.effect(networks, edits, strength="auto")
    assert set(found.strength.tolist()) <= {0.0, *AUTO}
    for row in range(8):
        alone = select(networks, torch.tensor([row]))
        steered, _ = untrained.steer(alone, edits, strength=float(found.strength[row]))
        one = flatten(select(found.networks, torch.tensor([row])))
        torch.testing.assert_close(flatten(steered), one, rtol=1e-4, atol=1e-5)
    with pytest.raises(InvalidInput, match="strength"):
        untrained.steer(networks, edits, strength="most")  # type: ignore[arg-type]


def test_what_another_behaviour_covers_is_not_had_for_it() -> None:
    # Nearly half of the sorted sequences begin with A, and enough do not.
    patterns = [PatternSpec(name="starts_with", token="A"), PatternSpec(name="sorted_ascending")]
    changes = {"subjects": 48, "vocab_size": 7, "patterns": patterns, "max_patterns_per_batch": 1}
    zoo = generate(ZOO.model_copy(update=changes))
    codec = CodecTrainer(tiny_spec(), zoo).codec()
    member = codec.support.membership
    assert int((member[:, 1] & ~member[:, 0]).sum()) >= MIN_EXCLUSIVE
    starts_with = select(zoo.params, zoo.labels[:, 0].nonzero().squeeze(1))
    found = codec.effect(starts_with, [("add", "sorted_ascending")])
    assert bool(found.had[:, 0].all()) and float(found.had[:, 1].float().mean()) < 0.1


def test_who_has_a_behaviour_is_measured_on_what_no_other_covers(untrained: Codec) -> None:
    member = untrained.support.membership
    alone = member & (member.sum(1, keepdim=True) == 1)
    for behaviour, measured in enumerate(untrained._decisive.bool()):
        enough = int(alone[:, behaviour].sum()) >= MIN_EXCLUSIVE
        assert torch.equal(measured, (alone if enough else member)[:, behaviour])


def test_automatic_strength_does_nothing_where_there_is_nothing_to_do(zoo: Zoo, untrained: Codec) -> None:
    has = zoo.labels[:, 3].nonzero().squeeze(1)
    networks = select(zoo.params, has)
    found = untrained.effect(networks, [("add", "has_majority")], strength="auto")
    done = found.had[:, 3]
    assert float(done.float().mean()) > 0.8
    assert bool((found.strength[done] == 0).all())
    assert torch.equal(flatten(found.networks)[done], flatten(networks)[done])


def test_a_calibrated_probe_gives_chances() -> None:
    draws = torch.Generator().manual_seed(0)
    latents = torch.randn(4000, 3, generator=draws)
    chance = torch.sigmoid(2 * latents[:, :1] - 1)
    labels = torch.rand(4000, 1, generator=draws) < chance
    found = torch.sigmoid(Probe.fit(latents, labels).calibrated(latents, labels)(latents))
    assert float((found - chance).abs().mean()) < 0.03
    # Where a line separates the classes the chances stay numbers.
    easy = latents[:, :1] > 0
    sure = torch.sigmoid(Probe.fit(latents, easy).calibrated(latents, easy)(latents))
    assert bool(sure.isfinite().all()) and bool(((sure > 0.5) == easy).float().mean() > 0.98)


def test_edited_forms() -> None:
    source, decoded, steered = torch.randn(3, 4, 9).unbind(0)
    assert torch.equal(edited(source, decoded, steered, "direct"), steered)
    assert torch.equal(edited(source, decoded, steered, "residual"), source + (steered - decoded))
