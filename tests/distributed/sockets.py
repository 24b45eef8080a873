"""Started by torchrun: no process of the run accepts connections from other machines."""

import os

import torch
import torch.distributed as dist
from launch import MARK, others_can_connect, processes_of
from leaving import leave

dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1))
if dist.get_rank() == 0:
    pids = processes_of(os.environ[MARK])
    assert len(pids) == 1 + dist.get_world_size(), pids  # torchrun, and what it started
    assert not others_can_connect(pids)
leave("only this machine")
