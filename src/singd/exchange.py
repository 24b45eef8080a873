"""What processes exchange before the factors move: sums of statistics, and gradients if nobody averages them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from singd import distributed, scaler
from singd.wrapping import Wrapping

if TYPE_CHECKING:
    from singd.optimizer import SINGD


def start(optimizer: SINGD) -> distributed.Reduction:
    """Give all processes the same gradients, while the sums of their statistics are on their way.

    (These cannot start before the step: only then is it known that no other micro-batch follows.)
    """
    params = params_to_average(optimizer)
    averaged = True
    if params:
        params, averaged = agree(params, optimizer._wrapping)
        averaged = averaged and optimizer.average_gradients is None
    if not averaged:
        scaler.check_averaging(optimizer.grad_scaler)
        for p in params:  # what one rank has used, all step
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    due = [b for b in optimizer._used_blocks() if optimizer._due(b.modules[0]) is not None]
    owner = optimizer._ownership.owner
    owners = [owner[b] for b in due] if optimizer._ownership.divided else None
    sums = distributed.Reduction(due, optimizer._statistics, owners)
    if not averaged:
        average_gradients(params)
    return sums


def params_to_average(optimizer: SINGD) -> list[nn.Parameter]:
    """Those whose gradients nobody else has surely averaged (of sharded ones, FSDP has)."""
    if optimizer.average_gradients is False:
        return []
    params = [p for g in optimizer.param_groups for p in g["params"] if p.requires_grad]
    return [p for p in params if not hasattr(p, "full_tensor")]


def agree(params: Sequence[nn.Parameter], wrapping: Wrapping) -> tuple[list[nn.Parameter], bool]:
    """What all ranks have to say of the gradients before they can be averaged, in one short message.

    Args:
        params: The parameters; the same ones on every rank.
        wrapping: What ran this rank's forwards.

    Returns:
        The parameters that have a gradient on any rank, and whether a wrapper has averaged them already.
    """
    mine = [p.grad is not None for p in params] + [wrapping.inside, wrapping.outside]
    flags = torch.tensor(mine, dtype=torch.float32, device=params[0].device)
    with distributed.telling_of_lost_ranks():
        dist.all_reduce(flags)
    *some, inside, outside = (flag > 0 for flag in flags.tolist())
    return [p for p, used in zip(params, some, strict=True) if used], inside and not outside


def average_gradients(params: Sequence[nn.Parameter]) -> None:
    """Replace each gradient by the mean over the ranks, in one buffer per dtype; all have one."""
    for dtype in dict.fromkeys(p.dtype for p in params):  # (a set's order may differ between ranks)
        some = [p for p in params if p.dtype == dtype]
        grads = [p.grad for p in some if p.grad is not None]
        buffer = torch.cat([g.flatten() for g in grads])
        with distributed.telling_of_lost_ranks():
            dist.all_reduce(buffer)
        buffer /= distributed.world_size()
        for p, part in zip(some, buffer.split([g.numel() for g in grads]), strict=True):
            p.grad = part.view_as(p)
