"""What the defaults cost beside AdamW: over 1,000 steps of their own schedule, and on a thousand tiny layers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import contenders as c
import torch
from timing import PERIOD, Contender, interleaved
from torch import nn
from torch.optim import AdamW
from workloads import Workload

import singd

STEPS = 1000
DENSE = ("dense", "dense")
OURS: dict[str, dict[str, Any]] = {
    "as they are": {},
    "dense": {"structures": DENSE},
    "dense, products kept": {"structures": DENSE, "cache_products": True},
    "block30diagonal": {"structures": ("block30diagonal", "block30diagonal")},
    "diagonal": {"structures": ("diagonal", "diagonal")},
}


def updates(schedule: Callable[[int], int], steps: int) -> int:
    """How often the factors are updated in so many steps."""
    count, last = 0, -1
    for step in range(steps):
        if last < 0 or step - last >= schedule(step):
            count, last = count + 1, step
    return count


def field(published: Any) -> list[Contender]:
    """AdamW, the defaults with several structures, and the published package with dense ones.

    The factors are updated in every tenth step here; the schedule's share of updates is applied afterwards.
    """

    def ours(changed: dict[str, Any]) -> Callable[[nn.Module], list[torch.optim.Optimizer]]:
        return lambda m: [singd.SINGD(m, T=PERIOD, **changed)]

    adamw = Contender("AdamW", lambda m: [AdamW(m.parameters(), lr=1e-3)])
    mine = [Contender(name, ours(changed), PERIOD, "ours") for name, changed in OURS.items()]
    if published is None:
        return [adamw, *mine]
    make = c.singd_of(published, "dense", PERIOD, warn_unsupported=False)
    return [adamw, *mine, Contender("published dense, T=10", make, PERIOD, "published", "dense")]


def schedule(
    workload: Workload, published: Any, seconds: float, show: Callable[[str], None], rounds: int
) -> dict[str, Any]:
    """Milliseconds of each contender's iteration, and of its overhead over SGD's, averaged over the schedule."""
    runs, sgd = interleaved(
        field(published), c.SGD_CONTENDER, workload, seconds=seconds, show=show, rounds=rounds
    )
    often = updates(singd.Growing(), STEPS) / STEPS
    plain = 1e3 * statistics.median(sgd)
    rows = []
    for run in runs.values():
        first, *others = (1e3 * statistics.median(phase) for phase in run.overheads if phase)
        other = statistics.mean(others or [first])
        share = often if run.contender.kind == "ours" else 1 / run.contender.period
        overhead = share * first + (1 - share) * other
        row = {"name": run.contender.name, "kind": run.contender.kind, "overhead_ms": overhead}
        rows.append({**row, "ms": plain + overhead, "update_ms": first, "other_ms": other})
    return {"sgd_ms": plain, "updates": often, "contenders": rows}


def tiny_layers(layers: int = 1000, steps: int = 40) -> dict[str, float]:
    """Milliseconds of a step, and of a whole iteration, on many linear layers of 8 inputs and outputs.

    AdamW and the defaults take turns; the first eighth of the steps is not counted.
    """
    torch.manual_seed(0)
    x = torch.randn(16, 8)
    makers = {"AdamW": lambda m: AdamW(m.parameters(), lr=1e-5), "SINGD": _every_tenth}
    models = {n: nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers))) for n in makers}
    optimizers = {name: make(models[name]) for name, make in makers.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in makers}
    for _ in range(steps):
        for name, optimizer in optimizers.items():
            optimizer.zero_grad()
            begin = time.process_time()
            models[name](x).square().mean().backward()
            middle = time.process_time()
            optimizer.step()
            end = time.process_time()
            times[name].append((end - middle, end - begin))
    found: dict[str, float] = {"layers": layers}
    for name, both in times.items():
        for i, part in enumerate(("step", "iteration")):
            found[f"{name} {part}_ms"] = 1e3 * statistics.mean(
                pair[i] for pair in both[steps // 8 :]
            )
    return found


def _every_tenth(model: nn.Module) -> torch.optim.Optimizer:
    return singd.SINGD(model, lr=1e-5, T=PERIOD)
