"""Hook points: places in a model whose numbers can be recorded, and the order in which a forward pass meets them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ethogram.errors import InvalidInput
from services.clt.policy.model import AttentionPolicy

INPUT = ":input"
"""What follows the name of a language model's module where its input is meant."""
# Names of the columns beside the hooks' in a store.
RESERVED = ("instance", "position")
_MLP = "mlp"
# Points that an error lists.
_LISTED = 12

Pair = tuple[str, str]
"""Names of a source and a target."""


@dataclass(frozen=True)
class HookPoint:
    """One place of a model."""

    name: str
    module: str
    """Dotted path of the module in the model."""
    side: Literal["input", "output"]


@dataclass(frozen=True)
class Traced:
    """A point that a forward pass has met."""

    point: HookPoint
    width: int


def policy_points(policy: AttentionPolicy) -> dict[str, HookPoint]:
    """All points of a policy by name, in the order of execution.

    ``encoder_layer_i_input`` and ``encoder_layer_i`` are what enters and leaves layer i, ``_attention`` and ``_mlp``
    what its parts add to the stream (before the skip and the normalisation), ``_pre_mlp`` what its MLP reads. All are
    ``[batch, nodes, width]``; ``decoder_input`` is ``[batch, nodes, 3 width]``: glimpse keys, values and logit keys.
    """
    found: list[HookPoint] = []
    for i in range(len(policy.encoder.layers)):
        name, module = f"encoder_layer_{i}", f"encoder.layers.{i}"
        found += [
            HookPoint(f"{name}_input", module, "input"),
            HookPoint(f"{name}_attention", f"{module}.attention", "output"),
            HookPoint(f"{name}_pre_mlp", f"{module}.mlp", "input"),
            HookPoint(f"{name}_mlp", f"{module}.mlp", "output"),
            HookPoint(name, module, "output"),
        ]
    found += [HookPoint("encoder_output", "encoder", "output"), HookPoint("decoder_input", "decoder.project", "output")]
    return {point.name: point for point in found}


def language_points(model: nn.Module) -> dict[str, HookPoint]:
    """Input and output of every module of a language model, by name."""
    found = [
        point
        for module, _ in model.named_modules()
        if module
        for point in (HookPoint(f"{module}{INPUT}", module, "input"), HookPoint(module, module, "output"))
    ]
    return {point.name: point for point in found}


def points_of(
    model: nn.Module, hooks: Sequence[str], pairs: Sequence[str]
) -> tuple[list[tuple[str, HookPoint]], list[Pair]]:
    """The points that ``hooks`` and ``pairs`` (``SOURCE->TARGET``) name, each once and with the field that names it
    first, and the pairs. With neither, what enters and leaves each MLP.

    Raises :class:`InvalidInput` for a name that the model does not have, and where there is no module ``mlp``.
    """
    policy = isinstance(model, AttentionPolicy)
    known = policy_points(model) if isinstance(model, AttentionPolicy) else language_points(model)
    ends = [parse_pair(pair, f"spec.pairs.{number}") for number, pair in enumerate(pairs)]
    wanted = [(f"spec.hooks.{number}", name) for number, name in enumerate(hooks)]
    wanted += [(f"spec.pairs.{number}", name) for number, pair in enumerate(ends) for name in pair]
    if not wanted:
        ends = default_pairs(list(known), policy)
        wanted = [("spec.hooks", name) for pair in ends for name in pair]
    if not wanted:
        text = "the model has no modules called mlp, so name the hooks or pairs to record; "
        raise InvalidInput.field("spec.hooks", text + _listed(_outputs(known)))
    found: dict[str, tuple[str, HookPoint]] = {}
    for field, name in wanted:
        if name not in known:
            raise _unknown(field, name, known, policy)
        if name in RESERVED:
            raise InvalidInput.field(field, f"{name} is the name of a column of every store; hook another module")
        found.setdefault(name, (field, known[name]))
    return list(found.values()), ends


def default_pairs(names: Sequence[str], policy: bool) -> list[Pair]:
    """What enters and leaves each MLP, of the points ``names``."""
    pre, post = ("_pre_mlp", "_mlp") if policy else (INPUT, "")
    present = set(names)
    stems = [name.removesuffix(post) for name in names if name.endswith(post) and not name.endswith(pre)]
    if not policy:
        stems = [stem for stem in stems if stem.rpartition(".")[2] == _MLP]
    return [(stem + pre, stem + post) for stem in stems if stem + pre in present]


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
    """A dictionary that each forward pass inside the block fills with a copy of what is at each point, by its name;
    ``dtype``: of the copies, else the model's own. A module that answers with several gives its first tensor."""
    found: dict[str, Tensor] = {}

    def keep(point: HookPoint, tensor: Tensor) -> None:
        # A copy: what follows may work in place.
        found[point.name] = tensor.detach().to(dtype or tensor.dtype, copy=True)

    with _watching(model, points, keep):
        yield found


def trace(
    model: nn.Module, points: Sequence[tuple[str, HookPoint]], drive: Callable[[], object], shape: tuple[int, int]
) -> list[Traced]:
    """The points, each with the field that names it, in the order in which ``drive``, a forward pass of ``shape``
    (instances, positions), meets them.

    Raises :class:`InvalidInput` for a point that is not met just once, or that has no vector for each position.
    """
    met: list[tuple[HookPoint, tuple[int, ...]]] = []
    with _watching(model, [point for _, point in points], lambda point, seen: met.append((point, tuple(seen.shape)))):
        drive()
    for field, point in points:
        shapes = [found for other, found in met if other == point]
        if not shapes:
            text = f"no tensor passes {point.name} in a forward pass; hook another module"
            raise InvalidInput.field(field, text)
        if len(shapes) > 1:
            raise InvalidInput.field(
                field, f"{point.name} runs several times in a forward pass; hook what is around it"
            )
        if len(shapes[0]) != 3 or shapes[0][:2] != shape:
            text = f"{point.name} has shape {list(shapes[0])} for {shape[0]} instances of {shape[1]} positions"
            raise InvalidInput.field(field, f"{text}, not a vector for each position; hook another module")
    return [Traced(point, found[-1]) for point, found in met]


def check_pair(order: Sequence[str], source: str, target: str, field: str = "spec.pairs.0") -> None:
    """Raise :class:`InvalidInput` unless ``source`` comes before ``target`` among the points ``order``, which are in
    the order of execution."""
    for name in (source, target):
        if name not in order:
            raise _unknown(field, name, order, policy=False)
    if source == target:
        raise InvalidInput.field(field, f"{source} is both source and target; name two different points")
    if order.index(source) > order.index(target):
        text = f"the source {source} comes after the target {target} in a forward pass"
        raise InvalidInput.field(field, f"{text}; name them the other way round")


@contextmanager
def _watching(
    model: nn.Module, points: Sequence[HookPoint], seen: Callable[[HookPoint, Tensor], None]
) -> Iterator[None]:
    """Call ``seen`` whenever a forward pass meets a point."""

    def before(point: HookPoint) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            tensor = _first([*args, named.get("hidden_states"), *named.values()])
            if tensor is not None:
                seen(point, tensor)

        return hook

    def after(point: HookPoint) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            tensor = _first(output)
            if tensor is not None:
                seen(point, tensor)

        return hook

    handles = []
    try:
        for point in points:
            module = model.get_submodule(point.module)
            if point.side == "input":
                handles.append(module.register_forward_pre_hook(before(point), with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(after(point)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first(value: object) -> Tensor | None:
    """The first tensor in what a module takes or gives."""
    if isinstance(value, Tensor):
        return value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return next((part for part in parts if isinstance(part, Tensor)), None)


def _unknown(field: str, name: str, known: Mapping[str, HookPoint] | Sequence[str], policy: bool) -> InvalidInput:
    names = list(known)
    near = difflib.get_close_matches(name, names, 5, 0.7)
    if near:
        return InvalidInput.field(field, f"there is no hook point {name}; did you mean {', '.join(near)}?")
    shown = names if policy or not isinstance(known, Mapping) else _outputs(known)
    return InvalidInput.field(field, f"there is no hook point {name}; {_listed(shown)}")


def _outputs(known: Mapping[str, HookPoint]) -> list[str]:
    return [name for name, point in known.items() if point.side == "output"]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"there are {', '.join(names[:_LISTED])}{more}"
