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
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from ethogram.errors import InvalidInput
from ethogram.specs.clt import PolicyModelSpec
from services.clt.policy.model import AttentionPolicy

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

    ``nodes``: cities per training instance, used if the settings do not give them. ``heads`` and ``graph_context``
    (whether the query contains the mean of the cities) override the settings; without either, 8 and True. A policy
    trained from every start city, as POMO is, is given its first city; others choose it. Raises :class:`InvalidInput`
    for anything but such a checkpoint, naming the unknown or missing weights.
    """
    checkpoint: Any = read_checkpoint(source) if isinstance(source, Path) else source
    if not isinstance(checkpoint, Mapping):
        raise InvalidInput.field(_FIELD, "holds no mapping; give a Lightning checkpoint of rl4co or its state dict")
    state = checkpoint.get("state_dict", checkpoint)
    state = state if isinstance(state, Mapping) else {}
    tensors = {str(name): value.detach() for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise InvalidInput.field(_FIELD, "holds no weights; give a Lightning checkpoint of rl4co or its state dict")
    names = {_our_name(name): name for name in tensors if not name.startswith("baseline.")}
    weights = {ours: tensors[name] for ours, name in names.items()}
    settings = _settings(checkpoint)
    try:
        spec = PolicyModelSpec(
            hidden_dim=len(weights["encoder.embed.weight"]),
            layers=1 + max((int(match[1]) for name in weights if (match := _LAYER.match(name))), default=0),
            heads=heads or _number(settings.get("num_heads")) or 8,
            feed_forward=len(weights["encoder.layers.0.mlp.0.weight"]),
            graph_context=bool(settings.get("use_graph_context", True)) if graph_context is None else graph_context,
            clipping=clipping if isinstance(clipping := settings.get("tanh_clipping"), int | float) else 10.0,
        )
    except KeyError as error:
        raise InvalidInput.field(_FIELD, f"has no {error.args[0]}, so it is no attention model of rl4co") from None
    except ValidationError as error:
        raise InvalidInput.from_pydantic(error, _FIELD) from None
    policy = AttentionPolicy(spec, _number(settings.get("num_loc")) or nodes)
    initial = policy.state_dict()
    if unknown := [name for ours, name in names.items() if ours not in initial]:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        text = f"has weights that no attention model of rl4co has: {', '.join(unknown[:5])}{more}"
        raise InvalidInput.field(_FIELD, text)
    pomo = "num_starts" in settings or settings.get("baseline") == "shared"
    policy.chooses_start = not pomo and spec.graph_context
    # A POMO policy has these two, but uses neither.
    unused = () if policy.chooses_start else ("decoder.placeholder", "decoder.fixed.weight")
    missing = [name for name in initial.keys() - weights.keys() - {*unused} if "num_batches_tracked" not in name]
    if any("running_" in name for name in missing):
        text = "has no running means, so it was trained with instance normalisation; a policy has batch normalisation"
        raise InvalidInput.field(_FIELD, f"{text}: train with normalization=batch")
    if missing:
        raise InvalidInput.field(_FIELD, f"lacks {', '.join(sorted(missing)[:5])}")
    for name, value in weights.items():
        if value.shape != initial[name].shape:
            shapes = f"has shape {list(value.shape)} instead of {list(initial[name].shape)}"
            raise InvalidInput.field(_FIELD, f"{name} {shapes}")
    policy.load_state_dict(initial | weights)
    policy.eval().requires_grad_(False)
    policy.save(folder, {"source": "rl4co"})
    return policy


def _our_name(name: str) -> str:
    name = name.removeprefix("policy.")
    for theirs, ours in _NAMES.items():
        name = name.replace(theirs, ours)
    return name


def _settings(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The readable hyperparameters, including the policy's."""
    settings = checkpoint.get("hyper_parameters")
    settings = dict(settings) if isinstance(settings, Mapping) else {}
    policy = settings.get("policy_kwargs")
    return settings | (dict(policy) if isinstance(policy, Mapping) else {})


def _number(value: object) -> int | None:
    return value if isinstance(value, int) else None


class _Placeholder:
    """Stands for an object of any class, which is not built; ignores whatever a pickle does to it."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

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
