"""Diagnostics of a step, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from singd.blocks import Block, whole
from singd.checkpoint import state_bytes
from singd.groups import Group
from singd.processes.ownership import Ownership
from singd.state import States
from singd.weight_steps import matched


@torch.no_grad()
def stats(
    blocks: Sequence[Block], states: States, group_of: Mapping[Any, Group], ownership: Ownership
) -> dict[str, dict[str, float]]:
    """Diagnostics of every preconditioned layer, computed from the state when called.

    Args:
        blocks: Those that are preconditioned.
        states: The optimizer's.
        group_of: Each parameter's param_group.
        ownership: Which rank keeps which layer.

    Returns:
        For each layer's name, plain numbers:

        - ``norm_K``, ...: Frobenius norms of what the rule keeps.
        - ``trace_K``, ...: average traces.
        - ``update_ratio``: size of the last step, weight decay included, over the weight's; nan where it needs
          gradients that are cleared already (all but that of plain ``momentum_on="direction"`` does).
        - ``cosine``: between gradient and natural gradient; nan when the gradient is cleared already.
        - ``age``: steps since the factors were last updated.
        - ``state_bytes``: those of this rank.
    """
    result = {}
    for block in [b for b in blocks if "step" in states.get(b.weight, {})]:
        state, blueprints = states[block.weight], block.blueprints()
        (numbers,) = ownership.gathered([block], states, "stats")
        factors = {name: blueprints[name].from_flat(v) for name, v in numbers.items()}
        age = state["step"] - 1 - state["last_update"]
        result[block.name] = {
            **{
                f"{what}_{key}": float(value)
                for key, A in factors.items()
                for what, value in (("norm", A.norm()), ("trace", A.average_trace()))
            },
            "update_ratio": _update_ratio(block, states, group_of, factors),
            "cosine": _cosine(block, factors),
            "age": age if state["last_update"] >= 0 else math.inf,
            "state_bytes": sum(state_bytes(states[p]) for p in block.params if p in states),
        }
    return result


def _update_ratio(
    block: Block, states: States, group_of: Mapping[Any, Group], factors: dict[str, Any]
) -> float:
    """The step was -lr (d + decay W) with the weight W before it, and d is known again from what is kept."""
    options, steps, weights = block.group, [], []
    alpha_2, nesterov = options["momentum"], options["nesterov"]
    after = options["momentum_on"] == "direction" and alpha_2 != 0
    grads: list[Any] = [None if p.grad is None else whole(p.grad) for p in block.params]
    kept = [states.get(p, {}).get("momentum_buffer") for p in block.params]
    M: list[Any] = [None if buffer is None else whole(buffer) for buffer in kept]
    alone = after and not nesterov  # what is kept is the step itself, the decay included
    if any(t is None for t in (*(M if alpha_2 else ()), *(() if alone else grads))):
        return math.nan
    d = M
    if not alone:
        d = [g if after or not alpha_2 else m for g, m in zip(grads, M, strict=True)]
        if nesterov and alpha_2 and not after:
            d = [torch.lerp(g, m.to(g.dtype), alpha_2) for g, m in zip(grads, M, strict=True)]
        N = _natural(block, factors, block.matrix(d))
        d = [t for t in block.parts(N) if t is not None]
        if options["match_rms"] is not None:
            d = matched(d, options["match_rms"])
        d = [x + alpha_2 * m if after else x for x, m in zip(d, M, strict=False)]
    for p, move in zip(block.params, d, strict=False):
        group, W = group_of[p], whole(p).detach().double()
        seen = group is options and block.last_lr is not None  # (a schedule sets the next one)
        lr = float(block.last_lr if seen else group["lr"])
        decay = 0.0 if alone else group["weight_decay"]
        before = (W + lr * move) / (1 - lr * decay)
        steps.append(float((before - W).norm()))
        weights.append(float(W.norm()))
    return math.hypot(*steps) / max(math.hypot(*weights), 1e-300)


def _natural(block: Block, factors: dict[str, Any], dW: Tensor) -> Tensor:
    return block.rule.direction(block.rule.prepare(factors, keep=False), dW).double()


def _cosine(block: Block, factors: dict[str, Any]) -> float:
    if any(p.grad is None for p in block.params):
        return math.nan
    dW = block.gradient()
    N, dW = _natural(block, factors, dW), dW.double()
    return float((dW * N).sum() / (dW.norm() * N.norm()).clamp(min=1e-300))
