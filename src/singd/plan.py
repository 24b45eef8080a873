"""Which parameters of a group are preconditioned, and which fall to AdamW: decided before anything is changed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from singd import groups
from singd.blocks import Block, check_dense


def trainable(
    model: nn.Module,
    blocks: Sequence[Block],
    options: Mapping[str, Any],
    names: Mapping[nn.Parameter, str],
    fallback: bool,
    warn: bool,
) -> list[nn.Parameter]:
    """What is trained where the user names no parameters.

    Args:
        model: The model.
        blocks: What of it can be preconditioned.
        options: Of all groups.
        names: Of its parameters.
        fallback: Whether others are trained too.
        warn: Whether to warn of those that are left out.
    """
    found = [p for p in model.parameters() if p.requires_grad]
    if fallback:
        return found
    rule = groups.rule_of(options)
    able = [b for b in blocks if b.weight.requires_grad and b.works_with(rule)]
    ours = {p for b in able for p in (b.weight, b.own_bias)}
    left = [names[p] for p in found if p not in ours]
    if left and warn:
        warnings.warn(
            f"SINGD leaves out parameters that are in no supported layer: {', '.join(left)}.",
            stacklevel=4,
        )
    return [p for p in found if p in ours]


def split(
    group: Mapping[str, Any],
    options: Mapping[str, Any],
    blocks: Sequence[Block],
    names: Mapping[nn.Parameter, str],
    reasons: Mapping[nn.Parameter, str],
    joins: Callable[[nn.Parameter], bool],
    fallback: Mapping[str, Any] | None,
) -> list[dict[str, Any]]:
    """The groups that a group becomes: of the parameters that are preconditioned, and of all others.

    A bias shares its weight's matrix. It follows the weight also where the two are in different groups.

    Args:
        group: What the user said of it, checked.
        options: The same, completed.
        blocks: What can be preconditioned.
        names: Of the model's parameters.
        reasons: Why some of them cannot be preconditioned.
        joins: Whether a weight is preconditioned, or will be by another group that is being added.
        fallback: AdamW's options; None if it is switched off.

    Raises:
        ValueError: For a parameter that isn't the model's, that nothing can train, or a bias that comes too late.
    """
    algorithm = options["algorithm"]
    params = set(map(groups.parameter, group["params"]))
    for p in params:
        if p not in names:
            raise ValueError(
                f"A parameter of shape {tuple(getattr(p, 'shape', ()))} isn't one of the model's."
            )
    ours: set[Any] = set()
    for block in blocks if algorithm == "singd" else ():
        trains = block.weight.requires_grad  # else its bias has nothing to be a column of
        if block.weight in params and block.works_with(groups.rule_of(options)):
            ours |= {block.weight, block.own_bias} if trains else {block.weight}
        elif trains and block.own_bias in params and joins(block.weight):
            if block.factors.started:
                raise ValueError(
                    f"The bias of layer {block.name!r} can't join its matrix after the first step; "
                    "add it with algorithm='adamw', or build SINGD with it."
                )
            ours.add(block.own_bias)
    rest = [p for p in group["params"] if groups.parameter(p) not in ours]
    check_dense(map(groups.parameter, rest), reasons, names)
    if rest and fallback is None and algorithm != "adamw":
        left = ", ".join(names[groups.parameter(p)] for p in rest)
        raise ValueError(
            f"SINGD can't precondition {left}, and fallback=None leaves them no other algorithm."
        )
    mine = [p for p in group["params"] if groups.parameter(p) in ours]
    found = [{**group, "params": mine}] if mine or not rest else []
    if rest:
        found.append({**groups.fallback_group(group, fallback), "params": rest})
    return found
