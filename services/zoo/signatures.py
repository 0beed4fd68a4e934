"""Activation signatures: the activations of a network's neurons on a fixed set of probe inputs."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ethogram.errors import InvalidInput
from ethogram.specs.generation import SignatureMethod, SignatureSpec
from services.runtime.devices import double
from services.zoo.subjects import ACTIVATIONS, Architecture, Params, activations

_KMEANS_ROUNDS = 20


class ActivationSignatureExtractor:
    """Computes signatures of networks on one set of probes: some numbers for each neuron, by method.

    - ``mean``, ``std`` (population), ``max``, ``min``; ``sparsity``: share of probes with a value <= 0;
    - ``pca``, ``svd``: the neuron's loadings on the layer's leading principal components or singular vectors over the
      probes, times the singular value over the root of the number of probes; each component's sign is such that its
      loading of largest magnitude is positive;
    - ``entropy``: of the histogram between the neuron's least and largest value, in nats;
    - ``clustering``: centres of the neuron's values by k-means, ascending (Lloyd 1982, started at even quantiles);
    - ``fourier``: magnitudes of the first frequencies along the probes, constant first, over the number of probes;
    - ``pattern_wise``: mean over the probes that match each pattern, then over those that match none;
    - ``raw``: the value on every probe. With more independent probes than ``fan_in + 1`` they determine each layer's
      weights by least squares, up to the redundancy of one-hot inputs.
    """

    def __init__(self, spec: SignatureSpec, inputs: Tensor, membership: Tensor) -> None:
        """``inputs``: encoded probes ``[probes, input_size]``; ``membership``: the patterns of each, bool ``[probes,
        patterns]``. Raises :class:`InvalidInput` for more components than the probes can give."""
        self.methods: list[SignatureMethod] = list(dict.fromkeys(spec.methods)) or ["raw"]
        probes = len(inputs)
        most = {"fourier": probes // 2 + 1, "clustering": probes, "pca": probes, "svd": probes}
        for method in self.methods:
            if spec.components > most.get(method, spec.components):
                text = f"{probes} probes have at most {most[method]} for {method}"
                raise InvalidInput.field("spec.signature.components", text)
        self._spec, self.inputs, self.activations = spec, inputs, spec.activations
        strata = torch.cat([membership, ~membership.any(1, keepdim=True)], 1).float()
        # A pattern that no probe matches has mean 0.
        self._strata = strata / strata.sum(0).clamp(min=1)

    @cached_property
    def values(self) -> int:
        """Numbers for each neuron, of all methods together."""
        neuron = self.inputs.new_zeros(1, len(self.inputs), 1)
        return sum(self._of(method, neuron).shape[2] for method in self.methods)

    def extract(
        self, params: Params, architecture: Architecture, widths: Tensor | None = None
    ) -> dict[SignatureMethod, Tensor]:
        """Of each method ``[models, neurons, values]``, layer after layer, the logit last. ``widths``: neurons in each
        hidden layer of each network, where some are narrower than ``architecture``; what they lack holds zeros."""
        layers = activations(params, self.inputs.to(params["layers.0.weight"].device), architecture.activation)
        if self.activations == "post":
            layers = [*map(ACTIVATIONS[architecture.activation], layers[:-1]), layers[-1]]
        if widths is not None:
            for layer in layers[:-1]:
                beyond = torch.arange(layer.shape[2], device=layer.device) >= widths.to(layer.device).view(-1, 1, 1)
                layer.masked_fill_(beyond, 0.0)
        return {method: torch.cat([self._of(method, layer) for layer in layers], 1) for method in self.methods}

    def _of(self, method: SignatureMethod, layer: Tensor) -> Tensor:
        """One layer, ``[models, probes, width]``, to ``[models, width, values]``."""
        probes, count = layer.shape[1], self._spec.components
        match method:
            case "mean":
                return layer.mean(1).unsqueeze(2)
            case "std":
                return layer.std(1, correction=0).unsqueeze(2)
            case "max":
                return layer.amax(1).unsqueeze(2)
            case "min":
                return layer.amin(1).unsqueeze(2)
            case "sparsity":
                return (layer <= 0).to(layer.dtype).mean(1).unsqueeze(2)
            case "pca":
                return _components(layer - layer.mean(1, keepdim=True), count)
            case "svd":
                return _components(layer, count)
            case "entropy":
                return _entropy(layer, self._spec.bins).unsqueeze(2)
            case "clustering":
                return _centres(layer.transpose(1, 2), count)
            case "fourier":
                magnitudes: Tensor = torch.fft.rfft(layer, dim=1)[:, :count].abs()
                return magnitudes.transpose(1, 2) / probes
            case "pattern_wise":
                return layer.transpose(1, 2) @ self._strata.to(layer)
            case "raw":
                return layer.transpose(1, 2)


def _components(layer: Tensor, count: int) -> Tensor:
    """Loadings on the leading right singular vectors, scaled: ``[models, probes, width]`` to ``[models, width,
    count]``; components that a narrow layer does not have are 0."""
    probes, width = layer.shape[1:]
    # In double precision: the eigenvalues of the Gram matrix are the squares of the singular values.
    values, vectors = torch.linalg.eigh(double(layer.transpose(1, 2) @ layer) / probes)
    kept = min(count, width)
    scale = values[:, -kept:].flip(1).clamp(min=0).sqrt()
    loadings = vectors[:, :, -kept:].flip(2) * scale.unsqueeze(1)
    largest = loadings.gather(1, loadings.abs().argmax(1, keepdim=True))
    loadings = loadings * torch.where(largest < 0, -1.0, 1.0)
    return torch.nn.functional.pad(loadings, (0, count - kept)).to(layer)


def _entropy(layer: Tensor, bins: int) -> Tensor:
    """Entropy of each neuron's histogram: ``[models, probes, width]`` to ``[models, width]``."""
    least, most = layer.amin(1, keepdim=True), layer.amax(1, keepdim=True)
    bin_of = ((layer - least) / (most - least).clamp(min=torch.finfo(layer.dtype).tiny) * bins).long()
    counts = layer.new_zeros(len(layer), bins, layer.shape[2])
    counts.scatter_add_(1, bin_of.clamp_(max=bins - 1), torch.ones_like(layer))
    shares = counts / layer.shape[1]
    return -torch.xlogy(shares, shares).sum(1)


def _centres(values: Tensor, count: int) -> Tensor:
    """One-dimensional k-means along the last axis: ``[..., probes]`` to ``[..., count]``."""
    ordered = values.contiguous().sort(-1).values
    probes = values.shape[-1]
    quantiles = ((torch.arange(count) + 0.5) / count * probes).long().to(values.device)
    centres = ordered[..., quantiles]
    totals = torch.nn.functional.pad(double(ordered).cumsum(-1), (1, 0))
    for _ in range(_KMEANS_ROUNDS):
        # Sorted values fall to sorted centres in runs, which the midpoints between the centres delimit.
        edges = torch.searchsorted(ordered, (centres[..., 1:] + centres[..., :-1]) / 2)
        first = torch.zeros_like(edges[..., :1])
        bounds = torch.cat([first, edges, first + probes], -1)
        sums, sizes = totals.gather(-1, bounds.to(totals.device)).diff(dim=-1), bounds.diff(dim=-1)
        centres = torch.where(sizes > 0, (sums / sizes.clamp(min=1).to(sums.device)).to(values), centres)
    return centres
