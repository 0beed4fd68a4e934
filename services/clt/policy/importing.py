"""Attention models that were trained by rl4co (https://github.com/ai4co/rl4co), as policies.

Its checkpoints are pickles. They are read without running anything that is in them: tensors and plain containers are
built, and every other object becomes an empty placeholder.
"""

from __future__ import annotations

import collections
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from ethogram.errors import InvalidInput
from ethogram.specs.clt import PolicyModelSpec
from services.clt.policy.model import AttentionPolicy

_FIELD = "checkpoint"
_PLAIN = {
    "encoder.init_embedding.init_embed": "encoder.embed",
    "decoder.context_embedding.W_placeholder": "decoder.placeholder",
    "decoder.context_embedding.project_context": "decoder.context",
    "decoder.project_node_embeddings": "decoder.project",
    "decoder.project_fixed_context": "decoder.fixed",
    "decoder.pointer.project_out": "decoder.out",
    "decoder.logit_attention.project_out": "decoder.out",
}
_LAYER = re.compile(r"encoder\.net\.layers\.(\d+)\.(.+)")
_IN_LAYER = {
    "0.module.Wqkv": "attention.qkv",
    "0.module.out_proj": "attention.out",
    "1.normalizer": "norm1",
    "2.module.lins.0": "mlp.0",
    "2.module.lins.1": "mlp.2",
    "2.module.0": "mlp.0",
    "2.module.2": "mlp.2",
    "3.normalizer": "norm2",
}


def import_rl4co(
    source: Path | Mapping[str, Any],
    folder: Path,
    *,
    nodes: int = 20,
    heads: int | None = None,
    graph_context: bool | None = None,
) -> AttentionPolicy:
    """Write the policy in ``source``, a Lightning checkpoint of rl4co's ``AttentionModel`` or ``POMO`` or its state
    dict, into ``folder``.

    ``nodes``: cities that it was trained on, where its settings do not say; ``heads``: the same, else 8;
    ``graph_context``: whether its query has the mean of the cities; None: as its settings say, else that it has. A
    policy that was trained from each city, as POMO is, is given its first city; others choose it. Raises
    :class:`InvalidInput` for what is no such checkpoint, with the weights that are unknown or missing.
    """
    about: Any = read_checkpoint(source) if isinstance(source, Path) else source
    if not isinstance(about, Mapping):
        raise InvalidInput.field(_FIELD, "holds no mapping; give a Lightning checkpoint of rl4co or its state dict")
    settings = about.get("hyper_parameters", {})
    state = about.get("state_dict", about)
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        raise InvalidInput.field(_FIELD, "holds no weights; give a Lightning checkpoint of rl4co or its state dict")
    options = _options(settings)
    weights = _renamed(state)
    try:
        embed, wide = weights["encoder.embed.weight"], weights["encoder.layers.0.mlp.0.weight"]
        layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layers."))
        spec = PolicyModelSpec(
            hidden_dim=embed.shape[0],
            layers=layers,
            heads=heads or _number(options.get("num_heads")) or 8,
            feed_forward=wide.shape[0],
            graph_context=bool(options.get("use_graph_context", True)) if graph_context is None else graph_context,
            clipping=clipping if isinstance(clipping := options.get("tanh_clipping"), int | float) else 10.0,
        )
    except KeyError as error:
        raise InvalidInput.field(_FIELD, f"has no {error.args[0]}, so it is no attention model of rl4co") from None
    except ValidationError as error:
        raise InvalidInput.from_pydantic(error, _FIELD) from None
    policy = AttentionPolicy(spec, _number(options.get("num_loc")) or nodes)
    pomo = "num_starts" in options or options.get("baseline") == "shared"
    policy.chooses_start = not pomo and spec.graph_context
    wanted = policy.state_dict()
    # A POMO policy has these two, but uses neither.
    missing = [name for name in wanted if name not in weights and not name.endswith("num_batches_tracked")]
    if not policy.chooses_start:
        missing = [name for name in missing if name not in ("decoder.placeholder", "decoder.fixed.weight")]
    if any("running_" in name for name in missing):
        what = "has no running means, so it was trained with instance normalisation; a policy has batch normalisation"
        raise InvalidInput.field(_FIELD, f"{what}: train with normalization=batch")
    if missing:
        raise InvalidInput.field(_FIELD, f"lacks {', '.join(missing[:5])}")
    for name, value in weights.items():
        if name in wanted and value.shape != wanted[name].shape:
            shapes = f"has shape {list(value.shape)} instead of {list(wanted[name].shape)}"
            raise InvalidInput.field(_FIELD, f"{name} {shapes}")
    policy.load_state_dict(wanted | weights)
    policy.eval().requires_grad_(False)
    policy.save(folder, {"source": "rl4co"})
    return policy


def _options(settings: object) -> dict[str, Any]:
    """The settings as far as they can be read, those of the policy among them."""
    found = dict(settings) if isinstance(settings, Mapping) else {}
    inner = found.get("policy_kwargs")
    return found | (dict(inner) if isinstance(inner, Mapping) else {})


def _number(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _renamed(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The policy's weights by our names. Raises :class:`InvalidInput` for one that is unknown."""
    inside = any(str(name).startswith("policy.") for name in state)
    found: dict[str, Tensor] = {}
    unknown = []
    for name, value in state.items():
        if str(name).startswith("baseline."):
            continue
        own = _own(str(name).removeprefix("policy.")) if str(name).startswith("policy.") or not inside else None
        if own is None or not isinstance(value, Tensor):
            unknown.append(str(name))
        else:
            found[own] = value.detach() if own.endswith("num_batches_tracked") else value.detach().float()
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise InvalidInput.field(
            _FIELD, f"has weights that no attention model of rl4co has: {', '.join(unknown[:5])}{more}"
        )
    return found


def _own(name: str) -> str | None:
    if name in _PLAIN:
        return _PLAIN[name]
    module, _, kind = name.rpartition(".")
    if module in _PLAIN:
        return f"{_PLAIN[module]}.{kind}"
    layer = _LAYER.fullmatch(module)
    inside = _IN_LAYER.get(layer[2]) if layer else None
    return f"encoder.layers.{layer[1]}.{inside}.{kind}" if layer and inside else None


class _Placeholder:
    """Stands for an object of any class, which is not made."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __call__(self, *_: object, **__: object) -> _Placeholder:
        return self

    def __setstate__(self, _: object) -> None:
        pass

    # Objects that a pickle fills after making them, as lists and mappings are.
    def append(self, _: object) -> None:
        pass

    def extend(self, _: object) -> None:
        pass

    def __setitem__(self, _: object, __: object) -> None:
        pass


_STORAGES = {
    f"{name}Storage": dtype
    for name, dtype in {
        "Float": torch.float32,
        "Double": torch.float64,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}


def _rebuild(storage: object, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    if not isinstance(storage, Tensor):
        raise pickle.UnpicklingError("a tensor without numbers")
    return torch.as_strided(storage, size, stride, offset).clone()


def _parameter(data: object, *_: object) -> object:
    return data


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}


def _own_copy(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*given: Any) -> Any:
        return function(*given)

    return call


class _Unpickler(pickle.Unpickler):
    """Makes tensors and plain containers."""

    def __init__(self, file: Any, record: Callable[[str], bytes]) -> None:
        super().__init__(file, encoding="utf-8")
        self._record = record

    def find_class(self, module: str, name: str) -> Any:
        found = _ALLOWED.get((module, name), _Placeholder)
        # A pickle can set attributes of what it is given: it gets a function of its own.
        return _own_copy(found) if isinstance(found, FunctionType) else found

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise pickle.UnpicklingError(f"unknown object {kind}")
        if not count:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(bytearray(self._record(f"data/{key}")), dtype=dtype, count=count)


def read_checkpoint(file: Path) -> Any:
    """What ``torch.save`` wrote into ``file``, made of tensors and plain containers. Raises :class:`InvalidInput`."""
    try:
        with zipfile.ZipFile(file) as archive:
            prefix = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
            with archive.open(f"{prefix}data.pkl") as pickled:
                return _Unpickler(pickled, lambda name: archive.read(prefix + name)).load()
    except OSError as error:
        raise InvalidInput.field(_FIELD, f"{file} cannot be read: {error.strerror or error}") from None
    # A broken file, or a pickle made to break its reader, may raise anything.
    except Exception as error:
        text = f"{file} is no file of torch.save that can be read ({type(error).__name__})"
        raise InvalidInput.field(_FIELD, f"{text}; save it again with torch 1.6 or later") from None
