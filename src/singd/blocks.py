"""What of a model can be preconditioned: one block of the curvature matrix per layer, or per loose matrix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from singd.groups import dtypes, resolve, rule_of
from singd.layers import LayerKind, find_kind
from singd.layers.embedding import SPARSE
from singd.layers.loose import LooseKind
from singd.rules import INPUT, OUTPUT, Rule
from singd.state import FactorState
from singd.structures import StructuredMatrix
from singd.torch_private import parameters_by_attribute, uncompiled


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
    factors: FactorState = field(default_factory=FactorState)
    last_lr: Any = None  # of its last step; None where that was not here
    _rule: Any = None  # what the group's rule was resolved to

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
        if self._rule is None or self._rule[0] != spec:
            self._rule = spec, rule_of(self.group)
        return self._rule[1]

    @property
    def used(self) -> bool:
        """Whether it takes part in a step."""
        return self.active and any(p.grad is not None for p in self.params)

    def rebind(self, old: nn.Parameter, new: nn.Parameter) -> None:
        """Take another parameter in the place of one."""
        for name in ("weight", "bias", "own_bias"):
            if getattr(self, name) is old:
                setattr(self, name, new)

    def works_with(self, rule: Rule) -> bool:
        """Whether a rule can precondition it: without a layer that is called there are no rows."""
        return not (rule.needs_rows and isinstance(self.kind, LooseKind))

    def gradient(self, known: Mapping[nn.Parameter, Tensor] | None = None) -> Tensor:
        """The gradient as one matrix, ``[d_o, d_i]``, with zeros for a parameter that has none.

        Args:
            known: Tensors to take in the place of ``p.grad``, each as a whole.
        """
        known = known or {}
        weight, *bias = (known[p] if p in known else whole(gradient_of(p)) for p in self.params)
        return self.kind.to_matrix(self.modules[0], weight, bias[0] if bias else None)

    def structures(self) -> dict[str, Any]:
        """The structure of each side."""
        K, C = resolve(self.group["structures"])
        forced = self.kind.input_structure
        return {INPUT: K if forced is None else resolve((forced, forced))[0], OUTPUT: C}

    def dtype(self, side: str) -> torch.dtype:
        """That of the factors of a side."""
        pair = dict(zip((INPUT, OUTPUT), dtypes(self.group["preconditioner_dtype"]), strict=True))
        return pair[side] or self.weight.dtype

    def identity(self, side: str, **kw: Any) -> StructuredMatrix:
        """A fresh identity for a side, on the weight's device."""
        n = dict(zip((OUTPUT, INPUT), self.size, strict=True))[side]
        options = {"dtype": self.dtype(side), "device": self.weight.device, **kw}
        return self.structures()[side](n, **options)

    def blueprints(self) -> dict[str, StructuredMatrix]:
        """What the rule keeps, without numbers: shapes and dtypes on the meta device."""
        group, weight = self.group, self.weight
        options = (
            group["structures"],
            self.rule,
            group["preconditioner_dtype"],
            bool(group["alpha1"]),
        )
        key = (*options, weight.dtype, self.bias is None)
        if self.factors.key != key:
            self._check_change()
            eye = {side: self.identity(side, device="meta") for side in (INPUT, OUTPUT)}
            self.factors.shape_as(key, eye, self.rule.kept(group))
        return self.factors.blueprints

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


@dataclass(eq=False)
class Slot:
    """A place of the model that holds a parameter, to notice when it holds another one."""

    module: nn.Module
    attribute: str
    param: nn.Parameter

    def current(self) -> nn.Parameter | None:
        return parameters_by_attribute(self.module).get(self.attribute)


def replaced_parameters(
    slots: Sequence[Slot], names: Mapping[nn.Parameter, str]
) -> dict[nn.Parameter, nn.Parameter]:
    """The parameters that are not in the model any more, each with the one in its place; the slots follow.

    Raises:
        RuntimeError: If a parameter that was tied is in one of its places only.
    """
    replacements: dict[nn.Parameter, nn.Parameter] = {}
    moved = []
    for slot in slots:
        old, new = slot.param, slot.current()
        gathered = hasattr(old, "full_tensor") and not hasattr(new, "full_tensor")
        if new is None or new is old or gathered:
            continue  # (FSDP shows the gathered weight in a forward; the sharded one is the parameter)
        if replacements.setdefault(old, new) is not new:
            raise RuntimeError(
                f"The weight {names[old]!r} was tied to another one when SINGD was built and is not any more; "
                "tie them again after load_state_dict(assign=True)."
            )
        moved.append((slot, new))
    for slot, new in moved:
        slot.param = new
    return replacements


def gradient_of(p: nn.Parameter) -> Tensor:
    """A parameter's gradient, zeros where there is none."""
    return torch.zeros_like(p) if p.grad is None else p.grad


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself; of one that ``fully_shard`` spread over ranks, all of it (every rank must ask)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def unwrapped(model: nn.Module) -> tuple[nn.Module, bool]:
    """The user's model inside wrappers, and whether one of them averages gradients over processes.

    The wrappers are those of torch.compile, DistributedDataParallel and DataParallel.
    """
    averages = False
    while True:
        if (inner := uncompiled(model)) is not None:
            model = inner
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            averages |= isinstance(model, nn.parallel.DistributedDataParallel)
            model = model.module
        else:
            return model, averages


def find_slots(model: nn.Module) -> list[Slot]:
    """Every place of the model that holds a parameter.

    Raises:
        ValueError: If a lazy layer is not materialised yet.
    """
    slots = []
    for name, module in model.named_modules():
        for attribute, param in parameters_by_attribute(module).items():
            if isinstance(param, UninitializedParameter):
                raise ValueError(
                    f"The lazy layer {name!r} has no sizes yet; call the model once before building SINGD."
                )
            if param is not None:
                slots.append(Slot(module, attribute, param))
    return slots


def find_blocks(model: nn.Module) -> tuple[list[Block], dict[nn.Parameter, str]]:
    """The blocks of a model, and for parameters of known layers that cannot have one, why.

    Weights tied between layers of one kind make one block; tied between kinds (an embedding and the
    output layer) the roles of the two factors differ, so that no single Kronecker product is right.
    After them come loose matrices, which only a rule without rows can precondition.
    """
    blocks: dict[nn.Parameter, Block] = {}
    reasons: dict[nn.Parameter, str] = {}
    for name, module in model.named_modules():
        kind = find_kind(module)
        if kind is None:
            continue
        weight, bias = cast(nn.Parameter, module.weight), cast(Any, getattr(module, "bias", None))
        reason = kind.supports(module)
        if reason is None and not weight.is_floating_point():
            reason = f"its weight is {weight.dtype}"
        if reason is not None:
            reasons.update({p: reason for p in (weight, bias) if p is not None})
            continue
        block = blocks.get(weight)
        if block is None:
            blocks[weight] = Block(kind, [module], [name], weight, bias)
            continue
        block.modules.append(module)
        block.names.append(name)
        if block.kind is not kind:
            reasons[weight] = "it is tied between layers of different kinds"
        if block.own_bias is not bias:  # tied weights with biases of their own: these stay outside
            for p in (block.own_bias, bias):
                if p is not None:
                    reasons[p] = "its weight is tied to a layer with another bias"
            block.own_bias = None
    biases = [b.own_bias for b in blocks.values() if b.own_bias is not None]
    for block in blocks.values():
        if block.own_bias is not None and sum(block.own_bias is b for b in biases) > 1:
            reasons[block.own_bias] = "it is the bias of layers with other weights"
    for block in blocks.values():
        if block.own_bias in reasons:
            block.own_bias = None
    found = [b for w, b in blocks.items() if w not in reasons]
    taken = {p for b in found for p in (b.weight, b.own_bias)} | set(reasons)
    return found + _loose_blocks(model, taken), reasons


def _loose_blocks(model: nn.Module, taken: set[Any]) -> list[Block]:
    """Matrices outside of known layers: of attention, of recurrent layers, and loose parameters."""
    found: dict[nn.Parameter, Block] = {}
    for name, module in model.named_modules():
        for attribute, p in parameters_by_attribute(module).items():
            if p is None or p in taken or p in found or p.ndim != 2 or not p.is_floating_point():
                continue
            if min(p.shape) > 1:
                full = f"{name}.{attribute}" if name else attribute
                found[p] = Block(LooseKind(attribute), [module], [full], p, None)
    return list(found.values())


def check_dense(
    params: Iterable[Any], reasons: Mapping[Any, str], names: Mapping[Any, str]
) -> None:
    """Refuse parameters with sparse gradients, which AdamW cannot train either, unless they are frozen."""
    for p in params:
        if p.requires_grad and reasons.get(p) == SPARSE:
            raise ValueError(
                f"{names[p]!r} gets sparse gradients, which neither SINGD nor AdamW can use; choose sparse=False, "
                "or hand it to another optimizer (torch.optim.SparseAdam)."
            )
