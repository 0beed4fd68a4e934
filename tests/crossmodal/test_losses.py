"""Each loss against its formula, written out with loops."""

from __future__ import annotations

import math

import pytest
import torch

from services.crossmodal import losses


def kl(p: float, q: float) -> float:
    return sum(a * math.log(a / b) for a, b in ((p, q), (1 - p, 1 - q)) if a > 0)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_reconstruction_of_the_mean_is_one_whatever_the_scale_of_the_layers() -> None:
    weights = torch.randn(200, 7) * torch.tensor([100.0, 100, 100, 1, 1, 0.01, 0.01])
    layer = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    weighting = losses.layer_weights(weights - weights.mean(0), layer)
    loss = losses.reconstruction(weights.mean(0).expand_as(weights), weights, weighting)
    assert float(loss) == pytest.approx(1, rel=1e-5)
    assert float(losses.reconstruction(weights, weights, weighting)) == 0


@pytest.mark.parametrize("form", ["mse", "mae", "cosine", "combined"])
def test_errors_of_weights_are_of_those_that_a_network_has(form: str) -> None:
    decoded, source = [[1.0, -2.0, 0.5], [0.3, 4.0, 9.0]], [[0.0, 1.0, 2.0], [-1.0, 2.0, 7.0]]
    present = [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]
    totals = dict.fromkeys(("mse", "mae", "cosine"), 0.0)
    for own, wanted, there in zip(decoded, source, present, strict=True):
        pairs = [(a, b) for a, b, has in zip(own, wanted, there, strict=True) if has]
        totals["mse"] += sum((a - b) ** 2 for a, b in pairs) / len(pairs) / 2
        totals["mae"] += sum(abs(a - b) for a, b in pairs) / len(pairs) / 2
        norms = math.hypot(*(a for a, _ in pairs)) * math.hypot(*(b for _, b in pairs))
        totals["cosine"] += (1 - sum(a * b for a, b in pairs) / norms) / 2
    totals["combined"] = sum(totals.values())
    loss = losses.elementwise(torch.tensor(decoded), torch.tensor(source), torch.tensor(present), form)
    assert float(loss) == pytest.approx(totals[form], rel=1e-5)


def test_variance_asks_for_a_deviation_of_one() -> None:
    latents = [[0.0, 3.0], [0.4, -3.0], [0.2, 0.0]]
    expected = 0.0
    for column in zip(*latents, strict=True):
        mean = sum(column) / 3
        expected += max(0.0, 1 - math.sqrt(sum((x - mean) ** 2 for x in column) / 2 + 1e-4)) / 2
    assert float(losses.variance(torch.tensor(latents))) == pytest.approx(expected, rel=1e-5)
    # One alone has no deviation.
    assert float(losses.variance(torch.tensor(latents[:1]))) == 0


def test_behavior_is_the_mean_divergence_of_answers() -> None:
    logits, source = torch.tensor([[0.5, -2.0], [3.0, 0.0]]), torch.tensor([[1.0, -1.0], [3.0, 2.0]])
    pairs = zip(source.flatten().tolist(), logits.flatten().tolist(), strict=True)
    expected = sum(kl(sigmoid(p), sigmoid(q)) for p, q in pairs) / 4
    assert float(losses.behavior(logits, source)) == pytest.approx(expected, rel=1e-5)
    assert float(losses.behavior(source, source)) == pytest.approx(0, abs=1e-6)


def test_steering_asks_for_the_label_where_the_edit_decides_and_for_the_source_elsewhere() -> None:
    logits, source = torch.tensor([[0.5, -2.0, 1.0]]), torch.tensor([[-3.0, -1.0, 2.0]])
    before, after = torch.tensor([[False, False, True]]), torch.tensor([[True, False, True]])
    inside = kl(1.0, sigmoid(0.5))
    outside = (kl(sigmoid(-1.0), sigmoid(-2.0)) + kl(sigmoid(2.0), sigmoid(1.0))) / 2
    loss = losses.steering(logits, source, before, after, locality=0.7, mend=False)
    assert float(loss) == pytest.approx(0.3 * inside + 0.7 * outside, rel=1e-5)


def test_steering_asks_for_the_label_where_the_source_errs_too_if_that_is_to_mend() -> None:
    logits, source = torch.tensor([[0.5, -2.0]]), torch.tensor([[1.0, -1.0]])
    wrong, before = kl(0.0, sigmoid(0.5)), torch.tensor([[False, False]])
    kept = kl(sigmoid(1.0), sigmoid(0.5))
    right = kl(sigmoid(-1.0), sigmoid(-2.0))
    for mend, first in ((True, wrong), (False, kept)):
        loss = losses.steering(logits, source, before, before, locality=1.0, mend=mend)
        assert float(loss) == pytest.approx((first + right) / 2, rel=1e-5)


def test_steering_without_deciding_sequences_is_about_the_source_alone() -> None:
    source, same = torch.randn(2, 5), torch.zeros(2, 5, dtype=torch.bool)
    assert float(losses.steering(source, source, same, same, locality=0.8, mend=False)) == pytest.approx(0, abs=1e-6)
    assert float(losses.steering(source, source, same, same, locality=0.0, mend=False)) == 0


@pytest.mark.parametrize("graded", [True, False])
def test_contrastive_against_loops(graded: bool) -> None:
    torch.manual_seed(0)
    latents = torch.randn(6, 4)
    labels = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 1, 1], [0, 0, 0]]).bool()
    unit = latents / latents.norm(dim=1, keepdim=True)
    total = 0.0
    for i in range(6):
        others = [j for j in range(6) if j != i]
        normaliser = sum(math.exp(float(unit[i] @ unit[j]) / 0.2) for j in others)
        weights = [float((labels[i] & labels[j]).sum()) / max(1, int((labels[i] | labels[j]).sum())) for j in others]
        weights = weights if graded else [float(weight > 0) for weight in weights]
        if sum(weights):
            logs = [float(unit[i] @ unit[j]) / 0.2 - math.log(normaliser) for j in others]
            total -= sum(w * log for w, log in zip(weights, logs, strict=True)) / sum(weights)
    assert float(losses.contrastive(latents, labels, 0.2, graded=graded)) == pytest.approx(total / 6, rel=1e-4)


def test_contrastive_of_strangers_has_no_gradient_and_no_nan() -> None:
    latents = torch.randn(3, 4, requires_grad=True)
    loss = losses.contrastive(latents, torch.eye(3).bool(), 0.1)
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0
    assert latents.grad is not None
    assert float(latents.grad.abs().sum()) == 0
