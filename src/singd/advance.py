"""A step of one layer: when its factors are due, move them by the rule; every time, precondition its gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from singd.blocks import Block, gradient_of
from singd.groups import is_due, step_size
from singd.hooks import Collector
from singd.processes.collectives import placed_like, whole_vectors
from singd.processes.ownership import Ownership
from singd.rules import INPUT, OUTPUT, Curvature
from singd.statistics import Statistics
from singd.weight_steps import WeightSteps, matched

States = Mapping[Any, dict[str, Any]]


def due_steps(
    blocks: Sequence[Block], states: Mapping[Any, Mapping[str, Any]], collector: Collector
) -> dict[Block, float]:
    """The steps on the factors that are due: a schedule's bad value is seen before anything changes."""
    found = {}
    for block in blocks:
        state = states.get(block.weight, {})
        if block.active and is_due(block.group, state) and collector.ready(block, state):
            found[block] = step_size(block.group["lr_cov"], state.get("step", 0))
    return found


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
    factors, rule = block.factors, block.rule
    block.blueprints()
    if "step" not in state:
        eye = {side: block.identity(side) for side in (INPUT, OUTPUT)} if kept_here else {}
        start = rule.start(eye) if eye else {}
        kept = {name: start[name] for name in factors.blueprints if name in start}
        factors.write(state, kept, step=0, last_update=-1, updates=0)
    step = state["step"]
    if collector.advanced(block, step):
        return
    counters = {"step": step + 1}
    new = None
    if lr_cov is not None:
        curvature, some = _curvature(block, state, statistics, kept_here)
        if curvature is not None:
            kept = factors.accumulated(state, block.weight.device)
            moved = rule.update(
                kept, curvature, {**block.group, "lr_cov": lr_cov}, state["updates"]
            )
            new = factors.finite(state, moved, some)
            if new is None:
                collector.warn_of_overflow(block)
            elif state["updates"] and factors.grew(state, new, rule.gathers_with):
                collector.warn_of_growth(block)
        elif kept_here:
            collector.miss(block)
        if not kept_here or curvature is not None or statistics is not None:
            counters["last_update"] = step  # on all processes alike
        if not kept_here or new is not None:
            counters["updates"] = state["updates"] + 1
    factors.write(state, new or {}, **counters)


def _curvature(
    block: Block, state: dict[str, Any], statistics: Statistics | None, kept_here: bool
) -> tuple[Curvature | None, Any]:
    """What moves the factors, if anything does; and whether there was any, as a number on the device."""
    if not block.rule.needs_rows:
        dW = block.gradient()  # (of a sharded parameter all processes must ask)
        if not kept_here:
            return None, True
        kept = block.factors.accumulated(state, block.weight.device)
        return block.rule.gradient_curvature(kept, dW), True
    if statistics is None:
        return None, False
    curvature, some = statistics.normalised(block.group["loss_average"] is not None)
    return (None if some is False else curvature), some


def directions(
    blocks: Sequence[Block],
    states: States,
    steps: WeightSteps,
    ownership: Ownership,
    cache_products: bool | None,
    rehearsal: bool,
) -> Iterator[tuple[nn.Parameter, Tensor | None]]:
    """The parameters of some layers, each with its direction; None of one that has no gradient.

    Args:
        blocks: Those that take part in a step.
        states: The optimizer's state by parameter.
        steps: Those on the weights, which know the momenta of gradients.
        ownership: Which process keeps which layer.
        cache_products: Whether products of the factors are kept between updates; None: where they are small.
        rehearsal: Whether all gradients are zero, and no factors needed.
    """
    found = _preconditioned(blocks, states, steps, ownership, cache_products, rehearsal)
    for block, N in ownership.directions(found, rehearsal):
        parts = block.kind.from_matrix(block.modules[0], N, block.bias is not None)
        for p, d in zip(block.params, parts, strict=False):
            if p.grad is None:
                yield p, None
            elif d is not None:
                d = matched(d, block.group["match_rms"])
                yield p, placed_like(d.to(p.dtype), p)


def keeps_products(block: Block, wanted: bool | None) -> bool:
    """Whether K K^T and C C^T are kept between updates; None: where they take at most half as much as it."""
    if wanted is not None:
        return wanted
    block.blueprints()
    numbers = sum(eye.numel for eye in block.factors.identity.values() if eye.numel > eye.n)
    return 2 * numbers <= block.weight.numel()


def _preconditioned(
    blocks: Sequence[Block],
    states: States,
    steps: WeightSteps,
    ownership: Ownership,
    cache_products: bool | None,
    rehearsal: bool,
) -> Iterator[tuple[Block, Tensor | None]]:
    """The preconditioned gradient of each block, [d_o, d_i]; None of one that another rank owns."""

    def vector(p: nn.Parameter) -> Tensor:
        return steps.averaged_gradient(p, gradient_of(p))

    for block, vectors in whole_vectors(blocks, vector):
        dW = block.gradient(vectors)
        if rehearsal:
            yield block, dW  # it is zero
        elif not ownership.keeps(block):
            yield block, None
        else:
            keep = block.group["T"] != 1 and keeps_products(block, cache_products)
            state, device = states[block.weight], block.weight.device
            prepared = block.factors.prepared(block.rule, state, keep, device)
            yield block, block.rule.direction(prepared, dW, overwrite=block.bias is not None)
