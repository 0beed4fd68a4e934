"""Attention models that were trained by rl4co (https://github.com/ai4co/rl4co), as policies.

Its checkpoints are pickles. They are read without running anything that is in them: tensors and plain containers are
built, and every other object becomes a placeholder with its attributes.
"""

from __future__ import annotations

import collections
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from ethogram.errors import InvalidInput
from ethogram.specs.clt import PolicyModelSpec
from services.clt.policy.model import AttentionPolicy
from services.runtime.run import Run

_FIELD = "checkpoint"
# Parts of the names of its weights, in several versions, and of ours. They are replaced in this order.
_NAMES = {
    "encoder.init_embedding.init_embed.": "encoder.embed.",
    "encoder.net.layers.": "encoder.layers.",
    ".0.module.Wqkv.": ".attention.qkv.",
    ".0.module.out_proj.": ".attention.out.",
    ".1.normalizer.": ".norm1.",
    ".2.module.lins.0.": ".mlp.0.",
    ".2.module.lins.1.": ".mlp.2.",
    ".2.module.0.": ".mlp.0.",
    ".2.module.2.": ".mlp.2.",
    ".3.normalizer.": ".norm2.",
    "decoder.context_embedding.W_placeholder": "decoder.placeholder",
    "decoder.context_embedding.project_context.": "decoder.context.",
    "decoder.project_node_embeddings.": "decoder.project.",
    "decoder.project_fixed_context.": "decoder.fixed.",
    "decoder.pointer.project_out.": "decoder.out.",
    "decoder.logit_attention.project_out.": "decoder.out.",
}
_LAYER = re.compile(r"encoder\.layers\.(\d{1,4})\.")
# What it says of a policy, and of which types that is.
_SETTINGS: dict[str, tuple[type, ...]] = {
    "num_heads": (int,),
    "use_graph_context": (bool,),
    "normalization": (str,),
    "tanh_clipping": (int, float),
    "temperature": (int, float),
    "mask_inner": (bool,),
    "mask_logits": (bool,),
    "num_loc": (int,),
}
# Weights that an error lists.
_LISTED = 5


def import_rl4co(
    source: Path | Mapping[str, Any],
    folder: Path,
    *,
    nodes: int = 20,
    heads: int | None = None,
    graph_context: bool | None = None,
    run: Run | None = None,
) -> AttentionPolicy:
    """Write the policy in ``source``, a Lightning checkpoint of rl4co's ``AttentionModel`` or ``POMO`` or its state
    dict, into ``folder``.

    ``nodes``: cities per training instance, used if the settings do not give them. ``heads`` and ``graph_context``
    (whether the query contains the mean of the cities) override the settings; a state dict has none, so give both. A
    policy trained from every start city, as POMO is, is given its first city; others choose it. ``run`` logs what is
    not part of a policy here. Raises :class:`InvalidInput` for anything but such a checkpoint, naming the weights that
    are unknown or missing.
    """
    run = run or Run()
    checkpoint: Any = read_checkpoint(source) if isinstance(source, Path) else source
    if not isinstance(checkpoint, Mapping):
        raise InvalidInput.field(_FIELD, "holds no mapping; give a Lightning checkpoint of rl4co or its state dict")
    tensors = _weights(checkpoint, run)
    names = {_our_name(name): name for name in tensors}
    weights = {ours: tensors[name] for ours, name in names.items()}
    if twice := [name for name in tensors if name not in names.values()]:
        raise InvalidInput.field(_FIELD, f"has weights twice, under other names: {_listed(twice)}")
    settings = _settings(checkpoint)
    if settings.get("mask_inner") is False or settings.get("mask_logits") is False:
        raise InvalidInput.field(
            _FIELD, "attends to visited cities (mask_inner or mask_logits is off), unlike a policy"
        )
    if settings.get("temperature", 1) != 1:
        run.log(f"tours are sampled at temperature 1, not {settings['temperature']} as in the checkpoint", "warning")
    if "tanh_clipping" not in settings:
        run.log("does not say how logits are clipped: 10, rl4co's default, is taken; greedy tours do not depend on it")
    asked = {"num_heads": heads, "use_graph_context": graph_context}
    settings |= {name: value for name, value in asked.items() if value is not None}
    for option, name in (("--heads", "num_heads"), ("--graph-context or --no-graph-context", "use_graph_context")):
        if name not in settings:
            text = (
                "its settings do not say" if "pomo" in settings else "it holds weights alone, and no settings that say"
            )
            raise InvalidInput.field(_FIELD, f"{text} what the policy is like; give {option}")
    try:
        spec = PolicyModelSpec(
            hidden_dim=len(weights["encoder.embed.weight"]),
            layers=1 + max((int(match[1]) for name in weights if (match := _LAYER.match(name))), default=0),
            heads=settings["num_heads"],
            feed_forward=len(weights["encoder.layers.0.mlp.0.weight"]),
            normalization=_normalization(weights, settings),
            graph_context=settings["use_graph_context"],
            clipping=settings.get("tanh_clipping", 10.0),
        )
    except KeyError as error:
        raise InvalidInput.field(_FIELD, f"has no {error.args[0]}, so it is no attention model of rl4co") from None
    except ValidationError as error:
        raise InvalidInput.from_pydantic(error, _FIELD) from None
    policy = AttentionPolicy(spec, settings.get("num_loc", nodes))
    initial = policy.state_dict()
    if unknown := [name for ours, name in names.items() if ours not in initial]:
        raise InvalidInput.field(_FIELD, f"has weights that no attention model of rl4co has: {_listed(unknown)}")
    policy.chooses_start = not settings.get("pomo", not spec.graph_context)
    # A POMO policy has them all the same.
    used = {"decoder.placeholder": policy.chooses_start, "decoder.fixed.weight": spec.graph_context}
    missing = [name for name in initial.keys() - weights.keys() if "num_batches" not in name and used.get(name, True)]
    if missing:
        raise InvalidInput.field(_FIELD, f"lacks {_listed(sorted(missing))}")
    for name, value in weights.items():
        if value.shape != initial[name].shape:
            shapes = f"has shape {list(value.shape)} instead of {list(initial[name].shape)}"
            raise InvalidInput.field(_FIELD, f"{name} {shapes}")
    policy.load_state_dict(initial | weights)
    policy.eval().requires_grad_(False)
    policy.save(folder, {"source": "rl4co"})
    return policy


def _weights(checkpoint: Mapping[str, Any], run: Run) -> dict[str, Tensor]:
    """The tensors of the policy. Raises :class:`InvalidInput` for an entry that is something else."""
    state = checkpoint.get("state_dict", checkpoint)
    state = {str(name): value for name, value in state.items()} if isinstance(state, Mapping) else {}
    if not any(isinstance(value, Tensor) for value in state.values()):
        raise InvalidInput.field(_FIELD, "holds no weights; give a Lightning checkpoint of rl4co or its state dict")
    left_out = [name for name in state if name.startswith("baseline.")]
    if left_out:
        run.log(f"left out, as they serve training alone: {_listed(left_out)}")
    if other := [name for name in state.keys() - left_out if not isinstance(state[name], Tensor)]:
        raise InvalidInput.field(_FIELD, f"has entries among its weights that are no tensors: {_listed(sorted(other))}")
    return {name: value.detach() for name, value in state.items() if name not in left_out}


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{', '.join(names[:_LISTED])}{more}"


def _our_name(name: str) -> str:
    name = name.removeprefix("policy.")
    for theirs, ours in _NAMES.items():
        name = name.replace(theirs, ours)
    return name


def _normalization(weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Any:
    if "encoder.layers.0.norm1.running_mean" in weights:
        return "batch"
    if "encoder.layers.0.norm1.weight" in weights:
        return "instance"
    if settings.get("normalization") == "layer":
        return "layer"
    text = "has no weights of normalization, and no settings with normalization=layer, which has none"
    raise InvalidInput.field(_FIELD, f"{text}; batch, instance and layer can be imported")


def _settings(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What the checkpoint says of the policy, under rl4co's names, and whether it is a ``pomo`` policy: from the policy
    that is in the settings, or from the options that it was made of, with the library's defaults. Empty for weights
    alone."""
    given = checkpoint.get("hyper_parameters")
    if not isinstance(given, Mapping):
        return {}
    pomo = "num_starts" in given or given.get("baseline") == "shared"
    policy, env, options = given.get("policy"), given.get("env"), given.get("policy_kwargs")
    if policy is None:
        defaults = {"num_heads": 8, "use_graph_context": not pomo, "tanh_clipping": 10.0}
        found = defaults | (dict(options) if isinstance(options, Mapping) else {})
    else:
        decoder = _attribute(policy, "decoder")
        places = (policy, decoder, *(_attribute(decoder, name) for name in ("pointer", "logit_attention")))
        found = {name: _first(_attribute(place, name) for place in places) for name in _SETTINGS}
        found["normalization"] = _attribute(policy, "encoder", "net", "layers", "0", "1", "normalizer")
    cities = [given.get("num_loc"), _attribute(env, "generator", "num_loc"), _attribute(env, "num_loc")]
    found["num_loc"] = _first(cities)
    return {"pomo": pomo} | {name: found[name] for name, types in _SETTINGS.items() if type(found.get(name)) in types}


def _first(values: Iterable[Any]) -> Any:
    return next((value for value in values if value is not None), None)


def _attribute(value: object, *path: str) -> Any:
    """What is at ``path`` in an object; None if there is nothing."""
    for name in path:
        attributes = getattr(value, "__dict__", {})
        modules = attributes.get("_modules")
        value = attributes.get(name, modules.get(name) if isinstance(modules, Mapping) else None)
    return value


class _Placeholder:
    """Stands for an object of any class, which is not built; keeps its attributes, and ignores whatever else a pickle
    does to it."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.__dict__ = state if isinstance(state, dict) else {}

    append = extend = __setitem__ = __init__


_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def _rebuild(storage: object, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    if not isinstance(storage, Tensor):
        raise pickle.UnpicklingError("a tensor without numbers")
    return torch.as_strided(storage, size, stride, offset).clone()


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "_rebuild_tensor": _rebuild,
    "_rebuild_tensor_v2": _rebuild,
    "_rebuild_parameter": lambda tensor, *_: tensor,
}


class _Unpickler(pickle.Unpickler):
    """Builds tensors and plain containers."""

    def __init__(self, file: Any, record: Callable[[str], bytes]) -> None:
        super().__init__(file, encoding="utf-8")
        self._record = record

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch._utils" and name in _FUNCTIONS:
            # A new function each time, as a pickle can set attributes of what it is given.
            return lambda *args: _FUNCTIONS[name](*args)  # noqa: PLW0108
        return _Placeholder

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise pickle.UnpicklingError(f"unknown object {kind}")
        if not count:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(bytearray(self._record(f"data/{key}")), dtype=dtype, count=count)


def read_checkpoint(file: Path) -> Any:
    """Contents of a file of ``torch.save``, as tensors and plain containers. Raises :class:`InvalidInput`."""
    try:
        with zipfile.ZipFile(file) as archive:
            prefix = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
            with archive.open(f"{prefix}data.pkl") as pickled:
                return _Unpickler(pickled, lambda name: archive.read(prefix + name)).load()
    except OSError as error:
        raise InvalidInput.field(_FIELD, f"{file} cannot be read: {error.strerror or error}") from None
    # A broken file, or a pickle made to break its reader, may raise anything.
    except Exception as error:
        text = f"{file} cannot be read as a file written by torch.save ({type(error).__name__})"
        raise InvalidInput.field(_FIELD, f"{text}; save it again with torch 1.6 or later") from None
