"""Whether the calls of a layer that hooks see make up the gradient of its weight.

Where they do not, the weight is also used by other means (``F.linear``, or the layer's ``forward`` itself), and
the statistics are those of a part. In the first backward pass through each layer this is looked at once, by the
law that the gradient is the sum of g a^T over all rows: both sides are multiplied by some random vectors.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from singd import torch_private
from singd.blocks import Block
from singd.precision import wide_dtype

PROBES = 8
"""How many random vectors the law is looked at with: one may be blind to what is missing."""

TOLERANCE = 0.1
"""The largest relative difference that is taken for rounding, or for a penalty on the weights beside the loss."""


class Witness:
    """What hooks saw in the first backward pass through each layer, and the gradient that it should make up."""

    def __init__(self) -> None:
        self.looked: set[Block] = set()  # once is enough, also where nothing can be said
        self.waits: dict[Block, tuple[Tensor, Any]] = {}  # random vectors u, the weight's hook
        self._seen: dict[Block, tuple[int, Tensor]] = {}  # the backward pass, the sum of g (a u)

    def awaits(self, block: Block, layer: nn.Module) -> list[Any]:
        """Before the first backward through a block: have a look at the gradient of its weight in it.

        Returns:
            The handle that takes the weight's hook off; none where nothing can be said.
        """
        self.looked.add(block)
        weight: Any = layer.weight
        plain = weight.is_leaf and not hasattr(weight, "full_tensor")
        if not plain or weight.is_meta or weight.dtype == torch.float16:  # whose sums overflow
            return []
        # of a generator of its own: the user's random numbers stay what they would be without
        own = torch.Generator(weight.device).manual_seed(0)
        kind: dict[str, Any] = dict(dtype=wide_dtype(weight.dtype), device=weight.device)
        u = torch.randn(block.size[1], PROBES, generator=own, **kind)
        if block.bias is not None:
            u[-1] = 0.0

        @torch.utils.hooks.unserializable_hook
        def compare(gradient: Tensor) -> None:
            if block in self._seen and block in self.waits:
                self._compare(block, layer, gradient)

        handle = weight.register_hook(compare)
        self.waits[block] = u, handle
        return [handle]

    def gathers(self, block: Block, layer: Any, x: Tensor, g: Tensor) -> None:
        """Add the rows of one call in a backward pass."""
        u, _ = self.waits[block]
        if (groups := _groups(layer)) > 1:  # their rows are means: of equal ones, here the first
            channels = -1 - len(layer.kernel_size)
            x = torch.cat([x.chunk(groups, channels)[0]] * groups, channels)
        rows: dict[str, Any] = dict(approx="expand", dtype=u.dtype)
        a = block.kind.input_rows(
            layer, x, bias=block.bias is not None, output_shape=g.shape, **rows
        ).mm(u)
        total = block.kind.grad_rows(layer, g, x, **rows).tmm(a)
        number, before = self._seen.get(block, (-1, total))
        now = torch_private.backward_number()
        self._seen[block] = now, before + total if number == now else total

    @torch.no_grad()
    def _compare(self, block: Block, layer: nn.Module, gradient: Tensor) -> None:
        (u, handle), (_, seen) = self.waits[block], self._seen[block]
        handle.remove()
        del self.waits[block], self._seen[block]
        matrix = block.kind.weight_to_matrix(layer, gradient)
        first = matrix.shape[0] // _groups(layer)
        whole, seen = matrix[:first].to(u.dtype) @ u[: matrix.shape[1]], seen[:first]
        size = torch.maximum(whole.norm(), seen.norm())
        if bool((whole - seen).norm() > TOLERANCE * size):  # (a comparison with nan is false)
            warnings.warn(
                f"Layer {block.name!r} is seen in part: its weight gets gradients that its calls do not make up, "
                "so its factors are those of its calls only; call the layer itself wherever its weight is used.",
                stacklevel=2,
            )


def _groups(layer: Any) -> int:
    """The channel groups of a convolution; one of other layers."""
    return getattr(layer, "groups", 1)
