"""What each trick for speed saves of a whole training step, one of them switched off at a time.

    PYTHONPATH=src:tests/benchmarks OMP_NUM_THREADS=1 python tests/benchmarks/kernels.py

prints, for some workloads with an update in every step, the time of a step and by how much it grows without each
kernel's faster form, or without a part of it. Times are CPU times, the least of some, so that other work on the
machine can only add; still, a few percent are noise.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn
from workloads import WORKLOADS

from singd import SINGD
from singd.kernels import KERNELS, cpu_products, fast_patches

REPEATS = 5
CASES = (
    ("mlp", "dense"),
    ("mlp", "hierarchical15_15"),
    ("mlp", "triltoeplitz"),
    ("cnn", "dense"),
    ("cnn", "diagonal"),
    ("cnn", "block30diagonal"),
    ("cnn", "hierarchical15_15"),
    ("cnn", "triltoeplitz"),
)
TWINS = {name: dict(kernel.twins) for name, kernel in KERNELS.items() if kernel.twins}
PARTS = {  # of the kernels above: where the number stands, and what switches the part off
    "rows aligned": (cpu_products, "ALIGNED", 1),
    "narrow products as rows": (cpu_products, "NARROW", 0),
    "half of a symmetric product": (cpu_products, "LEAST", 2**60),
    "shifted products": (fast_patches, "cheapest_plan", lambda *args: None),
}
USUAL = {name: getattr(module, number) for name, (module, number, _) in PARTS.items()}


def switch_off(trick: str | None) -> None:
    """Switch everything on, but for one kernel's faster forms, a part of one, or (``"all"``) all of them."""
    for name, twins in TWINS.items():
        KERNELS[name].twins = {} if trick in (name, "all") else dict(twins)
    for name, (module, number, off) in PARTS.items():
        setattr(module, number, off if trick == name else USUAL[name])


def training(workload: str, structure: str) -> Callable[[], object]:
    """One iteration with an update, on one batch."""
    torch.manual_seed(0)
    model, (x, y) = WORKLOADS[workload].model(), WORKLOADS[workload].batch()
    optimizer = SINGD(model, T=1, structures=(structure, structure), lr=1e-4)

    def iterate() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    iterate()
    return iterate


def seconds(iterate: Callable[[], object], tricks: list[str | None]) -> dict[str | None, float]:
    """The least time without each trick, measured in turns."""
    least = dict.fromkeys(tricks, float("inf"))
    for _ in range(REPEATS):
        for trick in tricks:
            switch_off(trick)
            start = time.process_time()
            iterate()
            least[trick] = min(least[trick], time.process_time() - start)
    switch_off(None)
    return least


if __name__ == "__main__":
    torch.set_num_threads(1)
    for workload, structure in CASES:
        found = seconds(training(workload, structure), [None, *TWINS, *PARTS, "all"])
        usual = found.pop(None)
        grown = {trick: f"{100 * (t / usual - 1):+.0f}%" for trick, t in found.items()}
        print(f"{workload} {structure}: {1e3 * usual:.1f} ms; without", grown, flush=True)
