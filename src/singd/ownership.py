"""Which rank keeps the factors of which layer (``shard_factors=True``), and what the owners hand out.

The owner of a layer holds its K, C, m_K and m_C, updates them and computes its natural gradients. All other
ranks see K and C only while they gather statistics for the next update: the statistics are P(K^T U K) already.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from singd import distributed
from singd.blocks import SIDES, Block
from singd.checkpoint import FACTORS

State = Mapping[Any, dict[str, Any]]


def cost(block: Block) -> float:
    """What a layer costs its owner: multiply-adds of a step with an update, plus the numbers stored.

    With s numbers in K, of size d_i: K K^T times the gradient takes 2 s d_o, and K^T K and K m_K take
    s^2 / d_i each (d_i^3 if dense, d_i if diagonal). The same for C.
    """
    d_o, d_i = block.size
    stored_K, stored_C = (block.blueprint(side).numel for side in SIDES)
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
        handed: K and C of the blocks that are due in the next step, on all ranks; nothing for an own block.
        dtypes: Those of the four factors of each block, which may be another rank's.
    """

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self.rank, self.ranks = 0, 1
        self.owner: dict[Block, int] = {}
        self.handed: dict[Block, dict[str, Tensor]] = {}
        self.dtypes: dict[Block, dict[str, torch.dtype]] = {}

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
        self.rank, self.ranks = distributed.rank(), distributed.world_size()
        new = [b for b in blocks if b.active and b not in self.owner]
        loads = [0.0] * self.ranks
        for block, rank in self.owner.items():
            loads[rank] += cost(block)
        self.owner.update(zip(new, balanced([cost(b) for b in new], loads), strict=True))

    def check_ranks(self) -> None:
        """Refuse to work where other processes' factors cannot be had.

        Raises:
            RuntimeError: If this is another rank, or one of another number, than when factors were shared out.
        """
        here = distributed.rank(), distributed.world_size()
        if self.owner and here != (self.rank, self.ranks):
            raise RuntimeError(
                f"This optimizer holds the factors of rank {self.rank} of {self.ranks} (shard_factors=True), but "
                f"runs on rank {here[0]} of {here[1]}; build a new one and load a state_dict into it."
            )

    def keeps(self, block: Block) -> bool:
        """Whether the factors of a block are kept here."""
        return not self.divided or self.owner[block] == self.rank

    def ready(self, block: Block, state: Mapping[str, Any]) -> bool:
        """Whether every rank has K and C, as gathering statistics needs them: all ranks say the same.

        They lack only where T was changed after the end of the last step.
        """
        return not self.divided or state.get("last_update", -1) < 0 or block in self.handed

    def gathered(
        self, blocks: Sequence[Block], keys: Sequence[str], states: State, where: str = "step"
    ) -> list[dict[str, Tensor]]:
        """The factors of some blocks, from their owners; every rank must ask for the same ones.

        Args:
            blocks: Blocks that have state.
            keys: Some of K, C, m_K, m_C.
            states: The optimizer's state.
            where: The method that asks, for the error.

        Returns:
            For each block the flat numbers of each key.
        """
        if not self.divided:
            return [{key: states[b.weight][key] for key in keys} for b in blocks]
        self.check_ranks()
        pieces = [
            distributed.Piece(
                self.owner[b],
                b.blueprint(key[-1]).numel,
                self.dtypes[b][key],
                b.weight.device,
                states[b.weight].get(key),
            )
            for b in blocks
            for key in keys
        ]
        flat = iter(distributed.spread(pieces, where))
        return [{key: next(flat) for key in keys} for _ in blocks]

    def natural_gradients(
        self, found: Iterable[tuple[Block, Tensor | None]], complete: bool = False
    ) -> Iterator[tuple[Block, Tensor]]:
        """The natural gradients of all blocks, [d_o, d_i], from those that each rank has computed.

        Args:
            found: Each block with its natural gradient, or with None where another rank owns it.
            complete: Whether every rank has them all.
        """
        if complete or not self.divided:
            for block, N in found:
                assert N is not None
                yield block, N
            return
        pairs = list(found)
        pieces = []
        for block, N in pairs:
            dtype = block.weight.dtype  # that of the weights will do, however wide the factors are
            for p in block.params:
                dtype = torch.promote_types(dtype, p.dtype)
            numel, device = math.prod(block.size), block.weight.device
            pieces.append(distributed.Piece(self.owner[block], numel, dtype, device, N))
        for (block, _), flat in zip(pairs, distributed.spread(pieces), strict=True):
            yield block, flat.view(block.size)

    def hand_out(self, blocks: Iterable[Block], used: Iterable[Block], states: State) -> None:
        """At the end of a step, give K and C of the layers that are due in the next one to all ranks.

        (Not in the hooks, when they are needed: ranks may use different layers.) Before the first update
        they are identities, which need not be sent.

        Args:
            blocks: All blocks.
            used: Those that took part in this step, whose K and C are old now.
            states: The optimizer's state.
        """
        if not self.divided:
            return
        for block in used:
            self.handed.pop(block, None)
        due = []
        for block in blocks:
            state = states.get(block.weight, {})
            if not self.ready(block, state) and state["step"] % block.group["T"] == 0:
                due.append(block)
        for block, factors in zip(due, self.gathered(due, SIDES, states), strict=True):
            self.handed[block] = {} if self.keeps(block) else factors

    def initialise(self, block: Block, state: dict[str, Any]) -> None:
        """Start with identities for K and C, and no momenta, in the state of the owner."""
        state["step"] = 0
        state["last_update"] = -1
        self.dtypes[block] = {key: block.dtype(key[-1]) for key in FACTORS}
        if self.keeps(block):
            for side in SIDES:
                eye = block.identity(side)
                state[side] = eye.flat()
                state["m_" + side] = torch.zeros_like(state[side])
        block.frozen_shape = True

    def keep_own(self, blocks: Iterable[Block], states: State) -> None:
        """Of whole states that were loaded, keep what this rank owns and what the next update needs.

        Args:
            blocks: All blocks.
            states: The optimizer's state; changed in place.
        """
        self.handed.clear()
        for block in blocks:
            state = states.get(block.weight, {})
            block.frozen_shape = "K" in state
            if not block.frozen_shape:
                continue
            self.dtypes[block] = {key: state[key].dtype for key in FACTORS}
            if not self.divided:
                continue
            mine = self.keeps(block)
            others = {} if mine else {key: state.pop(key) for key in FACTORS}
            if state["step"] % block.group["T"] == 0:
                self.handed[block] = {key: others[key] for key in others if key in SIDES}
