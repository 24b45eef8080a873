"""Flat buffers between processes: one reduction of the statistics per update, and what owners hand out.

Every rank ends with the same statistics as one process that saw all batches. The loss of the whole is the *mean*
of the ranks' losses, as in DistributedDataParallel: a gradient that a rank sees counts 1/N in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from singd.blocks import SIDES, Block
from singd.statistics import Statistics, accumulation_dtype


def world_size() -> int:
    """The number of processes in the default group; one without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process in the default group; zero without a group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


# -- flat buffers ----------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Where pieces that belong to ranks lie in one flat buffer: those of a rank side by side.

    A gather (or a scatter of sums) wants equally long stretches, which means padding; its ring moves
    (N - 1) stretches through each rank, and that of an all_reduce 2 (N - 1) / N times the whole.
    So stretches are padded where the buffer doesn't get more than twice as long by it. (Gloo's scatter is an
    all_reduce inside, and saves nothing.)

    Attributes:
        offsets: Where each piece starts.
        numel: The length of the buffer.
        stretch: The length of every rank's stretch; None without padding.
    """

    offsets: list[int]
    numel: int
    stretch: int | None

    @classmethod
    def of(cls, sizes: Sequence[int], owners: Sequence[int], ranks: int) -> Layout:
        shares = [0] * ranks
        within = []
        for size, owner in zip(sizes, owners, strict=True):
            within.append(shares[owner])
            shares[owner] += size
        total, longest = sum(shares), max(shares)
        even = ranks * longest <= 2 * total
        starts = [r * longest if even else sum(shares[:r]) for r in range(ranks)]
        offsets = [starts[owner] + w for owner, w in zip(owners, within, strict=True)]
        return cls(offsets, ranks * longest if even else total, longest if even else None)


class Piece(NamedTuple):
    """Some numbers that one rank has and all need."""

    owner: int
    numel: int
    dtype: torch.dtype
    device: torch.device
    tensor: Tensor | None  # of the owner alone


def spread(pieces: Sequence[Piece], where: str = "step") -> list[Tensor]:
    """Give every rank all pieces, as vectors; one collective per dtype and device.

    Args:
        pieces: The same ones in the same order on every rank.
        where: The method that asks, for the error.

    Raises:
        RuntimeError: If another process has ended, or does not answer within the group's timeout.
    """
    here, ranks = rank(), world_size()
    whole: list[Tensor] = [torch.empty(0)] * len(pieces)
    for kind in dict.fromkeys((p.dtype, p.device) for p in pieces):
        some = [i for i, p in enumerate(pieces) if (p.dtype, p.device) == kind]
        sizes, owners = [pieces[i].numel for i in some], [pieces[i].owner for i in some]
        layout = Layout.of(sizes, owners, ranks)
        buffer = torch.zeros(layout.numel, dtype=kind[0], device=kind[1])
        parts = [buffer[start : start + n] for start, n in zip(layout.offsets, sizes, strict=True)]
        for i, part in zip(some, parts, strict=True):
            own = pieces[i].tensor
            if pieces[i].owner == here and own is not None:
                part.copy_(own.reshape(-1))
            whole[i] = part
        with telling_of_lost_ranks(where):
            if layout.stretch is None:
                dist.all_reduce(buffer)
            else:
                stretch = buffer[here * layout.stretch :][: layout.stretch].clone()
                _newer("all_gather_single", "all_gather_into_tensor")(buffer, stretch)
    return whole


def _newer(name: str, before: str) -> Callable[..., Any]:
    """A collective under its name since torch 2.13, or under that before."""
    return getattr(dist, name, None) or getattr(dist, before)


@contextmanager
def telling_of_lost_ranks(where: str = "step") -> Iterator[None]:
    """Say in a collective what its failure means.

    Raises:
        RuntimeError: If another process has ended, or does not answer within the group's timeout.
    """
    try:
        yield
    except RuntimeError as error:
        remedy = "start all of them again from the last checkpoint"
        if where != "step":
            remedy = f"every rank must call {where} (shard_factors=True), or " + remedy
        raise RuntimeError(
            f"Rank {rank()} of {world_size()} lost another process in SINGD.{where}; {remedy}."
        ) from error


# -- statistics ------------------------------------------------------------------------------------


class Reduction:
    """The sum of all ranks' statistics, in one buffer; it starts when it is made.

    Args:
        blocks: The blocks whose factors are due. All ranks must agree on them: they follow from the steps
            taken and the gradients, not from what a rank saw.
        statistics: What this rank gathered. A rank may have seen less than others.
        owners: The rank that needs the sums of each block; None: all do.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        statistics: dict[Block, Statistics],
        owners: Sequence[int] | None = None,
    ) -> None:
        self._blocks, self._statistics, self._owners = blocks, statistics, owners
        self._work: Any = None
        if not blocks:
            return
        sizes = [sum(_sizes(b)) for b in blocks]
        if owners is None:
            self._layout = Layout(list(accumulate([0, *sizes[:-1]])), sum(sizes), None)
        else:
            self._layout = Layout.of(sizes, owners, world_size())
        wide = torch.float64 if any(_dtype(b) == torch.float64 for b in blocks) else torch.float32
        self._sums = torch.zeros(self._layout.numel, dtype=wide, device=blocks[0].weight.device)
        for block, start in zip(blocks, self._layout.offsets, strict=True):
            mine = statistics.get(block)
            if mine is not None:
                H_K, H_C, counts = self._sums[start:][: sum(_sizes(block))].split(_sizes(block))
                H_K.copy_(mine.H_K.flat())
                H_C.copy_(mine.H_C.flat())
                counts.copy_(torch.stack([mine.rows, mine.terms]))
        with telling_of_lost_ranks():
            if self._layout.stretch is None:
                self._work = dist.all_reduce(self._sums, async_op=True)
            else:
                everything, self._sums = self._sums, self._sums.new_empty(self._layout.stretch)
                scatter = _newer("reduce_scatter_single", "reduce_scatter_tensor")
                self._work = scatter(self._sums, everything, async_op=True)

    def finish(self) -> None:
        """Wait for the sums and put them in the place of this rank's statistics, or drop these."""
        if not self._blocks:
            return
        with telling_of_lost_ranks():
            self._work.wait()
        first = 0 if self._layout.stretch is None else rank() * self._layout.stretch
        for i, (block, offset) in enumerate(zip(self._blocks, self._layout.offsets, strict=True)):
            if self._owners is not None and self._owners[i] != rank():
                self._statistics.pop(block, None)
                continue
            sums = self._sums[offset - first :][: sum(_sizes(block))].to(block.weight.device)
            self._statistics[block] = _from_sums(block, sums)


def _sizes(block: Block) -> list[int]:
    """The numbers in H_K and in H_C, and two counts."""
    return [*(block.blueprint(side).numel for side in SIDES), 2]


def _from_sums(block: Block, sums: Tensor) -> Statistics:
    flat_K, flat_C, counts = sums.split(_sizes(block))
    dtype_K, dtype_C = (accumulation_dtype(block.dtype(side)) for side in SIDES)
    flat_C = flat_C / world_size() ** 2  # each rank's gradient counts 1/N, and enters squared
    rows, terms = counts.clone().unbind()
    if block.group["loss_average"] is None:
        terms = terms.clamp(max=1.0)
    H_K = block.blueprint("K").from_flat(flat_K.to(dtype_K))
    H_C = block.blueprint("C").from_flat(flat_C.to(dtype_C))
    return Statistics(H_K, H_C, rows, terms, -1)


def _dtype(block: Block) -> torch.dtype:
    return torch.promote_types(*(block.dtype(side) for side in SIDES))


# -- sharded parameters ----------------------------------------------------------------------------

BUCKET = 2**25  # bytes: enough for the links to be busy, little beside a model that needs sharding


def whole_gradients(blocks: Sequence[Block]) -> Iterator[tuple[Block, dict[nn.Parameter, Tensor]]]:
    """The blocks, each with those of its gradients that ``fully_shard`` spread over ranks, whole.

    As many blocks as fit into a bucket share a gather. Every rank must ask for the same blocks.
    """
    bucket: list[Block] = []
    numbers = 0
    for i, block in enumerate(blocks):
        bucket.append(block)
        numbers += sum(p.numel() * p.element_size() for p in block.params)
        if numbers >= BUCKET or i == len(blocks) - 1:
            gradients = gathered([p for b in bucket for p in b.params])
            for b in bucket:
                yield b, {p: gradients.pop(p) for p in b.params if p in gradients}
            bucket, numbers = [], 0


def gathered(params: Sequence[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """Whole gradients of sharded parameters, with one collective per mesh and dtype.

    Only of those whose rows are dealt out along the one axis of a mesh, as ``fully_shard`` does.
    """
    alike: dict[tuple[Any, torch.dtype], list[nn.Parameter]] = {}
    for p in params:
        if _rows_are_dealt_out(p.grad):
            alike.setdefault((p.grad.device_mesh, p.grad.dtype), []).append(p)  # type: ignore[union-attr]
    found = {}
    for (mesh, _), some in alike.items():
        ranks = mesh.size()
        stretches = []
        for p in some:
            rows = p.grad.to_local().flatten()  # type: ignore[union-attr]
            most = -(-p.shape[0] // ranks) * math.prod(p.shape[1:])  # of a rank; the last have less
            stretches.append(nn.functional.pad(rows, (0, most - rows.numel())))
        mine = torch.cat(stretches)
        buffer = mine.new_empty(ranks * mine.numel())
        with telling_of_lost_ranks():
            gather = _newer("all_gather_single", "all_gather_into_tensor")
            gather(buffer, mine, group=mesh.get_group())
        parts = buffer.view(ranks, -1).split([s.numel() for s in stretches], dim=1)
        for p, part in zip(some, parts, strict=True):
            found[p] = part.reshape(-1)[: p.numel()].view(p.shape)
    return found


def _rows_are_dealt_out(grad: Any) -> bool:
    if not hasattr(grad, "full_tensor"):
        return False
    from torch.distributed.tensor import Shard

    return grad.device_mesh.ndim == 1 and grad.placements == (Shard(0),)


def placed_like(tensor: Tensor, param: Any) -> Tensor:
    """The part of a whole tensor that this rank keeps of ``param``; needs no communication."""
    if not hasattr(param, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh = param.device_mesh
    everywhere = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(mesh, param.placements)
