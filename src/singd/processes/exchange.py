"""What processes exchange before the factors move: sums of statistics, and gradients if nobody averages them.

Every rank ends with the same statistics as one process that saw all batches. The loss of the whole is the *mean*
of the ranks' losses, as in DistributedDataParallel: a gradient that a rank sees counts 1/N in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
from singd.scaler import check_averaging
from singd.statistics import Statistics
from singd.torch_private import reduce_scatter

COUNTS = ("u", "g", "rows", "terms")


def exchanged(
    params: Sequence[nn.Parameter],
    due: Iterable[Block],
    statistics: Mapping[Block, Statistics],
    ddp: DDPDetector,
    average: bool | None,
    owner: Mapping[Block, int],
    grad_scaler: Any,
) -> dict[Block, Statistics]:
    """Give all processes the same gradients, if nobody averages them; and return the sums of their statistics.

    Args:
        params: All that are trained.
        due: The blocks whose factors are due.
        statistics: What this rank gathered.
        ddp: What ran this rank's forwards.
        average: Whether to average gradients; None: unless a wrapper has done it.
        owner: The rank that keeps each block; empty if all do.
        grad_scaler: What scales the loss, or None.
    """
    wanted: list[nn.Parameter] = []
    if average is not False:  # (of sharded parameters, FSDP has)
        whole = [p for p in params if p.requires_grad and not hasattr(p, "full_tensor")]
        wanted = to_average(whole, ddp, average is True)
    if wanted:
        check_averaging(grad_scaler)
    for p in wanted:  # what one rank has used, all step
        p.grad = gradient_of(p)
    blocks = [b for b in due if b.used and b.rule.needs_rows]
    sums = Reduction(blocks, statistics, [owner[b] for b in blocks] if owner else None)
    average_gradients(wanted)  # while the sums are on their way
    return sums.finish()


def to_average(
    params: Sequence[nn.Parameter], ddp: DDPDetector, always: bool
) -> list[nn.Parameter]:
    """The parameters whose gradients are to be averaged: those that any rank has used, unless a wrapper has
    done it.

    All ranks say in one short message what they have used and seen. What one rank has used gets a gradient on all.

    Args:
        params: Those that nobody else has surely averaged; the same ones on every rank.
        ddp: What ran this rank's forwards.
        always: Whether to average in any case.
    """
    if not params:
        return []
    mine = [p.grad is not None for p in params] + [n in ddp.seen for n in ("inside", "outside")]
    flags = torch.tensor(mine, dtype=torch.float32, device=params[0].device)
    with telling_of_lost_ranks():
        dist.all_reduce(flags)
    *some, inside, outside = (flag > 0 for flag in flags.tolist())
    if inside and not outside and not always:
        return []
    return [p for p, used in zip(params, some, strict=True) if used]


def average_gradients(params: Sequence[nn.Parameter]) -> None:
    """Replace each gradient by the mean over the ranks, in one buffer per dtype; all have one."""
    for dtype in dict.fromkeys(p.dtype for p in params):  # (a set's order may differ between ranks)
        some = [p for p in params if p.dtype == dtype]
        grads = [gradient_of(p) for p in some]
        buffer = torch.cat([g.flatten() for g in grads])
        with telling_of_lost_ranks():
            dist.all_reduce(buffer)
        buffer /= world_size()
        for p, part in zip(some, buffer.split([g.numel() for g in grads]), strict=True):
            p.grad = part.view_as(p)


class Reduction:
    """The sum of all ranks' statistics, in one buffer; it starts when it is made.

    (It cannot start before the step: only then is it known that no other micro-batch follows.)

    Args:
        blocks: The blocks whose factors are due. All ranks must agree on them: they follow from the steps
            taken and the gradients, not from what a rank saw.
        statistics: What this rank gathered; it is not changed. A rank may have seen less than others.
        owners: The rank that needs the sums of each block; None: all do.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        statistics: Mapping[Block, Statistics],
        owners: Sequence[int] | None = None,
    ) -> None:
        self._blocks, self._owners = blocks, owners
        if not blocks:
            return
        sizes = [sum(_sizes(b)) for b in blocks]
        if owners is None:
            self._layout = Layout(list(accumulate([0, *sizes[:-1]])), sum(sizes), None)
        else:
            self._layout = Layout.of(sizes, owners, world_size())
        dtypes = {A.dtype for b in blocks for A in b.factors.identity.values()}
        wide = torch.float64 if torch.float64 in dtypes else torch.float32
        self._sums = torch.zeros(self._layout.numel, dtype=wide, device=blocks[0].weight.device)
        for block, start in zip(blocks, self._layout.offsets, strict=True):
            mine = statistics.get(block)
            if mine is not None:
                H_K, H_C, counts = self._sums[start:][: sum(_sizes(block))].split(_sizes(block))
                H_K.copy_(mine.H_K.flat())
                H_C.copy_(mine.H_C.flat())
                counts.copy_(torch.stack([getattr(mine, name).to(wide) for name in COUNTS]))
        with telling_of_lost_ranks():
            if self._layout.shard_numel is None:
                self._work: Any = dist.all_reduce(self._sums, async_op=True)
            else:
                everything, self._sums = self._sums, self._sums.new_empty(self._layout.shard_numel)
                self._work = reduce_scatter(self._sums, everything, async_op=True)

    def finish(self) -> dict[Block, Statistics]:
        """Wait for the sums of the blocks that this rank needs."""
        if not self._blocks:
            return {}
        with telling_of_lost_ranks():
            self._work.wait()
        first = rank() * (self._layout.shard_numel or 0)
        found = {}
        for i, (block, offset) in enumerate(zip(self._blocks, self._layout.offsets, strict=True)):
            if self._owners is None or self._owners[i] == rank():
                mine = self._sums[offset - first :][: sum(_sizes(block))].to(block.weight.device)
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
    K, C = (block.factors.identity[side] for side in (INPUT, OUTPUT))
    H_K = K.from_flat(flat_K.to(wide_dtype(K.dtype)))
    H_C = C.from_flat((flat_C * once).to(wide_dtype(C.dtype)))
    return Statistics(H_K, H_C, u, g * once, rows, terms)
