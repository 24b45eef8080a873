"""What is gathered in a backward pass: the projected curvature of a block, as raw sums and counts.

A forward hook on the layer puts a tensor hook on its output. (A module's backward hook would break in-place
activations.) Every backward adds to the statistics, and they live exactly as long as the gradients do.
"""

from __future__ import annotations

import math
import weakref
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from singd.blocks import Block

if TYPE_CHECKING:
    from singd.optimizer import SINGD
    from singd.structures import StructuredMatrix


@dataclass(eq=False)
class Statistics:
    """Sums over the backward passes since the last step.

    Attributes:
        H_K: P(K^T A^T A K), summed over the rows A of layer inputs.
        H_C: P(C^T B^T B C), summed over the rows B of output gradients.
        rows: How many rows A had, a 0-d tensor.
        terms: How many loss terms the loss averaged over (1 if it did not), a 0-d tensor.
        backward: The number of the backward pass that added last.
    """

    H_K: StructuredMatrix
    H_C: StructuredMatrix
    rows: Tensor
    terms: Tensor
    backward: int

    def normalised(self) -> tuple[StructuredMatrix, StructuredMatrix, Tensor | float]:
        """H_K (a mean over rows), H_C (the averaging of the loss undone), and 1.0 if they hold anything, else 0.0.

        The sums are used up.
        """
        self.H_K.mul_(1.0 / self.rows.clamp(min=1.0))
        self.H_C.mul_(self.terms)
        some = (self.rows > 0).to(self.rows.dtype)
        return self.H_K, self.H_C, some.item() if some.device.type == "cpu" else some


def without_autocast(*devices: torch.device) -> AbstractContextManager[Any]:
    """The context for arithmetic of our own on some devices, where the user may have autocast on."""
    contexts = ExitStack()
    for kind in filter(torch.amp.is_autocast_available, {device.type for device in devices}):
        if torch.is_autocast_enabled(kind):
            contexts.enter_context(torch.autocast(kind, enabled=False))
    return contexts


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Where sums of squares are formed: float16 has too small a range for them, bfloat16 has not."""
    return torch.float32 if dtype == torch.float16 else dtype


def gather(
    block: Block,
    layer: nn.Module,
    K: StructuredMatrix,
    C: StructuredMatrix,
    x: Tensor,
    g: Tensor,
    scale: Tensor | None,
) -> Statistics:
    """The statistics of one backward pass through one layer.

    A contribution that is not finite is replaced by nothing, decided without waiting for the device: one bad
    batch, or an overflow under a gradient scaler, spoils neither the factors nor the good batches beside it.

    Args:
        block: The layer's block.
        layer: The layer that was called.
        K: The input factor.
        C: The output-gradient factor.
        x: The layer's input.
        g: The gradient of the (scaled) loss with respect to the layer's output.
        scale: What the loss was multiplied with, or None.
    """
    group, kind = block.group, block.kind
    dtype_K, dtype_C = accumulation_dtype(K.dtype), accumulation_dtype(C.dtype)
    batch, shared = kind.positions(layer, x, g)
    terms = {None: 1, "batch": batch, "batch+sequence": batch * shared}[group["loss_average"]]
    if scale is not None:
        g = g.to(torch.promote_types(g.dtype, torch.float32)) / scale
    a = kind.input_rows(
        layer,
        x,
        approx=group["kfac_approx"],
        bias=block.bias is not None,
        dtype=dtype_K,
        output_shape=g.shape,
    )
    b = kind.grad_rows(layer, g, x, approx=group["kfac_approx"], dtype=dtype_C)
    H_K = K.to(dtype=dtype_K).project_congruence(a)
    H_C = C.to(dtype=dtype_C).project_congruence(b)
    # both are positive semi-definite, so that no entry exceeds the trace, and no trace is negative
    finite = (H_K.trace() + H_C.trace()).abs() < math.inf
    if finite.device.type != "cpu" or not finite:  # only on a CPU it costs nothing to look
        for t in H_K.tensors() + H_C.tensors():
            t.masked_fill_(~finite, 0.0)
    seen = finite.to(torch.promote_types(dtype_K, torch.float32))
    return Statistics(
        H_K, H_C, seen * a.count, seen * (terms if a.count else 0), _backward_number()
    )


def added(old: Statistics, new: Statistics, loss_average: str | None) -> Statistics:
    """Both together; a loss that is not averaged stays so however many passes there were."""
    terms = old.terms + new.terms if loss_average else torch.maximum(old.terms, new.terms)
    H_K, H_C = old.H_K.add_(new.H_K), old.H_C.add_(new.H_C)
    return Statistics(H_K, H_C, old.rows + new.rows, terms, new.backward)


def _backward_number() -> int:
    """Identifies the running backward pass (as torch.autograd.graph's own hooks do)."""
    return torch._C._current_graph_task_id()


class _Kept:
    """A layer's input from its forward to its backward, and no longer than autograd keeps its own.

    Args:
        x: The input.
        output: What the layer made of it. Under autocast that is of a lower precision, and so is the
            input that the layer saw: a copy of that is smaller, and unharmed if x changes in place.
    """

    def __init__(self, x: Tensor, output: Tensor) -> None:
        if x.is_floating_point():
            x = x.to(output.dtype)
        # A product of no numbers: autograd saves x for the other factor's gradient, as a layer would, so that
        # activation checkpointing and offloading apply to it too.
        nothing = torch.empty(0, device=x.device, requires_grad=True)
        self._node: Any = (x.detach()[..., None] * nothing).grad_fn

    def __call__(self) -> Tensor:
        return self._node._saved_self[..., 0]

    def release(self) -> None:
        """Drop the input, unless the running backward was asked to retain the graph."""
        if not _graph_is_kept():
            self._node = None

    @property
    def released(self) -> bool:
        return self._node is None


def _graph_is_kept() -> bool:
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()  # torch 2.4 does not tell


def _accumulator(param: Tensor) -> Any:
    """The autograd node that adds to ``param.grad``; None for a tensor that is not a leaf."""
    return torch.autograd.graph.get_gradient_edge(param).node if param.is_leaf else None


def _runs(node: Any) -> bool:
    """Whether the running backward adds to the weight's gradient; ``torch.autograd.grad`` does not."""
    if node is None:
        return True
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch refuses the question where grad() was asked for this very leaf
        return False


class Watch:
    """The forward hook on one layer.

    It holds its optimizer weakly: a model outlives its optimizer, can be copied (as weight averaging does)
    or pickled without it, and the copy's hook is asleep until a copied optimizer wakes it.
    """

    def __init__(self, optimizer: SINGD | None = None):
        self.optimizer = weakref.ref(optimizer) if optimizer is not None else lambda: None

    def __reduce__(self) -> tuple[type[Watch], tuple[()]]:
        return Watch, ()

    @torch.compiler.disable
    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        optimizer = self.optimizer()
        if optimizer is None or not torch.is_grad_enabled():
            return
        optimizer._wrapping.saw_forward(optimizer)
        block = optimizer._due(layer)
        if (
            block is None
            or not output.requires_grad
            or not layer.weight.requires_grad
            or torch._C._are_functorch_transforms_active()
        ):
            return
        kept = _Kept(block.kind.input(args, kwargs), output)
        weight = cast(Tensor, layer.weight)
        node = _accumulator(weight)

        def hook(g: Tensor) -> None:
            now: Any = layer.weight
            adds = node
            # torch.func.functional_call lends a layer other weights for the time of a forward
            borrowed = weight.is_leaf and weight is not now
            if hasattr(now, "full_tensor"):  # FSDP will gather the forward's weight again
                borrowed = False
            if hasattr(weight, "full_tensor"):  # FSDP gathers the weight only now
                borrowed, adds = False, _accumulator(now)
            if not borrowed and not kept.released and _runs(adds):
                optimizer._gather(block, layer, kept(), g.detach())
            kept.release()

        output.register_hook(hook)


def watch(layer: nn.Module, optimizer: SINGD) -> None:
    """Hook a layer once per optimizer, waking a hook that a copy left asleep."""
    for hook in layer._forward_hooks.values():
        if isinstance(hook, Watch) and hook.optimizer() in (None, optimizer):
            hook.optimizer = weakref.ref(optimizer)
            return
    layer.register_forward_hook(Watch(optimizer), with_kwargs=True)
