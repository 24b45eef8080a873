"""Sums over the patches of a convolution that are never unfolded; on a CPU, part by part in its cache."""

from __future__ import annotations

import torch
from torch import Size, Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from singd.kernels.cpu_products import add_, add_symmetric_, mirror_
from singd.kernels.patches import Patches, unfold
from singd.kernels.registry import register_kernel
from singd.kernels.shifted_products import Plan, cheapest_plan
from singd.precision import wide_dtype


def patch_sums(p: Patches, squared: bool) -> Tensor:
    """See `kernels.patch_sums`: over the batch first, which leaves next to nothing to pad and to slide over."""
    parts = (part.x.square() if squared else part.x for part in p.split())
    sums = [part.sum(0, keepdim=True, dtype=wide_dtype(p.x.dtype)) for part in parts]
    total = p.pad(torch.cat(sums).sum(0, keepdim=True))[0]
    for k, s, d in zip(*p.window, strict=True):  # over the places, one axis after the other
        total = total.unfold(1, (k - 1) * d + 1, s)[..., ::d].sum(1)
    return total.flatten().to(p.x.dtype)


def patch_tmm(p: Patches, Y: Tensor) -> Tensor:
    """See `kernels.patch_tmm`: the weight's gradient of a convolution whose output has the gradient Y."""
    weight_grad = (conv1d_weight, conv2d_weight, conv3d_weight)[len(p.places) - 1]
    size, stride, dilation = p.window
    g = Y.T.unflatten(1, (len(p.x), *p.places)).transpose(0, 1)
    shape = Size((Y.shape[1], p.x.shape[1], *size))
    return weight_grad(p.padded(), shape, g, stride=stride, dilation=dilation).flatten(1).T


def patch_gram(p: Patches) -> Tensor:
    """See `kernels.patch_gram`: by shifted products where they pay, else unfolded part by part."""
    plan = cheapest_plan(p.window, (*p.x.shape[:2], *p.sizes), p.zeros)
    if plan is not None:
        return shifted_gram(p, plan).to(p.x.dtype)
    total = p.x.new_zeros(p.width, p.width, dtype=wide_dtype(p.x.dtype))
    for part in p.split(p.width * p.places.numel()):
        X = part.unfold()
        add_symmetric_(total, X, X.T)
    return mirror_(total).to(p.x.dtype)


def shifted_gram(p: Patches, plan: Plan) -> Tensor:
    """The Gram matrix of all patches, unfolding all axes but the plan's; see `shifted_products`."""
    rest, axis, stride = p.window.without(plan.axis), plan.axis, p.window.stride[plan.axis]
    E = p.x.shape[1] * rest.numel
    sums = p.x.new_zeros(len(plan.products), E, E, dtype=wide_dtype(p.x.dtype))
    for part in p.split(p.x.shape[1] * p.sizes.numel() * rest.numel):
        x = part.padded().movedim(2 + axis, 2)[:, :, plan.inside]
        phases = {i: unfold(x[:, :, i::stride], rest) for i in plan.phases}  # [E, rows, B * places]
        for total, product in zip(sums, plan.products, strict=True):
            U, V, shift, lo, hi = product
            L = phases[U][:, lo:hi].flatten(1)
            R = phases[V][:, lo + shift : hi + shift].flatten(1).T
            if product.symmetric:
                add_symmetric_(total, L, R)
            else:
                add_(total, L, R)
    half = (p.x.shape[1], *p.window.size)
    gram = sums.new_zeros(*half, *half)
    # blocks[i, j] is a view of all entries with these offsets along the plan's axis.
    blocks = gram.movedim((1 + axis, 1 + axis + len(half)), (0, 1))
    for (i, j), parts in plan.blocks.items():
        block = sums[parts].sum(0)
        block = mirror_(block) if i == j else block
        blocks[i, j] = block.view(blocks.shape[2:])
        blocks[j, i] = block.T.reshape(blocks.shape[2:])
    return gram.view(p.width, p.width)


def _something(p: Patches, Y: Tensor) -> bool:
    """Whether there is anything to multiply, which a convolution asks for."""
    return Y.numel() > 0


register_kernel("patch_sums", "any", patch_sums)
register_kernel("patch_tmm", "cpu", patch_tmm, _something)
register_kernel("patch_gram", "cpu", patch_gram)
