"""What raw signatures determine: each layer's weights, by least squares from its inputs and pre-activations."""

from __future__ import annotations

import torch
from torch import Tensor

from services.zoo.subjects import ACTIVATIONS, Architecture, Params


def recover(raw_signatures: Tensor, inputs: Tensor, architecture: Architecture) -> Params:
    """Parameters (float64) of the networks behind ``raw_signatures`` ``[models, probes, neurons]``.

    ``inputs``: the encoded probes ``[probes, input_size]``. Where the probes leave freedom, the solution of least norm:
    one-hot inputs (compare :func:`canonical` forms) and hidden neurons that no probe activates.
    """
    function, params, start = ACTIVATIONS[architecture.activation], Params(), 0
    hidden = inputs.double().expand(len(raw_signatures), -1, -1)
    for i, (_, fan_out) in enumerate(architecture.layers):
        pre = raw_signatures[:, :, start : start + fan_out].double()
        with_bias = torch.cat([hidden, torch.ones_like(hidden[:, :, :1])], 2)
        solution = torch.linalg.lstsq(with_bias, pre, driver="gelsd").solution
        params[f"layers.{i}.weight"] = solution[:, :-1].transpose(1, 2)
        params[f"layers.{i}.bias"] = solution[:, -1]
        hidden, start = function(pre), start + fan_out
    return params


def canonical(params: Params, architecture: Architecture) -> Params:
    """The same functions, with the redundancy of one-hot inputs removed: at each position the letters' weights have
    mean 0, and the first bias holds what they lost."""
    if architecture.input_encoding != "one_hot":
        return params
    first = params["layers.0.weight"]
    weight = first.reshape(*first.shape[:2], architecture.length, architecture.vocab_size)
    mean = weight.mean(3, keepdim=True)
    return {
        **params,
        "layers.0.weight": (weight - mean).flatten(2),
        "layers.0.bias": params["layers.0.bias"] + mean.sum((2, 3)),
    }
