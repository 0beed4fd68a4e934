"""One order and scale for neurons."""

from __future__ import annotations

import pytest
import torch

from services.crossmodal.canonical import Canonicalizer
from services.zoo.layout import Layout
from services.zoo.subjects import Architecture, Params, flatten, forward, init, select

SHAPES = [
    Architecture(5, 4, "one_hot", hidden, activation) for hidden, activation in (((6, 6), "relu"), ((4,), "tanh"))
]
INPUTS = torch.nn.functional.one_hot(torch.randint(5, (64, 4), generator=torch.Generator().manual_seed(0)), 5).flatten(
    1
)


def shuffled(params: Params, shape: Architecture) -> Params:
    """The same functions with hidden neurons in another order, and scaled where that changes nothing."""
    params = {name: tensor.clone() for name, tensor in params.items()}
    for i, width in enumerate(shape.hidden):
        order = torch.randperm(width)
        scale = torch.rand(width) + 0.5 if shape.activation == "relu" else torch.ones(width)
        params[f"layers.{i}.weight"] = params[f"layers.{i}.weight"][:, order] * scale.view(-1, 1)
        params[f"layers.{i}.bias"] = params[f"layers.{i}.bias"][:, order] * scale
        params[f"layers.{i + 1}.weight"] = params[f"layers.{i + 1}.weight"][:, :, order] / scale
    return params


@pytest.mark.parametrize("which", [0, 1])
def test_copies_in_another_order_and_scale_become_one(which: int) -> None:
    torch.manual_seed(0)
    layout, inputs, shape = Layout(SHAPES), INPUTS.float(), SHAPES[which]
    references = [init(one, torch.tensor([7])) for one in SHAPES]
    canonicalizer = Canonicalizer(layout, inputs, references)
    networks = init(shape, torch.arange(3))
    rows = torch.full((3,), which)
    plain, other = (layout.pad(flatten(one), which) for one in (networks, shuffled(networks, shape)))
    assert not torch.allclose(plain, other)
    first, second = (canonicalizer.transform(vectors, rows) for vectors in (plain, other))
    canonical = first.apply(plain)
    torch.testing.assert_close(canonical, second.apply(other), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second.undo(canonical), other, rtol=1e-4, atol=1e-5)
    said = layout.logits(canonical.unsqueeze(1), rows, inputs.T).squeeze(1)
    torch.testing.assert_close(said, forward(networks, inputs, shape.activation), rtol=1e-4, atol=1e-5)
    if shape.activation == "relu":
        norms = layout.strip(canonical, which)[:, : shape.input_size * 6].view(3, 6, -1).norm(dim=2)
        torch.testing.assert_close(norms, torch.ones_like(norms))


def test_a_reference_is_matched_to_itself_in_its_own_order() -> None:
    layout = Layout(SHAPES[1:])
    reference = init(SHAPES[1], torch.tensor([7]))
    canonicalizer = Canonicalizer(layout, INPUTS.float(), [reference])
    flat = flatten(select(reference, torch.tensor([0])))
    assert torch.equal(canonicalizer.transform(flat, torch.tensor([0])).apply(flat), flat)
