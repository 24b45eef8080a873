"""The one home of a layer's factors: flat numbers in the optimizer's state, and what is formed from them.

torch's state holds tensors, so that checkpoints and their hooks see all there is: ``state[weight]["K"]`` is a
vector of the numbers that K stores. Here are the views on them as structured matrices, the products that are
kept between updates, and with ``shard_factors`` what another process handed out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from singd.precision import accumulation_dtype, wide_dtype
from singd.rules import Rule
from singd.structures import StructuredMatrix
from singd.torch_private import version

COUNTERS = ("step", "last_update", "updates")
"""Beside the factors: steps taken, the step of the last update (-1 before the first), and how many there were."""


class FactorState:
    """The views and products of one layer.

    Attributes:
        key: What the blueprints were made for.
        started: Whether there are numbers in the state.
        blueprints: What is kept, by name, without numbers.
        identity: Of each side, without numbers.
        handed: What another process keeps, for gathering statistics for the update that is due; empty where it is
            kept here, None before it was handed out.
    """

    def __init__(self) -> None:
        self.key: Any = None
        self.started = False
        self.blueprints: dict[str, StructuredMatrix] = {}
        self.identity: dict[str, StructuredMatrix] = {}
        self.handed: dict[str, Tensor] | None = None
        self._views: dict[str, tuple[Tensor, StructuredMatrix]] = {}
        self._prepared: tuple[Any, Any] = (None, None)

    def shape_as(
        self, key: Any, identity: Mapping[str, StructuredMatrix], keeps: Mapping[str, str]
    ) -> None:
        """Take blueprints for other structures, sizes or dtypes."""
        self.identity = dict(identity)
        self.blueprints = {name: identity[side] for name, side in keeps.items()}
        self._views, self._prepared = {}, (None, None)
        self.key = key  # last, so that what an exception left half done is done again

    def adopt(self, state: Mapping[str, Any]) -> None:
        """Take the dtypes of factors that were loaded, which another process may keep."""
        for name, A in self.blueprints.items():
            if name in state:
                self.blueprints[name] = A.to(dtype=state[name].dtype)
        self._views, self._prepared = {}, (None, None)
        self.started = "step" in state

    def read(
        self, state: dict[str, Any], names: Any, device: torch.device
    ) -> dict[str, StructuredMatrix]:
        """Views on the numbers in the state, which follow the weight to its device, or on those handed out."""
        found = {}
        for name in names:
            source = state if name in state else self.handed or {}
            if source[name].device != device:  # the model was moved
                source[name] = source[name].to(device)
            flat, known = self._views.get(name, (None, None))
            if flat is not source[name] or known is None:
                known = self.blueprints[name].from_flat(source[name])
                self._views[name] = (source[name], known)
            found[name] = known
        return found

    def _dtype(self, state: Mapping[str, Any], name: str) -> torch.dtype:
        """That of the numbers that there are, which a model that is cast leaves as they were."""
        return state[name].dtype if name in state else self.blueprints[name].dtype

    def _here(self, state: Mapping[str, Any]) -> list[str]:
        """The names that there are numbers for: a momentum that was switched on later is zero."""
        return [name for name in self.blueprints if name in state]

    def accumulated(
        self, state: dict[str, Any], device: torch.device
    ) -> dict[str, StructuredMatrix]:
        """All factors in a dtype for arithmetic on them."""
        found = self.read(state, self._here(state), device)
        return {name: A.to(dtype=accumulation_dtype(A.dtype)) for name, A in found.items()}

    def finite(
        self, state: dict[str, Any], new: Mapping[str, StructuredMatrix], some: Tensor | bool
    ) -> dict[str, StructuredMatrix] | None:
        """New factors in the dtypes of the old ones, which stay where a new one is not finite.

        Args:
            state: Where the old ones are.
            new: The new ones.
            some: Whether they were moved by anything.

        Returns:
            None if the old ones stay; only a CPU says so, other devices need not be waited for.
        """
        rounded = {name: A.to(dtype=self._dtype(state, name)) for name, A in new.items()}
        tensors = [t for A in rounded.values() for t in A.tensors() if t.numel()]
        if not tensors:  # a rule that keeps nothing
            return rounded
        sums = torch.stack([t.sum(dtype=wide_dtype(t.dtype)) for t in tensors])
        finite = sums.isfinite().all()
        if finite.device.type == "cpu":
            return rounded if finite and bool(some) else None
        old = self.read(state, new, finite.device)
        return {
            name: A.map(lambda t, o: torch.where(finite & some, t, o), old[name])
            for name, A in rounded.items()
        }

    def grew(
        self, state: Mapping[str, Any], new: Mapping[str, StructuredMatrix], names: Iterable[str]
    ) -> bool:
        """Whether one of the new factors is more than ten times as large as it was; only a CPU is asked."""
        sizes = [
            (new[n].max_abs(), state[n].abs().amax())
            for n in names
            if state[n].device.type == "cpu" and state[n].numel()
        ]
        return any(bool(size > 10 * old) for size, old in sizes)

    def write(
        self, state: dict[str, Any], new: Mapping[str, StructuredMatrix], **counters: int
    ) -> None:
        """Put factors and counters into the state, all at once, so that an exception finds all or nothing."""
        flat, views = {}, {}
        for name, matrix in new.items():
            matrix = matrix.to(dtype=self._dtype(state, name))
            numbers = flat[name] = matrix.flat()
            same = numbers.data_ptr() == matrix.tensors()[0].data_ptr()
            views[name] = (numbers, matrix if same else matrix.from_flat(numbers))
        state.update(flat, **counters)
        self.started = True
        self._views.update(views)

    def prepared(self, rule: Rule, state: dict[str, Any], keep: bool, device: torch.device) -> Any:
        """What the rule's direction needs; where it is kept, formed anew when the numbers have changed."""
        factors = self.read(state, self._here(state), device)
        if not keep:
            return rule.prepare(factors, keep=False)
        of = [(flat, version(flat)) for flat in (state[name] for name in self._here(state))]
        known, value = self._prepared
        if known is None or any(
            f is not g or v != w for (f, v), (g, w) in zip(known, of, strict=True)
        ):
            value = rule.prepare(factors, keep=True)
            self._prepared = (of, value)
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_views": {}, "_prepared": (None, None)}
