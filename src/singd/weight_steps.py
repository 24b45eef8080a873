"""The steps on the weights: momentum, size of a direction, and the moves along it, as SGD and AdamW make them.

A parameter and what is kept of its steps change together, without a line of Python in between: an exception,
Ctrl-C included, finds all of it done or nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from singd import torch_private
from singd.groups import first_beta
from singd.precision import accumulation_dtype, wide_dtype

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's, which may be wider than the parameter."""

TOGETHER = 2**16
"""How many numbers a CPU moves at a time: so many are still in its cache, and small tensors share a call."""
TOGETHER_ELSEWHERE = 2**24
"""The same on other devices: few calls, and little memory for what is not stored yet."""


@dataclass
class Attempt:
    """What a step has done; one that failed is tried again with the same attempt, and does what is left.

    Attributes:
        steps: The layers whose factors took part, each with how many steps it had taken before.
        moved: The parameters that have moved.
    """

    steps: dict[Any, int] = field(default_factory=dict)
    moved: set[nn.Parameter] = field(default_factory=set)


@dataclass
class WeightSteps:
    """The steps on all weights.

    Attributes:
        group_of: Each parameter's param_group.
        states: The optimizer's state by parameter; momenta are kept in it.
        attempt: Parameters that have moved already are left alone.
        momenta: New ones, that are stored when their parameter moves.
    """

    group_of: Mapping[nn.Parameter, dict[str, Any]]
    states: MutableMapping[Any, dict[str, Any]]
    attempt: Attempt
    momenta: dict[nn.Parameter, Tensor] = field(default_factory=dict)

    def averaged_gradient(self, p: nn.Parameter, gradient: Tensor) -> Tensor:
        r"""The momentum that stands before the preconditioner (``momentum_on="gradient"``).

        .. math:: B \leftarrow \alpha_2 B + (1 - \alpha_2)\, g, \qquad V = B
            \text{, or with Nesterov } V = \alpha_2 B + (1 - \alpha_2)\, g

        The first gradient counts in full.

        Args:
            p: The parameter.
            gradient: Its gradient, which is not changed.
        """
        group, old = self.group_of[p], self.states.get(p, {}).get("momentum_buffer")
        alpha2 = group["momentum"]
        if group["momentum_on"] != "gradient" or alpha2 == 0:
            return gradient
        old = gradient if old is None else _beside(old, p)
        new = self.momenta[p] = torch.lerp(old, gradient.to(old.dtype), 1 - alpha2)
        return gradient.lerp(new.to(gradient.dtype), alpha2) if group["nesterov"] else new

    def sgd(self, directions: Iterable[tuple[nn.Parameter, Tensor | None]]) -> None:
        """Move parameters along natural gradients, on a CPU while these are computed and still in its cache.

        Other devices move many parameters of a group in one call, as torch's own optimizers do.

        Args:
            directions: Parameters, each with its natural gradient, of its shape; or with None where it has no
                gradient, so that only its momentum moves.
        """
        for pairs in self._together(directions):
            by_group: dict[int, list[tuple[nn.Parameter, Tensor]]] = {}
            for p, direction in pairs:
                if direction is not None:
                    by_group.setdefault(id(self.group_of[p]), []).append((p, direction))
                elif p in self.momenta:
                    self._store([p], [{"momentum_buffer": self.momenta[p]}], [])
            for some in by_group.values():
                self._sgd(some)

    def _sgd(self, pairs: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
        """Move parameters of one group, with its weight decay and momentum, as `torch.optim.SGD` does."""
        params, moves = [p for p, _ in pairs], []
        group = self.group_of[params[0]]
        for p, d in pairs:
            if group["weight_decay"] != 0:
                d = d.add(p, alpha=group["weight_decay"])
            if group["momentum_on"] == "direction" and group["momentum"] != 0:
                old = self.states[p].get("momentum_buffer")
                new = d.clone() if old is None else (_beside(old, p) * group["momentum"]).add_(d)
                self.momenta[p] = new
                d = d.add(new, alpha=group["momentum"]) if group["nesterov"] else new
            moves.append(d)
        stored = [{"momentum_buffer": self.momenta[p]} if p in self.momenta else {} for p in params]
        lr = group["lr"]
        alpha = -(lr.item() if isinstance(lr, Tensor) else lr)
        self._store(params, stored, torch_private.on_all("add_", params, moves, alpha=alpha))

    def adamw(self, group: dict[str, Any]) -> None:
        """One step of AdamW on all parameters of a group that have a gradient."""
        with_gradient = ((p, p.grad) for p in group["params"] if p.grad is not None)
        for pairs in self._together(with_gradient):
            self._adamw(group, [p for p, _ in pairs], [g for _, g in pairs])

    def _adamw(self, group: dict[str, Any], params: list[Any], grads: list[Tensor]) -> None:
        new = [_moments(p, self.states[p]) for p in params]
        first, second, steps = ([s[name] for s in new] for name in (*MOMENTS, "step"))
        # In float16 AdamW's squares and its eps are zero, and their quotient is not a number.
        wide = [p.to(accumulation_dtype(p.dtype), copy=True) for p in params]
        adamw(
            wide,
            [g.to(w.dtype) for g, w in zip(grads, wide, strict=True)],
            first,
            second,
            [],
            steps,
            fused=_one_pass([*wide, *grads, *first, *second]) or None,
            has_complex=any(p.is_complex() for p in params),
            amsgrad=False,
            beta1=first_beta(group),
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        self._store(params, new, torch_private.on_all("copy_", params, wide))

    def _store(self, params: list[Any], new: list[Any], calls: Sequence[Callable[[], Any]]) -> None:
        """Move parameters, store what is kept of them, and note it; no signal is heard between these calls.

        Args:
            params: The parameters.
            new: What their states take up, one mapping for each.
            calls: What moves them: one call for each, or one for all.
        """
        stores = [partial(self.states[p].update, s) for p, s in zip(params, new, strict=True)]
        marks = [partial(self.attempt.moved.add, p) for p in params]
        if len(calls) == len(params):
            calls = [c for some in zip(calls, stores, marks, strict=True) for c in some]
        else:
            calls = [*calls, *stores, *marks]
        deque(map(methodcaller("__call__"), calls), maxlen=0)

    def _together(self, pairs: Iterable[tuple[nn.Parameter, Any]]) -> Iterator[list[Any]]:
        """Parameters that have not moved, with something that belongs to them, a few at a time."""
        waiting, numbers = [], 0
        for p, thing in pairs:
            if p not in self.attempt.moved:
                waiting.append((p, thing))
                numbers += p.numel()
                if numbers >= (TOGETHER if p.device.type == "cpu" else TOGETHER_ELSEWHERE):
                    yield waiting
                    waiting, numbers = [], 0
        if waiting:
            yield waiting


def _moments(p: nn.Parameter, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """AdamW's count and averages as new tensors, which the step may change."""
    wide = accumulation_dtype(p.dtype)
    if "exp_avg" not in state:
        averages = {name: torch.zeros_like(p, dtype=wide) for name in MOMENTS}
        return {"step": torch.zeros((), dtype=torch.float32), **averages}
    averages = {n: state[n].to(device=p.device, dtype=wide, copy=True) for n in MOMENTS}
    return {"step": state["step"].clone(), **averages}


def matched(direction: Tensor, rms: float | None) -> Tensor:
    """A direction scaled to a root mean square, whatever its size was; as it is with None."""
    if rms is None:
        return direction
    size = torch.linalg.vector_norm(direction, dtype=wide_dtype(direction.dtype))
    scale = rms * direction.numel() ** 0.5 / size.clamp(min=torch.finfo(size.dtype).tiny)
    return direction * scale


def _one_pass(tensors: Sequence[Tensor]) -> bool:
    """Whether torch's fused kernel may be used, which saves most of the time of small parameters on a CPU.

    It reads memory in order, whatever the strides say; elsewhere torch chooses well itself.
    """
    return all(
        type(t) in (Tensor, nn.Parameter)
        and t.device.type == "cpu"
        and t.is_floating_point()
        and t.is_contiguous()
        for t in tensors
    )


def _beside(tensor: Tensor, p: Tensor) -> Tensor:
    """State on the parameter's device and in its dtype, where a model was moved after construction."""
    return tensor.to(device=p.device, dtype=p.dtype)
