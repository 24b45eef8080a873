"""The one home of a layer's factors: flat numbers in the optimizer's state, and what is formed from them.

torch's state holds tensors, so that checkpoints and their hooks see all there is: ``state[weight]["K"]`` is a
vector of the numbers that K stores. Here are the views on them as structured matrices, the products that are
kept between updates, and with ``shard_factors`` what another process handed out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from singd.precision import accumulation_dtype, wide_dtype
from singd.rules import Factors, Rule
from singd.structures import StructuredMatrix
from singd.torch_private import version

State: TypeAlias = dict[str, Any]
"""What torch keeps of one parameter."""

States: TypeAlias = Mapping[Any, State]
"""The same of all parameters."""

Matrices: TypeAlias = dict[str, StructuredMatrix]

COUNTERS = ("step", "last_update", "updates")
"""Beside the factors: steps taken, the step of the last update (-1 before the first), and how many there were."""


class FactorState:
    """The views and products of one layer.

    Attributes:
        key: What the blueprints were made for.
        started: Whether there are numbers in the state.
        blueprints: What is kept, by name, without numbers.
        identity: Of each side, without numbers.
        product_numel: How many numbers the kept products take; a diagonal factor has none that would be shorter.
        handed: What another process keeps, for gathering statistics for the update that is due; empty where it is
            kept here, None before it was handed out.
    """

    def __init__(self) -> None:
        self.key: Any = None
        self.started = False
        self.blueprints: Matrices = {}
        self.identity: Matrices = {}
        self.product_numel = 0
        self.handed: dict[str, Tensor] | None = {}
        self._forget()

    def _forget(self) -> None:
        self._views: dict[str, tuple[Tensor, StructuredMatrix]] = {}
        self._prepared: tuple[Any, Any] = ((), None)

    def shape_as(self, key: Any, identity: Matrices, keeps: Mapping[str, str]) -> None:
        """Take blueprints for other structures, sizes or dtypes."""
        self.identity = identity
        self.blueprints = {name: identity[side] for name, side in keeps.items()}
        self.product_numel = sum(eye.numel for eye in identity.values() if eye.numel > eye.n)
        self._forget()
        self.key = key  # last, so that what an exception left half done is done again

    def adopt(self, state: State) -> None:
        """Take the dtypes of factors that were loaded, which another process may keep."""
        for name, A in self.blueprints.items():
            if name in state:
                self.blueprints[name] = A.to(dtype=state[name].dtype)
        self._forget()
        self.started = "step" in state

    def read(self, state: State, names: Iterable[str], device: torch.device) -> Matrices:
        """Views on the numbers in the state, which follow the weight to its device, or on those handed out.

        A name without numbers is left out: a momentum that was switched on later is zero.
        """
        found = {}
        for name in names:
            source = state if name in state else self.handed or {}
            flat = source.get(name)
            if flat is None:
                continue
            if flat.device != device:  # the model was moved
                flat = source[name] = flat.to(device)
            of, matrix = self._views.get(name, (None, None))
            if of is not flat or matrix is None:
                matrix = self.blueprints[name].from_flat(flat)
                self._views[name] = (flat, matrix)
            found[name] = matrix
        return found

    def accumulated(self, state: State, names: Iterable[str], device: torch.device) -> Matrices:
        """The same in a dtype for arithmetic on them."""
        found = self.read(state, names, device)
        for name, A in found.items():
            stored = self._views[name][0].dtype
            if stored != accumulation_dtype(stored):
                found[name] = A.to(dtype=accumulation_dtype(stored))
        return found

    def moved(self, state: State, new: Factors, some: Tensor | bool) -> dict[str, Tensor] | None:
        """The numbers of new factors in the dtypes of the old ones, which stay where a new one is not finite.

        Args:
            state: Where the old ones are.
            new: The new ones.
            some: Whether they were moved by anything.

        Returns:
            None if the old ones stay; only a CPU says so, other devices need not be waited for.
        """
        numbers = self.flat(state, new)
        sums = [v.sum(dtype=wide_dtype(v.dtype)) for v in numbers.values()]
        if not sums:  # a rule that keeps nothing
            return numbers
        if sums[0].device.type == "cpu":
            return numbers if some and all(map(math.isfinite, map(float, sums))) else None
        finite = torch.stack(sums).isfinite().all()
        return {n: torch.where(finite & some, v, state[n]) for n, v in numbers.items()}

    def flat(self, state: State, new: Factors) -> dict[str, Tensor]:
        """The numbers of factors, in the dtype that is there: a model that is cast leaves them as they were."""
        return {n: A.flat().to(state.get(n, self.blueprints[n]).dtype) for n, A in new.items()}

    def grew(self, state: State, new: Mapping[str, Tensor], names: Iterable[str]) -> bool:
        """Whether one of the new factors is more than ten times as large as it was; only a CPU is asked."""
        return any(
            new[n].device.type == "cpu" and bool(_norm(new[n]) > 10 * _norm(state[n]))
            for n in names
        )

    def prepared(self, rule: Rule, state: State, keep: bool, device: torch.device) -> Any:
        """What the rule's direction needs; where it is kept, formed anew when the numbers have changed."""
        if not keep:
            return rule.prepare(self.accumulated(state, self.blueprints, device), keep=False)
        self.read(state, self.blueprints, device)  # which brings them to the device
        of = [(flat, version(flat)) for flat in map(state.get, self.blueprints) if flat is not None]
        known, value = self._prepared
        pairs = zip(known, of, strict=False)
        if len(known) != len(of) or any(f is not g or v != w for (f, v), (g, w) in pairs):
            value = rule.prepare(self.accumulated(state, self.blueprints, device), keep=True)
            self._prepared = of, value
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_views": {}, "_prepared": ((), None)}


def _norm(v: Tensor) -> Tensor:
    """The Euclidean norm, 0-d, in float32 at least."""
    return torch.linalg.vector_norm(v, dtype=wide_dtype(v.dtype))
