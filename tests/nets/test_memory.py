"""Training takes no more memory after 2,000 steps than after 200."""

import gc
import sys
import tracemalloc
import warnings

import torch
from counting import tried
from published import FAST
from torch import nn

from singd import SINGD


def tensor_bytes():
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of attributes that warn when they are looked at
        # (other tests leave lazy parameters and fake tensors, which have no memory)
        found = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]
        found = [t for t in found if t.device.type == "cpu" and t.layout == torch.strided]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}
    return len(found), sum(storages.values())


def test_memory_is_flat_over_2000_steps():
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = SINGD(model, **{**FAST, "lr": 1e-3, "T": 3})
    y = torch.arange(8) % 3

    def run(steps):
        for step in range(steps):
            optimizer.zero_grad()
            for x in torch.randn(2, 8, 6):
                nn.functional.cross_entropy(model(x), y).backward()
            if step % 5 == 0:
                model(x)  # a forward whose backward never comes
                with torch.no_grad():
                    model(x)
            if step % 7:  # some are skipped
                optimizer.step()

    run(200)
    tensors = tensor_bytes()
    tracemalloc.start()
    try:
        run(300)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        run(1500)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert tensor_bytes() == tensors
    # less than a tuple for each step; some 20 kB come and go, whatever the number of steps
    assert grown < 1500 * sys.getsizeof((1,))
    tried("steps with flat memory", 2000)
