"""Which rank keeps the factors of which layer (``shard_factors=True``), and what the owners hand out.

The owner of a layer holds its factors, updates them and computes its preconditioned gradients. All other ranks see
what the rule gathers with (K and C of SINGD) only while they gather statistics for the next update: the statistics
are P(K^T U K) already.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from singd.blocks import Block
from singd.groups import is_due
from singd.processes.collectives import Piece, all_gather_flat, rank, world_size
from singd.rules import INPUT, OUTPUT
from singd.state import States


def cost(block: Block) -> float:
    """What a layer costs its owner: multiply-adds of a step with an update, plus the numbers stored.

    With s numbers in K, of size d_i: K K^T times the gradient takes 2 s d_o, and K^T K and K m_K take
    s^2 / d_i each (d_i^3 if dense, d_i if diagonal). The same for C.
    """
    d_o, d_i = block.size
    block.blueprints()
    stored_K, stored_C = (block.factors.identity[side].numel for side in (INPUT, OUTPUT))
    natural_gradient = 2 * (stored_K * d_o + stored_C * d_i)
    update = 2 * (stored_K**2 / d_i + stored_C**2 / d_o)
    return natural_gradient + update + 2 * (stored_K + stored_C)


def balanced(costs: Sequence[float], loads: Sequence[float]) -> list[int]:
    """A rank for each cost: the largest first, each to the rank that has the least so far.

    No rank ends with more than the mean plus the largest cost.

    Args:
        costs: What is to be shared out.
        loads: What each rank has already.
    """
    loads = list(loads)
    ranks = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        ranks[i] = loads.index(min(loads))
        loads[ranks[i]] += costs[i]
    return ranks


class Ownership:
    """The owner of each block.

    Attributes:
        wanted: What the user asked for; with one process nothing is shared out.
        ranks: How many processes the blocks were shared out to.
        rank: Which of them this one is.
        owner: The rank of each block. It never changes, so that no state has to move.
    """

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self.rank, self.ranks = 0, 1
        self.owner: dict[Block, int] = {}

    @property
    def divided(self) -> bool:
        """Whether blocks have different owners."""
        return self.ranks > 1

    def assign(self, blocks: Iterable[Block]) -> None:
        """Give an owner to each block that has none; the same on every rank, without communication.

        Raises:
            RuntimeError: If the number of processes has changed since the first blocks got theirs.
        """
        if not self.wanted:
            return
        self.check_ranks()
        self.rank, self.ranks = rank(), world_size()
        new = [b for b in blocks if b.active and b not in self.owner]
        loads = [0.0] * self.ranks
        for block, owner in self.owner.items():
            loads[owner] += cost(block)
        self.owner.update(zip(new, balanced([cost(b) for b in new], loads), strict=True))

    def check_ranks(self) -> None:
        """Refuse to work where other processes' factors cannot be had.

        Raises:
            RuntimeError: If this is another rank, or one of another number, than when factors were shared out.
        """
        here = rank(), world_size()
        if self.owner and here != (self.rank, self.ranks):
            raise RuntimeError(
                f"This optimizer holds the factors of rank {self.rank} of {self.ranks} (shard_factors=True), but "
                f"runs on rank {here[0]} of {here[1]}; build a new one and load a state_dict into it."
            )

    def keeps(self, block: Block) -> bool:
        """Whether the factors of a block are kept here."""
        return self.owner[block] == self.rank

    def gathered(
        self, blocks: Sequence[Block], states: States, where: str, gathers_with: bool = False
    ) -> list[dict[str, Tensor]]:
        """The factors of some blocks, from their owners; every rank must ask for the same ones.

        Args:
            blocks: Blocks that have state.
            states: The optimizer's state.
            where: The method that asks, for the error.
            gathers_with: Whether only those that the rule gathers with are wanted.

        Returns:
            For each block the flat numbers of each name.
        """
        names = [b.rule.gathers_with if gathers_with else tuple(b.blueprints()) for b in blocks]
        if not self.divided:
            pairs = zip(blocks, names, strict=True)
            return [{name: states[b.weight][name] for name in some} for b, some in pairs]
        self.check_ranks()
        pieces = [
            Piece(self.owner[b], A.numel, A.dtype, b.weight.device, states[b.weight].get(name))
            for b, some in zip(blocks, names, strict=True)
            for name, A in b.blueprints().items()
            if name in some
        ]
        flat = iter(all_gather_flat(pieces, where))
        return [{name: next(flat) for name in some} for some in names]

    def directions(
        self, found: Iterable[tuple[Block, Any]], complete: bool
    ) -> Iterator[tuple[Block, Tensor]]:
        """The preconditioned gradients of all blocks, [d_o, d_i], from those that each rank has computed.

        Args:
            found: Each block with its own, or with None where another rank owns it.
            complete: Whether every rank has them all.
        """
        if complete:
            yield from found
            return
        pairs = list(found)
        pieces = []
        for block, N in pairs:
            # that of the parameters will do, however wide the factors are
            dtype = reduce(torch.promote_types, (p.dtype for p in block.params))
            numel, device = math.prod(block.size), block.weight.device
            pieces.append(Piece(self.owner[block], numel, dtype, device, N))
        for (block, _), flat in zip(pairs, all_gather_flat(pieces), strict=True):
            yield block, flat.view(block.size)

    def broadcast_factors(
        self, blocks: Iterable[Block], used: Iterable[Block], states: States
    ) -> None:
        """At the end of a step, give all ranks what they gather with for the layers that are due in the next one.

        (Not in the hooks, when it is needed: ranks may use different layers.) Before the first update
        factors are as they start, and need not be sent.

        Args:
            blocks: All blocks.
            used: Those that took part in this step, whose factors are old now.
            states: The optimizer's state.
        """
        for block in used:
            block.factors.handed = None
        due = []
        for block in blocks:
            state = states.get(block.weight, {})
            wanted = block.active and block.rule.gathers_with and block.factors.handed is None
            if wanted and state.get("last_update", -1) >= 0 and is_due(block.group, state):
                due.append(block)
        for block, factors in zip(due, self.gathered(due, states, "step", True), strict=True):
            block.factors.handed = {} if self.keeps(block) else factors

    def keep_own(self, blocks: Iterable[Block], states: States) -> None:
        """Of whole states that were loaded, keep what this rank owns and what the next update needs.

        Args:
            blocks: All blocks.
            states: The optimizer's state; changed in place.
        """
        for block in blocks:
            block.factors.handed = None if self.divided else {}
            state = states.get(block.weight, {})
            if not block.active or not self.divided or "step" not in state:
                continue
            names = () if self.keeps(block) else tuple(block.blueprints())
            others = {name: state.pop(name) for name in names}
            if is_due(block.group, state):
                with_ = block.rule.gathers_with
                block.factors.handed = {name: others[name] for name in with_ if name in others}
