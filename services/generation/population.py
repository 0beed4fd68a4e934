"""Training many subject networks at once: stacked weights, batched matrix products, one Adam over a flat buffer.

The backward pass is written by hand into preallocated buffers; autograd spends as long on its own as the products of
networks this small take. A population's result equals training each network alone, up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from services.zoo.hashing import mix
from services.zoo.subjects import Architecture, Params

_aten = torch.ops.aten

# (gradient of the output, pre-activation, output, where to put it) -> gradient of the pre-activation. All but GELU's
# follow from the output alone, so that it may overwrite the pre-activation.
_DERIVATIVES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "relu": lambda grad, _, out, into: _aten.threshold_backward.grad_input(grad, out, 0, grad_input=into),
    "gelu": lambda grad, pre, _, into: _aten.gelu_backward.grad_input(grad, pre, grad_input=into),
    "tanh": lambda grad, _, out, into: _aten.tanh_backward.grad_input(grad, out, grad_input=into),
    "sigmoid": lambda grad, _, out, into: _aten.sigmoid_backward.grad_input(grad, out, grad_input=into),
    "leaky_relu": lambda grad, _, out, into: _aten.leaky_relu_backward.grad_input(
        grad, out, 0.01, True, grad_input=into
    ),
}
_FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda pre, into: torch.clamp_min(pre, 0, out=into),
    "gelu": lambda pre, into: _aten.gelu.out(pre, out=into),
    "tanh": lambda pre, into: torch.tanh(pre, out=into),
    "sigmoid": lambda pre, into: torch.sigmoid(pre, out=into),
    "leaky_relu": lambda pre, into: _aten.leaky_relu.out(pre, out=into),
}
_NEEDS_PRE = frozenset({"gelu"})
# Fractions of 2^16: four masks come out of one hash.
_LEVELS = 2**16


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

    def scales(self, step: int, layer: int, n: int, width: int, dtype: torch.dtype) -> Tensor:
        """What to multiply activations by: ``[models, n, width]``, 0 or ``1 / (1 - rate)``."""
        count = -(-n * width // 4)
        places = torch.arange(count, device=self.keys.device)
        hashed = mix(mix(self.keys + (step << 8) + layer).unsqueeze(1) + places)
        draws = hashed.view(torch.int16)[:, : n * width].view(-1, n, width)
        # int16 counts from -2^15.
        kept = draws >= (self.rates * _LEVELS).round().sub(_LEVELS // 2).view(-1, 1, 1)
        return kept.to(dtype) / (1 - self.rates).to(dtype).view(-1, 1, 1)


class Population:
    """``models`` networks of one depth and activation in training, with Adam on binary cross-entropy.

    Networks may be narrower than ``architecture``: what they lack is padded with zeros, and these stay exactly zero.
    """

    def __init__(
        self,
        architecture: Architecture,
        state: Tensor,
        *,
        widths: Tensor | None = None,
        dropout: Dropout | None = None,
    ) -> None:
        """``state``: where to start, as :func:`state_of` makes it; copied. ``widths``: neurons in each hidden layer of
        each network, int64 ``[models]``; None: all are as wide as ``architecture``."""
        self.architecture, self._dropout = architecture, dropout
        self._flat = state.clone()
        self._neurons: Tensor | None = None
        if widths is not None and architecture.activation == "sigmoid":
            # It makes 0.5 of a padded neuron's 0; the other activations leave it.
            neurons = torch.arange(max(architecture.hidden), device=self._flat.device) < widths.unsqueeze(1)
            self._neurons = neurons.unsqueeze(1).to(self._flat.dtype)
        self._mean, self._square = torch.zeros_like(self._flat), torch.zeros_like(self._flat)
        self._steps, self._taken = torch.zeros((), device=self._flat.device), 0
        self._link()

    @property
    def models(self) -> int:
        """Networks."""
        return len(self._flat)

    @property
    def state(self) -> Tensor:
        """The parameters, ``[models, size]``; the next step changes them in place."""
        return self._flat

    def keep(self, index: Tensor) -> None:
        """Go on with the networks at ``index`` alone."""
        self._flat, self._mean, self._square = self._flat[index], self._mean[index], self._square[index]
        if self._dropout is not None:
            self._dropout = self._dropout.select(index)
        if self._neurons is not None:
            self._neurons = self._neurons[index]
        self._link()

    @torch.no_grad()
    def step(self, inputs: Tensor, targets: Tensor, learning_rate: float | Tensor) -> Tensor:
        """One step of every network, each on its own batch.

        ``inputs``: ``[models, n, input_size]``; ``targets``: ``[models, n]`` of 0 and 1, both in the parameters' type;
        ``learning_rate``: one, or one for each network, ``[models]``. Returns ``probability - target``, ``[models,
        n]``, a buffer that the next step overwrites.
        """
        n = targets.shape[1]
        buffers = self._buffers_for(n)
        function = _FUNCTIONS[self.architecture.activation]
        derivative = _DERIVATIVES[self.architecture.activation]
        last = len(self._weights) - 1
        hidden, scales = inputs, list[Tensor]()
        for i, (pre, out, _) in enumerate(buffers):
            # Bias apart: baddbmm would first spread it over the output, which costs more than this.
            torch.bmm(hidden, self._weights[i], out=pre).add_(self._biases[i])
            if i < last:
                hidden = function(pre, out)
                if self._neurons is not None:
                    hidden.mul_(self._neurons)
                if self._dropout is not None:
                    scales.append(self._dropout.scales(self._taken, i, n, out.shape[2], out.dtype))
                    # The derivative of tanh and sigmoid is told by the output before it.
                    hidden = out * scales[i]
        pre, _, grad = buffers[last]
        error = pre.squeeze(2).sigmoid_().sub_(targets)
        torch.div(error.unsqueeze(2), n, out=grad)
        for i in range(last, -1, -1):
            below = inputs if i == 0 else buffers[i - 1][1]
            if scales and i > 0:
                below = below * scales[i - 1]
            torch.bmm(below.transpose(1, 2), grad, out=self._weight_grads[i])
            torch.sum(grad, 1, keepdim=True, out=self._bias_grads[i])
            if i > 0:
                pre, out, back = buffers[i - 1]
                torch.bmm(grad, self._weights[i].transpose(1, 2), out=back)
                if scales:
                    back.mul_(scales[i - 1])
                grad = derivative(back, pre, out, back)
        self._adam(learning_rate)
        self._taken += 1
        return error

    @torch.no_grad()
    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Binary cross-entropy of each network on its own examples, shapes as in :meth:`step`: ``[models]``."""
        function, last, hidden = _FUNCTIONS[self.architecture.activation], len(self._weights) - 1, inputs
        for i, (pre, out, _) in enumerate(self._buffers_for(targets.shape[1])):
            torch.bmm(hidden, self._weights[i], out=pre).add_(self._biases[i])
            if i < last:
                hidden = function(pre, out)
                if self._neurons is not None:
                    hidden.mul_(self._neurons)
        return F.binary_cross_entropy_with_logits(pre.squeeze(2), targets, reduction="none").mean(1)

    def _link(self) -> None:
        """Views into the flat buffers, and room for what a step needs."""
        self._flat = self._flat.contiguous()
        self._grad, self._delta = torch.zeros_like(self._flat), torch.zeros_like(self._flat)
        self._weights, self._biases = _views(self.architecture, self._flat)
        self._weight_grads, self._bias_grads = _views(self.architecture, self._grad)
        self._buffers: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def _buffers_for(self, n: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For each layer: pre-activations, outputs, and the gradient of either; ``[models, n, fan_out]``."""
        if n not in self._buffers:
            widths = [fan_out for _, fan_out in self.architecture.layers]
            apart = self.architecture.activation in _NEEDS_PRE
            # A gradient is needed only until the one below is there: two rooms do, and stay in the cache.
            room = [self._flat.new_empty(self.models * n * max(widths)) for _ in range(2)]
            made = []
            for i, width in enumerate(widths):
                pre = self._flat.new_empty(self.models, n, width)
                grad = room[i % 2][: pre.numel()].view_as(pre)
                made.append((pre, torch.empty_like(pre) if apart else pre, grad))
            self._buffers[n] = made
        return self._buffers[n]

    def _adam(self, learning_rate: float | Tensor) -> None:
        """Adam (Kingma and Ba 2015) with its usual constants."""
        self._steps += 1
        each = isinstance(learning_rate, Tensor)
        if each:
            # The fused step has one rate for all, so it takes a unit step from zero, which is scaled then.
            self._delta.zero_()
        torch._fused_adam_(
            [self._delta if each else self._flat],
            [self._grad],
            [self._mean],
            [self._square],
            [],
            [self._steps],
            lr=1.0 if isinstance(learning_rate, Tensor) else learning_rate,
            beta1=0.9,
            beta2=0.999,
            weight_decay=0.0,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )
        if isinstance(learning_rate, Tensor):
            self._flat.addcmul_(self._delta, learning_rate.unsqueeze(1))


def cosine(step: int, steps: int, peak: float) -> float:
    """Learning rate at ``step`` of ``steps``: from ``peak`` to nothing along half a cosine."""
    return peak * 0.5 * (1 + math.cos(math.pi * step / steps))


def state_of(architecture: Architecture, params: Params) -> Tensor:
    """Stacked parameters (see :mod:`services.zoo.subjects`) in one row for each network: ``[models, size]``."""
    first = params["layers.0.bias"]
    state = first.new_empty(len(first), architecture.size)
    for i, (weight, bias) in enumerate(zip(*_views(architecture, state), strict=True)):
        weight.copy_(params[f"layers.{i}.weight"].transpose(1, 2))
        bias.copy_(params[f"layers.{i}.bias"].unsqueeze(1))
    return state


def params_of(architecture: Architecture, state: Tensor) -> Params:
    """The inverse of :func:`state_of`; copies."""
    params: Params = {}
    for i, (weight, bias) in enumerate(zip(*_views(architecture, state), strict=True)):
        params[f"layers.{i}.weight"] = weight.transpose(1, 2).contiguous()
        params[f"layers.{i}.bias"] = bias.squeeze(1).clone()
    return params


def _views(architecture: Architecture, state: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Weights as ``[models, fan_in, fan_out]``, so that products need no transposition; biases ``[models, 1,
    fan_out]``."""
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    start = 0
    for fan_in, fan_out in architecture.layers:
        for rows, into in ((fan_in, weights), (1, biases)):
            stop = start + rows * fan_out
            into.append(state[:, start:stop].view(len(state), rows, fan_out))
            start = stop
    return weights, biases
