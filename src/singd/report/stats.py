"""Diagnostics of a step, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from singd.blocks import Block, whole
from singd.checkpoint import state_bytes
from singd.processes.ownership import Ownership, States


@torch.no_grad()
def stats(
    blocks: Sequence[Block],
    states: States,
    group_of: Mapping[Any, Mapping[str, Any]],
    ownership: Ownership,
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
        - ``update_ratio``: size of the last update (lr times momentum) over the weight's; nan with no
          momentum buffer.
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
            "update_ratio": _update_ratio(block, states, group_of),
            "cosine": _cosine(block, factors),
            "age": age if state["last_update"] >= 0 else math.inf,
            "state_bytes": sum(state_bytes(states[p]) for p in block.params if p in states),
        }
    return result


def _update_ratio(block: Block, states: States, group_of: Mapping[Any, Mapping[str, Any]]) -> float:
    buffers: list[Any] = [states.get(p, {}).get("momentum_buffer") for p in block.params]
    if any(buffer is None for buffer in buffers):
        return math.nan
    # (a schedule sets the next lr)
    lrs = (group_of[p]["lr"] if block.last_lr is None else block.last_lr for p in block.params)
    updates = [float(lr) * float(whole(b).norm()) for lr, b in zip(lrs, buffers, strict=True)]
    weights = [float(whole(p).norm()) for p in block.params]
    return math.hypot(*updates) / max(math.hypot(*weights), 1e-300)


def _cosine(block: Block, factors: dict[str, Any]) -> float:
    if any(p.grad is None for p in block.params):
        return math.nan
    dW = block.gradient()
    N = block.rule.direction(block.rule.prepare(factors, keep=False), dW).double()
    dW = dW.double()
    return float((dW * N).sum() / (dW.norm() * N.norm()).clamp(min=1e-300))
