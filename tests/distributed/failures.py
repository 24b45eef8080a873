"""Started by torchrun with the name of what happens: what one rank meets, all ranks bear."""

import copy
import os
import signal
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from leaving import leave
from models import model_and_batches
from published import SINGD
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from singd.processes import exchange


def overflow(shard_factors):
    """A scaler's overflow on rank 1: all skip the step, and go on as if the batch had not been."""
    model, batches = model_and_batches("mlp", steps=4, batch=6)
    model = model.float()
    twin = copy.deepcopy(model)
    scale = 2.0**10
    ends = []
    for network, bad in ((model, True), (twin, False)):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        trained = DistributedDataParallel(network)
        options = dict(T=1, lr=0.05, lr_cov=0.2, shard_factors=shard_factors)
        optimizer = SINGD(trained, grad_scaler=scaler, **options)
        for i, (x, y) in enumerate(batches):
            x = x.float().chunk(2)[dist.get_rank()]
            y = y.chunk(2)[dist.get_rank()]
            if i == 2:
                if not bad:
                    continue
                factor = float("inf") if dist.get_rank() == 1 else 1.0
            else:
                factor = 1.0
            before = [p.clone() for p in network.parameters()]
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(trained(x), y)
            scaler.scale(loss * factor).backward()
            scaler.step(optimizer)
            scaler.update(scale)
            same = [torch.equal(p, q) for p, q in zip(before, network.parameters(), strict=True)]
            assert all(same) if factor != 1.0 or (bad and i == 2) else not any(same)
        ends.append(
            [*(p.detach().clone() for p in network.parameters()), optimizer.factors("2").K.flat()]
        )
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def unwrapped():
    """Without a wrapper, ranks could disagree on an overflow: refused. One built after SINGD will do."""
    model, batches = model_and_batches("mlp", steps=1, batch=6)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = SINGD(model.float(), grad_scaler=scaler)
    scaler.scale(
        nn.functional.cross_entropy(model(batches[0][0].float()), batches[0][1])
    ).backward()
    with pytest.raises(RuntimeError, match="wrap the model in DistributedDataParallel"):
        scaler.step(optimizer)
    before = model[0].weight.clone()
    network = DistributedDataParallel(model)
    optimizer.zero_grad()
    scaler.update()
    scaler.scale(
        nn.functional.cross_entropy(network(batches[0][0].float()), batches[0][1])
    ).backward()
    scaler.step(optimizer)
    assert not torch.equal(before, model[0].weight)


def one_asks_alone():
    """Factors of another rank's layer need that rank: without it there is an error, not a wait."""
    model, batches = model_and_batches("mlp", steps=1, batch=6)
    optimizer = SINGD(DistributedDataParallel(model), shard_factors=True)
    assert repr(optimizer).count("dense") == 6  # asks nobody
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    optimizer.step()
    dist.barrier()
    if dist.get_rank() == 1:
        os._exit(0)
    for asking in (lambda: optimizer.factors("2"), optimizer.stats, optimizer.state_dict):
        with pytest.raises(RuntimeError, match=r"every rank must call (factors|stats|state_dict) "):
            asking()
    print("as expected", flush=True)
    os._exit(0)


def killed():
    """Rank 1 dies in its third step, before it exchanges anything; rank 0 says so."""
    model, batches = model_and_batches("mlp", steps=4, batch=6)
    optimizer = SINGD(DistributedDataParallel(model), T=1)
    reduce = exchange.Reduction
    for i, (x, y) in enumerate(batches):
        if i == 2 and dist.get_rank() == 1:
            exchange.Reduction = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        try:
            optimizer.step()
        except RuntimeError as error:
            print(f"after {i} steps: {error}", flush=True)
            os._exit(3)
    exchange.Reduction = reduce
    print("nothing happened")


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    torch.set_num_threads(1)
    if sys.argv[1] == "overflow":
        overflow(shard_factors=False)
        overflow(shard_factors=True)
    else:
        {"unwrapped": unwrapped, "killed": killed, "one_asks_alone": one_asks_alone}[sys.argv[1]]()
    leave("as expected")
