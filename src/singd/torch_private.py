"""All of torch that has a leading underscore, or one name in some versions and another in others.

Each function has a fallback, or says what is missing. The tests run with torch 2.13. With torch 2.4.1 most of them
pass; docs/install.md says which do not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, repeat
from operator import methodcaller
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def backward_number() -> int:
    """A number of the running backward pass, larger in later and in nested ones; -1 outside of any."""
    return torch._C._current_graph_task_id()


def after_backward(function: Callable[[], None]) -> None:
    """Call a function once the running backward pass has ended well. Without the queue: never."""
    engine = getattr(torch.autograd.Variable, "_execution_engine", None)
    if engine is not None:
        engine.queue_callback(function)


def graph_is_kept() -> bool:
    """Whether the running backward was asked to retain the graph; true where torch (2.4) does not tell."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()


def accumulator(param: Tensor) -> Any:
    """The autograd node that adds to ``param.grad``; None for a tensor that is not a leaf."""
    return torch.autograd.graph.get_gradient_edge(param).node if param.is_leaf else None


def runs(node: Any) -> bool:
    """Whether the running backward adds to a weight's gradient; ``torch.autograd.grad`` does not."""
    if node is None:
        return True
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch refuses the question where grad() was asked for this very leaf
        return False


def in_functorch() -> bool:
    """Whether ``torch.func`` transforms the running code."""
    return torch._C._are_functorch_transforms_active()


class KeptInput:
    """A layer's input from its forward to its backward, and no longer than autograd keeps its own.

    A product of no numbers: autograd saves x for the other factor's gradient, as a layer would, so that activation
    checkpointing and offloading apply to it too.

    Args:
        x: The input.
    """

    def __init__(self, x: Tensor) -> None:
        nothing = torch.empty(0, device=x.device, requires_grad=True)
        self._node: Any = (x.detach()[..., None] * nothing).grad_fn

    def __call__(self) -> Tensor:
        return self._node._saved_self[..., 0]

    def release(self) -> None:
        """Drop the input, unless the running backward was asked to retain the graph."""
        if not graph_is_kept():
            self._node = None

    @property
    def released(self) -> bool:
        return self._node is None


def running_ddp() -> Any:
    """The DistributedDataParallel whose forward runs; None where torch does not tell."""
    return getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)


def scaler_of_this_step(scaler: Any, optimizer: Any) -> bool | None:
    """Whether a gradient scaler looked at this optimizer's gradients since its last update; None if unknown."""
    states = getattr(scaler, "_per_optimizer_states", None)
    if states is None:
        return None
    mine = states.get(id(optimizer))
    return bool(mine and mine["found_inf_per_device"])


def caller() -> Any:
    """The object whose method reads a property of ours, two frames up."""
    return sys._getframe(2).f_locals.get("self")


def parameters_by_attribute(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """A module's own parameters, by attribute (not what a parametrization computes)."""
    return module._parameters


def forward_hooks(module: nn.Module) -> Any:
    """A module's forward hooks, an OrderedDict by their id, to be looked through."""
    return module._forward_hooks


def uncompiled(model: nn.Module) -> nn.Module | None:
    """The module that torch.compile wrapped, or None."""
    return getattr(model, "_orig_mod", None)


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a sharded tensor, or the tensor itself."""
    return getattr(tensor, "_local_tensor", tensor)


def version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; zero where nobody counts (inference mode)."""
    return 0 if tensor.is_inference() else tensor._version


def on_all(
    name: str, tensors: Sequence[Tensor], *others: Sequence[Tensor], **kw: Any
) -> Iterator[Any]:
    """Calls a method of many tensors, each with tensors of its own, one for each item that is asked for.

    All of them at the first item, where a device gains by a single call.
    """
    plain = all(type(t) in (Tensor, nn.Parameter) for some in (tensors, *others) for t in some)
    if plain and tensors[0].device.type != "cpu":
        return once(partial(getattr(torch, f"_foreach_{name}"), tensors, *others, **kw))
    return map(partial(getattr(Tensor, name), **kw), tensors, *others)


def once(call: Callable[[], Any]) -> Iterator[Any]:
    """Calls a function when the first item is asked for; items have no end."""
    return chain(map(methodcaller("__call__"), [call]), repeat(None))


fused_adamw: Callable[..., None] | None = getattr(torch, "_fused_adamw_", None)
"""AdamW's step on lists of tensors in place, in one call; None where torch has no such kernel."""


def all_gather(output: Tensor, mine: Tensor, **kw: Any) -> Any:
    """``all_gather_single``, as it is called since torch 2.13, or ``all_gather_into_tensor`` before."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(output, mine, **kw)


def reduce_scatter(output: Tensor, everything: Tensor, **kw: Any) -> Any:
    """``reduce_scatter_single``, as it is called since torch 2.13, or ``reduce_scatter_tensor`` before."""
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return scatter(output, everything, **kw)


def lerp_all(tensors: Any, ends: Any, weight: float) -> list[Tensor]:
    """``a.lerp(b, weight)`` for many tensors, in one call where all are plain, which saves a CPU much time."""
    if all(type(t) in (Tensor, nn.Parameter) for t in (*tensors, *ends)):
        return list(torch._foreach_lerp(tensors, ends, weight))
    return [a.lerp(b, weight) for a, b in zip(tensors, ends, strict=True)]


def root_mean_squares(tensors: Any, dtype: torch.dtype) -> Tensor:
    """The root mean squares of many tensors, summed in a dtype, [len(tensors)]."""
    # A weight beside its bias is no contiguous part of their matrix: row by row it takes a tenth of the time.
    rows = [
        torch.linalg.vector_norm(t, dim=tuple(range(1, t.ndim)), dtype=dtype)
        if t.ndim > 1 and t.stride(-1) == 1 and not t.is_contiguous()
        else t
        for t in tensors
    ]
    norms = torch.stack(torch._foreach_norm(rows, 2, dtype=dtype))
    return norms / norms.new_tensor([t.numel() ** 0.5 for t in tensors])


def scaled_all(tensors: Any, scales: Any) -> list[Tensor]:
    """Many tensors, each times a number of its own."""
    return list(torch._foreach_mul(tensors, scales))
