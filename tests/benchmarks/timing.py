"""CPU time of training iterations, in turns with SGD's so that both meet the same noise."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from workloads import Workload

PERIOD = 10  # of contenders that update something only every tenth step
SLOW = 2.0  # seconds of one iteration, from which on two iterations must do


@dataclass
class Contender:
    """An optimizer as it is compared.

    Attributes:
        name: What the tables call it.
        make: From a model to the optimizer, or to several that step together.
        period: After how many steps its cost repeats.
        kind: "ours", "published" or "other".
        structure: The structure of both factors, where there is one.
    """

    name: str
    make: Callable[[nn.Module], list[torch.optim.Optimizer]]
    period: int = 1
    kind: str = "other"
    structure: str | None = None


class Training:
    """One contender that trains on one workload."""

    def __init__(self, contender: Contender, workload: Workload) -> None:
        torch.manual_seed(0)
        self.model = workload.model()
        self.x, self.y = workload.batch()
        self.optimizers = contender.make(self.model)

    def iterate(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        F.cross_entropy(self.model(self.x), self.y).backward()
        for optimizer in self.optimizers:
            optimizer.step()

    def timed(self) -> float:
        """CPU seconds of the next iteration."""
        start = time.process_time()
        self.iterate()
        return time.process_time() - start


@dataclass
class Run:
    """The measurements of one contender.

    Attributes:
        seconds: CPU seconds of its iterations, a list for each phase of the period.
        overheads: The same minus those of the SGD iteration that was made just before.
    """

    contender: Contender
    training: Training
    seconds: list[list[float]] = field(default_factory=list)
    overheads: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.seconds = [[] for _ in range(self.contender.period)]
        self.overheads = [[] for _ in range(self.contender.period)]

    def turn(self, sgd: Training, iterations: int, pair_every: int = 1) -> list[float]:
        """Some iterations from phase 0 on, each after one of SGD; returns SGD's seconds."""
        partners: list[float] = []
        for i in range(iterations):
            if i % pair_every == 0:
                partners.append(sgd.timed())
            spent, phase = self.training.timed(), i % self.contender.period
            self.seconds[phase].append(spent)
            self.overheads[phase].append(spent - partners[-1])
        return partners


def over_period(phases: Sequence[Sequence[float]], quantile: float = 0.5) -> float:
    """Each phase's quantile, averaged over the period.

    Phases that were not reached count as the last one that was (see SLOW).
    """
    reached = [quantile_of(s, quantile) for s in phases if s]
    return (sum(reached) + (len(phases) - len(reached)) * reached[-1]) / len(phases)


def quantile_of(values: Sequence[float], quantile: float) -> float:
    ordered = sorted(values)
    position = quantile * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def interleaved(
    contenders: list[Contender],
    sgd: Contender,
    workload: Workload,
    *,
    seconds: float,
    focus: Container[str] = (),
    focus_seconds: float = 0.0,
    rounds: int = 99,
    show: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, Run], list[float]]:
    """Train all contenders in turns, each of their iterations next to one of SGD.

    A turn is one period, at least three iterations. Turns come in an order of chance, another one in
    every round. The first turn of each, which allocates and warms up, does not count, unless the contender
    is so slow that its warm-up is nothing beside it.

    Args:
        contenders: What to compare.
        sgd: What all of them are compared with.
        workload: On what.
        seconds: Wall time of the rounds of all. There is one round at least.
        focus: The names of those that take part in further rounds of their own.
        focus_seconds: Wall time of these.
        rounds: How many rounds of each kind at most.
        show: Is told how far it is.

    Returns:
        The runs by name, and the seconds of all of SGD's iterations.
    """
    begin, chance = time.monotonic(), random.Random(0)
    partner = Training(sgd, workload)
    for _ in range(3):
        partner.iterate()
    runs = {c.name: Run(c, Training(c, workload)) for c in contenders}
    slow, partners = set(), []
    gc.collect()
    gc.freeze()  # what torch holds need not be looked through before every turn
    for done, run in enumerate(runs.values()):
        show(f"warm-up {done + 1} of {len(runs)}: {run.contender.name}")
        partners += run.turn(partner, 1)
        if run.seconds[0][0] > SLOW and run.contender.period > 1:
            spent = run.training.timed()
            run.seconds[1].append(spent)
            run.overheads[1].append(spent - partners[-1])
            slow.add(run.contender.name)
            continue
        for _ in range(run.contender.period - 1):
            run.training.iterate()
        run.forget()
    fast = [run for run in runs.values() if run.contender.name not in slow]
    few = [run for run in fast if run.contender.name in focus]
    for group, until, pair_every in ((fast, seconds, 2), (few, seconds + focus_seconds, 1)):
        last = 0.0
        for done in range(rounds if group else 0):
            spent = time.monotonic() - begin
            if spent + last > until and (done or group is few):
                break
            show(f"round {done + 1} of {len(group)}, {spent:.0f} of {until:.0f} s")
            for run in chance.sample(group, len(group)):
                gc.collect()
                partners += run.turn(partner, max(3, run.contender.period), pair_every)
            last = time.monotonic() - begin - spent
    gc.unfreeze()
    return runs, partners


def median_seconds(work: Callable[[], object], *, least: float = 0.05, repeats: int = 5) -> float:
    """The median CPU time of some work: several times, or once where it takes very long."""
    times: list[float] = []
    while len(times) < repeats or sum(times) < least:
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
        if sum(times) > 20 * least and len(times) > 1:
            break
        if times[0] > 40 * least:
            break
    return statistics.median(times[1:] or times)


def product_rate(n: int = 2048, least: float = 1.0) -> float:
    """Floating-point operations per CPU second of one large float32 matrix product."""
    a, b = torch.randn(n, n), torch.randn(n, n)
    return 2 * n**3 / median_seconds(lambda: a @ b, least=least)
