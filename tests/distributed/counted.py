"""Started by torchrun: what is exchanged in each kind of step, number by number, against what must be."""

import torch
import torch.distributed as dist
from leaving import leave
from models import model_and_batches
from published import SINGD
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from traffic import Traffic

from singd import registered_structures, structure

UPDATE, OFF = (0, 3), (1, 2)  # of steps 0..3 with T = 3


def traffic_of_steps(wrapper, **options):
    """What is exchanged in each of four steps: in the backward pass, and in the optimizer's step."""
    model, batches = model_and_batches("mlp", steps=4, batch=8)
    model = model.float()
    numel = [p.numel() for p in model.parameters()]
    sizes = [(d.out_features, d.in_features + (d.bias is not None)) for d in model[::2]]
    if wrapper == "ddp":
        trained = DistributedDataParallel(model)
    elif wrapper == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in (m for m in model if isinstance(m, nn.Linear)):
            fully_shard(layer, mesh=mesh)
        trained = fully_shard(model, mesh=mesh)
    else:
        trained = model
    optimizer = SINGD(trained, T=3, lr_cov=0.1, **options)
    found = []
    for x, y in batches:
        x, y = (t.chunk(dist.get_world_size())[dist.get_rank()] for t in (x, y))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(trained(x.float()), y)
        with Traffic() as backward:
            loss.backward()
        with Traffic() as step:
            optimizer.step()
        found.append((backward, step))
    return numel, sizes, found


def stored(name, sizes):
    """The numbers that a pair of factors holds, of all layers."""
    return sum(structure(name)(n).numel for pair in sizes for n in pair)


def independent(name, n):
    """The dimension of the space of P(X) over symmetric X: no fewer numbers say what a statistic is."""
    I = structure(name)(n, dtype=torch.float64)
    torch.manual_seed(0)
    some = [I.project(torch.randn(n, n, dtype=torch.float64)).flat() for _ in range(n * n + 1)]
    return int(torch.linalg.matrix_rank(torch.stack(some)))


def plain(wrapper):
    """One collective per update holds the statistics of all layers; off the updates SINGD adds nothing."""
    for name in registered_structures():
        gradients, sizes, found = traffic_of_steps(wrapper, structures=(name, name))
        statistics = stored(name, sizes) + 4 * len(sizes)
        least = sum(independent(name, n) for pair in sizes for n in pair) + 4 * len(sizes)
        assert least <= statistics <= 2 * least
        if dist.get_rank() == 0 and wrapper == "ddp":
            print(
                f"{name:20} {statistics:5} numbers per update, {statistics / least:.2f} x the least"
            )
        # without a wrapper: which gradients exist and what ran the forwards; the means
        flags, means = ([], []) if wrapper == "ddp" else ([len(gradients) + 2], [sum(gradients)])
        for i, (backward, step) in enumerate(found):
            assert backward.numel == (sum(gradients) if wrapper == "ddp" else 0)
            expected = [*flags, *([statistics] if i in UPDATE else []), *means]
            assert [m.numel for m in step.messages] == expected, (name, i)
            assert all(m.kind == "all_reduce" and m.itemsize == 4 for m in step.messages)


def shared_out():
    """Under DDP: sums go to the owners, natural gradients to all, and K and C before they are needed."""
    for name in registered_structures():
        gradients, sizes, found = traffic_of_steps(
            "ddp", structures=(name, name), shard_factors=True
        )
        factors = stored(name, sizes)
        for i, (backward, step) in enumerate(found):
            assert backward.numel == sum(gradients)
            least = [sum(gradients)]
            if i in UPDATE:
                least.insert(0, factors + 4 * len(sizes))
            if i + 1 in UPDATE:
                least.append(factors)
            assert len(step.messages) == len(least), (name, i)
            for message, needed in zip(step.messages, least, strict=True):
                # a gather pads all shares to the longest, but to no more than twice the whole
                assert needed <= message.numel <= 2 * needed, (name, i)


def fully_sharded():
    """FSDP2 reduces the gradients; SINGD gathers them whole, and reduces the statistics."""
    for name in registered_structures():
        gradients, sizes, found = traffic_of_steps("fsdp", structures=(name, name))
        statistics = stored(name, sizes) + 4 * len(sizes)
        for i, (_, step) in enumerate(found):
            sums = [m.numel for m in step.messages if m.kind == "all_reduce"]
            assert sums == ([statistics] if i in UPDATE else [])
            gathered = [m for m in step.messages if m.kind == "all_gather"]
            assert sum(gradients) <= sum(m.numel for m in gathered) <= 2 * sum(gradients)
            assert len(gathered) <= len(gradients)
    if dist.get_rank() == 0:
        print(f"{len(gathered)} gathers of {len(gradients)} gradients")


def main():
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    plain("ddp")
    plain("none")
    shared_out()
    fully_sharded()
    leave("counted")


if __name__ == "__main__":
    main()
