"""Sums over the patches of a convolution that are never unfolded; on a CPU, part by part in its cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Size, Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from singd.kernels.cpu_products import add_symmetric_, mirror_
from singd.kernels.patches import Patches, Window, windows
from singd.kernels.registry import register_kernel
from singd.kernels.shifted_products import Plan, cheapest_plan

CHUNK_BYTES = 2 * 2**20
"""How much is padded and unfolded at a time on a CPU; so much also stays in the cache."""


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def batches(x: Tensor, bytes_each: float) -> tuple[Tensor, ...]:
    """See `patches.batches`."""
    return x.split(max(1, int(CHUNK_BYTES / max(1.0, bytes_each))))


def window_sums(x: Tensor, window: Window) -> Tensor:
    """The sums of `windows` over all places, [..., *k], one axis after the other."""
    first = x.ndim - len(window.size)
    for k, s, d in zip(*window, strict=True):
        x = x.unfold(first, (k - 1) * d + 1, s)[..., ::d].sum(first)
    return x


def patch_sums(p: Patches, squared: bool) -> Tensor:
    """See `kernels.patch_sums`: over the batch first, which leaves next to nothing to pad and to slide over."""
    parts = (part.x.square() if squared else part.x for part in p.split(1.0))
    sums = [part.sum(0, keepdim=True, dtype=_wide(p.x)) for part in parts]
    total = sums[0] if len(sums) == 1 else torch.cat(sums).sum(0, keepdim=True)
    return window_sums(p.pad(total)[0], p.window).flatten().to(p.x.dtype)


def patch_means(p: Patches) -> Tensor:
    """See `kernels.patch_means`."""
    sums = [window_sums(part.padded(), p.window).flatten(1) for part in p.split(2.0)]
    return torch.cat(sums) / p.places.numel()


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
        return shifted_gram(p, plan)
    total = p.x.new_zeros(p.width, p.width, dtype=_wide(p.x))
    growth = p.places.numel() * p.window.numel / max(1, Size(p.sizes).numel())
    for part in p.split(1.0 + growth):
        X = part.unfold()
        add_symmetric_(total, X, X.T)
    return mirror_(total).to(p.x.dtype)


def shifted_gram(p: Patches, plan: Plan) -> Tensor:
    """The Gram matrix of all patches, unfolding all axes but the plan's; see `shifted_products`."""
    rest, stride = p.window.without(plan.axis), p.window.stride[plan.axis]
    E = p.x.shape[1] * rest.numel
    sums = p.x.new_zeros(len(plan.products), E, E, dtype=_wide(p.x))
    for part in p.split(growth=1.0 + rest.numel):
        x = part.padded().movedim(2 + plan.axis, 2)
        x = x[:, :, plan.before : x.shape[2] - plan.after]
        phases = {phase: _unfold_rest(x[:, :, phase::stride], rest) for phase in plan.phases}
        for total, product in zip(sums, plan.products, strict=True):
            U, V, shift, lo, hi = product
            left = phases[U][:, lo:hi].flatten(1)
            if product.symmetric:
                add_symmetric_(total, left, left.T)
            elif total.dtype == left.dtype:
                total.addmm_(left, phases[V][:, lo + shift : hi + shift].flatten(1).T)
            else:
                total += left @ phases[V][:, lo + shift : hi + shift].flatten(1).T
    for total, product in zip(sums, plan.products, strict=True):
        if product.symmetric:
            mirror_(total)
    return _assemble(sums, p, plan).to(p.x.dtype)


def _unfold_rest(x: Tensor, window: Window) -> Tensor:
    """Unfold x [B, C, h, *n] along the axes n: [C * k, h, B * o]."""
    view = windows(x, window)  # [B, C, h, *o, *k]
    places, offsets = range(3, x.ndim), range(x.ndim, view.ndim)
    columns = view.permute(1, *offsets, 2, 0, *places)
    return columns.flatten(2 + len(offsets)).flatten(0, len(offsets))


def _assemble(sums: Tensor, p: Patches, plan: Plan) -> Tensor:
    """Put the products [products, E, E] where they belong: [d, d]."""
    half = (p.x.shape[1], *p.window.size)
    gram = sums.new_zeros(*half, *half)
    # blocks[p, q] is a view of all entries with these offsets along the plan's axis.
    blocks = gram.movedim((1 + plan.axis, 1 + plan.axis + len(half)), (0, 1))
    for (i, j), parts in plan.blocks.items():
        block = sums[parts[0]] if len(parts) == 1 else sums[parts].sum(0)
        blocks[i, j] = block.view(blocks.shape[2:])
        if i < j:
            blocks[j, i] = block.T.reshape(blocks.shape[2:])
    return gram.view(p.width, p.width)


def _something(p: Patches, Y: Tensor) -> bool:
    """Whether there is anything to multiply, which a convolution asks for."""
    return Y.numel() > 0


_ANY: dict[str, Callable[..., Tensor]] = {"patch_sums": patch_sums, "patch_means": patch_means}
for name, run in _ANY.items():
    register_kernel(name, "any", run)
register_kernel("batches", "cpu", batches)
register_kernel("patch_tmm", "cpu", patch_tmm, _something)
register_kernel("patch_gram", "cpu", patch_gram)
