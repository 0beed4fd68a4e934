"""Figures of the generation benchmark count what they say."""

from __future__ import annotations

import pytest
import torch

from benchmarks.generation import needed


def test_padding_is_no_needed_operation() -> None:
    widths = torch.tensor([20, 40])
    # Forward: own outputs x own inputs and the bias x sequences.
    assert needed((40, 41, 128), widths) == pytest.approx((20 * 21 / (40 * 41) + 1) / 2)
    # The first layer's inputs, the logit and the sequences are the same for all.
    assert needed((40, 6, 128), widths) == pytest.approx(0.75)
    assert needed((1, 41, 512), widths) == pytest.approx((21 / 41 + 1) / 2)
    assert needed((40, 41, 128), torch.tensor([40, 40])) == 1
