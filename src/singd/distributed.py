"""What several processes exchange: one reduction of the statistics per update, and gradients if nobody else does.

Every rank ends with the same statistics as one process that saw all batches. The loss of the whole is the *mean*
of the ranks' losses, as in DistributedDataParallel: a gradient that a rank sees counts 1/N in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from singd.blocks import SIDES, Block
from singd.statistics import Statistics, accumulation_dtype
from singd.structures import StructuredMatrix


def world_size() -> int:
    """The number of processes in the default group; one without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def reduce_statistics(blocks: Sequence[Block], statistics: dict[Block, Statistics]) -> None:
    """Sum the statistics of all ranks, in one buffer.

    Args:
        blocks: The blocks whose factors are due. All ranks must agree on them: they follow from the steps
            taken and the gradients, not from what a rank saw.
        statistics: What this rank gathered; changed in place. A rank may have seen less than others.
    """
    parts: list[Tensor] = []
    views = [_matrices(block) for block in blocks]
    for block, (K, C) in zip(blocks, views, strict=True):
        mine, device = statistics.get(block), block.weight.device
        if mine is None:
            zeros = torch.zeros(K.numel + C.numel + 2, dtype=torch.float32, device=device)
            parts.append(zeros)
            continue
        counts = torch.stack([mine.rows, mine.terms])
        parts += [mine.H_K.flat(), mine.H_C.flat(), counts]
    if not parts:
        return
    wide = torch.float64 if any(_dtype(b) == torch.float64 for b in blocks) else torch.float32
    buffer = torch.cat([p.to(wide) for p in parts])
    _summed(buffer)
    ranks = world_size()
    start = 0
    for block, (K, C) in zip(blocks, views, strict=True):
        flat_K, flat_C, counts = buffer[start : start + K.numel + C.numel + 2].split(
            [K.numel, C.numel, 2]
        )
        start += K.numel + C.numel + 2
        dtype_K, dtype_C = (accumulation_dtype(block.dtype(side)) for side in SIDES)
        flat_C = flat_C / ranks**2  # each rank's gradient counts 1/N, and enters squared
        rows, terms = counts.clone().unbind()
        if block.group["loss_average"] is None:
            terms = terms.clamp(max=1.0)
        statistics[block] = Statistics(
            K.from_flat(flat_K.to(dtype_K)), C.from_flat(flat_C.to(dtype_C)), rows, terms, -1
        )


def _summed(buffer: Tensor) -> None:
    """Sum over the ranks, in place.

    Raises:
        RuntimeError: If another process has ended, or does not answer within the group's timeout.
    """
    try:
        dist.all_reduce(buffer)
    except RuntimeError as error:
        raise RuntimeError(
            f"Rank {dist.get_rank()} of {dist.get_world_size()} lost another process in SINGD.step; "
            "start all of them again from the last checkpoint."
        ) from error


def average_gradients(params: Sequence[nn.Parameter]) -> None:
    """Replace each gradient by the mean over the ranks; one that no rank has stays None."""
    if not params:
        return
    flags = torch.tensor([float(p.grad is not None) for p in params], device=params[0].device)
    _summed(flags)
    used = [p for p, flag in zip(params, flags.tolist(), strict=True) if flag > 0]
    for dtype in {p.dtype for p in used}:
        some = [p for p in used if p.dtype == dtype]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in some]
        buffer = torch.cat([g.flatten() for g in grads])
        _summed(buffer)
        buffer /= world_size()
        for p, part in zip(some, buffer.split([g.numel() for g in grads]), strict=True):
            p.grad = part.view_as(p)


def _matrices(block: Block) -> tuple[StructuredMatrix, StructuredMatrix]:
    """The shapes of a block's factors."""
    return block.blueprint("K"), block.blueprint("C")


def _dtype(block: Block) -> torch.dtype:
    return torch.promote_types(*(block.dtype(side) for side in SIDES))


def placed_like(tensor: Tensor, param: Any) -> Tensor:
    """The part of a whole tensor that this rank keeps of ``param``; needs no communication."""
    if not hasattr(param, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh = param.device_mesh
    everywhere = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(mesh, param.placements)
