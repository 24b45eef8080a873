"""Bytes that tensors take: what an optimizer keeps, and the peak while a step is made.

Live storages are counted by a dispatch mode, which sees every tensor that an operation returns, also in
the backward pass. The counts are exact and the same in every run; the process's resident size is
not, since the allocator keeps freed pages. Buffers inside a single operation are not seen.
"""

from __future__ import annotations

import gc
from collections.abc import Container
from typing import Any

import torch
from timing import Contender, Training
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from workloads import Workload


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all CPU storages that were made while the mode is on and still live.

    Attributes:
        peak: The largest count so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._total = self.peak = 0

    def live(self) -> int:
        for key in [k for k, (ref, _) in self._storages.items() if ref.expired()]:
            self._total -= self._storages.pop(key)[1]
        return self._total

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.live()  # forget what died since the last operation
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if torch.is_tensor(t) and t.device.type == "cpu":
                storage = t.untyped_storage()
                if storage._cdata not in self._storages:
                    self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                    self._total += storage.nbytes()
        self.peak = max(self.peak, self._total)
        return out


def kept_bytes(contender: Contender, workload: Workload, iterations: int = 2) -> int:
    """What an optimizer keeps between steps: live bytes after some, without parameters and batch."""
    with LiveBytes() as count:
        training = Training(contender, workload)
        for _ in range(iterations):
            training.iterate()
        for optimizer in training.optimizers:
            optimizer.zero_grad()
        training.model.zero_grad()
        gc.collect()
        mine = [*training.model.parameters(), *training.model.buffers(), training.x, training.y]
        return count.live() - sum(t.untyped_storage().nbytes() for t in mine)


def peak_bytes(contender: Contender, workload: Workload) -> int:
    """The peak of an iteration that updates the factors, without what is kept between iterations."""
    with LiveBytes() as count:
        training = Training(contender, workload)
        training.iterate()  # the states exist from now on
        for optimizer in training.optimizers:
            optimizer.zero_grad()
        gc.collect()
        count.peak = before = count.live()
        training.iterate()
        return count.peak - before


def state_bytes(optimizer: torch.optim.Optimizer, algorithm: str, keys: Container[str]) -> int:
    """The state of the parameters that one algorithm of SINGD steps, only entries of some names."""
    params = [p for g in optimizer.param_groups if g["algorithm"] == algorithm for p in g["params"]]
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for p in params
        for key, value in optimizer.state[p].items()
        if torch.is_tensor(value) and key in keys
    }
    return sum(storages.values())


def layer_state(contender: Contender, workload: Workload) -> tuple[int, int, int]:
    """Bytes of SINGD's state for the layers that it preconditions.

    Returns:
        The factors and their momenta; these and the weights' momenta; what AdamW keeps for those weights.
    """
    training = Training(contender, workload)
    training.iterate()
    (optimizer,) = training.optimizers
    factors = state_bytes(optimizer, "singd", ("K", "C", "m_K", "m_C"))
    momenta = state_bytes(optimizer, "singd", ("momentum_buffer",))
    groups = [g for g in optimizer.param_groups if g["algorithm"] == "singd"]
    adamw = sum(2 * p.untyped_storage().nbytes() for g in groups for p in g["params"])
    return factors, factors + momenta, adamw
