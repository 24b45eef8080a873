"""Started by torchrun: N processes, each with its share of every batch, equal one process with all of it.

Each rank trains its own twin on the whole batch first, alone, and then together with the others on its share.
"""

import copy
import itertools

import torch
import torch.distributed as dist
from leaving import leave
from models import MODELS, model_and_batches
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from singd import SINGD, registered_structures

LR = dict(lr=0.05, lr_cov=0.2, damping=0.1)


def loss_of(output, target, average):
    """The mean over the batch, or a sum (divided by a constant, for the scale)."""
    if average is None:
        return nn.functional.cross_entropy(output, target, reduction="sum") / 10
    return nn.functional.cross_entropy(output, target)


def run(name, wrapper, shares, parts=1, **options):
    """Train both; return the largest difference of a weight, and of K of the last layer."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    size = sum(shares)
    average = options.get("loss_average", "batch")
    model, batches = model_and_batches(name, steps=4, batch=size)
    twin = copy.deepcopy(model)

    alone = SINGD(twin, average_gradients=False, **LR, **options)
    alone_step(alone, twin, batches, average)

    if wrapper == "ddp":
        trained = DistributedDataParallel(model)
        optimizer = SINGD(trained, **LR, **options)
    elif wrapper == "ddp afterwards":
        optimizer = SINGD(model, **LR, **options)
        trained = DistributedDataParallel(model)
    else:
        trained = model
        optimizer = SINGD(model, **LR, **options)
    start = sum(shares[:rank])
    mine = slice(start, start + shares[rank])
    for x, y in batches:
        optimizer.zero_grad()
        pieces = list(zip(x[mine].chunk(parts), y[mine].chunk(parts), strict=True))
        for i, (x_part, y_part) in enumerate(pieces):
            # each rank's loss is its part of the whole one, times the number of ranks that are averaged
            weight = ranks if average is None else ranks * len(x_part) / size
            last = i == len(pieces) - 1
            if hasattr(trained, "no_sync") and not last:
                with trained.no_sync():
                    (loss_of(trained(x_part), y_part, average) * weight).backward()
            else:
                (loss_of(trained(x_part), y_part, average) * weight).backward()
        optimizer.step()
    difference = max(
        (p - q).abs().max() for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    twins = [m for m in twin.modules() if isinstance(m, nn.Linear)]
    K, K_alone = optimizer.factors(layers[-1]).K.dense(), alone.factors(twins[-1]).K.dense()
    assert not torch.allclose(K, torch.eye(len(K)).to(K), atol=1e-3)
    return max(difference.item(), (K - K_alone).abs().max().item())


def alone_step(optimizer, model, batches, average):
    """Train without any communication, though the group is there."""
    from singd import distributed

    world_size, distributed.world_size = distributed.world_size, lambda: 1
    for x, y in batches:
        optimizer.zero_grad()
        loss_of(model(x), y, average).backward()
        optimizer.step()
    distributed.world_size = world_size


def cases():
    equal, unequal = (4, 4), (2, 6)
    for name, wrapper in itertools.product(MODELS, ("ddp", "ddp afterwards", "none")):
        yield dict(name=name, wrapper=wrapper, shares=unequal, T=1)
    for structure in registered_structures():
        yield dict(
            name="mlp", wrapper="ddp", shares=unequal, T=1, structures=(structure, structure)
        )
    for approx, average in itertools.product(
        ("expand", "reduce"), (None, "batch", "batch+sequence")
    ):
        for name in ("cnn", "shared"):
            yield dict(
                name=name,
                wrapper="ddp",
                shares=equal,
                T=2,
                kfac_approx=approx,
                loss_average=average,
            )
            yield dict(
                name=name, wrapper="ddp", shares=unequal, parts=2, T=1, kfac_approx=approx,
                loss_average=average, kfac_like=True,
            )  # fmt: skip


def a_layer_that_one_rank_does_not_use():
    """Rank 1 skips the middle layer; all ranks end with the same weights and factors."""

    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))

        def forward(self, x):
            x = torch.tanh(self.a(x))
            return self.c(x if dist.get_rank() == 1 else self.b(x))

    for wrapped in (True, False):
        torch.manual_seed(0)
        model = Skipping()
        trained = DistributedDataParallel(model, find_unused_parameters=True) if wrapped else model
        optimizer = SINGD(trained, T=1, lr=0.05, lr_cov=0.2)
        for _ in range(3):
            optimizer.zero_grad()
            trained(torch.randn(4, 6)).square().mean().backward()
            optimizer.step()
        mine = torch.cat(
            [*(p.flatten() for p in model.parameters()), optimizer.factors("b").K.flat()]
        )
        theirs = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(theirs, mine.detach())
        assert all(torch.equal(t, theirs[0]) for t in theirs)
        assert not torch.equal(optimizer.factors("b").K.dense(), torch.eye(7))


def main():
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    count = 0
    for case in cases():
        difference = run(**case)
        assert difference < 1e-10, (case, difference)
        count += 1
    a_layer_that_one_rank_does_not_use()
    leave(f"{count} cases equal")


if __name__ == "__main__":
    main()
