"""Training many subject networks at once: stacked weights, batched matrix products, one Adam over a flat buffer.

The backward pass is written by hand into preallocated buffers; autograd spends as long on its own as the products of
networks this small take. A population's result equals training each network alone, up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from services.zoo.subjects import Architecture, Params

_aten = torch.ops.aten

# (gradient of the output, pre-activation, output, where to put it) -> gradient of the pre-activation
_DERIVATIVES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "relu": lambda grad, _, out, into: _aten.threshold_backward.grad_input(grad, out, 0, grad_input=into),
    "gelu": lambda grad, pre, _, into: _aten.gelu_backward.grad_input(grad, pre, grad_input=into),
    "tanh": lambda grad, _, out, into: _aten.tanh_backward.grad_input(grad, out, grad_input=into),
    "sigmoid": lambda grad, _, out, into: _aten.sigmoid_backward.grad_input(grad, out, grad_input=into),
    "leaky_relu": lambda grad, pre, _, into: _aten.leaky_relu_backward.grad_input(
        grad, pre, 0.01, False, grad_input=into
    ),
}
_FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda pre, into: torch.clamp_min(pre, 0, out=into),
    "gelu": lambda pre, into: _aten.gelu.out(pre, out=into),
    "tanh": lambda pre, into: torch.tanh(pre, out=into),
    "sigmoid": lambda pre, into: torch.sigmoid(pre, out=into),
    "leaky_relu": lambda pre, into: _aten.leaky_relu.out(pre, out=into),
}


class Population:
    """``models`` networks of one architecture in training with Adam on binary cross-entropy."""

    def __init__(self, architecture: Architecture, params: Params) -> None:
        """``params``: where to start, stacked as :mod:`services.zoo.subjects` says; copied."""
        first = params["layers.0.weight"]
        self.architecture, self.models = architecture, len(first)
        self._flat = torch.empty(self.models * architecture.size, dtype=first.dtype, device=first.device)
        self._grad, self._mean, self._square = (torch.zeros_like(self._flat) for _ in range(3))
        self._steps = torch.zeros((), device=first.device)
        self._buffers: list[tuple[Tensor, Tensor, Tensor]] = []
        # Weights as [models, fan_in, fan_out], so that products need no transposition; biases [models, 1, fan_out].
        self._weights, self._biases = self._views(self._flat)
        self._weight_grads, self._bias_grads = self._views(self._grad)
        for i, (weight, bias) in enumerate(zip(self._weights, self._biases, strict=True)):
            weight.copy_(params[f"layers.{i}.weight"].transpose(1, 2))
            bias.copy_(params[f"layers.{i}.bias"].unsqueeze(1))

    def _views(self, flat: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        weights: list[Tensor] = []
        biases: list[Tensor] = []
        start = 0
        for fan_in, fan_out in self.architecture.layers:
            for rows, into in ((fan_in, weights), (1, biases)):
                stop = start + self.models * rows * fan_out
                into.append(flat[start:stop].view(self.models, rows, fan_out))
                start = stop
        return weights, biases

    @property
    def params(self) -> Params:
        """A copy of the parameters."""
        copies: Params = {}
        for i, (weight, bias) in enumerate(zip(self._weights, self._biases, strict=True)):
            copies[f"layers.{i}.weight"] = weight.transpose(1, 2).contiguous()
            copies[f"layers.{i}.bias"] = bias.squeeze(1).clone()
        return copies

    @torch.no_grad()
    def step(self, inputs: Tensor, targets: Tensor, learning_rate: float) -> Tensor:
        """One step of every network, each on its own batch.

        ``inputs``: ``[models, n, input_size]``; ``targets``: ``[models, n]`` of 0 and 1, both in the parameters' type.
        Returns ``probability - target``, ``[models, n]``, a buffer that the next step overwrites.
        """
        models, n = targets.shape
        if not self._buffers or self._buffers[0][0].shape[1] != n:
            self._buffers = [
                tuple(inputs.new_empty(models, n, fan_out) for _ in range(3))  # type: ignore[misc]
                for _, fan_out in self.architecture.layers
            ]
        function = _FUNCTIONS[self.architecture.activation]
        derivative = _DERIVATIVES[self.architecture.activation]
        last = len(self._weights) - 1
        hidden = inputs
        for i, (pre, out, _) in enumerate(self._buffers):
            # Bias apart: baddbmm would first spread it over the output, which costs more than this.
            torch.bmm(hidden, self._weights[i], out=pre).add_(self._biases[i])
            if i < last:
                hidden = function(pre, out)
        pre, _, grad = self._buffers[last]
        error = pre.squeeze(2).sigmoid_().sub_(targets)
        torch.div(error.unsqueeze(2), n, out=grad)
        for i in range(last, -1, -1):
            below = inputs if i == 0 else self._buffers[i - 1][1]
            torch.bmm(below.transpose(1, 2), grad, out=self._weight_grads[i])
            torch.sum(grad, 1, keepdim=True, out=self._bias_grads[i])
            if i > 0:
                pre, out, back = self._buffers[i - 1]
                torch.bmm(grad, self._weights[i].transpose(1, 2), out=back)
                grad = derivative(back, pre, out, back)
        self._adam(learning_rate)
        return error

    def _adam(self, learning_rate: float) -> None:
        """Adam (Kingma and Ba 2015) with its usual constants, in one pass."""
        self._steps += 1
        torch._fused_adam_(
            [self._flat],
            [self._grad],
            [self._mean],
            [self._square],
            [],
            [self._steps],
            lr=learning_rate,
            beta1=0.9,
            beta2=0.999,
            weight_decay=0.0,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )


def cosine(step: int, steps: int, peak: float) -> float:
    """Learning rate at ``step`` of ``steps``: from ``peak`` to nothing along half a cosine."""
    return peak * 0.5 * (1 + math.cos(math.pi * step / steps))
