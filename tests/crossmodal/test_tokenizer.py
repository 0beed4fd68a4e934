"""Networks and signatures as tokens and back."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.crossmodal.tokenizer import METADATA, signature_form, weights_form
from services.zoo.layout import Layout
from services.zoo.subjects import Architecture, flatten, init, unflatten
from tests.zoo.test_layout import architectures

COLUMN = {name: i for i, name in enumerate(METADATA)}


@settings(max_examples=60, deadline=None)
@given(architectures(), st.sampled_from(["neuron", "chunk"]), st.integers(1, 40))
def test_round_trip_is_exact_whatever_the_shapes_of_a_batch(
    shapes: list[Architecture], granularity: str, chunk: int
) -> None:
    layout = Layout(shapes)
    form = weights_form(layout, granularity, chunk)  # type: ignore[arg-type]
    rows = torch.arange(len(shapes)).repeat_interleave(2)
    vectors = torch.cat([layout.pad(flatten(init(shape, torch.arange(2))), i) for i, shape in enumerate(shapes)])
    tokens = form.tokens(vectors, rows)
    # What is padding is not read.
    noise = torch.where(form.entry[rows] < 0, 9.0, tokens.values)
    assert torch.equal(form.vectors(noise, rows, layout.size), vectors)
    assert bool((tokens.values[~tokens.mask] == 0).all()) and bool((tokens.metadata[~tokens.mask] == 0).all())
    for i, shape in enumerate(shapes):
        params = init(shape, torch.arange(2))
        alone = form.tokens(layout.pad(flatten(params), i), rows[rows == i])
        back = unflatten(layout.strip(form.vectors(alone.values, rows[rows == i], layout.size), i), shape)
        assert all(torch.equal(back[name], params[name]) for name in params)
        assert torch.equal(alone.values, tokens.values[rows == i])


def test_a_neuron_is_a_token_that_says_where_it_stands() -> None:
    small, large = (Architecture(5, 4, "one_hot", hidden, "relu") for hidden in ((2,), (3, 3)))
    layout = Layout([small, large])
    signatures = torch.arange(2.0 * layout.neurons * 7).view(2, -1)
    tokens = signature_form(layout, 7).tokens(signatures, torch.tensor([0, 1]))
    assert tokens.values.shape == (2, 7, 7)
    assert tokens.mask.sum(1).tolist() == [3, 7]
    rows = signatures.view(2, layout.neurons, 7)
    # The small network's output neuron is the envelope's, in the last place.
    assert torch.equal(tokens.values[0, :3], rows[0, [0, 1, 6]])
    assert torch.equal(tokens.values[1], rows[1])
    weights = weights_form(layout).tokens(torch.rand(2, layout.size), torch.tensor([0, 1]))
    own = weights.metadata[1]
    assert own[:, COLUMN["layer"]].tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert own[:, COLUMN["position"]].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert own[:, COLUMN["fan_in"]].tolist() == [20, 20, 20, 3, 3, 3, 3]
    assert own[:, COLUMN["fan_out"]].tolist() == [3, 3, 3, 3, 3, 3, 1]
    assert own[:, COLUMN["token"]].tolist() == list(range(7))
    assert set(own[:, COLUMN["parameter"]].tolist()) != set(tokens.metadata[1, :, COLUMN["parameter"]].tolist())
