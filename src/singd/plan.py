"""What of a model can be preconditioned, and which algorithm trains what: decided before anything is changed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from singd import groups
from singd.blocks import Block
from singd.layers import find_kind
from singd.layers.embedding import SPARSE
from singd.layers.loose import LooseKind
from singd.torch_private import parameters_by_attribute, uncompiled


@dataclass(eq=False)
class Slot:
    """A place of the model that holds a parameter, to notice when it holds another one."""

    there: Mapping[str, nn.Parameter | None]  # the parameters of a module
    attribute: str
    param: nn.Parameter


class Plan:
    """A model as the optimizer sees it.

    Attributes:
        slots: Every place of the model that holds a parameter.
        blocks: What can be preconditioned.
        reasons: Why some parameters cannot.
        names: Of all parameters.
        fallback: AdamW's options; None if it is switched off.
        announced: The weights of all groups that are being added.
    """

    def __init__(self, model: nn.Module, fallback: Mapping[str, Any] | None) -> None:
        self.slots = find_slots(model)
        self.blocks, self.reasons = find_blocks(model)
        self.names = {p: n for n, p in model.named_parameters()}
        self.fallback = fallback
        self.announced: set[Any] = set()

    def trainable(self, options: Mapping[str, Any], warn: bool) -> list[nn.Parameter]:
        """What is trained where the user names no parameters.

        Args:
            options: Of all groups.
            warn: Whether to warn of parameters that are left out.
        """
        found = [p for p in self.names if p.requires_grad]
        if self.fallback is not None:
            return found
        rule = groups.rule_of(options)
        able = [b for b in self.blocks if b.weight.requires_grad and b.works_with(rule)]
        ours = {p for b in able for p in (b.weight, b.own_bias)}
        left = [self.names[p] for p in found if p not in ours]
        if left and warn:
            warnings.warn(
                f"SINGD leaves out parameters that are in no supported layer: {', '.join(left)}.",
                stacklevel=4,
            )
        return [p for p in found if p in ours]

    def replaced(self) -> dict[nn.Parameter, nn.Parameter]:
        """The parameters that are not in the model any more, each with the one in its place; the plan follows.

        Raises:
            RuntimeError: If a parameter that was tied is in one of its places only.
        """
        new_of: dict[nn.Parameter, nn.Parameter] = {}
        moved = []
        for slot in [s for s in self.slots if s.there.get(s.attribute) is not s.param]:
            old, new = slot.param, slot.there.get(slot.attribute)
            gathered = hasattr(old, "full_tensor") and not hasattr(new, "full_tensor")
            if new is None or gathered:
                continue  # (FSDP shows the gathered weight in a forward; the sharded one is the parameter)
            if new_of.setdefault(old, new) is not new:
                raise RuntimeError(
                    f"The weight {self.names[old]!r} was tied to another one when SINGD was built and is not any "
                    "more; tie them again after load_state_dict(assign=True)."
                )
            moved.append((slot, new))
        for slot, new in moved:
            slot.param = new
        for old, new in new_of.items():
            self.names[new] = self.names.pop(old)
            for block in self.blocks:
                block.rebind(old, new)
        return new_of

    def split(self, group: Mapping[str, Any], options: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The groups that a group becomes: of the parameters that are preconditioned, and of all others.

        A bias shares its weight's matrix. It follows the weight also where the two are in different groups.

        Args:
            group: What the user said of it, checked.
            options: The same, completed.

        Raises:
            TypeError: For what is no parameter.
            ValueError: For a parameter that isn't the model's, that nothing can train, or a bias that comes too
                late.
        """
        params = set(map(groups.parameter, group["params"]))
        for p in params:
            if not isinstance(p, Tensor):
                raise TypeError(f"A group needs parameters of the model, got {p!r}.")
            if p not in self.names:
                shape = tuple(getattr(p, "shape", ()))
                raise ValueError(f"A parameter of shape {shape} isn't one of the model's.")
        ours: set[Any] = set()
        for block in self.blocks if options["algorithm"] == "singd" else ():
            trains = block.weight.requires_grad  # else its bias has nothing to be a column of
            joins = block.active or block.weight in self.announced
            if block.weight in params and block.works_with(groups.rule_of(options)):
                ours |= {block.weight, block.own_bias} if trains else {block.weight}
            elif trains and block.own_bias in params and joins:
                if block.factors.started:
                    raise ValueError(
                        f"The bias of layer {block.name!r} can't join its matrix after the first step; "
                        "add it with algorithm='adamw', or build SINGD with it."
                    )
                ours.add(block.own_bias)
        rest = [p for p in group["params"] if groups.parameter(p) not in ours]
        # checked also where nothing falls to it
        adamw = groups.fallback_group(group, self.fallback)
        self._check_rest([groups.parameter(p) for p in rest], options["algorithm"])
        mine = [p for p in group["params"] if groups.parameter(p) in ours]
        found = [{**group, "params": mine}] if mine or not rest else []
        if rest:
            found.append({**adamw, "params": rest})
        return found

    def take(self, param_groups: groups.Groups) -> None:
        """Note what is trained by groups that were added."""
        ours = [g["params"] for g in param_groups if g["algorithm"] == "singd"]
        handed = {p for params in ours for p in params}
        for block in self.blocks:
            block.active |= block.weight in handed
            if block.own_bias in handed:
                block.bias = block.own_bias

    def _check_rest(self, rest: list[nn.Parameter], algorithm: str) -> None:
        """Refuse parameters that AdamW cannot train either: switched off, or sparse gradients and not frozen."""
        for p in rest:
            if p.requires_grad and self.reasons.get(p) == SPARSE:
                raise ValueError(
                    f"{self.names[p]!r} gets sparse gradients, which neither SINGD nor AdamW can use; choose "
                    "sparse=False, or hand it to another optimizer (torch.optim.SparseAdam)."
                )
        if rest and self.fallback is None and algorithm != "adamw":
            left = ", ".join(self.names[p] for p in rest)
            raise ValueError(
                f"SINGD can't precondition {left}, and fallback=None leaves them no other algorithm."
            )


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
                slots.append(Slot(parameters_by_attribute(module), attribute, param))
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
