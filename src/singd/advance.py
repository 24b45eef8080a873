"""A step of the factors of one layer: when an update is due, the rule moves them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from singd.blocks import Block
from singd.hooks import Collector
from singd.rules import Curvature, Rule
from singd.statistics import Statistics


def advance(
    block: Block,
    state: dict[str, Any],
    lr_cov: float | None,
    statistics: Statistics | None,
    kept_here: bool,
    collector: Collector,
) -> None:
    """Count a step of a layer, and update its factors if they are due and kept here; all of it or nothing.

    Args:
        block: The layer.
        state: Its state, changed at once when all is known.
        lr_cov: The step on the factors, if they are due; else None.
        statistics: What was seen since the last step, if anything.
        kept_here: Whether this process keeps the factors.
        collector: Warns of layers that were not seen, and of factors that overflow.
    """
    blueprints, factors, rule = block.blueprints(), block.factors, block.rule
    if "step" not in state:
        start = factors.flat({}, block.start()) if kept_here else {}
        state.update(start, step=0, last_update=-1, updates=0)
        factors.started = True
    step, updates = state["step"], state["updates"]
    if collector.attempt.steps.setdefault(block, step) != step:
        return  # it has taken part already in a step that failed later, and is tried again
    if lr_cov is None:
        state["step"] = step + 1
        return
    new: dict[str, Tensor] | None = None
    curvature, some = _curvature(block, rule, state, statistics, kept_here)
    if curvature is not None:
        kept = factors.accumulated(state, blueprints, block.weight.device)
        options = {**block.group, "lr_cov": lr_cov}
        new = factors.moved(state, rule.update(kept, curvature, options, updates), some)
        if new is None:
            collector.warn(block, "overflow")
        elif updates and factors.grew(state, new, rule.gathers_with):
            collector.warn(block, "growth")
    elif kept_here:
        collector.miss(block)
    counters = {"step": step + 1}
    if not kept_here or curvature is not None or statistics is not None:
        counters["last_update"] = step  # on all processes alike
    if not kept_here or new is not None:
        counters["updates"] = updates + 1
    state.update(new or {}, **counters)


def _curvature(
    block: Block, rule: Rule, state: dict[str, Any], statistics: Statistics | None, kept_here: bool
) -> tuple[Curvature | None, Any]:
    """What moves the factors, if anything does; and whether there was any, as a number on the device."""
    if not rule.needs_rows:
        dW = block.gradient()  # (of a sharded parameter all processes must ask)
        if not kept_here:
            return None, True
        kept = block.factors.accumulated(state, block.factors.blueprints, block.weight.device)
        return rule.gradient_curvature(kept, dW), True
    if statistics is None:
        return None, False
    curvature, some = statistics.normalised(block.group["loss_average"] is not None)
    return (None if some is False else curvature), some
