"""Activation signatures: what a network's neurons do on a fixed set of probe inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from services.zoo.subjects import Params, activations

_METHODS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda raw: raw.mean(1),
    "std": lambda raw: raw.std(1, correction=0),
    "max": lambda raw: raw.amax(1),
    "min": lambda raw: raw.amin(1),
    "sparsity": lambda raw: (raw <= 0).to(raw.dtype).mean(1),
}


def raw(params: Params, inputs: Tensor, activation: str = "relu") -> Tensor:
    """Pre-activations ``[models, probes, neurons]`` of the neurons of all layers in order, the logit last.

    ``inputs``: the encoded probes ``[probes, input_size]``. With more independent probes than ``fan_in + 1`` they
    determine each layer's weights by least squares (up to the redundancy of one-hot inputs).
    """
    return torch.cat(activations(params, inputs, activation), 2)


def aggregated(raw_signatures: Tensor, methods: Sequence[str] = ("mean", "std")) -> Tensor:
    """Statistics over the probes: ``[models, probes, neurons]`` to ``[models, methods, neurons]``.

    Methods: ``mean``, ``std`` (population), ``max``, ``min``, ``sparsity`` (share of probes with a value <= 0).
    """
    return torch.stack([_METHODS[method](raw_signatures) for method in methods], 1)
