"""How a test's process ends, once all that it asserts has held."""

import os

import torch.distributed as dist


def leave(said):
    """Wait for the other ranks, let the first one say it, and end without tearing the interpreter down.

    Gloo's threads may still hold tensors with a Python object when the interpreter goes, which then aborts
    now and then ("terminate called without an active exception", pytorch/pytorch#179291). A mesh of FSDP
    keeps the group alive beyond ``destroy_process_group``, so that destroying it isn't enough.
    """
    dist.barrier()
    if dist.get_rank() == 0:
        print(said, flush=True)
    dist.destroy_process_group()
    os._exit(0)
