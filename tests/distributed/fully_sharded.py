"""Started by torchrun: models under ``fully_shard`` (FSDP2) equal one process with the whole batch.

Each rank trains a twin on the whole batch first, alone, and then the sharded model on its share.
"""

import copy
import itertools

import torch
import torch.distributed as dist
from equal_one_process import alone_step
from leaving import leave
from models import model_and_batches
from published import SINGD
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from singd import registered_structures
from singd.processes import collectives

OPTIONS = dict(lr=0.05, lr_cov=0.2, damping=0.1, T=2)


def sharded(model, policy, grid=None):
    grid = grid or (dist.get_world_size(),)
    mesh = init_device_mesh("cpu", grid, mesh_dim_names=("copy", "shard")[-len(grid) :])
    for layer in model.children():
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def run(name, first, policy=None, norm=False, shard_factors=False, grid=None, **options):
    """Train both; return the largest difference of a weight or a factor."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    shares = [2, 6, 3, 5][:ranks]
    model, batches = model_and_batches(name, steps=5, batch=sum(shares))
    if norm:  # not preconditioned: the fallback trains it
        model.insert(1, nn.LayerNorm(8, dtype=torch.float64))
    twin = copy.deepcopy(model)
    options = {**OPTIONS, **options}
    alone = SINGD(twin, average_gradients=False, **options)
    alone_step(alone, twin, batches, "batch")
    options["shard_factors"] = shard_factors

    policy = policy or MixedPrecisionPolicy()
    if first == "optimizer":
        optimizer = SINGD(model, **options)
        sharded(model, policy, grid)
    else:
        optimizer = SINGD(sharded(model, policy, grid), **options)
    start = sum(shares[:rank])
    mine = slice(start, start + shares[rank])
    for x, y in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[mine]), y[mine])
        (loss * (ranks * shares[rank] / sum(shares))).backward()
        optimizer.step()
    differences = [
        (p.full_tensor() - q).abs().max()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    ]
    assert all(hasattr(p, "full_tensor") for p in model.parameters())
    for layer, other in zip(model.modules(), twin.modules(), strict=True):
        if isinstance(other, (nn.Linear, nn.Conv2d)):
            pairs = zip(optimizer.factors(layer), alone.factors(other), strict=True)
            differences += [(a.dense() - b.dense()).abs().max() for a, b in pairs]
            assert alone.factors(other).K.dense().std() > 0
    if policy.param_dtype is None:  # the diagnostics see whole tensors
        for line, expected in zip(optimizer.stats().values(), alone.stats().values(), strict=True):
            for key in ("cosine", "update_ratio", "norm_K"):
                differences.append(torch.tensor(abs(line[key] - expected[key])))
    return max(differences).item()


def gathered_gradients():
    """One gather gives what ``full_tensor`` gives parameter by parameter."""
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    gather, calls = getattr(dist, name), []

    def counted(*args, **options):
        calls.append(args[1].numel())
        return gather(*args, **options)

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(dist.get_rank())
    params = []
    for shape in ((1,), (5, 3), (7,), (8, 2, 3), (3, 1)):
        for dtype in (torch.float32, torch.float64):
            whole = torch.randn(shape, dtype=dtype)
            p = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
            p.grad = distribute_tensor(torch.randn(shape, dtype=dtype), mesh, [Shard(0)])
            params.append(p)
    other = nn.Parameter(distribute_tensor(torch.randn(4, 4), mesh, [Shard(1)]))
    other.grad = other.detach().clone()
    setattr(dist, name, counted)
    found = collectives.gathered({p: p.grad for p in [*params, other]})
    setattr(dist, name, gather)
    assert found.keys() == {*params, other} and len(calls) == 2  # one per dtype
    assert torch.equal(found[other], other.grad.full_tensor())
    for p in params:
        assert torch.equal(found[p], p.grad.full_tensor()) and found[p].abs().min() > 0


def buckets():
    """A model larger than a bucket takes several gathers, and trains the same."""
    size, gathered, calls = collectives.BUCKET, collectives.gathered, []

    def counted(vectors):
        if any(
            hasattr(v, "full_tensor") for v in vectors.values()
        ):  # (the twin's are whole already)
            calls.append(vectors)
        return gathered(vectors)

    collectives.gathered = counted
    for bytes_, gathers in ((size, 5), (200, 15)):  # five steps of three layers
        calls.clear()
        collectives.BUCKET = bytes_
        assert run("mlp", "shards") < 1e-10
        assert len(calls) == gathers
    collectives.BUCKET, collectives.gathered = size, gathered


def main():
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    count = 0
    for name, first in itertools.product(("mlp", "cnn", "shared"), ("optimizer", "shards")):
        difference = run(name, first)
        assert difference < 1e-10, (name, first, difference)
        count += 1
    assert run("mlp", "shards", norm=True) < 1e-10
    gathered_gradients()
    buckets()
    if dist.get_world_size() == 4:  # two copies, each spread over two ranks
        for shard in (False, True):
            assert run("mlp", "shards", grid=(2, 2), shard_factors=shard) < 1e-10
    for structure in registered_structures():
        difference = run("mlp", "shards", structures=(structure, structure))
        assert difference < 1e-10, (structure, difference)
        count += 1
    # Layers compute in float32, weights and gradients are kept and reduced in float64.
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float64)
    difference = run("mlp", "shards", policy)
    assert 0 < difference < 1e-5, difference
    leave(f"{count} cases equal")


if __name__ == "__main__":
    main()
