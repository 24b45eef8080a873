"""The steps on the weights: momentum and size of a direction, and torch's own SGD and AdamW to take them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from singd.groups import first_beta
from singd.precision import accumulation_dtype, wide_dtype

TOGETHER = 2**16
"""How many numbers a CPU moves at a time: so many are still in its cache, and small tensors share a call."""


def averaged_gradient(
    p: nn.Parameter, gradient: Tensor, group: Mapping[str, Any], state: MutableMapping[str, Any]
) -> Tensor:
    r"""The momentum that stands before the preconditioner (``momentum_on="gradient"``).

    .. math:: B \leftarrow \alpha_2 B + (1 - \alpha_2)\, g, \qquad V = B
        \text{, or with Nesterov } V = \alpha_2 B + (1 - \alpha_2)\, g

    The first gradient counts in full.

    Args:
        p: The parameter.
        gradient: Its gradient, which is not changed.
        group: Its param_group.
        state: Its state; the buffer is kept in it.
    """
    if group["momentum_on"] != "gradient" or group["momentum"] == 0:
        return gradient
    buffer = state.get("momentum_buffer")
    if buffer is None:
        buffer = state["momentum_buffer"] = gradient.clone()
    else:
        buffer = state["momentum_buffer"] = _beside(buffer, p)
        buffer.lerp_(gradient.to(buffer.dtype), 1 - group["momentum"])
    return (
        gradient.lerp(buffer.to(gradient.dtype), group["momentum"]) if group["nesterov"] else buffer
    )


def matched(direction: Tensor, rms: float | None) -> Tensor:
    """A direction scaled to a root mean square, whatever its size was; as it is with None."""
    if rms is None:
        return direction
    size = torch.linalg.vector_norm(direction, dtype=wide_dtype(direction.dtype))
    scale = rms * direction.numel() ** 0.5 / size.clamp(min=torch.finfo(size.dtype).tiny)
    return direction * scale


def sgd_steps(
    directions: Iterable[tuple[nn.Parameter, Tensor]],
    group_of: Mapping[nn.Parameter, dict[str, Any]],
    states: MutableMapping[Any, dict[str, Any]],
) -> None:
    """Move parameters along natural gradients, on a CPU while these are computed and still in its cache.

    Other devices move all parameters of a group in one call, as torch's own optimizers do.

    Args:
        directions: Parameters, each with its natural gradient, of its shape.
        group_of: Each parameter's param_group.
        states: The optimizer's state by parameter.
    """
    waiting: dict[int, list[tuple[nn.Parameter, Tensor]]] = {}  # by group
    numbers = 0

    def move() -> None:
        for pairs in waiting.values():
            params, some = zip(*pairs, strict=True)
            _sgd_step(group_of[params[0]], params, some, states)
        waiting.clear()

    for p, direction in directions:
        waiting.setdefault(id(group_of[p]), []).append((p, direction))
        numbers += p.numel()
        if p.device.type == "cpu" and numbers >= TOGETHER:
            move()
            numbers = 0
    move()


def _sgd_step(
    group: dict[str, Any],
    params: Sequence[nn.Parameter],
    directions: Sequence[Tensor],
    states: MutableMapping[Any, dict[str, Any]],
) -> None:
    """Move parameters along natural gradients, with momentum.

    Args:
        group: Their param_group.
        params: The parameters.
        directions: The natural gradient of each, of its shape.
        states: The optimizer's state by parameter; momentum buffers are kept in it.
    """
    buffers: list[Tensor | None] = [None] * len(params)
    after = group["momentum_on"] == "direction"  # else it stood before the preconditioner
    if after and group["momentum"] != 0:
        for i, p in enumerate(params):
            state = states[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            buffers[i] = state["momentum_buffer"] = _beside(state["momentum_buffer"], p)
    sgd(
        list(params),
        list(directions),
        buffers,
        lr=group["lr"],
        momentum=group["momentum"] if after else 0.0,
        weight_decay=group["weight_decay"],
        dampening=0.0,
        nesterov=after and group["nesterov"] and group["momentum"] != 0,
        maximize=False,
    )


def adamw_step(
    group: dict[str, Any],
    params: Sequence[nn.Parameter],
    states: MutableMapping[Any, dict[str, Any]],
) -> None:
    """One step of AdamW.

    Args:
        group: The param_group.
        params: Its parameters that have a gradient.
        states: The optimizer's state by parameter; the moments are kept in it.
    """
    for p in params:
        state = states[p]
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(p, dtype=accumulation_dtype(p.dtype))
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=accumulation_dtype(p.dtype))
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = state[name].to(device=p.device, dtype=accumulation_dtype(p.dtype))
    mine = [states[p] for p in params]
    grads = [p.grad for p in params if p.grad is not None]
    # In float16 AdamW's squares and its eps are zero, and their quotient is not a number.
    wide = [p.to(accumulation_dtype(p.dtype)) for p in params]
    adamw(
        wide,
        [g.to(w.dtype) for g, w in zip(grads, wide, strict=True)],
        [s["exp_avg"] for s in mine],
        [s["exp_avg_sq"] for s in mine],
        [],
        [s["step"] for s in mine],
        fused=_one_pass([*params, *grads, *(s[n] for s in mine for n in ("exp_avg", "exp_avg_sq"))])
        or None,
        has_complex=any(p.is_complex() for p in params),
        amsgrad=False,
        beta1=first_beta(group),
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
    for p, w in zip(params, wide, strict=True):
        if w is not p:
            p.copy_(w)


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
