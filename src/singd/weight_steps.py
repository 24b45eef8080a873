"""The step on the weights: momentum, direction, size, and torch's own SGD and AdamW to take it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from singd import torch_private
from singd.blocks import Block, gradient_of
from singd.precision import accumulation_dtype, wide_dtype
from singd.processes import collectives
from singd.processes.ownership import Ownership

CACHE = 2**18
"""How many bytes of weights a CPU moves at a time: they are still in its cache, and small tensors share calls."""


def keeps_products(block: Block, wanted: bool | None) -> bool:
    """Whether K K^T and C C^T are kept between updates; None: where they take at most half as much as it."""
    if wanted is not None:
        return wanted
    block.blueprints()
    return 2 * block.factors.product_numel <= block.weight.numel()


@dataclass
class NaturalSteps:
    """Moves the parameters of layers along their directions, in one step of the optimizer.

    A CPU moves parameters while their directions are computed and still in its cache; other devices move all
    parameters of a group in one call, as torch's own optimizers do.

    Attributes:
        states: The optimizer's state by parameter; momentum buffers are kept in it.
        group_of: Each parameter's group.
        owners: Which process keeps which layer; None where each keeps all.
        cache_products: Whether products of the factors are kept between updates; None: where they are small.
        rehearsal: Whether all gradients are zero, and no factors needed.
    """

    states: MutableMapping[Any, dict[str, Any]]
    group_of: Mapping[nn.Parameter, dict[str, Any]]
    owners: Ownership | None
    cache_products: bool | None
    rehearsal: bool

    def take(self, blocks: Sequence[Block]) -> None:
        """One step of the layers that take part in it."""
        waiting: dict[Any, list[tuple[nn.Parameter, Tensor]]] = {}  # what can move in one call
        size = 0
        found = self._preconditioned(blocks)
        if self.owners is not None:
            found = self.owners.directions(found, self.rehearsal)
        for block, N in found:
            rms, parts = block.group["match_rms"], block.parts(N)
            for p, d in zip(block.params, parts, strict=False):
                if d is not None and p.grad is not None:
                    alike = (id(self.group_of[p]), rms, d.dtype, d.device)
                    waiting.setdefault(alike, []).append((p, d))
                    size += p.nbytes
            if N.device.type == "cpu" and size >= CACHE:
                self._move(waiting)
                size = 0
        self._move(waiting)

    def _preconditioned(self, blocks: Sequence[Block]) -> Iterator[tuple[Block, Any]]:
        """The direction of each layer, [d_o, d_i]; None where another process computes it."""
        for block, dW in self._averaged(blocks):
            if self.rehearsal:
                yield block, dW  # it is zero
            elif self.owners is not None and not self.owners.keeps(block):
                yield block, None
            else:
                keep = block.group["T"] != 1 and keeps_products(block, self.cache_products)
                rule, state = block.rule, self.states[block.weight]
                prepared = block.factors.prepared(rule, state, keep, block.weight.device)
                yield block, rule.direction(prepared, dW, overwrite=block.bias is not None)

    def _averaged(self, blocks: Sequence[Block]) -> Iterator[tuple[Block, Tensor]]:
        """The averaged gradient of each layer as a matrix, [d_o, d_i], whole.

        Small layers share calls: as many as fit into a CPU's cache, or, where ``fully_shard`` spread parameters
        over ranks, into one gather.
        """
        params_of = {block: block.params for block in blocks}
        sharded = any(_is_sharded(p) for params in params_of.values() for p in params)
        in_cache = not sharded and bool(blocks) and blocks[0].weight.device.type == "cpu"
        portion: list[Block] = []
        size = 0
        for i, block in enumerate(blocks):
            portion.append(block)
            size += sum(p.nbytes for p in params_of[block])
            if size >= (CACHE if in_cache else collectives.BUCKET) or i == len(blocks) - 1:
                vectors = self._averaged_gradients([p for b in portion for p in params_of[b]])
                if sharded:
                    vectors = collectives.gathered(vectors)
                for b in portion:
                    yield b, b.matrix([vectors.pop(p) for p in params_of[b]])
                portion, size = [], 0

    def _averaged_gradients(self, params: Sequence[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
        r"""The gradients with the momentum that stands before the preconditioner (``momentum_on="gradient"``).

        .. math:: B \leftarrow \alpha_2 B + (1 - \alpha_2)\, g, \qquad V = B
            \text{, or with Nesterov } V = \alpha_2 B + (1 - \alpha_2)\, g

        The first gradient counts in full. No gradient is changed.
        """
        found = {p: gradient_of(p) for p in params}
        for group in {id(self.group_of[p]): self.group_of[p] for p in params}.values():
            alpha_2 = group["momentum"]
            if group["momentum_on"] != "gradient" or alpha_2 == 0:
                continue
            some = [p for p in params if self.group_of[p] is group]
            B = [self._buffer(p, found[p]) for p in some]
            g = [found[p].to(b.dtype) for p, b in zip(some, B, strict=True)]
            torch_private.lerp_all_(B, g, 1 - alpha_2)
            V = torch_private.lerp_all(g, B, alpha_2) if group["nesterov"] else B
            found.update(zip(some, V, strict=True))
        return found

    def _buffer(self, p: nn.Parameter, first: Tensor | None) -> Tensor:
        """The momentum of a parameter, beside it; at first a copy of a tensor, or zeros."""
        buffer = self.states[p].get("momentum_buffer")
        if buffer is None:
            buffer = torch.zeros_like(p) if first is None else first.clone()
        buffer = self.states[p]["momentum_buffer"] = _beside(buffer, p)
        return buffer

    def _move(self, waiting: dict[Any, list[tuple[Any, Tensor]]]) -> None:
        """Move parameters along their directions, with the momentum that stands after these."""
        for (_, rms, *_), pairs in waiting.items():
            params, directions = map(list, zip(*pairs, strict=True))
            group = self.group_of[params[0]]
            after = group["momentum_on"] == "direction" and group["momentum"] != 0
            if rms is not None:
                directions = matched(directions, rms)
            for i, p in enumerate(params):
                d = directions[i].to(p.dtype)
                directions[i] = collectives.placed_like(d, p) if _is_sharded(p) else d
            sgd(
                params,
                directions,
                [self._buffer(p, None) if after else None for p in params],
                foreach=None if any(map(_is_sharded, params)) else True,
                lr=group["lr"],
                momentum=group["momentum"] if after else 0.0,
                weight_decay=group["weight_decay"],
                dampening=0.0,
                nesterov=after and group["nesterov"],
                maximize=False,
            )
        waiting.clear()


def _is_sharded(p: nn.Parameter) -> bool:
    """Whether ``fully_shard`` spread it over ranks."""
    return type(p) is not nn.Parameter and hasattr(p, "full_tensor")


def matched(directions: Sequence[Tensor], rms: float) -> list[Tensor]:
    """Directions of one dtype and device, each scaled to a root mean square, whatever its size was."""
    dtype = wide_dtype(directions[0].dtype)
    sizes = torch.stack(torch_private.root_mean_squares(directions, dtype))
    least = 2**20 * torch.finfo(dtype).tiny  # so that the scale of zeros is finite
    return torch_private.scaled_all(directions, (rms / sizes.clamp(min=least)).unbind())


def adamw_step(group: dict[str, Any], states: MutableMapping[Any, dict[str, Any]]) -> None:
    """One step of AdamW on the parameters of a group that have a gradient.

    Args:
        group: The param_group.
        states: The optimizer's state by parameter; the moments are kept in it.
    """
    params = [p for p in group["params"] if p.grad is not None]
    moments = ("exp_avg", "exp_avg_sq")
    wide = [p.to(accumulation_dtype(p.dtype)) for p in params]
    for p, w in zip(params, wide, strict=True):
        state = states[p]
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state.update({name: torch.zeros_like(w) for name in moments})
        state.update({name: _beside(state[name], w) for name in moments})
    # In float16 AdamW's squares and its eps are zero, and their quotient is not a number.
    grads = [p.grad.to(w.dtype) for p, w in zip(params, wide, strict=True) if p.grad is not None]
    averages, squares = ([states[p][name] for p in params] for name in moments)
    # OneCycleLR and CyclicLR cycle one momentum for all groups, and note the largest in each.
    beta1 = group["momentum"] if "max_momentum" in group else group["betas"][0]
    adamw(
        wide,
        grads,
        averages,
        squares,
        [],
        [states[p]["step"] for p in params],
        fused=_one_pass([*wide, *grads, *averages, *squares]) or None,
        has_complex=any(p.is_complex() for p in params),
        amsgrad=False,
        beta1=beta1,
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
    for p, w in zip(params, wide, strict=True):
        if w is not p:
            p.copy_(w)


def _one_pass(tensors: Sequence[Tensor]) -> bool:
    """Whether torch's fused kernel may be used, which saves most of the time of small parameters on a CPU.

    It reads memory in order, whatever the strides say; elsewhere torch chooses well itself.
    """
    return all(
        type(t) in (Tensor, nn.Parameter)
        and t.device.type == "cpu"
        and t.is_floating_point()
        and t.is_contiguous()
        for t in tensors
    )


def _beside(tensor: Tensor, p: Tensor) -> Tensor:
    """State on the parameter's device and in its dtype, where a model was moved after construction."""
    return tensor.to(device=p.device, dtype=p.dtype)
