"""Checks of input to a codec; each error names its field as a request does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ethogram.errors import InvalidInput, Violation
from ethogram.specs.edits import Edit
from services.zoo.layout import Layout
from services.zoo.subjects import Architecture, Params


class NotFinite(InvalidInput):
    """A field holds NaN or infinity."""


def networks(params: Mapping[str, Tensor], layout: Layout, activation: str | None = None) -> tuple[Params, int]:
    """Stacked networks as float32 with the parameters in order, and which of the layout's shapes they have; or
    :class:`InvalidInput`. ``activation``: of their hidden layers, where the layout has several."""
    path = "networks.parameters"
    named = layout.shapes if activation is None else [s for s in layout.shapes if s.activation == activation]
    if not named:
        known = ", ".join(sorted({shape.activation for shape in layout.shapes}))
        raise InvalidInput.field("networks.activation", f"no network of this model has {activation}; it knows {known}")
    fitting = [shape for shape in named if len(shape.layers) == len(params) / 2] or named[:1]
    names = fitting[0].shapes
    violations = [Violation(f"{path}.{name}", "missing") for name in names if name not in params]
    violations += [
        Violation(f"{path}.{name}", "the model has no such parameter") for name in params if name not in names
    ]
    if violations:
        first = violations[0]
        raise InvalidInput(f"{first.field}: {first.description}; {_known(named)}", violations)
    if len(named) > 1:
        given = {name: tuple(params[name].shape[1:]) for name in names}
        matching = [shape for shape in named if shape.shapes == given]
        if not matching:
            raise InvalidInput.field(path, f"an architecture that the model was not trained on; {_known(named)}")
        if len(matching) > 1:
            known = ", ".join(shape.activation for shape in matching)
            raise InvalidInput.field("networks.activation", f"networks of this shape have {known}; say which")
        fitting = matching
    checked = {name: batch(params[name], shape, f"{path}.{name}") for name, shape in fitting[0].shapes.items()}
    first_name, count = next((name, len(tensor)) for name, tensor in checked.items())
    for name, tensor in checked.items():
        if len(tensor) != count:
            raise InvalidInput.field(f"{path}.{name}", f"a batch of {len(tensor)}, but {first_name} has {count}")
    return checked, layout.shapes.index(fitting[0])


def shape(hidden: Sequence[int], activation: str | None, layout: Layout) -> Architecture:
    """The one of the layout's shapes with these widths of hidden layers, and this activation where there are several,
    or :class:`InvalidInput`; no widths are for a layout of one shape."""
    if not hidden and len(layout.shapes) > 1:
        raise InvalidInput.field("architecture", f"say which; {_known(layout.shapes)}")
    fitting = [
        shape
        for shape in layout.shapes
        if (not hidden or shape.hidden == tuple(hidden)) and activation in (None, shape.activation)
    ]
    if not fitting:
        raise InvalidInput.field("architecture", f"one that the model was not trained on; {_known(layout.shapes)}")
    if len(fitting) > 1:
        known = ", ".join(shape.activation for shape in fitting)
        raise InvalidInput.field("architecture.activation", f"networks of this shape have {known}; say which")
    return fitting[0]


def _known(shapes: Sequence[Architecture]) -> str:
    if len(shapes) == 1:
        known = ", ".join(f"{name} {list(shape)}" for name, shape in shapes[0].shapes.items())
        return f"a network of this model has {known}"
    listed = ", ".join("-".join(map(str, (s.input_size, *s.hidden, 1))) + f" {s.activation}" for s in shapes[:8])
    return f"this model knows {listed}" + (f" and {len(shapes) - 8} more" if len(shapes) > 8 else "")


def batch(tensor: Tensor, shape: tuple[int, ...], field: str) -> Tensor:
    """A finite, non-empty batch of ``shape`` as float32, or :class:`InvalidInput`."""
    if not tensor.is_floating_point():
        name = str(tensor.dtype).removeprefix("torch.")
        raise InvalidInput.field(field, f"{name} elements; send float32, float64 or float16")
    if tensor.dim() != len(shape) + 1 or tuple(tensor.shape[1:]) != shape:
        expected = ", ".join(["batch", *map(str, shape)])
        raise InvalidInput.field(field, f"shape {list(tensor.shape)}, but this model takes [{expected}]")
    if len(tensor) == 0:
        raise InvalidInput.field(field, "an empty batch; send at least one")
    single = tensor.float()
    if not bool(single.isfinite().all()):
        error = InvalidInput if bool(tensor.isfinite().all()) else NotFinite
        raise error.field(field, "holds NaN, infinity or a number that float32 cannot hold")
    return single


def finite(tensor: Tensor, field: str) -> Tensor:
    """What a model made of ``field``, or :class:`InvalidInput` where that is NaN or infinite."""
    if not bool(tensor.isfinite().all()):
        raise InvalidInput.field(field, "values so large that activations overflow; send smaller ones")
    return tensor


def edits(edits: Sequence[Edit], behaviors: Sequence[str]) -> None:
    """Raise :class:`InvalidInput` unless each edit is of ``behaviors``, and none is edited twice."""
    position: dict[str, int] = {}
    for i, edit in enumerate(edits):
        for field, name in (("behavior", edit.behavior), *([("by", edit.by)] if edit.by is not None else [])):
            if name not in behaviors:
                raise InvalidInput.field(f"edits.{i}.{field}", f"unknown; this model has {', '.join(behaviors)}")
            if name in position:
                raise InvalidInput.field(f"edits.{i}.{field}", f"{name} is in edits.{position[name]} already")
            position[name] = i
