"""Each method of description, against a plain account of it in numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ethogram.errors import InvalidInput
from ethogram.specs.generation import SignatureMethod, SignatureSpec
from services.zoo.signatures import ActivationSignatureExtractor
from services.zoo.subjects import Architecture, activations, encode, init

ARCHITECTURE = Architecture(5, 4, "one_hot", (6, 6), "tanh")
WIDTHS = torch.tensor([6, 3, 5])
PARAMS = init(ARCHITECTURE, torch.arange(3), WIDTHS, kaiming=True)
SEQUENCES = torch.randint(5, (40, 4), generator=torch.Generator().manual_seed(0))
INPUTS = encode(ARCHITECTURE, SEQUENCES)
MEMBERSHIP = torch.stack([SEQUENCES[:, 0] == 0, SEQUENCES[:, 1] > 3, torch.zeros(40, dtype=torch.bool)], 1)
METHODS: list[Any] = list(get_args(SignatureMethod))

Numbers = NDArray[np.float64]


def components(layer: Numbers) -> Numbers:
    """Loadings by a full singular value decomposition."""
    _, values, rows = np.linalg.svd(layer / np.sqrt(len(layer)), full_matrices=False)
    found = np.zeros((layer.shape[1], 3))
    for k in range(min(3, layer.shape[1])):
        loading = rows[k] * values[k]
        found[:, k] = loading * (1 if loading[np.abs(loading).argmax()] > 0 else -1)
    return found


def entropy(values: Numbers) -> float:
    counts, _ = np.histogram(values, bins=8, range=(values.min(), values.max()))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def centres(values: Numbers) -> Numbers:
    ordered = np.sort(values)
    found = ordered[((np.arange(3) + 0.5) / 3 * len(values)).astype(int)]
    for _ in range(20):
        nearest = np.abs(values[:, None] - found).argmin(1)
        found = np.array([values[nearest == k].mean() if (nearest == k).any() else found[k] for k in range(3)])
    return np.asarray(found)


def by_pattern(layer: Numbers) -> Numbers:
    strata = [*MEMBERSHIP.numpy().T, ~MEMBERSHIP.numpy().any(1)]
    return np.stack([layer[own].mean(0) if own.any() else np.zeros(layer.shape[1]) for own in strata], 1)


def each(function: Callable[[Numbers], Any]) -> Callable[[Numbers], Numbers]:
    return lambda layer: np.stack([np.atleast_1d(function(column)) for column in layer.T])


ORACLES: dict[str, Callable[[Numbers], Numbers]] = {
    "mean": each(np.mean),
    "std": each(np.std),
    "max": each(np.max),
    "min": each(np.min),
    "sparsity": each(lambda values: (values <= 0).mean()),
    "pca": lambda layer: components(layer - layer.mean(0)),
    "svd": components,
    "entropy": each(entropy),
    "clustering": each(centres),
    "fourier": each(lambda values: np.abs(np.fft.rfft(values))[:3] / len(values)),
    "pattern_wise": by_pattern,
    "raw": lambda layer: layer.T,
}


def extractor(**fields: Any) -> ActivationSignatureExtractor:
    spec = SignatureSpec(probes=40, components=3, bins=8, **{"methods": METHODS, **fields})
    return ActivationSignatureExtractor(spec, INPUTS, MEMBERSHIP)


@pytest.mark.parametrize("side", ["pre", "post"])
def test_every_method_is_what_it_says(side: str) -> None:
    found = extractor(activations=side).extract(PARAMS, ARCHITECTURE, WIDTHS)
    assert list(found) == METHODS == list(ORACLES)
    layers = activations(PARAMS, INPUTS, "tanh")
    if side == "post":
        layers = [*(layer.tanh() for layer in layers[:-1]), layers[-1]]
    for model, width in enumerate(WIDTHS.tolist()):
        for method, values in found.items():
            start = 0
            for i, layer in enumerate(layers):
                own = width if i < 2 else 1
                expected = ORACLES[method](layer[model, :, :own].double().numpy())
                got = values[model, start : start + own]
                np.testing.assert_allclose(got.numpy(), expected, rtol=1e-3, atol=2e-4, err_msg=f"{method} {i}")
                start += layer.shape[2]


def test_neurons_that_are_not_there_say_nothing() -> None:
    for method, values in extractor().extract(PARAMS, ARCHITECTURE, WIDTHS).items():
        beyond = values[1, 3:6]
        assert not beyond.any() or method in ("sparsity",), method


def test_without_a_list_all_activations_are_kept() -> None:
    found = extractor(methods=[]).extract(PARAMS, ARCHITECTURE)
    assert list(found) == ["raw"] and found["raw"].shape == (3, 13, 40)


@pytest.mark.parametrize(("method", "most"), [("fourier", 21), ("pca", 40), ("clustering", 40)])
def test_more_than_the_probes_can_give_is_refused(method: str, most: int) -> None:
    def make(count: int) -> None:
        spec = SignatureSpec(probes=40, components=count, methods=[method])  # type: ignore[list-item]
        ActivationSignatureExtractor(spec, INPUTS, MEMBERSHIP)

    make(most)
    with pytest.raises(InvalidInput, match=f"at most {most} for {method}") as caught:
        make(most + 1)
    assert caught.value.violations[0].field == "spec.signature.components"
