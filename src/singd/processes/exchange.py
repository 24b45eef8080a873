"""What processes exchange before the factors move: sums of statistics, and gradients if nobody averages them.

Every rank ends with the same statistics as one process that saw all batches. The loss of the whole is the *mean*
of the ranks' losses, as in DistributedDataParallel: a gradient that a rank sees counts 1/N in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from singd.blocks import Block, gradient_of
from singd.precision import wide_dtype
from singd.processes.collectives import Layout, rank, telling_of_lost_ranks, world_size
from singd.processes.ddp import DDPDetector
from singd.rules import INPUT, OUTPUT
from singd.statistics import Statistics
from singd.torch_private import reduce_scatter

COUNTS = ("u", "g", "rows", "terms")


def average(params: Sequence[nn.Parameter], ddp: DDPDetector, always: bool) -> bool:
    """Give all processes the mean of their gradients, unless a wrapper has done it.

    Args:
        params: Those that nobody else has surely averaged; the same ones on every rank.
        ddp: What ran this rank's forwards.
        always: Whether to average in any case.

    Returns:
        Whether they were averaged here.
    """
    if not params:
        return False
    used, averaged = _agree(params, ddp)
    if averaged and not always:
        return False
    for p in used:  # what one rank has used, all step
        p.grad = gradient_of(p)
    _average_gradients(used)
    return True


def _agree(params: Sequence[nn.Parameter], ddp: DDPDetector) -> tuple[list[nn.Parameter], bool]:
    """What all ranks have to say of the gradients before they can be averaged, in one short message.

    Returns:
        The parameters that have a gradient on any rank, and whether a wrapper has averaged them already.
    """
    mine = [p.grad is not None for p in params] + [ddp.inside, ddp.outside]
    flags = torch.tensor(mine, dtype=torch.float32, device=params[0].device)
    with telling_of_lost_ranks():
        dist.all_reduce(flags)
    *some, inside, outside = (flag > 0 for flag in flags.tolist())
    return [p for p, used in zip(params, some, strict=True) if used], inside and not outside


def _average_gradients(params: Sequence[nn.Parameter]) -> None:
    """Replace each gradient by the mean over the ranks, in one buffer per dtype; all have one."""
    for dtype in dict.fromkeys(p.dtype for p in params):  # (a set's order may differ between ranks)
        some = [p for p in params if p.dtype == dtype]
        grads = [p.grad for p in some if p.grad is not None]
        buffer = torch.cat([g.flatten() for g in grads])
        with telling_of_lost_ranks():
            dist.all_reduce(buffer)
        buffer /= world_size()
        for p, part in zip(some, buffer.split([g.numel() for g in grads]), strict=True):
            p.grad = part.view_as(p)


def reduced(
    blocks: Sequence[Block],
    statistics: dict[Block, Statistics],
    owners: Sequence[int] | None = None,
) -> dict[Block, Statistics]:
    """The sums of all ranks' statistics, in one buffer.

    Args:
        blocks: The blocks whose factors are due. All ranks must agree on them: they follow from the steps
            taken and the gradients, not from what a rank saw.
        statistics: What this rank gathered; it is not changed. A rank may have seen less than others.
        owners: The rank that needs the sums of each block; None: all do.

    Returns:
        The sums of the blocks that this rank needs.
    """
    if not blocks:
        return {}
    sizes = [sum(_sizes(b)) for b in blocks]
    if owners is None:
        layout = Layout(list(accumulate([0, *sizes[:-1]])), sum(sizes), None)
    else:
        layout = Layout.of(sizes, owners, world_size())
    wide = torch.float64 if any(_dtype(b) == torch.float64 for b in blocks) else torch.float32
    sums = torch.zeros(layout.numel, dtype=wide, device=blocks[0].weight.device)
    for block, start in zip(blocks, layout.offsets, strict=True):
        mine = statistics.get(block)
        if mine is not None:
            H_K, H_C, counts = sums[start:][: sum(_sizes(block))].split(_sizes(block))
            H_K.copy_(mine.H_K.flat())
            H_C.copy_(mine.H_C.flat())
            counts.copy_(torch.stack([getattr(mine, name).to(wide) for name in COUNTS]))
    first = 0
    with telling_of_lost_ranks():
        if layout.shard_numel is None:
            dist.all_reduce(sums)
        else:
            everything, sums = sums, sums.new_empty(layout.shard_numel)
            reduce_scatter(sums, everything)
            first = rank() * layout.shard_numel
    found = {}
    for i, (block, offset) in enumerate(zip(blocks, layout.offsets, strict=True)):
        if owners is None or owners[i] == rank():
            mine = sums[offset - first :][: sum(_sizes(block))].to(block.weight.device)
            found[block] = _from_sums(block, mine)
    return found


def _sizes(block: Block) -> list[int]:
    """The numbers in H_K and in H_C, and the counts."""
    block.blueprints()
    return [*(block.factors.identity[side].numel for side in (INPUT, OUTPUT)), len(COUNTS)]


def _from_sums(block: Block, sums: Tensor) -> Statistics:
    flat_K, flat_C, counts = sums.split(_sizes(block))
    once = 1 / world_size() ** 2  # each rank's gradient counts 1/N, and enters squared
    u, g, rows, terms = counts.clone().unbind()
    eye = block.factors.identity
    H: list[Any] = [
        eye[side].from_flat(flat.to(wide_dtype(eye[side].dtype)))
        for side, flat in ((INPUT, flat_K), (OUTPUT, flat_C * once))
    ]
    return Statistics(*H, u, g * once, rows, terms)


def _dtype(block: Block) -> torch.dtype:
    return torch.promote_types(*(A.dtype for A in block.factors.identity.values()))
