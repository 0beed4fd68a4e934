"""Training many subject networks at once: stacked weights, batched matrix products, one Adam over a flat buffer.

The backward pass is written by hand into preallocated buffers; autograd spends as long on its own as the products of
networks this small take. A population's result equals training each network alone, up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from services.zoo.subjects import ACTIVATIONS, Architecture, Params

_aten = torch.ops.aten

# (gradient of the output, pre-activation, output) -> gradient of the pre-activation
_DERIVATIVES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "relu": lambda grad, _, out: _aten.threshold_backward(grad, out, 0),
    "gelu": lambda grad, pre, _: _aten.gelu_backward(grad, pre),
    "tanh": lambda grad, _, out: _aten.tanh_backward(grad, out),
    "sigmoid": lambda grad, _, out: _aten.sigmoid_backward(grad, out),
    "leaky_relu": lambda grad, pre, _: _aten.leaky_relu_backward(grad, pre, 0.01, False),
}


class Population:
    """``models`` networks of one architecture in training with Adam on binary cross-entropy."""

    def __init__(self, architecture: Architecture, params: Params) -> None:
        """``params``: where to start, stacked as :mod:`services.zoo.subjects` says; copied."""
        first = params["layers.0.weight"]
        self.architecture, self.models = architecture, len(first)
        self._flat = torch.empty(self.models * architecture.size, dtype=first.dtype, device=first.device)
        self._flat.grad = torch.empty_like(self._flat)
        self._adam = torch.optim.Adam([self._flat], fused=True)
        # Weights as [models, fan_in, fan_out], so that products need no transposition; biases [models, 1, fan_out].
        self._weights, self._biases = self._views(self._flat)
        self._weight_grads, self._bias_grads = self._views(self._flat.grad)
        for i, (weight, bias) in enumerate(zip(self._weights, self._biases, strict=True)):
            weight.copy_(params[f"layers.{i}.weight"].transpose(1, 2))
            bias.copy_(params[f"layers.{i}.bias"].unsqueeze(1))

    def _views(self, flat: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        weights, biases, start = [], [], 0
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
        """One step of every network on its own batch; returns the mean losses' gradient sign-free error ``[models, n]``.

        ``inputs``: ``[models, n, input_size]``; ``targets``: ``[models, n]`` of 0 and 1, both in the parameters' type.
        The value returned is ``probability - target``.
        """
        function = ACTIVATIONS[self.architecture.activation]
        derivative = _DERIVATIVES[self.architecture.activation]
        outputs, pres = [inputs], []
        last = len(self._weights) - 1
        for i in range(last + 1):
            pres.append(torch.baddbmm(self._biases[i], outputs[i], self._weights[i]))
            if i < last:
                outputs.append(function(pres[i]))
        error = pres[last].squeeze(2).sigmoid_().sub_(targets)
        grad = (error / targets.shape[1]).unsqueeze(2)
        for i in range(last, -1, -1):
            torch.bmm(outputs[i].transpose(1, 2), grad, out=self._weight_grads[i])
            torch.sum(grad, 1, keepdim=True, out=self._bias_grads[i])
            if i > 0:
                back = torch.bmm(grad, self._weights[i].transpose(1, 2))
                grad = derivative(back, pres[i - 1], outputs[i])
        self._adam.param_groups[0]["lr"] = learning_rate
        self._adam.step()
        return error


def cosine(step: int, steps: int, peak: float) -> float:
    """Learning rate at ``step`` of ``steps``: from ``peak`` to nothing along half a cosine."""
    return peak * 0.5 * (1 + math.cos(math.pi * step / steps))
