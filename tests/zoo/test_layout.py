"""Networks of several shapes in vectors of one size."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.zoo.layout import Layout
from services.zoo.subjects import ACTIVATIONS, Architecture, Params, flatten, forward, init, unflatten


def architectures() -> st.SearchStrategy[list[Architecture]]:
    one = st.builds(
        lambda layers, neurons, activation: Architecture(5, 4, "one_hot", (neurons,) * layers, activation),
        st.integers(1, 4),
        st.integers(1, 9),
        st.sampled_from(sorted(ACTIVATIONS)),
    )
    return st.lists(one, min_size=1, max_size=5, unique=True)


def networks(shape: Architecture, count: int = 3) -> Params:
    return init(shape, torch.arange(count))


@settings(max_examples=40, deadline=None)
@given(architectures())
def test_padding_and_stripping_are_inverse_and_keep_what_networks_compute(shapes: list[Architecture]) -> None:
    layout = Layout(shapes)
    own = [flatten(networks(shape)) for shape in shapes]
    vectors = torch.cat([layout.pad(flat, i) for i, flat in enumerate(own)])
    rows = torch.arange(len(shapes)).repeat_interleave(3)
    for i, flat in enumerate(own):
        assert torch.equal(layout.strip(vectors[rows == i], i), flat)
        assert int(layout.present[i].sum()) == shapes[i].size
        assert int(layout.present_neurons[i].sum()) == shapes[i].neurons
    assert bool((vectors[~layout.present[rows]] == 0).all())
    inputs = torch.rand(20, 7)
    order = torch.randperm(len(rows))
    found = layout.logits(vectors[order].unsqueeze(1), rows[order], inputs).squeeze(1)
    for i, shape in enumerate(shapes):
        plain = forward(unflatten(own[i], shape), inputs.T, shape.activation)
        torch.testing.assert_close(
            found[rows[order] == i], plain[order[rows[order] == i] - 3 * i], rtol=1e-4, atol=1e-5
        )


def test_one_shape_is_its_own_envelope() -> None:
    shape = Architecture(5, 4, "one_hot", (6, 3), "relu")
    layout = Layout([shape])
    flat = flatten(networks(shape))
    assert layout.envelope == shape
    assert torch.equal(layout.pad(flat, 0), flat)


def test_gradients_reach_every_variant_of_every_shape() -> None:
    shapes = [Architecture(5, 4, "one_hot", (4,) * n, activation) for n in (1, 3) for activation in ("relu", "tanh")]
    layout = Layout(shapes)
    vectors = torch.stack([layout.pad(flatten(networks(shape, 1)), i)[0] for i, shape in enumerate(shapes)])
    variants = vectors.unsqueeze(1).repeat(1, 2, 1).requires_grad_()
    layout.logits(variants, torch.arange(4), torch.rand(4, 20, 9)).sum().backward()  # type: ignore[no-untyped-call]
    assert variants.grad is not None
    reached = variants.grad.abs().sum((1, 2)) > 0
    assert reached.tolist() == [True] * 4
