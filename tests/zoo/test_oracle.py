"""What signatures determine, and what they cannot."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from ethogram.specs.generation import SignatureSpec
from services.zoo.layout import Layout
from services.zoo.oracle import ambiguity, recovered, solvable, varies
from services.zoo.patterns import default_suite
from services.zoo.pools import probes
from services.zoo.signatures import ActivationSignatureExtractor
from services.zoo.subjects import Architecture, encode, flatten, init
from services.zoo.universe import Universe
from tests.zoo.test_subjects import keys

ONE_HOT = Architecture(7, 7, "one_hot", (16, 16), "gelu")
INDEX = Architecture(7, 7, "index", (16, 16), "gelu")
DEEP = Architecture(7, 7, "index", (40,) * 6, "relu")
PATTERNS = 10


def extractor(shape: Architecture, count: int = 128, **signature: Any) -> ActivationSignatureExtractor:
    """Of ``count`` probes."""
    sequences = torch.randint(7, (count, 7), generator=torch.Generator().manual_seed(0))
    matches = torch.rand(count, PATTERNS, generator=torch.Generator().manual_seed(1)) < 0.2
    return ActivationSignatureExtractor(SignatureSpec(probes=count, **signature), encode(shape, sequences), matches)


@pytest.mark.parametrize(
    ("shape", "count", "signature", "reason"),
    [
        (ONE_HOT, 128, {}, ""),
        (ONE_HOT, 128, {"activations": "post"}, ""),
        (ONE_HOT, 128, {"methods": ["raw", "mean"]}, ""),
        (ONE_HOT, 128, {"methods": ["fourier"], "components": 64}, ""),
        # 43 weights of each of the 16 neurons that see letters: 6 for each position, and one.
        (ONE_HOT, 128, {"methods": ["mean", "std"]}, r"\(mean, std\) has 66 numbers for the 977 weights .* 49-16-16-1"),
        (ONE_HOT, 128, {"methods": ["pattern_wise"]}, "has 363 numbers for the 977 weights"),
        (ONE_HOT, 128, {"methods": ["pca", "svd", "clustering"]}, "has 396 numbers for the 977 weights"),
        (ONE_HOT, 40, {}, r"40 probes show 40 of the 43 directions"),
        (INDEX, 40, {}, ""),
        (INDEX, 12, {}, "has 396 numbers for the 417 weights"),
        # Enough numbers, but all of them follow from 12 activations.
        (
            *(INDEX, 12, {"methods": ["raw", "fourier"], "components": 7}),
            "12 probes are too few for the 17 weights of a neuron",
        ),
        # Enough numbers in all, and too few of the later layers.
        (
            *(INDEX, 128, {"methods": ["fourier"], "components": 15}),
            "has 255 numbers for the 289 weights .* 7-16-16-1 from layer 1 on",
        ),
        (INDEX, 128, {"methods": ["sparsity", "entropy"]}, "has 0 numbers for the 417 weights"),
        (DEEP, 72, {"methods": ["mean", "std", "max", "min"]}, "has 964 numbers for the 8,561 weights"),
    ],
)
def test_signatures_that_cannot_determine_the_weights(
    shape: Architecture, count: int, signature: dict[str, Any], reason: str
) -> None:
    found = ambiguity(extractor(shape, count, **signature), Layout([shape]))
    assert re.search(reason, found) if reason else found == ""


def test_the_widest_shape_of_a_layout_counts() -> None:
    small, wide = (Architecture(7, 7, "index", (width,), "relu") for width in (4, 30))
    few = extractor(small, 20)
    assert ambiguity(few, Layout([small])) == ""
    assert "7-30-1" in ambiguity(few, Layout([small, wide]))


def test_what_changes_with_the_weights_and_what_least_squares_can_solve() -> None:
    assert varies(extractor(INDEX)) and varies(extractor(INDEX, methods=["sparsity", "mean"]))
    assert not varies(extractor(INDEX, methods=["entropy", "sparsity"]))
    assert solvable(extractor(INDEX)) and solvable(extractor(INDEX, methods=["mean", "raw"]))
    assert not solvable(extractor(INDEX, methods=["mean"]))
    assert not solvable(extractor(INDEX, activations="post"))


@pytest.mark.parametrize("encoding", ["one_hot", "index"])
def test_networks_of_several_shapes_are_recovered(encoding: str) -> None:
    shapes = [Architecture(7, 7, encoding, hidden, "gelu") for hidden in ((6,), (10,), (6, 9))]
    layout = Layout(shapes)
    shape = torch.tensor([0, 1, 2, 1, 0, 2])
    networks = [flatten(init(shapes[which], keys(6)[i : i + 1])) for i, which in enumerate(shape.tolist())]
    vectors = torch.cat([layout.pad(network, which) for network, which in zip(networks, shape.tolist(), strict=True)])
    inputs = encode(shapes[0], probes(Universe(7, 7, default_suite()), 128))
    signature = SignatureSpec(methods=["mean", "raw"])
    found = recovered(
        vectors, shape, layout, ActivationSignatureExtractor(signature, inputs, torch.ones(128, 1, dtype=torch.bool))
    )
    assert float((found - vectors).norm() / vectors.norm()) < 1e-3
    # What a shape lacks stays 0.
    assert torch.equal(found == 0, vectors == 0)
