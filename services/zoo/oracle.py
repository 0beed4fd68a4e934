"""What signatures determine: each layer's weights, by least squares from raw signatures; and what they cannot."""

from __future__ import annotations

import torch
from torch import Tensor

from services.zoo.layout import Layout
from services.zoo.signatures import ActivationSignatureExtractor
from services.zoo.subjects import ACTIVATIONS, Architecture, Params, flatten, unflatten

_STEPWISE = frozenset({"sparsity", "entropy"})
"""Methods whose values stay the same under small changes of the weights, almost everywhere."""


def ambiguity(extractor: ActivationSignatureExtractor, layout: Layout) -> str:
    """Why the extractor's signatures cannot determine the weights of all networks of ``layout``; empty if nothing
    speaks against it.

    Each condition is necessary. The first layer is seen through the probes alone, so these must span what all
    sequences span. A layer is seen through its outputs on the probes, so there must be as many as it has inputs and a
    bias. And the weights from any layer on are seen through the neurons from there on, so that these must have as many
    numbers as there are weights, up to the redundancy of one-hot inputs.
    """
    methods, probes = ", ".join(extractor.methods), len(extractor.inputs)
    steps = sum(method in _STEPWISE for method in extractor.methods)
    values = extractor.values - steps
    with_bias = torch.cat([extractor.inputs, torch.ones(probes, 1)], 1)
    seen, first = int(torch.linalg.matrix_rank(with_bias.double())), layout.shapes[0]
    one_hot = first.input_encoding == "one_hot"
    directions = first.length * (first.vocab_size - 1) + 1 if one_hot else first.length + 1
    if seen < directions:
        return f"its {probes} probes show {seen} of the {directions} directions of the first layer's weights"
    for shape in layout.shapes:
        reason, have, need = "", 0, 0
        for i, (fan_in, fan_out) in reversed(list(enumerate(shape.layers))):
            inputs = directions if i == 0 else fan_in + 1
            have, need = have + values * fan_out, need + inputs * fan_out
            where = "-".join(map(str, (shape.input_size, *shape.hidden, 1))) + (f" from layer {i} on" if i else "")
            if have < need:
                reason = f"its signature ({methods}) has {have:,} numbers for the {need:,} weights of a network {where}"
            elif probes < inputs:
                reason = f"its {probes} probes are too few for the {inputs} weights of a neuron of a network {where}"
        if reason:
            return reason
    return ""


def varies(extractor: ActivationSignatureExtractor) -> bool:
    """Whether a small change of the weights changes the extractor's signatures."""
    return not _STEPWISE.issuperset(extractor.methods)


def solvable(extractor: ActivationSignatureExtractor) -> bool:
    """Whether the extractor's signatures hold what :func:`recover` needs."""
    return "raw" in extractor.methods and extractor.activations == "pre"


@torch.no_grad()
def recovered(vectors: Tensor, shape: Tensor, layout: Layout, extractor: ActivationSignatureExtractor) -> Tensor:
    """Networks ``[models, size]`` found by :func:`recover` from the raw signatures of networks ``vectors`` of the
    shapes ``shape`` (int64 ``[models]``), as float32 on the CPU.

    Of the equal functions that one-hot inputs allow it is the one whose letters have the sources' mean weights.
    """
    vectors, shape = vectors.cpu(), shape.cpu()
    found = torch.zeros_like(vectors)
    for which, architecture in enumerate(layout.shapes):
        rows = (shape == which).nonzero().squeeze(1)
        if len(rows):
            source = unflatten(layout.strip(vectors[rows], which), architecture)
            raw = extractor.extract(source, architecture)["raw"].transpose(1, 2)
            solved = recover(raw, extractor.inputs, architecture)
            found[rows] = layout.pad(flatten(_with_letter_means(solved, source, architecture)).float(), which)
    return found


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
    return _shifted(params, -_means(params, architecture), architecture)


def _with_letter_means(params: Params, others: Params, architecture: Architecture) -> Params:
    """The same functions, with the letters' mean weights of ``others``."""
    return _shifted(params, _means(others, architecture).double() - _means(params, architecture), architecture)


def _means(params: Params, architecture: Architecture) -> Tensor:
    """Mean weight of the letters at each position, ``[models, width, length]``."""
    return _by_position(params["layers.0.weight"], architecture).mean(3)


def _by_position(weight: Tensor, architecture: Architecture) -> Tensor:
    return weight.reshape(*weight.shape[:2], architecture.length, -1)


def _shifted(params: Params, shift: Tensor, architecture: Architecture) -> Params:
    """The same functions of one-hot inputs, with ``shift`` ``[models, width, length]`` added to the letters' weights;
    inputs that are numbers allow none."""
    if architecture.input_encoding != "one_hot":
        return params
    weight = params["layers.0.weight"]
    return {
        **params,
        "layers.0.weight": (_by_position(weight, architecture) + shift.unsqueeze(3)).flatten(2),
        "layers.0.bias": params["layers.0.bias"] - shift.sum(2),
    }
