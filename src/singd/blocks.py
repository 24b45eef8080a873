"""What of a model can be preconditioned: one block of the curvature matrix per layer, or per loose matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from singd.groups import dtypes, is_due, resolve, rule_of
from singd.layers import LayerKind
from singd.layers.loose import LooseKind
from singd.precision import accumulation_dtype
from singd.rules import INPUT, OUTPUT, Rule
from singd.state import FactorState
from singd.structures import StructuredMatrix, structure


@dataclass(eq=False)
class Block:
    """The parameters that share one Kronecker-factored block, and the layers that use them.

    Usually one layer; several where a weight is tied. The matrix W is ``[d_o, d_i]``.
    """

    kind: LayerKind
    modules: list[nn.Module]
    names: list[str]
    weight: nn.Parameter
    own_bias: nn.Parameter | None  # the layer's, whether or not it was handed to the optimizer
    bias: nn.Parameter | None = None  # the layer's, if it is part of the matrix
    group: dict[str, Any] = field(default_factory=dict)  # the param_group of the weight
    active: bool = False  # whether its weight was handed to the optimizer, to be preconditioned
    states: Mapping[Any, dict[str, Any]] = field(default_factory=dict)  # the optimizer's
    factors: FactorState = field(default_factory=FactorState)
    last_lr: Any = None  # of its last step; None where that was not here
    _rule: Any = (None, None)  # what the group's rule was resolved to
    _due: Any = (None, None)  # when and under which T it was asked last, and the answer

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def params(self) -> list[nn.Parameter]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def size(self) -> tuple[int, int]:
        """``(d_o, d_i)``, the bias column counted."""
        return self.kind.size(self.modules[0], self.bias is not None)

    @property
    def rule(self) -> Rule:
        spec = self.group["rule"], self.group["kfac_like"]
        if self._rule[0] != spec:
            self._rule = spec, rule_of(self.group)
        return self._rule[1]

    @property
    def state(self) -> dict[str, Any]:
        """The optimizer's state of the weight; empty before the first step."""
        return self.states.get(self.weight, {})

    @property
    def used(self) -> bool:
        """Whether it takes part in a step."""
        return self.active and any(p.grad is not None for p in self.params)

    @property
    def due(self) -> bool:
        """Whether the factors are updated in the next step, and every process has what gathering for it needs.

        It lacks only where T was changed after the end of the last step.
        """
        state = self.state
        at = state.get("step", 0), state.get("last_update", -1), self.group["T"]
        if self._due[0] != at:
            self._due = at, is_due(self.group, state)
        here = self.factors.handed is not None or at[1] < 0 or not self.rule.gathers_with
        return self._due[1] and here

    def join(self, states: Mapping[Any, Any], group_of: Mapping[Any, Any]) -> None:
        """Take the optimizer's state, and the group that the weight is in; without one it takes part no more.

        Raises:
            ValueError: If the bias alone is in no group any more.
        """
        self.states = states
        self.active &= self.weight in group_of
        if self.active:
            if self.bias is not None and self.bias not in group_of:
                raise ValueError(
                    f"The bias of layer {self.name!r} cannot be taken out of the groups, because it is a column "
                    "of the layer's matrix; to keep it as it is, call its requires_grad_(False)."
                )
            self.group = group_of[self.weight]

    def rebind(self, old: nn.Parameter, new: nn.Parameter) -> None:
        """Take another parameter in the place of one."""
        for name in ("weight", "bias", "own_bias"):
            if getattr(self, name) is old:
                setattr(self, name, new)

    def works_with(self, rule: Rule) -> bool:
        """Whether a rule can precondition it: without a layer that is called there are no rows."""
        return not (rule.needs_rows and isinstance(self.kind, LooseKind))

    def gradient(self) -> Tensor:
        """The gradient as one matrix, ``[d_o, d_i]``, with zeros for a parameter that has none."""
        return self.matrix([whole(gradient_of(p)) for p in self.params])

    def matrix(self, parts: Sequence[Tensor]) -> Tensor:
        """Tensors of the shapes of ``params`` as one matrix, ``[d_o, d_i]``."""
        return self.kind.to_matrix(self.modules[0], parts[0], parts[1] if parts[1:] else None)

    def parts(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """The inverse of ``matrix``."""
        return self.kind.from_matrix(self.modules[0], matrix, self.bias is not None)

    def structures(self) -> dict[str, Any]:
        """The structure of each side."""
        K, C = resolve(self.group["structures"])
        forced = self.kind.input_structure
        return {INPUT: K if forced is None else structure(forced), OUTPUT: C}

    def identities(self, device: Any = None) -> dict[str, StructuredMatrix]:
        """A fresh identity for each side, on the weight's device unless another one is named."""
        pair, (d_o, d_i) = dtypes(self.group["preconditioner_dtype"]), self.size
        kinds, device = self.structures(), device or self.weight.device
        return {
            side: kinds[side](n, dtype=dtype or self.weight.dtype, device=device)
            for side, n, dtype in zip((INPUT, OUTPUT), (d_i, d_o), pair, strict=True)
        }

    def start(self) -> dict[str, StructuredMatrix]:
        """What the rule keeps, before its first update."""
        start = self.rule.start(self.identities())
        return {name: start[name] for name in self.blueprints()}

    def blueprints(self) -> dict[str, StructuredMatrix]:
        """What the rule keeps, without numbers: shapes and dtypes on the meta device."""
        group, rule = self.group, self.rule
        options = group["structures"], rule, group["preconditioner_dtype"], bool(group["alpha1"])
        key = (*options, self.weight.dtype, self.bias is None)
        if self.factors.key != key:
            self._check_change()
            self.factors.shape_as(key, self.identities(device="meta"), rule.kept(group))
        return self.factors.blueprints

    def gathering_factors(self) -> dict[str, StructuredMatrix]:
        """What the rule gathers with, in a dtype for sums; the identities where it needs nothing else."""
        self.blueprints()
        names = self.rule.gathers_with
        if found := self.factors.accumulated(self.state, names, self.weight.device):
            return found
        start = self.start() if names else self.identities()
        return {n: start[n].to(dtype=accumulation_dtype(start[n].dtype)) for n in names or start}

    def _check_change(self) -> None:
        """Refuse other structures, or to keep something else, where there are numbers of the old kind."""
        factors = self.factors
        if not factors.started or factors.key is None:
            return
        (before, *_), now = factors.key, self.group["structures"]
        names = [tuple(s.name for s in resolve(pair)) for pair in (before, now)]
        if names[0] != names[1]:
            raise ValueError(
                f"The structures of layer {self.name!r} cannot change after its first step, from {names[0]} to "
                f"{names[1]}; build another optimizer."
            )
        if set(self.rule.kept(self.group)) != set(factors.blueprints):
            raise ValueError(
                f"Layer {self.name!r} keeps {', '.join(factors.blueprints)} since its first step; another rule, "
                "or alpha1 from or to zero, would keep something else, so build another optimizer."
            )


def gradient_of(p: nn.Parameter) -> Tensor:
    """A parameter's gradient, zeros where there is none."""
    return torch.zeros_like(p) if p.grad is None else p.grad


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself; of one that ``fully_shard`` spread over ranks, all of it (every rank must ask)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
