"""Which kind a module is."""

from __future__ import annotations

import sys

from torch import nn

from singd.layers.base import LayerKind
from singd.layers.conv import ConvKind
from singd.layers.conv_transpose import ConvTransposeKind
from singd.layers.embedding import EmbeddingKind
from singd.layers.linear import LinearKind

KINDS: dict[type[nn.Module], LayerKind] = {
    nn.Linear: LinearKind(),
    nn.Embedding: EmbeddingKind(),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), ConvKind()),
    **dict.fromkeys(
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), ConvTransposeKind()
    ),
}
"""The kind of each layer class that SINGD preconditions."""


def register_layer(layer_class: type[nn.Module], kind: LayerKind) -> None:
    """Let SINGD precondition layers of a class of yours, or replace the kind of a known class.

    Args:
        layer_class: A subclass of `nn.Module` with the parameter `weight` and perhaps `bias`.
            Subclasses of it must be registered themselves.
        kind: An object that describes it, usually of a small subclass of the kind most alike.

    Raises:
        TypeError: One of the arguments is something else.

    Example:
        >>> from torch import nn
        >>> from singd.layers import LinearKind, find_kind, register_layer
        >>> class MyLinear(nn.Linear):
        ...     '''A Linear with a longer `extra_repr`, say.'''
        >>> find_kind(MyLinear(3, 2)) is None
        True
        >>> register_layer(MyLinear, LinearKind())
        >>> find_kind(MyLinear(3, 2)).size(MyLinear(3, 2), bias=True)
        (2, 4)
    """
    if not (isinstance(layer_class, type) and issubclass(layer_class, nn.Module)):
        raise TypeError(f"layer_class must be a subclass of nn.Module, got {layer_class!r}.")
    if not isinstance(kind, LayerKind):
        raise TypeError(f"kind must be an object of a LayerKind class, got {kind!r}.")
    KINDS[layer_class] = kind


def find_kind(module: nn.Module) -> LayerKind | None:
    """The kind of a module, or None if SINGD has no factors for it.

    A class must be registered itself: a subclass may compute something else in its `forward`. None,
    too, where the weight is computed from other parameters (`nn.utils.parametrize`, and the older
    `weight_norm`, `spectral_norm` and pruning), because the gradient then belongs to those.
    """
    kind = KINDS.get(_own_class(module))
    return kind if module._parameters.get("weight") is not None else None


def _own_class(module: nn.Module) -> type:
    """The module's class, without the one that FSDP2's `fully_shard` puts in front."""
    cls = type(module)
    # Who never imported FSDP has no sharded module, and need not wait for the import.
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if fsdp is None or not issubclass(cls, fsdp):
        return cls
    return next(base for base in cls.__mro__ if not issubclass(base, fsdp))
