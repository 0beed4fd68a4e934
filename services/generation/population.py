"""Training many subject networks at once: stacked weights, batched matrix products, one Adam for all.

The backward pass is written by hand into preallocated buffers; autograd takes as long by itself as the products of
networks this small. A population's result equals training each network alone, up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from services.zoo.hashing import mix
from services.zoo.subjects import Architecture, Params

_aten = torch.ops.aten

# (gradient of the output, pre-activation, output, where to put it) -> gradient of the pre-activation. Pre-activations
# are only kept for those of _PRE_ACTIVATIONS; the others follow from the output.
_PRE_ACTIVATIONS = {"gelu"}
_DERIVATIVES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "relu": lambda grad, _, out, into: _aten.threshold_backward.grad_input(grad, out, 0, grad_input=into),
    "gelu": lambda grad, pre, _, into: _aten.gelu_backward.grad_input(grad, pre, grad_input=into),
    "tanh": lambda grad, _, out, into: _aten.tanh_backward.grad_input(grad, out, grad_input=into),
    "sigmoid": lambda grad, _, out, into: _aten.sigmoid_backward.grad_input(grad, out, grad_input=into),
    "leaky_relu": lambda grad, _, out, into: _aten.leaky_relu_backward.grad_input(
        grad, out, 0.01, False, grad_input=into
    ),
}
_FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda pre, into: torch.clamp_min(pre, 0, out=into),
    "gelu": lambda pre, into: _aten.gelu.out(pre, out=into),
    "tanh": lambda pre, into: torch.tanh(pre, out=into),
    "sigmoid": lambda pre, into: torch.sigmoid(pre, out=into),
    "leaky_relu": lambda pre, into: _aten.leaky_relu.out(pre, out=into),
}
State = list[Tensor]
"""Each layer's weights, with the biases as the last column: ``[models, fan_out, fan_in + 1]``."""

# Fractions of 2^16: four masks come out of one hash.
_LEVELS = 2**16


class _Layer(NamedTuple):
    """Buffers for what one layer makes of a batch."""

    pre: Tensor
    """Pre-activations ``[models, width, n]``; contiguous, or the product would be copied there. The next layer's are
    in the same memory where the gradient does without them."""
    out: Tensor
    """Outputs ``[models, width, n]``; without dropout a part of ``hidden``."""
    hidden: Tensor
    """What the next layer is given: ``[models, width + 1, n]``, outputs after dropout, and a row of ones, by which the
    biases are a column of the weights."""
    turned: Tensor
    """``hidden``, transposed."""
    grad: Tensor
    """Gradient of the output, then of the pre-activation."""


@dataclass(frozen=True)
class Dropout:
    """Inverted dropout behind each hidden activation. The masks depend on a network's key and its step alone."""

    rates: Tensor
    """Of each network: ``[models]``."""
    keys: Tensor
    """Of each network: int64 ``[models]``."""

    def select(self, index: Tensor) -> Dropout:
        """That of the networks at ``index``."""
        return Dropout(self.rates[index], self.keys[index])

    def scales(self, step: int, layer: int, width: int, n: int, dtype: torch.dtype) -> Tensor:
        """What to multiply activations by: ``[models, width, n]``, 0 or ``1 / (1 - rate)``."""
        count = -(-n * width // 4)
        positions = torch.arange(count, device=self.keys.device)
        hashed = mix(mix(self.keys + (step << 8) + layer).unsqueeze(1) + positions)
        levels = hashed.view(torch.int16)[:, : n * width].view(-1, width, n)
        # int16 counts from -2^15.
        kept = levels >= (self.rates * _LEVELS).round().sub(_LEVELS // 2).view(-1, 1, 1)
        return kept.to(dtype) / (1 - self.rates).to(dtype).view(-1, 1, 1)


class Population:
    """``models`` networks of one depth and activation in training, with Adam on binary cross-entropy.

    Networks may be narrower than ``architecture``: what they lack is padded with zeros, and these stay exactly zero.
    """

    def __init__(
        self,
        architecture: Architecture,
        state: State,
        *,
        widths: Tensor | None = None,
        dropout: Dropout | None = None,
        rates: Tensor | None = None,
    ) -> None:
        """``state``: where to start, as :func:`state_of` makes it; copied. ``widths``: neurons in each hidden layer of
        each network, int64 ``[models]``; None: all are as wide as ``architecture``. ``rates``: learning rate of each
        network, ``[models]``; None: 1."""
        self.architecture, self._dropout = architecture, dropout
        self.state = [weight.clone() for weight in state]
        """The parameters; a step changes them in place."""
        device = self.state[0].device
        self._neurons: Tensor | None = None
        if widths is not None and architecture.activation == "sigmoid":
            # It makes 0.5 of a padded neuron's 0; the other activations leave it.
            neurons = torch.arange(max(architecture.hidden), device=device) < widths.unsqueeze(1)
            self._neurons = neurons.unsqueeze(2).to(self.state[0].dtype)
        self._rates = rates.to(self.state[0].dtype).view(-1, 1, 1) if rates is not None else None
        # Adam has one rate for all. Where networks have their own, it moves their weights divided by their rates, at 1.
        self._scaled = self.state if self._rates is None else [weight / self._rates for weight in self.state]
        self._mean, self._square = ([torch.zeros_like(weight) for weight in self.state] for _ in range(2))
        self._steps, self._taken = torch.zeros((), device=device), 0
        self._allocate()

    def keep(self, index: Tensor) -> None:
        """Keep only the networks at ``index``."""
        if self._rates is not None:
            self._rates = self._rates[index]
            self._scaled = [tensor[index] for tensor in self._scaled]
        for tensors in (self.state, self._mean, self._square):
            tensors[:] = [tensor[index] for tensor in tensors]
        if self._dropout is not None:
            self._dropout = self._dropout.select(index)
        if self._neurons is not None:
            self._neurons = self._neurons[index]
        self._allocate()

    @torch.no_grad()
    def step(self, inputs: Tensor, targets: Tensor, learning_rate: float = 1.0) -> Tensor:
        """One step of every network, each on its own batch.

        ``inputs``: ``[models, n, input_size + 1]``, as :func:`with_ones` makes them; ``targets``: ``[models, n]`` of 0
        and 1, both in the parameters' type; ``learning_rate``: of all, times each network's own. Returns
        ``probability - target``, ``[models, n]``, a buffer that the next step overwrites.
        """
        n = targets.shape[1]
        layers, last = self._buffers(n), len(self.state) - 1
        scales = self._forward(layers, inputs, drop=True)
        derivative = _DERIVATIVES[self.architecture.activation]
        grad = layers[last].grad
        error = layers[last].pre.squeeze(1).sigmoid_().sub_(targets)
        torch.div(error.unsqueeze(1), n, out=grad)
        for i in range(last, 0, -1):
            below = layers[i - 1]
            torch.bmm(grad, below.turned, out=self._gradients[i])
            torch.bmm(self._turned[i], grad, out=below.grad)
            if scales:
                below.grad.mul_(scales[i - 1])
            grad = derivative(below.grad, below.pre, below.out, below.grad)
        torch.bmm(grad, inputs, out=self._gradients[0])
        self._adam(learning_rate)
        self._taken += 1
        return error

    @torch.no_grad()
    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Binary cross-entropy of each network on its own examples, shapes as in :meth:`step`: ``[models]``."""
        layers = self._buffers(targets.shape[1])
        self._forward(layers, inputs, drop=False)
        logits = layers[-1].pre.squeeze(1)
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)

    def _forward(self, layers: list[_Layer], inputs: Tensor, *, drop: bool) -> list[Tensor]:
        """Fill ``layers``. Returns the factors of dropout for each hidden layer, none without dropout."""
        function, hidden, scales = _FUNCTIONS[self.architecture.activation], inputs.transpose(1, 2), list[Tensor]()
        for i, (weight, layer) in enumerate(zip(self.state, layers, strict=True)):
            torch.bmm(weight, hidden, out=layer.pre)
            if i == len(layers) - 1:
                break
            if layer.out.is_contiguous() or self.architecture.activation != "gelu":
                function(layer.pre, layer.out)
            else:
                # In single precision it takes any output for a contiguous one. The gradient is not there yet.
                layer.out.copy_(function(layer.pre, layer.grad))
            if self._neurons is not None:
                layer.out.mul_(self._neurons)
            hidden = layer.hidden
            if self._dropout is not None:
                kept = hidden[:, :-1]
                if drop:
                    _, width, n = layer.out.shape
                    scales.append(self._dropout.scales(self._taken, i, width, n, layer.out.dtype))
                    # The derivative of tanh and sigmoid follows from the output before dropout.
                    torch.mul(layer.out, scales[i], out=kept)
                else:
                    kept.copy_(layer.out)
        return scales

    def _allocate(self) -> None:
        """Allocate what a step needs."""
        self._gradients = [torch.zeros_like(weight) for weight in self.state]
        # Without the biases; views, since making them each step takes as long as a small product.
        self._turned = [weight[:, :, :-1].transpose(1, 2) for weight in self.state]
        self._layers: dict[int, list[_Layer]] = {}

    def _buffers(self, n: int) -> list[_Layer]:
        """Buffers for batches of ``n``."""
        if n not in self._layers:
            widths, models = [fan_out for _, fan_out in self.architecture.layers], len(self.state[0])
            new = self.state[0].new_empty
            # A gradient is needed only until the one below is there: two buffers do, and stay in the cache. The third
            # is for pre-activations that are not kept.
            buffers = [new(models * n * max(widths)) for _ in range(3)]
            rows = []
            for i, width in enumerate(widths):
                is_kept = self.architecture.activation in _PRE_ACTIVATIONS
                pre = new(models, width, n) if is_kept else buffers[2][: models * n * width].view(models, width, n)
                hidden = self.state[0].new_ones(models, width + 1, n)
                out = hidden[:, :-1] if self._dropout is None else torch.empty_like(pre)
                grad = buffers[i % 2][: pre.numel()].view_as(pre)
                rows.append(_Layer(pre, out, hidden, hidden.transpose(1, 2), grad))
            self._layers[n] = rows
        return self._layers[n]

    def _adam(self, learning_rate: float) -> None:
        """Adam (Kingma and Ba 2015) with its usual constants."""
        self._steps += 1
        torch._fused_adam_(
            self._scaled,
            self._gradients,
            self._mean,
            self._square,
            [],
            [self._steps] * len(self.state),
            lr=learning_rate,
            beta1=0.9,
            beta2=0.999,
            weight_decay=0.0,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )
        if self._rates is not None:
            for weight, scaled in zip(self.state, self._scaled, strict=True):
                torch.mul(scaled, self._rates, out=weight)


def cosine(step: int, steps: int, peak: float) -> float:
    """Learning rate at ``step`` of ``steps``: from ``peak`` to nothing along half a cosine."""
    return peak * 0.5 * (1 + math.cos(math.pi * step / steps))


def with_ones(inputs: Tensor) -> Tensor:
    """Network inputs ``[..., input_size]`` with a one behind each, for the biases: ``[..., input_size + 1]``."""
    return F.pad(inputs, (0, 1), value=1)


def state_of(params: Params) -> State:
    """Stacked parameters (see :mod:`services.zoo.subjects`) as a population has them."""
    layers = range(len(params) // 2)
    return [torch.cat([params[f"layers.{i}.weight"], params[f"layers.{i}.bias"].unsqueeze(2)], 2) for i in layers]


def params_of(state: State) -> Params:
    """The inverse of :func:`state_of`; copies."""
    params: Params = {}
    for i, weight in enumerate(state):
        params[f"layers.{i}.weight"] = weight[:, :, :-1].contiguous()
        params[f"layers.{i}.bias"] = weight[:, :, -1].contiguous()
    return params
