"""Started by torchrun: with ``shard_factors=True`` every rank keeps its share, and nothing else changes.

Each case is that of one process with the whole batch, as in the scripts beside this one.
"""

import copy
import io
import itertools
import pickle

import pytest
import torch
import torch.distributed as dist
from equal_one_process import LR, a_layer_that_one_rank_does_not_use, rules, run
from fully_sharded import run as run_fully_sharded
from leaving import leave
from models import MODELS, model_and_batches
from published import SINGD
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from singd import registered_structures
from singd.processes import ownership

SHARES = [2, 6, 3, 5]  # unequal batches


def cases():
    """(what trains, arguments of its run)."""
    shares = SHARES[: dist.get_world_size()]
    for name, wrapper in itertools.product(MODELS, ("ddp", "ddp afterwards", "none")):
        yield run, dict(name=name, wrapper=wrapper, shares=shares, T=3)
    for structure in registered_structures():
        both = (structure, structure)
        for wrapper, T in (("ddp", 1), ("none", 3)):
            yield run, dict(name="mlp", wrapper=wrapper, shares=shares, T=T, structures=both)
        yield run_fully_sharded, dict(name="mlp", first="shards", structures=both)
    for name, average in itertools.product(("cnn", "shared"), (None, "batch", "batch+sequence")):
        yield (
            run,
            dict(name=name, wrapper="ddp", shares=shares, parts=2, T=1, loss_average=average),
        )
    for case in rules(shares):
        yield run, case
    for name, first, T in itertools.product(MODELS, ("optimizer", "shards"), (1, 3)):
        yield run_fully_sharded, dict(name=name, first=first, T=T, norm=name == "mlp")


def trained(steps=4, **options):
    """A model in float64 and its optimizer, after some steps on this rank's share."""
    model, batches = model_and_batches("mlp", steps=8, batch=8)
    network = DistributedDataParallel(model)
    optimizer = SINGD(network, **{**LR, "T": 2, **options})
    go_on(network, optimizer, batches[:steps])
    return model, network, optimizer, batches


def go_on(network, optimizer, batches):
    for x, y in batches:
        x, y = (t.chunk(dist.get_world_size())[dist.get_rank()] for t in (x, y))
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()


def everywhere(mine):
    """The objects of all ranks."""
    theirs = [None] * dist.get_world_size()
    dist.all_gather_object(theirs, mine)
    return theirs


def bytes_of_factors(optimizer):
    states = optimizer.state.values()
    return sum(s[key].nbytes for s in states for key in ("K", "C", "m_K", "m_C") if key in s)


def memory_falls_with_the_ranks():
    """All is kept once, and no rank keeps more than its part and one layer."""
    widths = [24, 32, 16, 32, 8, 40, 16, 24, 8]
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))
    found = {}
    for shard in (False, True):
        network = copy.deepcopy(model)
        optimizer = SINGD(network, shard_factors=shard)
        network(torch.randn(4, widths[0])).square().mean().backward()
        optimizer.step()
        found[shard] = everywhere(bytes_of_factors(optimizer))
    whole = found[False][0]
    blocks = {b: ownership.cost(b) for b in optimizer._blocks}
    loads = [0.0] * dist.get_world_size()
    for block, cost in blocks.items():
        loads[optimizer._ownership.owner[block]] += cost
    ranks = dist.get_world_size()
    assert max(loads) <= sum(loads) / ranks + max(blocks.values())
    assert found[False] == [whole] * ranks and sum(found[True]) == whole
    largest = 4 * 2 * (41**2 + 32**2)  # bytes of K, C, m_K, m_C of the largest layer
    assert max(found[True]) <= whole / ranks + largest
    if dist.get_rank() == 0:
        print(f"bytes of factors per rank: {found[True]} of {whole}")


def groups_that_are_added_later():
    """A new layer gets an owner after the first step; all ranks agree, and go on as if nothing were shared."""
    ends = []
    for shard in (False, True):
        model, batches = model_and_batches("mlp", steps=6, batch=8)
        head = model[4]
        first = [p for p in model.parameters() if all(p is not q for q in head.parameters())]
        network = DistributedDataParallel(model)
        optimizer = SINGD(network, first, **LR, T=2, shard_factors=shard)
        go_on(network, optimizer, batches[:3])
        optimizer.add_param_group({"params": list(head.parameters()), "T": 1})
        go_on(network, optimizer, batches[3:])
        ends.append(
            [p.detach() for p in model.parameters()] + list(optimizer.factors("4").K.tensors())
        )
    owners = everywhere(list(optimizer._ownership.owner.values()))
    assert len(owners[0]) == 3 and all(o == owners[0] for o in owners)
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def checkpoints_hold_everything():
    """The state dict is that of an unshared run, on every rank, and goes into runs of either kind."""
    for steps, rule in ((0, "singd"), (3, "singd"), (4, "singd"), (3, "kfac"), (4, "shampoo")):
        _, _, plain, _ = trained(steps, rule=rule)
        model, network, optimizer, batches = trained(steps, rule=rule, shard_factors=True)
        saved = optimizer.state_dict()
        assert_equal(saved["state"], plain.state_dict()["state"])
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": saved}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        go_on(network, optimizer, batches[steps:])
        for shard in (False, True):
            other, other_network, resumed, _ = trained(2, rule=rule, shard_factors=shard)
            other.load_state_dict(loaded["model"])
            resumed.load_state_dict(loaded["optimizer"])
            assert_equal(resumed.state_dict()["state"], loaded["optimizer"]["state"], atol=0.0)
            go_on(other_network, resumed, batches[steps:])
            assert_equal(resumed.state_dict()["state"], optimizer.state_dict()["state"])
            for p, q in zip(model.parameters(), other.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=0, atol=1e-10)


def assert_equal(state, other, atol=1e-10):
    assert state.keys() == other.keys()
    for index, entry in state.items():
        assert entry.keys() == other[index].keys()
        for key, value in entry.items():
            torch.testing.assert_close(value, other[index][key], rtol=0, atol=atol)


def copies_go_on_alike():
    for copied in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        model, network, optimizer, batches = trained(4, shard_factors=True)
        twin, other = copied((model, optimizer))
        go_on(network, optimizer, batches[4:])
        go_on(DistributedDataParallel(twin), other, batches[4:])
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            # (a new wrapper sums in another order)
            torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
        assert_equal(optimizer.state_dict()["state"], other.state_dict()["state"], atol=1e-12)


def others_factors_are_kept_for_one_update():
    """K and C of all layers are there between the step before an update and the update, and not in the state."""
    for steps, there in ((1, False), (2, True), (3, False), (4, True)):
        _, _, optimizer, _ = trained(steps, shard_factors=True)  # T = 2
        for block in optimizer._blocks:
            mine = optimizer._ownership.keeps(block)
            assert [key in optimizer.state[block.weight] for key in block.rule.keeps] == [mine] * 4
            handed = block.factors.handed
            assert (handed is not None) == there
            assert set(handed or ()) == ({"K", "C"} if there and not mine else set())


def another_number_of_ranks_is_refused():
    _, network, optimizer, batches = trained(2, shard_factors=True)
    optimizer._ownership.rank += 1
    with pytest.raises(
        RuntimeError, match=r"holds the factors of rank \d of \d .* load a state_dict"
    ):
        go_on(network, optimizer, batches[2:3])


def factors_in_other_dtypes():
    """Each rank knows the dtypes of the others' factors, also after loading factors of another dtype."""
    options = dict(preconditioner_dtype=(torch.float32, torch.float64))
    _, _, optimizer, _ = trained(3, shard_factors=True, **options)
    saved = optimizer.state_dict()
    _, network, other, batches = trained(2, shard_factors=True)
    other.load_state_dict(saved)
    go_on(network, other, batches[3:])
    for layer in ("0", "2", "4"):
        factors = other.factors(layer)
        assert (factors.K.dtype, factors.m_C.dtype) == (torch.float32, torch.float64)


def a_new_T_holds_a_step_later():
    """All ranks agree on what is due when a group's T is changed between steps."""
    _, network, optimizer, batches = trained(2, shard_factors=True, T=4)
    optimizer.param_groups[0]["T"] = 2
    go_on(network, optimizer, batches[2:3])
    assert [line["age"] for line in optimizer.stats().values()] == [2.0] * 3
    go_on(network, optimizer, batches[3:5])
    assert [line["age"] for line in optimizer.stats().values()] == [0.0] * 3


def main():
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    count = 0
    for train, case in cases():
        difference = train(**case, shard_factors=True)
        assert difference < 1e-10, (train.__module__, case, difference)
        count += 1
    a_layer_that_one_rank_does_not_use(shard_factors=True)
    groups_that_are_added_later()
    checkpoints_hold_everything()
    copies_go_on_alike()
    others_factors_are_kept_for_one_update()
    another_number_of_ranks_is_refused()
    factors_in_other_dtypes()
    a_new_T_holds_a_step_later()
    memory_falls_with_the_ranks()
    leave(f"{count} cases equal")


if __name__ == "__main__":
    main()
