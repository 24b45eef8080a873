"""The steps on the weights: momentum, direction and size, and the moves along it, as SGD and AdamW make them.

A parameter and what is kept of its steps change together, without a line of Python in between: an exception,
Ctrl-C included, finds all of it done or nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from singd import alike, torch_private
from singd.blocks import Block, gradient_of
from singd.precision import accumulation_dtype, wide_dtype
from singd.processes import collectives
from singd.processes.ownership import Ownership

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's, which may be wider than the parameter."""

TOGETHER = 2**16
"""How many numbers a CPU moves at a time: so many are still in its cache, and small tensors share a call."""
TOGETHER_ELSEWHERE = 2**24
"""The same on other devices: few calls, and little memory for what is not stored yet."""


class Direction(NamedTuple):
    """Where a parameter moves to, and the root mean square that the move is scaled to, or None."""

    tensor: Tensor
    rms: float | None


@dataclass
class Attempt:
    """What a step has done; one that failed is tried again with the same attempt, and does what is left.

    Attributes:
        steps: The layers whose factors took part, each with how many steps it had taken before.
        moved: The parameters that have moved, by id (the hash of a tensor is Python, and can be interrupted).
    """

    steps: dict[Any, int] = field(default_factory=dict)
    moved: dict[int, nn.Parameter] = field(default_factory=dict)


def keeps_products(block: Block, wanted: bool | None) -> bool:
    """Whether K K^T and C C^T are kept between updates; None: where they take at most half as much as it."""
    if wanted is not None:
        return wanted
    block.blueprints()
    return 2 * block.factors.product_numel <= block.weight.numel()


@dataclass
class WeightSteps:
    """The steps on all weights.

    Attributes:
        states: The optimizer's state by parameter; momenta are kept in it.
        group_of: Each parameter's param_group.
        attempt: Parameters that have moved already are left alone.
        owners: Which process keeps which layer; None where each keeps all.
        cache_products: Whether products of the factors are kept between updates; None: where they are small.
        rehearsal: Whether all gradients are zero, and no factors needed.
        momenta: New ones, that are stored when their parameter moves.
    """

    states: MutableMapping[Any, dict[str, Any]]
    group_of: Mapping[nn.Parameter, dict[str, Any]]
    attempt: Attempt
    owners: Ownership | None
    cache_products: bool | None
    rehearsal: bool
    momenta: dict[nn.Parameter, Tensor] = field(default_factory=dict)

    def take(self, blocks: Sequence[Block]) -> None:
        """Move the parameters of layers along their directions, on a CPU while these are still in its cache.

        Other devices move many parameters of a group in one call, as torch's own optimizers do.

        Args:
            blocks: Those that take part in a step.
        """

        def parts() -> Iterator[tuple[Block, Any]]:
            if self.owners is not None:
                found = chain.from_iterable(map(self._preconditioned, self._averaged(blocks)))
                for block, N in self.owners.directions(found, self.rehearsal):
                    yield block, block.parts(N)
                return
            for portion in self._averaged(blocks):
                few = self.rehearsal or len(portion) < alike.FEW
                together, alone = ([], portion) if few else alike.split(portion, self.states)
                for some in together:
                    yield from alike.directions(some, self.states)
                for block, N in self._preconditioned(alone):
                    yield block, block.parts(N)

        def directions() -> Iterator[tuple[nn.Parameter, Direction | None]]:
            for block, found in parts():
                rms = block.group["match_rms"]
                for p, d in zip(block.params, found, strict=False):
                    if p.grad is None or d is not None:
                        yield p, None if p.grad is None or d is None else Direction(d, rms)

        for pairs in self._together(directions()):
            same: dict[Any, list[tuple[nn.Parameter, Tensor]]] = {}
            for p, d in pairs:
                if d is not None:
                    kind = id(self.group_of[p]), d.rms, d.tensor.dtype, d.tensor.device
                    same.setdefault(kind, []).append((p, d.tensor))
                elif p in self.momenta:  # it has no gradient, so that only its momentum moves
                    self._store([p], [{"momentum_buffer": self.momenta[p]}], repeat(None))
            for (_, rms, *_), some in same.items():
                self._sgd([p for p, _ in some], [d for _, d in some], rms)

    def _preconditioned(self, portion: alike.Portion) -> Iterator[tuple[Block, Any]]:
        """The preconditioned gradients of layers, one by one; None where another process computes it."""
        for block, V in portion:
            rule, dW = block.rule, block.matrix(V)
            if self.rehearsal:
                yield block, dW  # it is zero
            elif self.owners is not None and not self.owners.keeps(block):
                yield block, None
            else:
                keep = block.group["T"] != 1 and keeps_products(block, self.cache_products)
                state, device = self.states[block.weight], block.weight.device
                prepared = block.factors.prepared(rule, state, keep, device)
                yield block, rule.direction(prepared, dW, overwrite=block.bias is not None)

    def _averaged(self, blocks: Sequence[Block]) -> Iterator[alike.Portion]:
        """The averaged gradients of each layer's parameters, whole.

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
            if size >= (4 * TOGETHER if in_cache else collectives.BUCKET) or i == len(blocks) - 1:
                vectors = self._averaged_gradients([p for b in portion for p in params_of[b]])
                if sharded:
                    vectors = collectives.gathered(vectors)
                yield [(b, [vectors.pop(p) for p in params_of[b]]) for b in portion]
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
            g = [found[p].to(p.dtype) for p in some]
            kept = [self.states.get(p, {}).get("momentum_buffer", found[p]) for p in some]
            old = [_beside(buffer, p) for buffer, p in zip(kept, some, strict=True)]
            B = torch_private.lerp_all(old, g, 1 - alpha_2)
            self.momenta.update(zip(some, B, strict=True))
            V = torch_private.lerp_all(g, B, alpha_2) if group["nesterov"] else B
            found.update(zip(some, V, strict=True))
        return found

    def _sgd(self, params: list[Any], directions: list[Tensor], rms: float | None) -> None:
        """Move parameters of one group, with its weight decay and momentum, as `torch.optim.SGD` does."""
        group = self.group_of[params[0]]
        lr, alpha_2, decay = group["lr"], group["momentum"], group["weight_decay"]
        averages = group["momentum_on"] == "direction" and alpha_2 != 0
        sharded = any(map(_is_sharded, params))
        scales = None if rms is None else scales_to(directions, rms)
        if scales is not None and (averages or sharded or decay):
            directions, scales = torch_private.scaled_all(directions, scales), None
        moves = [d.to(p.dtype) for p, d in zip(params, directions, strict=True)]
        stored = [{"momentum_buffer": self.momenta[p]} if p in self.momenta else {} for p in params]
        for i, p in enumerate(params if averages or sharded or decay else ()):
            d = collectives.placed_like(moves[i], p) if sharded else moves[i]
            d = d.add(p, alpha=decay) if decay else d
            if averages:
                old = self.states[p].get("momentum_buffer")
                new = d.clone() if old is None else torch.add(d, _beside(old, p), alpha=alpha_2)
                stored[i] = {"momentum_buffer": new}
                d = d.add(new, alpha=alpha_2) if group["nesterov"] else new
            moves[i] = d
        step = -(lr.item() if isinstance(lr, Tensor) else lr)
        if scales is None:
            moving = torch_private.on_all("add_", params, moves, alpha=step)
        else:  # one pass for scale and move
            moving = torch_private.on_all("addcmul_", params, moves, scales, value=step)
        self._store(params, stored, moving)

    def adamw(self, group: dict[str, Any]) -> None:
        """One step of AdamW on all parameters of a group that have a gradient."""
        with_gradient = ((p, p.grad) for p in group["params"] if p.grad is not None)
        for pairs in self._together(with_gradient):
            self._adamw(group, [p for p, _ in pairs], [g for _, g in pairs])

    def _adamw(self, group: dict[str, Any], params: list[Any], grads: list[Tensor]) -> None:
        tensors = [*params, *grads, *(self.states[p].get(n, p) for p in params for n in MOMENTS)]
        at_once = torch_private.fused_adamw if _one_pass(tensors) else None
        new = [_moments(p, self.states[p], copy=at_once is None) for p in params]
        # OneCycleLR and CyclicLR cycle one momentum for all groups, and note the largest in each.
        beta1 = group["momentum"] if "max_momentum" in group else group["betas"][0]
        first, second, steps = ([s[name] for s in new] for name in (*MOMENTS, "step"))
        options = dict(beta1=beta1, beta2=group["betas"][1], amsgrad=False, maximize=False)
        options |= {name: group[name] for name in ("lr", "weight_decay", "eps")}
        if at_once is not None:
            move = partial(at_once, params, grads, first, second, [], steps, **options)
            return self._store(params, new, torch_private.once(move))
        # In float16 AdamW's squares and its eps are zero, and their quotient is not a number.
        wide = [p.to(accumulation_dtype(p.dtype), copy=True) for p in params]
        grads = [g.to(w.dtype) for g, w in zip(grads, wide, strict=True)]
        unlike = any(p.is_complex() for p in params)
        adamw(wide, grads, first, second, [], [s - 1 for s in steps], has_complex=unlike, **options)
        self._store(params, new, torch_private.on_all("copy_", params, wide))

    def _store(self, params: list[Any], new: list[Any], moving: Iterator[Any]) -> None:
        """Move parameters, store what is kept of them, and note it, one after the other, with no line of Python.

        Args:
            params: The parameters.
            new: What their states take up, one mapping for each.
            moving: Moves the next of them when it is asked for an item, or all at the first.
        """
        stores = map(dict.update, [self.states[p] for p in params], new)
        marks = map(self.attempt.moved.__setitem__, list(map(id, params)), params)
        deque(zip(moving, stores, marks, strict=False), maxlen=0)

    def _together(self, pairs: Iterable[tuple[nn.Parameter, Any]]) -> Iterator[list[Any]]:
        """Parameters that have not moved, with something that belongs to them, a few at a time."""
        waiting, numbers = [], 0
        for p, thing in pairs:
            if id(p) not in self.attempt.moved:
                waiting.append((p, thing))
                numbers += p.numel()
                if numbers >= (TOGETHER if p.device.type == "cpu" else TOGETHER_ELSEWHERE):
                    yield waiting
                    waiting, numbers = [], 0
        if waiting:
            yield waiting


def _moments(p: nn.Parameter, state: Mapping[str, Any], copy: bool) -> dict[str, Tensor]:
    """AdamW's averages, in copies if wanted, and its count after the step."""
    wide = accumulation_dtype(p.dtype)
    if "exp_avg" not in state:
        averages = {name: torch.zeros_like(p, dtype=wide) for name in MOMENTS}
        return {"step": torch.ones((), dtype=torch.float32, device="cpu"), **averages}
    averages = {n: state[n].to(device=p.device, dtype=wide, copy=copy) for n in MOMENTS}
    return {"step": state["step"] + 1, **averages}


def _is_sharded(p: nn.Parameter) -> bool:
    """Whether ``fully_shard`` spread it over ranks."""
    return type(p) is not nn.Parameter and hasattr(p, "full_tensor")


def matched(directions: Sequence[Tensor], rms: float) -> list[Tensor]:
    """Directions of one dtype and device, each scaled to a root mean square, whatever its size was."""
    return torch_private.scaled_all(directions, scales_to(directions, rms))


def scales_to(directions: Sequence[Tensor], rms: float) -> list[Tensor]:
    """What brings each of some directions of one dtype and device to a root mean square, 0-d."""
    dtype = wide_dtype(directions[0].dtype)
    sizes = torch_private.root_mean_squares(directions, dtype)
    least = 2**20 * torch.finfo(dtype).tiny  # so that the scale of zeros is finite
    return list((rms / sizes.clamp(min=least)).unbind())


def _one_pass(tensors: Sequence[Tensor]) -> bool:
    """Whether torch's fused kernel may be used, which saves most of the time on a CPU, and moves all at once.

    It reads memory in order, whatever the strides say; elsewhere torch chooses well itself.
    """
    return all(
        t.dtype == accumulation_dtype(tensors[0].dtype)
        and type(t) in (Tensor, nn.Parameter)
        and t.device.type == "cpu"
        and t.is_floating_point()
        and t.is_contiguous()
        for t in tensors
    )


def _beside(tensor: Tensor, p: Tensor) -> Tensor:
    """State on the parameter's device and in its dtype, where a model was moved after construction."""
    return tensor.to(device=p.device, dtype=p.dtype)
