"""Small layers of equal shape and options: their gradients are preconditioned in one call.

A thousand tiny layers would otherwise take a thousand times what Python and torch need to start an operator.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

from singd.blocks import Block
from singd.rules import Rule
from singd.state import States

SMALL = 2**12
"""How many numbers a weight has at most: the work on more takes longer than its start."""

FEW = 4
"""How many layers it takes at least for one call to pay."""


Portion: TypeAlias = list[tuple[Block, list[Tensor]]]
"""Layers, each with a tensor for each of its parameters."""


def split(portion: Portion, states: States) -> tuple[list[Portion], Portion]:
    """Layers that can be preconditioned together, and those that stay alone.

    Args:
        portion: Layers with their averaged gradients.
        states: The optimizer's state by parameter.
    """
    sets: dict[Any, Portion] = {}
    for item in portion:
        if (key := _key(item[0], states)) is not None:
            sets.setdefault(key, []).append(item)
    together = [some for some in sets.values() if len(some) >= FEW]
    done = {block for some in together for block, _ in some}
    alone = [item for item in portion if item[0] not in done]
    return together, alone


def _key(block: Block, states: States) -> Any:
    """What two layers must have in common; None where one stays alone."""
    weight, rule = block.weight, block.rule
    usual = type(rule).direction is Rule.direction and type(rule).prepare is Rule.prepare
    if weight.numel() > SMALL or not usual:
        return None
    state, blueprints = states[weight], block.blueprints()
    flats = [state[name] for name in blueprints if name in state]
    batched = all(A.batched for A in blueprints.values())
    if not batched or len(flats) < len(blueprints) or any(f.device != weight.device for f in flats):
        return None
    dtypes = tuple(flat.dtype for flat in flats)
    groups = getattr(block.modules[0], "groups", 1)
    own = id(block.group), block.kind, groups, block.bias is None
    return own, weight.shape, weight.dtype, weight.device, dtypes


def directions(alike: Portion, states: States) -> Iterator[tuple[Block, list[Tensor]]]:
    """The preconditioned gradients of layers that are alike, as of each of them alone."""
    first, _ = alike[0]
    blueprints = first.factors.blueprints
    flats = {n: torch.stack([states[block.weight][n] for block, _ in alike]) for n in blueprints}

    def direction(flats: dict[str, Tensor], *gradients: Tensor) -> list[Tensor]:
        factors = {name: A.from_flat(flats[name]) for name, A in blueprints.items()}
        prepared = first.rule.prepare(factors, keep=False)
        parts = first.parts(first.rule.direction(prepared, first.matrix(gradients)))
        return [part for part in parts if part is not None]

    gradients = [torch.stack(some) for some in zip(*(V for _, V in alike), strict=True)]
    found = torch.func.vmap(direction)(flats, *gradients)
    for (block, _), *parts in zip(alike, *(t.unbind() for t in found), strict=True):
        yield block, parts
