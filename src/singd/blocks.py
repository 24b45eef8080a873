"""What of a model SINGD can precondition: one block of the Fisher matrix per layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from singd.layers import LayerKind, find_kind
from singd.options import dtypes, resolve
from singd.structures import Preconditioner, StructuredMatrix

SIDES = ("K", "C")


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
    active: bool = False  # whether its weight was handed to the optimizer
    frozen_shape: bool = False  # whether factors exist, so that the bias cannot join any more
    _blueprints: dict[str, tuple[str, int, StructuredMatrix]] = field(default_factory=dict)
    _views: dict[str, tuple[Tensor, StructuredMatrix]] = field(default_factory=dict)
    _products: dict[str, tuple[Tensor, Preconditioner | StructuredMatrix]] = field(
        default_factory=dict
    )

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

    def gradient(self, known: Mapping[nn.Parameter, Tensor] | None = None) -> Tensor:
        """The gradient as one matrix, ``[d_o, d_i]``, with zeros for a parameter that has none.

        Args:
            known: Gradients that are there as a whole already, of sharded parameters.
        """
        known = known or {}
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        pairs = zip(self.params, grads, strict=True)
        weight, *bias = (known[p] if p in known else whole(g) for p, g in pairs)
        return self.kind.to_matrix(self.modules[0], weight, bias[0] if bias else None)

    def structures(self) -> dict[str, Any]:
        K, C = resolve(self.group["structures"])
        forced = self.kind.input_structure
        return {"K": K if forced is None else resolve((forced, forced))[0], "C": C}

    def dtype(self, side: str) -> torch.dtype:
        return dtypes(self.group["preconditioner_dtype"])[SIDES.index(side)] or self.weight.dtype

    def identity(self, side: str, **kw: Any) -> StructuredMatrix:
        """A fresh identity for ``side`` ("K" or "C") on the weight's device."""
        n = self.size[1 if side == "K" else 0]
        return self.structures()[side](
            n, **{"dtype": self.dtype(side), "device": self.weight.device, **kw}
        )

    def blueprint(self, side: str) -> StructuredMatrix:
        """A factor's shape without its numbers; made once."""
        key = self.structures()[side].name, self.size[1 if side == "K" else 0]
        known = self._blueprints.get(side)
        if known is None or known[:2] != key:
            known = (*key, self.identity(side, device="meta"))
            self._blueprints[side] = known
        return known[2]

    def view(self, key: str, flat: Tensor) -> StructuredMatrix:
        """The matrix whose numbers are ``flat``, for ``key`` in K, C, m_K, m_C."""
        known = self._views.get(key)
        if known is None or known[0] is not flat:
            known = (flat, self.blueprint(key[-1]).from_flat(flat))
            self._views[key] = known
        return known[1]

    def remember(self, key: str, flat: Tensor, matrix: StructuredMatrix) -> None:
        """Make the view on ``flat``, a matrix' own numbers, now, so that the one before it keeps no memory."""
        same = flat.data_ptr() == matrix.tensors()[0].data_ptr()
        self._views[key] = (flat, matrix if same else matrix.from_flat(flat))

    def product(self, key: str, flat: Tensor) -> Preconditioner | StructuredMatrix:
        """K K^T (or C C^T) where it is worth keeping between updates, else the factor itself."""
        matrix = self.view(key, flat)
        if self.group["T"] == 1:
            return matrix
        known = self._products.get(key)
        if known is None or known[0] is not flat:  # every update makes a new tensor
            known = (flat, matrix.preconditioner() or matrix)
            self._products[key] = known
        return known[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_blueprints": {}, "_views": {}, "_products": {}}


@dataclass(eq=False)
class Slot:
    """A place of the model that holds a parameter, to notice when it holds another one."""

    module: nn.Module
    attribute: str
    param: nn.Parameter

    def current(self) -> nn.Parameter | None:
        return self.module._parameters.get(self.attribute)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself; of one that ``fully_shard`` spread over ranks, all of it (every rank must ask)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def unwrapped(model: nn.Module) -> tuple[nn.Module, bool]:
    """The user's model inside wrappers, and whether one of them averages gradients over processes.

    The wrappers are those of torch.compile, DistributedDataParallel and DataParallel.
    """
    averages = False
    while True:
        if hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
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
        for attribute, param in module._parameters.items():
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
    """
    blocks: dict[nn.Parameter, Block] = {}
    reasons: dict[nn.Parameter, str] = {}
    for name, module in model.named_modules():
        kind = find_kind(module)
        if kind is None:
            continue
        weight, bias = module.weight, getattr(module, "bias", None)
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
    return [b for w, b in blocks.items() if w not in reasons], reasons
