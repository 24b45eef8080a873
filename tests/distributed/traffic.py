"""Counts what a process exchanges with the others."""

from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# torch's names of what is counted; others (barriers) carry no numbers
KINDS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_reduce": "all_reduce",
    "broadcast_": "broadcast",
}
IGNORED = {"barrier", "wait_tensor", "_wrap_tensor_autograd"}


@dataclass(frozen=True)
class Message:
    """One collective: what it is and the numbers in its whole buffer (of all ranks, if they are gathered)."""

    kind: str
    numel: int
    itemsize: int

    def bytes_sent(self, ranks):
        """What each rank sends in a ring: an all_reduce is a reduce_scatter and an all_gather."""
        rounds = 2 if self.kind == "all_reduce" else 1
        return rounds * (ranks - 1) / ranks * self.numel * self.itemsize


class Traffic(TorchDispatchMode):
    """Within it, every collective of this process is written down, those of DDP's and FSDP's own code too."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # it first says what it exchanges
        result = func(*args, **(kwargs or {}))
        namespace, _, name = func._schema.name.partition("::")
        if "c10d" in namespace and name not in IGNORED:
            tensors = [t for t in tree_leaves((args, result)) if isinstance(t, Tensor)]
            largest = max(tensors, key=lambda t: t.numel())
            self.messages.append(Message(KINDS[name], largest.numel(), largest.itemsize))
        return result

    @property
    def numel(self):
        return sum(m.numel for m in self.messages)

    @property
    def kinds(self):
        return [m.kind for m in self.messages]
