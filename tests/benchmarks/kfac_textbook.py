"""KFAC as in the textbook, a contender: running averages of both factors, inverted every T steps.

Source: Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature",
ICML 2015, arXiv:1503.05671; Grosse and Martens for convolutions, arXiv:1602.01407.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KFAC(torch.optim.Optimizer):
    """KFAC on linear layers and convolutions, SGD with momentum on all else.

    Args:
        model: The model, whose loss is a mean over the batch.
        lr: Step size on the weights.
        momentum: Momentum on the weights.
        damping: Added to both factors.
        decay: Of the running averages.
        T: The statistics and the inverses are renewed every T steps.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        momentum: float = 0.9,
        damping: float = 1e-3,
        decay: float = 0.95,
        T: int = 10,
    ):
        super().__init__(model.parameters(), dict(lr=lr, momentum=momentum))
        self.damping, self.decay, self.T, self.steps = damping, decay, T, 0
        self._layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        for layer in self._layers:
            layer.register_forward_hook(self._watch)

    def _watch(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self.steps % self.T == 0 and output.requires_grad:
            x = args[0].detach()
            output.register_hook(lambda g: self._gather(layer, x, g))

    @torch.no_grad()
    def _gather(self, layer: Any, x: Tensor, g: Tensor) -> None:
        if isinstance(layer, nn.Conv2d):
            x = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT
            g = g.flatten(2).mT
        a, b = x.flatten(0, -2), g.flatten(0, -2)
        a = torch.cat([a, a.new_ones(len(a), 1)], 1)
        state = self.state[layer.weight]
        for name, new in (("U", a.T @ a / len(a)), ("G", b.T @ b * len(x))):
            old = state.get(name)
            state[name] = new if old is None else old.lerp_(new, 1 - self.decay)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step."""
        for layer in self._layers:
            state = self.state[layer.weight]
            if self.steps % self.T == 0:
                for name in ("U", "G"):
                    damped = state[name] + self.damping * torch.eye(len(state[name]))
                    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
                    state[name + "_inverse"] = inverse
            dW = torch.cat([layer.weight.grad.flatten(1), layer.bias.grad[:, None]], 1)
            N = state["G_inverse"] @ dW @ state["U_inverse"]
            layer.weight.grad.copy_(N[:, :-1].view_as(layer.weight))
            layer.bias.grad.copy_(N[:, -1])
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                state["momentum_buffer"].mul_(group["momentum"]).add_(p.grad)
                p.sub_(state["momentum_buffer"], alpha=group["lr"])
        self.steps += 1
