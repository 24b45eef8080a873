"""Whether a DistributedDataParallel that was built after the optimizer averages the gradients."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from singd.torch_private import running_ddp


class DDPDetector:
    """What ran the forwards since the last step.

    A wrapper knows the model, but not the model its wrapper: it shows only while its forward runs (for
    torch.compile, in an attribute of the class). Where that attribute is missing, nothing was seen, and the
    gradients are averaged once too often, which does not change them.

    Attributes:
        params: The parameters that the optimizer trains.
        seen: "inside", if a forward ran in a wrapper that has all the parameters and averages their gradients;
            "outside", if one ran without such a wrapper, so that not all gradients are averaged. It is emptied
            once the gradients are used up or cleared.
    """

    def __init__(self) -> None:
        self.params: set[Tensor] = set()
        self._last: Any = lambda: None
        self._has_all = False
        self.seen: set[str] = set()

    def saw_forward(self) -> None:
        """Note what runs this forward of one of the optimizer's layers."""
        ddp = running_ddp()
        if ddp is None or not self._averages_all(ddp):
            self.seen.add("outside")
        elif ddp.require_backward_grad_sync:  # not so in its no_sync()
            self.seen.add("inside")

    def _averages_all(self, ddp: Any) -> bool:
        if ddp is not self._last():
            ignored = getattr(ddp, "parameters_to_ignore", ())
            averaged = {p for name, p in ddp.module.named_parameters() if name not in ignored}
            self._last, self._has_all = weakref.ref(ddp), self.params <= averaged
        return self._has_all
