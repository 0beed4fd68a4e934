"""Rounding weights to few levels or to a smaller floating-point type, as values that the same type still holds."""

from __future__ import annotations

import torch
from torch import Tensor

from services.zoo.subjects import Params

# Largest code of a symmetric signed integer.
_CODES = {"int8": 127, "int4": 7}
# Ternary weights (Li et al. 2016) with the threshold as a share of the largest weight.
_TERNARY_ZERO = 0.2


def rounded(params: Params, precision: str = "float32", quantization: str = "none") -> Params:
    """The networks with weights and biases rounded, each tensor of each network by its own scale.

    ``int8``, ``int4``: symmetric, the largest magnitude is the largest code. ``ternary``: weights below a fifth of the
    largest magnitude become 0, the others plus or minus the mean magnitude of those that stay. ``binary``: plus or
    minus the mean magnitude (Rastegari et al. 2016); an exact zero stays, so that padding does. Biases are rounded to
    ``int8`` where weights are ternary or binary: there are few of them, and a network needs them. ``precision`` comes
    last.
    """
    if precision == "float32" and quantization == "none":
        return params
    quantized = {}
    for name, tensor in params.items():
        kind = "int8" if quantization in ("ternary", "binary") and name.endswith("bias") else quantization
        quantized[name] = _quantized(tensor, kind).to(getattr(torch, precision)).to(tensor.dtype)
    return quantized


def _quantized(tensor: Tensor, kind: str) -> Tensor:
    if kind == "none":
        return tensor
    flat = tensor.flatten(1)
    size = flat.abs()
    largest = size.amax(1, keepdim=True)
    if kind in _CODES:
        scale = (largest / _CODES[kind]).clamp(min=torch.finfo(tensor.dtype).tiny)
        return ((flat / scale).round() * scale).view_as(tensor)
    kept = size > (_TERNARY_ZERO * largest if kind == "ternary" else 0)
    mean = (size * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)
    return (flat.sign() * kept * mean).view_as(tensor)
