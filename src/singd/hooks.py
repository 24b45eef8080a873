"""What happens at a layer's forward and backward: its rows are handed to the rule, its statistics kept.

A forward hook on the layer puts a tensor hook on its output. (A module's backward hook would break in-place
activations.) Every backward adds to the statistics, and they live exactly as long as the gradients do.
"""

from __future__ import annotations

import types
import warnings
import weakref
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from singd import torch_private
from singd.blocks import Block
from singd.groups import check_counting, is_due
from singd.precision import accumulation_dtype, without_autocast
from singd.processes.ddp import DDPDetector
from singd.rules import INPUT, OUTPUT
from singd.statistics import Statistics, gathered
from singd.structures import StructuredMatrix
from singd.weight_steps import Attempt
from singd.witness import Witness


class Collector:
    """What the hooks of one optimizer know, and the statistics that they collect.

    Attributes:
        statistics: Of each block, since the last step.
        heard: The blocks that statistics came from, or that a warning was given for.
        collecting: Whether backward passes add to the statistics.
        grad_scaler: What scales the loss, or None.
        states: The optimizer's state by parameter.
        ddp: What ran the forwards.
        attempt: What the step has done that runs, or that failed.
        block_of: The block of each layer.
        divided: Whether other processes keep the factors of some layers.
    """

    def __init__(self, states: Mapping[Any, dict[str, Any]], grad_scaler: Any) -> None:
        self.statistics: dict[Block, Statistics] = {}
        self.heard: set[Block] = set()
        self.collecting = True
        self.grad_scaler = grad_scaler
        self.states = states
        self.ddp = DDPDetector()
        self.block_of: dict[nn.Module, Block] = {}
        self.divided = False
        self._cleared: dict[Block, Statistics] = {}
        self.attempt = Attempt()
        self._overflowed: set[Block] = set()
        self._called: set[Block] = set()
        self._told = False
        self.witness = Witness()
        self._handles: list[Any] = []
        weakref.finalize(self, _remove, self._handles)

    def watch(self, blocks: Iterable[Block], params: Iterable[Tensor]) -> None:
        """Look up once which layers hand over rows, and hook them; hooks that do nothing are taken off."""
        blocks = [b for b in blocks if b.active and b.rule.needs_rows]
        self.block_of = {layer: block for block in blocks for layer in block.modules}
        self.ddp.params = {p for p in params if p.requires_grad}
        for layer in self.block_of:
            hooks = torch_private.forward_hooks(layer)
            for key in [k for k, hook in hooks.items() if _sleeps(hook)]:
                del hooks[key]
            if not any(isinstance(h, Watch) and h.collector() is self for h in hooks.values()):
                self._handles.append(
                    layer.register_forward_hook(Watch(self), with_kwargs=True, prepend=True)
                )

    def saw_forward(self) -> None:
        """Note that a forward runs: what comes is another step than one that failed."""
        if torch_private.backward_number() == -1:  # else activation checkpointing repeats one
            self.ddp.saw_forward()
            self.attempt = Attempt()

    def due(self, layer: nn.Module) -> Block | None:
        """The layer's block if its factors are updated in the next step, and are here to gather with."""
        block = self.block_of.get(layer)
        if block is None:
            return None
        state = self.states.get(block.weight, {})
        return block if is_due(block.group, state) and self.ready(block, state) else None

    def ready(self, block: Block, state: Mapping[str, Any]) -> bool:
        """Whether every process has what gathering needs: all say the same.

        It lacks only where T was changed after the end of the last step.
        """
        here = not self.divided or not block.rule.gathers_with or state.get("last_update", -1) < 0
        return here or block.factors.handed is not None

    @torch.no_grad()
    def gather(self, block: Block, layer: nn.Module, x: Tensor, g: Tensor) -> None:
        """Add the statistics of one backward through one layer, with its input x and output gradient g."""
        if not self.collecting or self.due(layer) is None:  # (perhaps since a step came in between)
            return
        group, kind = block.group, block.kind
        check_counting(group)
        if not group["batch_first"] and kind.takes_sequences and g.ndim > 2:
            x, g = x.transpose(0, 1), g.transpose(0, 1)
        with without_autocast(g.device):
            self.witness.gathers(block, layer, x, g)
            if self.grad_scaler is not None and self.grad_scaler.is_enabled():
                scale = self.grad_scaler.scale(torch.ones((), device=g.device))
                g = g.to(torch.promote_types(g.dtype, torch.float32)) / scale
            factors = self._factors(block)
            dtypes = {block.rule.keeps.get(name, name): A.dtype for name, A in factors.items()}
            batch, shared = kind.positions(layer, x, g)
            terms = {None: 1, "batch": batch, "batch+sequence": batch * shared}
            a = kind.input_rows(
                layer,
                x,
                approx=group["kfac_approx"],
                bias=block.bias is not None,
                dtype=dtypes[INPUT],
                output_shape=g.shape,
            )
            b = kind.grad_rows(layer, g, x, approx=group["kfac_approx"], dtype=dtypes[OUTPUT])
            new = gathered(block.rule, factors, a, b, terms[group["loss_average"]], group)
        new.backward = torch_private.backward_number()
        torch_private.after_backward(lambda: setattr(new, "over", True))
        old = self.statistics.get(block)
        if old is not None and not old.over and old.backward == new.backward:
            positions = group["repeated_calls"] == "positions" and group["loss_average"] == "batch"
            new.follows(old, positions)
            self._warn_of_calls(block, new.calls)
        self.heard.add(block)
        # gradients that were cleared (by the model's zero_grad) took their statistics with them
        # (a weight may have been replaced in the model, or be computed from the parameter)
        param = layer.weight if isinstance(layer.weight, nn.Parameter) else block.weight
        cleared = param.grad is None and not hasattr(block.weight, "full_tensor")
        stale = cleared and old is not None and old.over and old.backward < new.backward
        if stale and old is not None:
            self._cleared[block] = old
        self.statistics[block] = new if old is None or stale else old + new

    def _factors(self, block: Block) -> dict[str, StructuredMatrix]:
        """What the rule gathers with, in a dtype for sums; the identities where it needs nothing else."""
        state, names = self.states.get(block.weight, {}), block.rule.gathers_with
        block.blueprints()
        if names and (names[0] in state or block.factors.handed):
            found = block.factors.read(state, names, block.weight.device)
        else:
            found = {side: block.identity(side) for side in (INPUT, OUTPUT)}
            if names:
                start = block.rule.start(found)
                found = {name: start[name] for name in names}
        return {name: A.to(dtype=accumulation_dtype(A.dtype)) for name, A in found.items()}

    def clear(self) -> None:
        """Forget the statistics with the gradients (but `collect(False)` brings them back)."""
        self._cleared = self.statistics or self._cleared
        self.statistics = {}
        self.ddp.clear()
        self.attempt = Attempt()

    def collect(self, enabled: bool) -> None:
        """Whether backward passes add from now on; what the last `clear` took comes back where they don't."""
        self.collecting = enabled
        if not enabled and not self.statistics:
            self.statistics, self._cleared = self._cleared, {}

    def lost(self, sampled: bool) -> bool:
        """Whether statistics on sampled labels were cleared, and others came in their place; true only once."""
        found = sampled and bool(self._cleared) and bool(self.statistics) and not self._told
        self._told |= found
        return found

    def advanced(self, block: Block, step: int) -> bool:
        """Whether a block at this step has taken part already in a step that failed later, and is tried again."""
        return self.attempt.steps.setdefault(block, step) != step

    def finish(self, loss: Any) -> Any:
        """A step has ended: its statistics are used up; the loss is passed on.

        That the step has ended is noted last, and in the line that returns: an exception up to there finds a step
        of which nothing is left to do.
        """
        self.statistics, self._cleared = {}, {}
        self.ddp.clear()
        return (vars(self).update(attempt=Attempt()), loss)[1]

    def miss(self, block: Block) -> None:
        """Warn once of a block that has a gradient, but no statistics."""
        grad = block.weight.grad
        if block not in self.heard and grad is not None and bool(grad.any()):
            self.heard.add(block)
            warnings.warn(
                f"Layer {block.name!r} has a gradient but its forward and backward were not seen, so its "
                "factors stay as they are; build SINGD before the first call of a compiled model, call the "
                "layer itself, and let backward() fill in the gradients.",
                stacklevel=6,
            )

    def _warn_of_calls(self, block: Block, calls: int) -> None:
        """Warn once of a layer whose batch may be counted once per call; twice is too common, and no loop."""
        group = block.group
        unsaid = group["repeated_calls"] is None and group["loss_average"] == "batch"
        if calls > 2 and unsaid and block not in self._called:
            self._called.add(block)
            warnings.warn(
                f"Layer {block.name!r} is called more than twice in a forward, and each call is counted as more "
                'examples; say repeated_calls="examples" if so, or "positions" if the loss averages over the '
                "batch of one call.",
                stacklevel=2,
            )

    def warn_of_overflow(self, block: Block) -> None:
        """Warn once of a block whose factors would not have been finite."""
        if block not in self._overflowed:
            self._overflowed.add(block)
            warnings.warn(
                f"The factors of layer {block.name!r} would not be finite after this update, so they stay as they "
                'are; take normalize_lr_cov="spectral", a smaller lr_cov or wider factors (preconditioner_dtype).',
                stacklevel=6,
            )

    def warn_of_growth(self, block: Block) -> None:
        """Warn once of a block whose factors grew so much that the weights may be spoilt."""
        if block not in self._overflowed:
            self._overflowed.add(block)
            warnings.warn(
                f"The factors of layer {block.name!r} grew more than tenfold in one update, as after a loss that "
                'is far too large, and can spoil its weights; take normalize_lr_cov="spectral" or a smaller '
                "lr_cov, and go back to a checkpoint.",
                stacklevel=5,
            )

    def detach(self) -> None:
        """Take the hooks off."""
        self.block_of = {}
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class Watch:
    """The forward hook on one layer.

    It holds the collector weakly: a model outlives its optimizer, and can be copied (as weight averaging does) or
    pickled without it. A copy's hook does nothing, and is taken off when a copied optimizer hooks the layer.
    """

    def __init__(self, collector: Collector):
        self.collector = weakref.ref(collector)

    def __reduce__(self) -> Any:
        return getattr, (
            nullcontext(),
            "__exit__",
        )  # takes any arguments, returns None, needs no singd

    def __deepcopy__(self, memo: Any) -> Any:
        return Leaving()

    @torch.compiler.disable
    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        collector = self.collector()
        if collector is None or not torch.is_grad_enabled():
            return
        collector.saw_forward()
        block = collector.due(layer)
        weight = cast(Tensor, layer.weight)
        if (
            block is None
            or not output.requires_grad
            or not weight.requires_grad
            or torch_private.in_functorch()
        ):
            return
        x = strided(block.kind.input(args, kwargs))
        collector.witness.awaits(block, layer)
        if x.is_floating_point():
            # Under autocast the output is of a lower precision, and so is the input that the layer saw: a copy of
            # that is smaller, and unharmed if x changes in place.
            x = x.to(output.dtype)
        kept = torch_private.KeptInput(x)
        node = torch_private.accumulator(weight)

        def hook(g: Tensor) -> None:
            now: Any = layer.weight
            adds = node
            # torch.func.functional_call lends a layer other weights for the time of a forward
            borrowed = weight.is_leaf and weight is not now
            if hasattr(now, "full_tensor"):  # FSDP will gather the forward's weight again
                borrowed = False
            if hasattr(weight, "full_tensor"):  # FSDP gathers the weight only now
                borrowed, adds = False, torch_private.accumulator(now)
            if not borrowed and not kept.released and torch_private.runs(adds):
                collector.gather(block, layer, kept(), strided(g.detach()))
            kept.release()

        output.register_hook(hook)


class Leaving:
    """What a copy of a model has in the place of our hook: it takes itself off when the layer is called."""

    def __reduce__(self) -> Any:
        return getattr, (nullcontext(), "__exit__")  # as of Watch

    def __call__(self, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        hooks = torch_private.forward_hooks(layer)
        for key in [k for k, hook in hooks.items() if hook is self]:
            del hooks[key]


def strided(t: Tensor) -> Tensor:
    """A sparse tensor with its zeros, and a jagged one as all its rows; else the tensor itself."""
    if t.is_nested:
        return t.values()
    return t if t.layout == torch.strided else t.to_dense()


def _sleeps(hook: Any) -> bool:
    """Whether a hook is what a copy of ours became."""
    return isinstance(hook, Leaving) or (
        isinstance(hook, types.MethodType) and isinstance(hook.__self__, nullcontext)
    )


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
