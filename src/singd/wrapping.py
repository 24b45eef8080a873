"""Whether a DistributedDataParallel that was built after the optimizer averages the gradients."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from singd.optimizer import SINGD


class Wrapping:
    """What ran the forwards since the last step.

    A wrapper knows the model, but not the model its wrapper: it shows only while its forward runs (for
    torch.compile, in an attribute of the class). Where that attribute is missing, nothing was seen, and the
    gradients are averaged once too often, which does not change them.

    Attributes:
        inside: A forward ran in a wrapper that has all the parameters and averages their gradients.
        outside: A forward ran without such a wrapper, so that not all gradients are averaged.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget what was seen: the gradients are used up or cleared."""
        self.inside = self.outside = False
        self._last: Any = lambda: None
        self._has_all = False

    def saw_forward(self, optimizer: SINGD) -> None:
        """Note what runs this forward of one of the optimizer's layers."""
        if (
            torch._C._current_graph_task_id() != -1
        ):  # in a backward: activation checkpointing repeats it
            return
        ddp = getattr(DistributedDataParallel, "_active_ddp_module", None)
        if ddp is None or not self._averages_all(ddp, optimizer):
            self.outside = True
        elif ddp.require_backward_grad_sync:  # not so in its no_sync()
            self.inside = True

    def _averages_all(self, ddp: DistributedDataParallel, optimizer: SINGD) -> bool:
        if ddp is not self._last():
            ignored = getattr(ddp, "parameters_to_ignore", ())
            averaged = {p for name, p in ddp.module.named_parameters() if name not in ignored}
            ours = {p for g in optimizer.param_groups for p in g["params"] if p.requires_grad}
            self._last, self._has_all = weakref.ref(ddp), ours <= averaged
        return self._has_all

    def __reduce__(self) -> tuple[type[Wrapping], tuple[()]]:
        return Wrapping, ()
