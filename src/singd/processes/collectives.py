"""Flat buffers between processes, and tensors that ``fully_shard`` spread over them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from singd.blocks import whole
from singd.torch_private import all_gather


def world_size() -> int:
    """The number of processes in the default group; one without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process in the default group; zero without a group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


# -- flat buffers ----------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Where pieces that belong to ranks lie in one flat buffer: those of a rank side by side.

    A gather (or a scatter of sums) wants equally long shards, which means padding; its ring moves
    (N - 1) shards through each rank, and that of an all_reduce 2 (N - 1) / N times the whole.
    So shards are padded where the buffer doesn't get more than twice as long by it. (Gloo's scatter is an
    all_reduce inside, and saves nothing.)

    Attributes:
        offsets: Where each piece starts.
        numel: The length of the buffer.
        shard_numel: The length of every rank's shard; None without padding.
    """

    offsets: list[int]
    numel: int
    shard_numel: int | None

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


def all_gather_flat(pieces: Sequence[Piece], where: str = "step") -> list[Tensor]:
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
            if layout.shard_numel is None:
                dist.all_reduce(buffer)
            else:
                mine = buffer[here * layout.shard_numel :][: layout.shard_numel]
                all_gather(buffer, mine.clone())
    return whole


LOST = ("onnect", "imed out", "imeout", "peer", "ocket", "roken pipe", "remote process", "NCCL")
"""What stands in the message of a collective that waited for a process in vain."""


@contextmanager
def telling_of_lost_ranks(where: str = "step") -> Iterator[None]:
    """Say in a collective what its failure means; errors of another kind pass as they are.

    Raises:
        RuntimeError: If another process has ended, or does not answer within the group's timeout.
    """
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or any(word in str(error) for word in LOST)
        if not lost or isinstance(error, torch.OutOfMemoryError):
            raise
        remedy = "start all of them again from the last checkpoint"
        if where != "step":
            remedy = f"every rank must call {where} (shard_factors=True), or " + remedy
        raise RuntimeError(
            f"Rank {rank()} of {world_size()} lost another process in SINGD.{where}; {remedy}."
        ) from error


# -- sharded parameters ----------------------------------------------------------------------------

BUCKET = 2**25  # bytes: enough for the links to be busy, little beside a model that needs sharding


def gathered(vectors: Mapping[nn.Parameter, Any]) -> dict[nn.Parameter, Tensor]:
    """Whole vectors of sharded parameters, with one collective per mesh and dtype for those whose rows are dealt
    out along the one axis of a mesh, as ``fully_shard`` does.
    """
    alike: dict[tuple[Any, torch.dtype], list[nn.Parameter]] = {}
    found = {}
    for p, vector in vectors.items():
        if _rows_are_dealt_out(vector):
            alike.setdefault((vector.device_mesh, vector.dtype), []).append(p)
        else:
            found[p] = whole(vector)
    for (mesh, _), some in alike.items():
        ranks = mesh.size()
        shards = []
        for p in some:
            rows = vectors[p].to_local().flatten()
            most = -(-p.shape[0] // ranks) * math.prod(p.shape[1:])  # of a rank; the last have less
            shards.append(nn.functional.pad(rows, (0, most - rows.numel())))
        mine = torch.cat(shards)
        buffer = mine.new_empty(ranks * mine.numel())
        with telling_of_lost_ranks():
            all_gather(buffer, mine, group=mesh.get_group())
        parts = buffer.view(ranks, -1).split([s.numel() for s in shards], dim=1)
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
