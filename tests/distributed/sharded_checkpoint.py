"""Started by torchrun with ``save DIR`` or ``resume DIR``: checkpoints of sharded models.

With and without ``shard_factors``, and from either into the other.
"""

import itertools
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from equal_one_process import alone_step
from leaving import leave
from models import model_and_batches
from published import SINGD
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

OPTIONS = dict(lr=0.05, lr_cov=0.2, damping=0.1, T=2, weight_decay=0.1)
SAVED_AT = 3  # an odd step: factors are not due in the next one


def made():
    model, batches = model_and_batches("mlp", steps=6, batch=8)
    model.insert(1, nn.LayerNorm(8, dtype=torch.float64))
    return model, batches


def step(model, optimizer, batch):
    ranks, rank = dist.get_world_size(), dist.get_rank()
    x, y = (t.chunk(ranks)[rank] for t in batch)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def state_of(model, optimizer):
    weights, states = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": states}


def load(folder, model, optimizer):
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )


def sharded(**options):
    """The model under ``fully_shard``, and its optimizer."""
    model, _ = made()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, SINGD(model, **OPTIONS, **options)


def main(what, folder):
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    twin, batches = made()
    alone = SINGD(twin, average_gradients=False, **OPTIONS)
    alone_step(alone, twin, batches, "batch")
    for saved, shard in itertools.product((False, True), repeat=2):
        place = f"{folder}/{saved}"
        if what == "save" and saved == shard:
            model, optimizer = sharded(shard_factors=shard)
            dcp.save(state_of(model, optimizer), checkpoint_id=place + "/start")
            for batch in batches[:SAVED_AT]:
                step(model, optimizer, batch)
            dcp.save(state_of(model, optimizer), checkpoint_id=place + "/middle")
            check(model, optimizer, batches[SAVED_AT:], twin, alone)
        if what == "resume":
            model, optimizer = sharded(shard_factors=shard)
            for start, name in ((0, "/start"), (SAVED_AT, "/middle")):
                with torch.no_grad():
                    for p in model.parameters():
                        p.mul_(2.0)  # nothing of what was here before may stay
                load(place + name, model, optimizer)
                check(model, optimizer, batches[start:], twin, alone)
    leave("resumed" if what == "resume" else "saved")


def check(model, optimizer, batches, twin, alone):
    """Go on to the end: weights and factors are those of one process that was never interrupted."""
    for batch in batches:
        step(model, optimizer, batch)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q, rtol=0, atol=1e-10)
    for name in ("0", "3"):
        for a, b in zip(optimizer.factors(name), alone.factors(name), strict=True):
            torch.testing.assert_close(a.dense(), b.dense(), rtol=0, atol=1e-10)


if __name__ == "__main__":
    main(*sys.argv[1:])
