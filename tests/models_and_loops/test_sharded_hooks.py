"""FSDP2 lends a layer its gathered weight for the time of a forward and of a backward: one process will do."""

import copy

import pytest
import torch
import torch.distributed as dist
from models import model_and_batches
from published import SINGD
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("reshard", [True, False])
def test_statistics_are_those_of_the_plain_model(mesh, reshard):
    model, batches = model_and_batches("mlp", steps=1)
    twin = copy.deepcopy(model)
    for layer in (model[0], model[2], model[4], model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    optimizer, other = SINGD(model, T=1), SINGD(twin, T=1)
    x, y = batches[0]
    for m in (model, twin):
        inputs = x.clone().requires_grad_()
        torch.autograd.grad(m(inputs).sum(), inputs)  # adds nothing to gradients or statistics
        nn.functional.cross_entropy(m(x), y).backward()
    for mine, theirs in zip(optimizer._blocks, other._blocks, strict=True):
        a, b = (
            optimizer._collector.statistics[mine].normalised(),
            other._collector.statistics[theirs].normalised(),
        )
        for name in ("H_K", "H_C"):
            torch.testing.assert_close(getattr(a[0], name).dense(), getattr(b[0], name).dense())
