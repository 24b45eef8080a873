"""What happens at a layer's forward and backward: its rows are handed to the rule, its statistics kept.

A forward hook on the layer puts a tensor hook on its output. (A module's backward hook would break in-place
activations.) Every backward adds to the statistics, and they live exactly as long as the gradients do.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from singd import fisher, torch_private
from singd.blocks import Block
from singd.groups import COUNTING, check_choices
from singd.precision import without_autocast
from singd.processes import collectives
from singd.processes.ddp import DDPDetector
from singd.rules import INPUT, OUTPUT
from singd.statistics import Statistics, gathered
from singd.weight_steps import Attempt
from singd.witness import Witness

WARNINGS = {
    "missed": "Layer {name!r} has a gradient but its forward and backward were not seen, so its factors stay as "
    "they are; build SINGD before the first call of a compiled model, call the layer itself, and let backward() "
    "fill in the gradients.",
    "calls": "Layer {name!r} is called more than twice in a forward, and each call is counted as more examples; "
    'say repeated_calls="examples" if so, or "positions" if the loss averages over the batch of one call.',
    "overflow": "The factors of layer {name!r} would not be finite after this update, so they stay as they are; "
    'take normalize_lr_cov="spectral", a smaller lr_cov or wider factors (preconditioner_dtype).',
    "growth": "The factors of layer {name!r} grew more than tenfold in one update, as after a loss that is far "
    'too large, and can spoil its weights; take normalize_lr_cov="spectral" or a smaller lr_cov, and go back to '
    "a checkpoint.",
    "lost": "The statistics of a backward pass on sampled labels were cleared, and those of another one are used; "
    "for the Monte-Carlo Fisher matrix put that one into `with optimizer.collecting(False):`.",
}


class Collector:
    """What the hooks of one optimizer know, and the statistics that they collect.

    Attributes:
        statistics: Of each block, since the last step.
        heard: The blocks that statistics came from, or that a warning was given for.
        collecting: Whether backward passes add to the statistics.
        grad_scaler: What scales the loss, or None.
        ddp: What ran the forwards.
        block_of: The block of each layer.
        attempt: What the step has done that runs, or that failed.
        witness: Looks whether the calls of a layer make up its gradient.
        handles: What takes the hooks off.
    """

    def __init__(self, grad_scaler: Any) -> None:
        self.statistics: dict[Block, Statistics] = {}
        self.heard: set[Block] = set()
        self.collecting = True
        self.grad_scaler = grad_scaler
        self.ddp = DDPDetector()
        self.block_of: dict[nn.Module, Block] = {}
        self._cleared: dict[Block, Statistics] = {}
        self.attempt = Attempt()
        self._told: set[Any] = set()  # each warning is given once
        self._said: Any = ()  # what the groups' options were when they were checked last
        self._draws = fisher.DRAWS[0]
        self.witness = Witness()
        self.handles: list[Any] = []
        weakref.finalize(self, _remove, self.handles)

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
                hook = layer.register_forward_hook(Watch(self), with_kwargs=True, prepend=True)
                self.handles.append(hook)

    def saw_forward(self) -> None:
        """Note that a forward runs: what comes is another step than one that failed."""
        if torch_private.backward_number() == -1:  # else activation checkpointing repeats one
            self.attempt = Attempt()
            if collectives.world_size() > 1:
                self.ddp.saw_forward()

    @torch.no_grad()
    def gather(self, block: Block, layer: nn.Module, x: Tensor, g: Tensor) -> None:
        """Add the statistics of one backward through one layer, with its input x and output gradient g."""
        if not self.collecting or self.block_of.get(layer) is not block or not block.due:
            return  # (perhaps since a step came in between)
        group, kind, rule = block.group, block.kind, block.rule
        said = group["loss_average"], group["kfac_approx"], group["repeated_calls"]
        if said != self._said:  # a user may have changed them
            check_choices(group, COUNTING)
            self._said = said
        if not group["batch_first"] and kind.takes_sequences and g.ndim > 2:
            x, g = x.transpose(0, 1), g.transpose(0, 1)
        with without_autocast(g.device):
            if block in self.witness.waits:
                self.witness.gathers(block, layer, x, g)
            if self.grad_scaler is not None and self.grad_scaler.is_enabled():
                scale = self.grad_scaler.scale(torch.ones((), device=g.device))
                g = g.to(torch.promote_types(g.dtype, torch.float32)) / scale
            factors = block.gathering_factors()
            dtypes = {rule.keeps.get(name, name): A.dtype for name, A in factors.items()}
            batch, shared = kind.positions(layer, x, g)
            terms = {None: 1, "batch": batch, "batch+sequence": batch * shared}
            approx, bias = group["kfac_approx"], block.bias is not None
            rows: dict[str, Any] = dict(bias=bias, dtype=dtypes[INPUT], output_shape=g.shape)
            a = kind.input_rows(layer, x, approx=approx, **rows)
            b = kind.grad_rows(layer, g, x, approx=approx, dtype=dtypes[OUTPUT])
            new = gathered(rule, factors, a, b, terms[group["loss_average"]], group)
        new.backward = torch_private.backward_number()
        torch_private.after_backward(partial(setattr, new, "over", True))
        old = self.statistics.get(block)
        if old is not None and not old.over and old.backward == new.backward:
            positions = group["repeated_calls"] == "positions" and group["loss_average"] == "batch"
            new.follows(old, positions)
            unsaid = group["repeated_calls"] is None and group["loss_average"] == "batch"
            if new.calls > 2 and unsaid:  # (two are too common, and no loop)
                self.warn(block, "calls", stacklevel=2)
        self.heard.add(block)
        # gradients that were cleared (by the model's zero_grad) took their statistics with them
        # (a weight may have been replaced in the model, or be computed from the parameter)
        param = layer.weight if isinstance(layer.weight, nn.Parameter) else block.weight
        cleared = param.grad is None and not hasattr(block.weight, "full_tensor")
        if old is not None and cleared and old.over and old.backward < new.backward:
            self._cleared[block], old = old, None
        self.statistics[block] = new if old is None else old + new

    def clear(self) -> None:
        """Forget the statistics with the gradients (but `collect(False)` brings them back)."""
        self._cleared = self.statistics or self._cleared
        self.statistics = {}
        self.ddp.seen.clear()
        self.attempt = Attempt()

    def collect(self, enabled: bool) -> None:
        """Whether backward passes add from now on; what the last `clear` took comes back where they don't."""
        self.collecting = enabled
        if not enabled and not self.statistics:
            self.statistics, self._cleared = self._cleared, {}

    def check_sampled(self) -> None:
        """Warn once if statistics on sampled labels were cleared, and others came in their place."""
        before, self._draws = self._draws, fisher.DRAWS[0]
        if before != self._draws and self._cleared and self.statistics:
            self.warn(None, "lost", stacklevel=6)

    def finish(self, loss: Any) -> Any:
        """A step has ended: its statistics are used up; the loss is passed on.

        That the step has ended is noted last, and in the line that returns: an exception up to there finds a step
        of which nothing is left to do.
        """
        self.statistics, self._cleared = {}, {}
        self.ddp.seen.clear()
        return (vars(self).update(attempt=Attempt()), loss)[1]

    def miss(self, block: Block) -> None:
        """Warn once of a block that has a gradient, but no statistics."""
        grad = block.weight.grad
        if block not in self.heard and grad is not None and bool(grad.any()):
            self.heard.add(block)
            self.warn(block, "missed", stacklevel=7)

    def warn(self, block: Block | None, what: str, stacklevel: int = 6) -> None:
        """Give one of ``WARNINGS`` of a block, once."""
        about = block, "overflow" if what == "growth" else what  # of both one is enough
        if about not in self._told:
            self._told.add(about)
            name = block.name if block else ""
            warnings.warn(WARNINGS[what].format(name=name), stacklevel=stacklevel)

    def detach(self) -> None:
        """Take the hooks off."""
        self.block_of = {}
        _remove(self.handles)
        self.handles.clear()


class Watch:
    """The forward hook on one layer.

    It holds the collector weakly: a model outlives its optimizer, and can be copied (as weight averaging does) or
    pickled without it. A copy's hook does nothing, and is taken off when a copied optimizer hooks the layer.
    """

    def __init__(self, collector: Collector):
        self.collector = weakref.ref(collector)

    def __reduce__(self) -> Any:
        # a bound method that takes any arguments, returns None and needs no singd
        return getattr, (nullcontext(), "__exit__")

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
        block, weight = collector.block_of.get(layer), cast(Tensor, layer.weight)
        hooks = torch_private.forward_hooks(layer)
        if not isinstance(next(iter(hooks.values())), Watch):
            # a hook that a user put in front of ours may have changed the output; next time ours is first again
            (mine,) = (key for key, hook in hooks.items() if hook is self)
            hooks.move_to_end(mine, last=False)
            collector.heard.discard(block)  # so that a warning tells of this forward
            return
        wanted = output.requires_grad and weight.requires_grad
        if block is None or not wanted or torch_private.in_functorch() or not block.due:
            return
        x = strided(block.kind.input(args, kwargs))
        if block not in collector.witness.looked:
            collector.handles += collector.witness.awaits(block, layer)
        if x.is_floating_point():
            # Under autocast the output is of a lower precision, and so is the input that the layer saw: a copy of
            # that is smaller, and unharmed if x changes in place.
            x = x.to(output.dtype)
        kept = torch_private.KeptInput(x)
        node = torch_private.accumulator(weight)

        def hook(g: Tensor) -> None:
            now: Any = layer.weight
            # FSDP gathers the weight only now, or will gather that of the forward again
            sharded, later = (hasattr(w, "full_tensor") for w in (weight, now))
            adds = torch_private.accumulator(now) if sharded else node
            # torch.func.functional_call lends a layer other weights for the time of a forward
            borrowed = weight.is_leaf and weight is not now and not (sharded or later)
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
    """A sparse tensor with its zeros, and a nested one as all its rows; else the tensor itself."""
    if t.is_nested:
        return torch.cat(t.unbind())
    return t if t.layout == torch.strided else t.to_dense()


def _sleeps(hook: Any) -> bool:
    """Whether a hook is what a copy of ours became."""
    return isinstance(hook, Leaving) or isinstance(getattr(hook, "__self__", None), nullcontext)


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
