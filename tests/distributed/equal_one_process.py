"""Started by torchrun: N processes, each with its share of every batch, equal one process with all of it.

Each rank trains its own twin on the whole batch first, alone, and then together with the others on its share.
"""

import contextlib
import copy
import io
import itertools
import operator

import torch
import torch.distributed as dist
from leaving import leave
from models import MODELS, model_and_batches
from published import SINGD
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from singd import registered_structures
from singd.processes import collectives, exchange

LR = dict(lr=0.05, lr_cov=0.2, damping=0.1)


def loss_of(output, target, average):
    """The mean over the batch, or a sum (divided by a constant, for the scale)."""
    if average is None:
        return nn.functional.cross_entropy(output, target, reduction="sum") / 10
    return nn.functional.cross_entropy(output, target)


def run(name, wrapper, shares, parts=1, shard_factors=False, **options):
    """Train both; return the largest difference of a weight, and of what is kept of the last layer's inputs."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    size = sum(shares)
    average = options.get("loss_average", "batch")
    model, batches = model_and_batches(name, steps=4, batch=size)
    twin = copy.deepcopy(model)

    alone = SINGD(twin, average_gradients=False, **LR, **options)
    alone_step(alone, twin, batches, average)
    options["shard_factors"] = shard_factors

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
    K, K_alone = (o.factors(m)[0].dense() for o, m in ((optimizer, layers[-1]), (alone, twins[-1])))
    assert not torch.allclose(K, torch.eye(len(K)).to(K), atol=1e-3)
    return max(difference.item(), (K - K_alone).abs().max().item())


def alone_step(optimizer, model, batches, average):
    """Train without any communication, though the group is there."""
    world_size, collectives.world_size = collectives.world_size, lambda: 1
    for x, y in batches:
        optimizer.zero_grad()
        loss_of(model(x), y, average).backward()
        optimizer.step()
    collectives.world_size = world_size


def rules(shares):
    """What differs between the rules: where statistics come from, and what is kept of them."""
    for wrapper in ("ddp", "none"):
        for parts, T in ((1, 1), (2, 3)):
            yield dict(name="shared", wrapper=wrapper, shares=shares, parts=parts, T=T, rule="kfac")
            yield dict(name="cnn", wrapper=wrapper, shares=shares, parts=parts, T=T, rule="shampoo")
    both = ("block2diagonal", "diagonal")
    yield dict(name="mlp", wrapper="ddp", shares=shares, T=2, rule="kfac", structures=both)
    yield dict(name="mlp", wrapper="none", shares=shares, T=2, rule="shampoo", structures=both)
    yield dict(name="mlp", wrapper="ddp", shares=shares, T=2, rule="ikfac")


def cases():
    equal, unequal = (4, 4), (2, 6)
    yield from rules(unequal)
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


def a_layer_that_one_rank_does_not_use(**options):
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
        optimizer = SINGD(trained, T=1, lr=0.05, lr_cov=0.2, **options)
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


@contextlib.contextmanager
def recorded():
    """What a step does, in order: the sizes of its all_reduces ("~" for one that it doesn't wait for)."""
    seen, reduce, finish = [], dist.all_reduce, exchange.Reduction.finish

    def all_reduce(tensor, *args, async_op=False, **options):
        seen.append(("~" if async_op else "") + str(tensor.numel()))
        return reduce(tensor, *args, async_op=async_op, **options)

    def waited(sums):
        seen.append("wait")
        return finish(sums)

    dist.all_reduce, exchange.Reduction.finish = all_reduce, waited
    yield seen
    dist.all_reduce, exchange.Reduction.finish = reduce, finish


def what_a_step_sends():
    """Statistics travel while gradients do; these are not averaged where a wrapper has done it.

    A wrapper that has not all parameters, or a forward past it, leaves some gradients of each rank: then all
    are averaged (again), and every rank ends with the same weights.
    """
    expected = {
        "first": ["~{S}", "wait"],
        "afterwards": ["{F}", "~{S}", "wait"],
        "none": ["{F}", "~{S}", "{G}", "wait"],
        "of a part": ["{F}", "~{S}", "{G}", "wait"],
        "but one forward past it": ["{F}", "~{S}", "{G}", "wait"],
        "never in sync": ["{F}", "~{S}", "{G}", "wait"],
    }
    S = 2 * (3 * 3 + 4) + 3 * 3 + 4 * 4  # H_K, H_C and four numbers of [3, 2 + 1] and of [3, 3 + 1]
    F, G = 4 + 2, 3 * 3 + 3 * 4  # a flag per parameter, and two on the wrapper
    for wrapper, sent in expected.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3))
        trained, part = model, model[1]
        if wrapper == "first":
            trained = DistributedDataParallel(model)
        optimizer = SINGD(trained, T=2, lr=0.05, lr_cov=0.2)
        if wrapper == "of a part":
            part = DistributedDataParallel(model[1])
        elif wrapper not in ("first", "none"):
            trained = DistributedDataParallel(model)
        torch.manual_seed(dist.get_rank())
        for step in range(4):
            x = torch.randn(4, 2)
            optimizer.zero_grad()
            if wrapper == "of a part":
                part(model[0](x)).square().mean().backward()
            elif wrapper == "never in sync":
                with trained.no_sync():
                    trained(x).square().mean().backward()
            else:
                trained(x).square().mean().backward()
            if wrapper == "but one forward past it":
                model(x).square().mean().backward()
            with recorded() as seen:
                optimizer.step()
            due = sent if step % 2 == 0 else [s for s in sent if s != "~{S}"]
            assert seen == [s.format(S=S, F=F, G=G) for s in due], (wrapper, seen)
        mine = torch.cat([p.detach().flatten() for p in model.parameters()])
        theirs = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(theirs, mine)
        assert all(torch.equal(t, theirs[0]) for t in theirs), wrapper


def any_rank_can_save():
    """Under DDP all ranks have the same state dict, and that of any one resumes in one process."""
    model, batches = model_and_batches("mlp", steps=5, batch=8)
    network = DistributedDataParallel(model)
    optimizer = SINGD(network, T=2, **LR)
    twin = copy.deepcopy(model)
    alone = SINGD(twin, T=2, average_gradients=False, **LR)
    for x, y in batches[:3]:
        x, y = (t.chunk(dist.get_world_size())[dist.get_rank()] for t in (x, y))
        optimizer.zero_grad()
        loss_of(network(x), y, "batch").backward()
        optimizer.step()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    files = [None] * dist.get_world_size()
    dist.all_gather_object(files, file.getvalue())
    states = [torch.load(io.BytesIO(f), weights_only=True) for f in files]
    leaves = [torch.utils._pytree.tree_leaves(s) for s in states]
    assert len(leaves[0]) > 20
    for mine, theirs in zip(leaves[0], leaves[1], strict=True):
        same = torch.equal if isinstance(mine, torch.Tensor) else operator.eq
        assert same(mine, theirs)
    alone_step(alone, twin, batches, "batch")
    for state in states:
        resumed = copy.deepcopy(model)
        other = SINGD(resumed, T=2, average_gradients=False, **LR)
        resumed.load_state_dict(state["model"])
        other.load_state_dict(state["optimizer"])
        alone_step(other, resumed, batches[3:], "batch")
        for p, q in zip(resumed.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-10)


def main():
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    count = 0
    for case in cases():
        difference = run(**case)
        assert difference < 1e-10, (case, difference)
        count += 1
    a_layer_that_one_rank_does_not_use()
    what_a_step_sends()
    any_rank_can_save()
    leave(f"{count} cases equal")


if __name__ == "__main__":
    main()
