"""Hook points of a model, where activations can be recorded, and the order in which a forward pass reaches them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ethogram.errors import InvalidInput
from ethogram.specs.clt import PAIR_SETS
from services.clt.policy.model import AttentionPolicy

INPUT = ":input"
"""Suffix of a module's name in a language model that stands for the module's input."""
# Points that an error lists.
_LISTED = 12

Pair = tuple[str, str]
"""Names of a source and a target."""
SourceKind = Literal["policy", "language_model"]
# Ends of the names of an MLP's input and output; in a language model whole names of modules.
_MLPS: dict[SourceKind, list[Pair]] = {
    "policy": [("_pre_mlp", "_mlp")],
    "language_model": [
        *((f"{module}{INPUT}", module) for module in ("mlp", "feed_forward", "ffn", "ff", "block_sparse_moe")),
        (f"fc1{INPUT}", "fc2"),
        (f"intermediate{INPUT}", "output.dense"),
    ],
}


@dataclass(frozen=True)
class HookPoint:
    """Input or output of one module of a model."""

    name: str
    module: str
    """Dotted path of the module in the model."""
    side: Literal["input", "output"]
    positions_first: bool = False
    """Whether the model has ``[positions, instances, width]`` here."""

    def by_position(self, tensor: Tensor, shape: tuple[int, int]) -> Tensor | None:
        """``tensor`` as ``[instances, positions, width]``, or None unless it has one vector for each position of
        ``shape`` (instances, positions). Models may flatten them to ``[instances * positions, width]``."""
        if tensor.ndim == 2 and len(tensor) == shape[0] * shape[1]:
            return tensor.reshape(*shape, tensor.shape[1])
        if tensor.ndim != 3:
            return None
        tensor = tensor.transpose(0, 1) if self.positions_first else tensor
        return tensor if tensor.shape[:2] == shape else None


def policy_points(policy: AttentionPolicy) -> dict[str, HookPoint]:
    """All points of a policy by name, in the order of execution.

    ``encoder_layer_i_input`` and ``encoder_layer_i`` are what enters and leaves layer i, ``_attention`` and ``_mlp``
    what its parts add to the stream (before the skip and the normalisation), ``_pre_mlp`` what its MLP reads. All are
    ``[batch, nodes, width]``; ``decoder_input`` is ``[batch, nodes, 3 width]``: glimpse keys, values and logit keys.
    """
    points: list[HookPoint] = []
    for i in range(len(policy.encoder.layers)):
        name, module = f"encoder_layer_{i}", f"encoder.layers.{i}"
        points += [
            HookPoint(f"{name}_input", module, "input"),
            HookPoint(f"{name}_attention", f"{module}.attention", "output"),
            HookPoint(f"{name}_pre_mlp", f"{module}.mlp", "input"),
            HookPoint(f"{name}_mlp", f"{module}.mlp", "output"),
            HookPoint(name, module, "output"),
        ]
    points.append(HookPoint("encoder_output", "encoder", "output"))
    points.append(HookPoint("decoder_input", "decoder.project", "output"))
    return {point.name: point for point in points}


def language_points(model: nn.Module) -> dict[str, HookPoint]:
    """Input and output of every module of a language model, by name."""
    points: dict[str, HookPoint] = {}
    for module, _ in model.named_modules():
        if module:
            points[f"{module}{INPUT}"] = HookPoint(f"{module}{INPUT}", module, "input")
            points[module] = HookPoint(module, module, "output")
    return points


def mlp_pairs(kind: SourceKind, names: Sequence[str]) -> list[Pair]:
    """What enters and leaves each MLP, of the hook points ``names`` of a source of this kind, in their order. An MLP
    inside another one is left out."""
    pairs, known = dict[str, Pair](), set(names)
    for begin, end in _MLPS[kind]:
        for name in names:
            stem = name.removesuffix(end)
            if not name.endswith(end) or stem + begin not in known or (kind != "policy" and stem[-1:] not in ("", ".")):
                continue
            pairs[name] = (stem + begin, name)
    return [pairs[name] for name in names if name in pairs and not any(name.startswith(f"{outer}.") for outer in pairs)]


def candidate_pairs(kind: SourceKind, names: Sequence[str]) -> dict[str, list[Pair]]:
    """The pairs of each set of :data:`ethogram.specs.clt.PAIR_SETS`, of the hook points ``names`` of a source of this
    kind in the order of execution."""
    mlps, known = mlp_pairs(kind, names), {*names}
    if kind == "policy":
        layers = [name for name in names if re.fullmatch(r"encoder_layer_\d+", name)]
    else:
        around = {_layer_of(pair) for pair in mlps}
        layers = [name for name in names if name in around]
    found = {
        "mlp": mlps,
        "adjacent": list(pairwise(layers)),
        "jumps": [(layer, later) for number, layer in enumerate(layers) for later in layers[number + 2 :]],
        "output": [(layer, "encoder_output") for layer in layers[:-1]],
        "decoder": [("encoder_output", "decoder_input")],
    }
    return {name: [pair for pair in pairs if {*pair} <= known] for name, pairs in found.items()}


def _layer_of(mlp: Pair) -> str:
    """The module around an MLP of a language model."""
    begin, end = (name.removesuffix(INPUT).split(".")[:-1] for name in mlp)
    return ".".join(part for part, other in zip(begin, end, strict=False) if part == other)


def named_pairs(entries: Sequence[str], kind: SourceKind, names: Sequence[str], field: str) -> list[tuple[str, Pair]]:
    """The pairs of ``entries``, each ``SOURCE->TARGET`` or the name of a set, with the field of its entry: ``field``,
    with the entry's number for ``{}``. Raises :class:`InvalidInput`."""
    pairs: list[tuple[str, Pair]] = []
    for number, entry in enumerate(entries):
        entry_field = field.format(number)
        chosen = candidate_pairs(kind, names)[entry] if entry in PAIR_SETS else [parse_pair(entry, entry_field)]
        if not chosen:
            text = f"there are no pairs of the set {entry} ({PAIR_SETS[entry]})"
            raise InvalidInput.field(entry_field, f"{text}; {listed(names)}")
        pairs += [(entry_field, pair) for pair in chosen]
    return pairs


def parse_pair(text: str, field: str) -> Pair:
    """Source and target of ``SOURCE->TARGET``. Raises :class:`InvalidInput`."""
    source, _, target = (part.strip() for part in text.partition("->"))
    if not source or not target:
        raise InvalidInput.field(field, f"{text} is not of the form SOURCE->TARGET")
    return source, target


@contextmanager
def capture(
    model: nn.Module, points: Sequence[HookPoint], dtype: torch.dtype | None = None
) -> Iterator[dict[str, Tensor]]:
    """Yield a dictionary that each forward pass inside the block fills with a copy of the activations at each point.

    ``dtype``: of the copies, by default the model's own. Of a module that returns several tensors the first is copied.
    """
    activations: dict[str, Tensor] = {}

    def keep(point: HookPoint, tensor: Tensor) -> None:
        # A copy, since what follows may work in place.
        activations[point.name] = tensor.detach().to(dtype or tensor.dtype, copy=True)

    with _watching(model, points, keep):
        yield activations


def trace(
    model: nn.Module, points: Sequence[HookPoint], drive: Callable[[], object], shape: tuple[int, int]
) -> dict[str, tuple[HookPoint, int] | str]:
    """The points, by name, each with the width of its vectors, in the order in which ``drive`` reaches them: a forward
    pass of ``shape`` (instances, positions), two different numbers.

    A string instead says why a point cannot be recorded: it is not reached exactly once, or has no vector for each
    position. Points that are not reached are last.
    """
    reached: dict[str, list[torch.Size]] = {}
    with _watching(model, points, lambda point, tensor: reached.setdefault(point.name, []).append(tensor.shape)):
        drive()
    order = {name: number for number, name in enumerate(reached)}
    points = sorted(points, key=lambda point: order.get(point.name, len(order)))
    return {point.name: _traced(point, reached.get(point.name, []), shape) for point in points}


def _traced(point: HookPoint, sizes: Sequence[torch.Size], shape: tuple[int, int]) -> tuple[HookPoint, int] | str:
    if not sizes:
        return f"no tensor passes {point.name} in a forward pass; hook another module"
    if len(sizes) > 1:
        return f"{point.name} runs several times in a forward pass; hook the module around it"
    for form in (point, replace(point, positions_first=True)):
        if (rows := form.by_position(torch.empty(sizes[0], device="meta"), shape)) is not None:
            return form, rows.shape[-1]
    return misshapen(point, sizes[0], shape)


def misshapen(point: HookPoint, size: torch.Size, shape: tuple[int, int]) -> str:
    """What is wrong with a point that has a tensor of ``size`` in a forward pass of ``shape``."""
    text = f"{point.name} has shape {list(size)} for {shape[0]} instances of {shape[1]} positions"
    return f"{text}, not a vector for each position; hook another module"


def check_pair(order: Sequence[str], source: str, target: str, field: str = "spec.pairs.0") -> None:
    """Raise :class:`InvalidInput` unless ``source`` comes before ``target`` in ``order``, the points in the order of
    execution."""
    for name in (source, target):
        if name not in order:
            raise InvalidInput.field(field, unknown_point(name, order))
    if source == target:
        raise InvalidInput.field(field, f"{source} is both source and target; name two different points")
    if order.index(source) > order.index(target):
        text = f"the source {source} comes after the target {target} in a forward pass"
        raise InvalidInput.field(field, f"{text}; name them the other way round")


@contextmanager
def _watching(
    model: nn.Module, points: Sequence[HookPoint], on_tensor: Callable[[HookPoint, Tensor], None]
) -> Iterator[None]:
    """Call ``on_tensor`` whenever a forward pass reaches a point."""

    def watch(
        point: HookPoint, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *outputs: object
    ) -> None:
        # A forward hook is given what the module returns; a pre-hook is not.
        tensor = _first(outputs[0] if outputs else [*args, kwargs.get("hidden_states"), *kwargs.values()])
        if tensor is not None:
            on_tensor(point, tensor)

    with ExitStack() as stack:
        for point in points:
            module = model.get_submodule(point.module)
            register = module.register_forward_pre_hook if point.side == "input" else module.register_forward_hook
            stack.callback(register(partial(watch, point), with_kwargs=True).remove)
        yield


def _first(value: object) -> Tensor | None:
    """The first tensor of a module's arguments or result."""
    if isinstance(value, Tensor):
        return value
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return next((item for item in items if isinstance(item, Tensor)), None)


def unknown_point(name: str, names: Sequence[str], missing: str = "there is no hook point") -> str:
    """What is wrong with a hook point ``name`` that is none of ``names``."""
    similar = difflib.get_close_matches(name, names, 5, 0.7)
    hint = f"did you mean {', '.join(similar)}?" if similar else listed(names)
    return f"{missing} {name}; {hint}"


def listed(names: Sequence[str]) -> str:
    """Some of the hook points ``names``, for an error; outputs are enough where there are many."""
    if len(names) > _LISTED:
        names = [name for name in names if not name.endswith(INPUT)]
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"there are {', '.join(names[:_LISTED])}{more}"
