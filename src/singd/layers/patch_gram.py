"""The Gram matrix of a convolution's patches by shifted products, see `shifted_products`."""

from __future__ import annotations

from torch import Tensor

from singd.layers.padded import PaddedInput
from singd.layers.rows import add_product_, wide
from singd.layers.shifted_products import Plan
from singd.layers.windows import Kernel, windows
from singd.products import add_symmetric_, mirror_


def shifted_gram(padded: PaddedInput, kernel: Kernel, plan: Plan) -> Tensor:
    """The Gram matrix of all patches, unfolding all axes but the plan's.

    Args:
        padded: The padded input.
        kernel: The kernel.
        plan: The products to form.

    Returns:
        [d, d], channel-major as the patches, in the dtype of the padded input.
    """
    rest, stride = kernel.without(plan.axis), kernel.stride[plan.axis]
    E = padded.shape[0] * rest.numel
    sums = padded.x.new_zeros(len(plan.products), E, E, dtype=wide(padded.dtype))
    for part in padded.split(growth=1.0 + rest.numel):
        x = part.tensor().movedim(2 + plan.axis, 2)
        x = x[:, :, plan.before : x.shape[2] - plan.after]
        phases = {phase: _unfold(x[:, :, phase::stride], rest) for phase in plan.phases}
        for total, product in zip(sums, plan.products, strict=True):
            U, V, shift, lo, hi = product
            left = phases[U][:, lo:hi].flatten(1)
            if product.symmetric:
                add_symmetric_(total, left, left.T)
            else:
                right = phases[V][:, lo + shift : hi + shift].flatten(1)
                add_product_(total, left, right.T)
    for total, product in zip(sums, plan.products, strict=True):
        if product.symmetric:
            mirror_(total)
    return _assemble(sums, padded.shape[0], kernel, plan).to(padded.dtype)


def _unfold(x: Tensor, kernel: Kernel) -> Tensor:
    """Unfold x [B, C, h, *n] along the axes n: [C * k, h, B * o]."""
    view = windows(x, kernel)  # [B, C, h, *o, *k]
    places, offsets = range(3, x.ndim), range(x.ndim, view.ndim)
    columns = view.permute(1, *offsets, 2, 0, *places)
    h_axis = 1 + len(offsets)
    return columns.flatten(h_axis + 1).flatten(0, h_axis - 1)


def _assemble(sums: Tensor, channels: int, kernel: Kernel, plan: Plan) -> Tensor:
    """Put the products [products, E, E] where they belong: [d, d]."""
    gram = sums.new_zeros(channels, *kernel.size, channels, *kernel.size)
    first = 1 + plan.axis
    second = first + 1 + len(kernel.size)
    # blocks[p, q] is a view of all entries with these offsets along the plan's axis.
    blocks = gram.movedim((first, second), (0, 1))
    for (p, q), parts in plan.blocks.items():
        block = sums[parts[0]] if len(parts) == 1 else sums[parts].sum(0)
        blocks[p, q] = block.view(blocks.shape[2:])
        if p < q:
            blocks[q, p] = block.T.reshape(blocks.shape[2:])
    d = channels * kernel.numel
    return gram.view(d, d)
