"""Checks of input to a codec; each error names its field as a request does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ethogram.errors import InvalidInput, Violation
from ethogram.specs.edits import Edit
from services.zoo.layout import Layout
from services.zoo.subjects import Architecture, Params


def networks(params: Mapping[str, Tensor], layout: Layout, activation: str | None = None) -> tuple[Params, int]:
    """Stacked networks as float32 with the parameters in order, and the index of their shape in the layout; or
    :class:`InvalidInput`. ``activation``: of their hidden layers, where the layout has several."""
    path = "networks.parameters"
    candidates = [shape for shape in layout.shapes if activation in (None, shape.activation)]
    if not candidates:
        known = ", ".join(sorted({shape.activation for shape in layout.shapes}))
        raise InvalidInput.field("networks.activation", f"no network of this model has {activation}; it knows {known}")
    shape = next((shape for shape in candidates if len(shape.shapes) == len(params)), candidates[0])
    violations = [Violation(f"{path}.{name}", "missing") for name in shape.shapes if name not in params]
    unknown = "the model has no such parameter"
    violations += [Violation(f"{path}.{name}", unknown) for name in params if name not in shape.shapes]
    if violations:
        first = violations[0]
        raise InvalidInput(f"{first.field}: {first.description}; {_known(candidates)}", violations)
    if len(candidates) > 1:
        shapes = {name: tuple(params[name].shape[1:]) for name in shape.shapes}
        shape = _only([s for s in candidates if s.shapes == shapes], path, "networks.activation", candidates)
    checked = {name: batch(params[name], size, f"{path}.{name}") for name, size in shape.shapes.items()}
    first_name, count = next((name, len(tensor)) for name, tensor in checked.items())
    for name, tensor in checked.items():
        if len(tensor) != count:
            raise InvalidInput.field(f"{path}.{name}", f"a batch of {len(tensor)}, but {first_name} has {count}")
    return checked, layout.shapes.index(shape)


def shape(hidden: Sequence[int], activation: str | None, layout: Layout) -> Architecture:
    """The layout's shape with these widths of hidden layers (empty: the only one) and this activation, or
    :class:`InvalidInput`."""
    if not hidden and len(layout.shapes) > 1:
        raise InvalidInput.field("architecture", f"say which; {_known(layout.shapes)}")
    widths = tuple(hidden)
    fitting = [s for s in layout.shapes if widths in ((), s.hidden) and activation in (None, s.activation)]
    return _only(fitting, "architecture", "architecture.activation", layout.shapes)


def _only(fitting: Sequence[Architecture], field: str, activation: str, known: Sequence[Architecture]) -> Architecture:
    """The only shape of ``fitting``, or :class:`InvalidInput` of ``field`` if there is none, of ``activation`` if there
    are several."""
    if not fitting:
        raise InvalidInput.field(field, f"an architecture that the model was not trained on; {_known(known)}")
    if len(fitting) > 1:
        activations = ", ".join(shape.activation for shape in fitting)
        raise InvalidInput.field(activation, f"networks of this shape have {activations}; say which")
    return fitting[0]


def _known(shapes: Sequence[Architecture]) -> str:
    if len(shapes) == 1:
        known = ", ".join(f"{name} {list(shape)}" for name, shape in shapes[0].shapes.items())
        return f"a network of this model has {known}"
    listed = ", ".join("-".join(map(str, (s.input_size, *s.hidden, 1))) + f" {s.activation}" for s in shapes[:8])
    return f"this model knows {listed}" + (f" and {len(shapes) - 8} more" if len(shapes) > 8 else "")


def batch(tensor: Tensor, shape: tuple[int, ...], field: str) -> Tensor:
    """A finite, non-empty batch of ``shape`` as float32, or :class:`InvalidInput`."""
    # Numbers of float8 come with scales, which are not here.
    if not tensor.is_floating_point() or tensor.dtype.itemsize == 1 or tensor.layout is not torch.strided:
        name = "sparse" if tensor.layout is not torch.strided else str(tensor.dtype).removeprefix("torch.")
        raise InvalidInput.field(field, f"{name} elements; send float32, float64 or float16, dense")
    if tensor.dim() != len(shape) + 1 or tuple(tensor.shape[1:]) != shape:
        expected = ", ".join(["batch", *map(str, shape)])
        raise InvalidInput.field(field, f"shape {list(tensor.shape)}, but this model takes [{expected}]")
    if len(tensor) == 0:
        raise InvalidInput.field(field, "an empty batch; send at least one")
    single = tensor.float()
    if not bool(single.isfinite().all()):
        raise InvalidInput.field(field, "holds NaN, infinity or a number that float32 cannot hold")
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
