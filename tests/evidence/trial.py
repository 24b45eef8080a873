"""One training run: a task, a method, a learning rate and a seed."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from tasks import SPLITS, Task
from torch import nn

LOST = 1e30  # from here on a loss counts as not finite


@dataclass
class Run:
    """What is kept of a run.

    Attributes:
        seconds: CPU seconds of its training, measuring left out.
        final: The measure on each split at the end; empty where the run diverged.
        step: The steps after which was measured.
        at: CPU seconds by then.
        curves: The measure at these steps, on each split.
    """

    task: str
    method: str
    steps: int
    lr: float
    seed: int
    seconds: float = 0.0
    final: dict[str, float] = field(default_factory=dict)
    step: list[int] = field(default_factory=list)
    at: list[float] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=lambda: {s: [] for s in SPLITS})

    @property
    def key(self) -> tuple[str, str, int, float, int]:
        return self.task, self.method, self.steps, self.lr, self.seed

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def share(step: int, steps: int) -> float:
    """The schedule: 2 % of the steps warm up, the second half falls in a line to zero."""
    return min(1.0, (step + 1) / max(1, round(0.02 * steps)), (steps - step) / (steps / 2))


def train(
    task: Task,
    make: Callable[[nn.Module, float, dict[str, Any]], Any],
    run: Run,
    measures: int | None = None,
    show: Callable[[int], None] = lambda step: None,
) -> Run:
    """Train, and fill in what was measured. A run whose loss is not finite any more ends at once."""
    torch.manual_seed(run.seed)
    model = task.model()
    batches = task.batches(run.seed + 1)
    every = max(1, run.steps // (measures or task.measures))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peers warn of their slow routes
        made = make(model, run.lr, task.options)
        optimizers = made if isinstance(made, list) else [made]
        schedules = [
            torch.optim.lr_scheduler.LambdaLR(o, lambda t: share(t, run.steps)) for o in optimizers
        ]
        start = time.process_time()
        for step in range(run.steps):
            if step % every == 0:
                run.seconds += time.process_time() - start
                measured = task.measured(model)
                if not all(math.isfinite(v) and v < LOST for v in measured.values()):
                    return run
                note(run, step, measured)
                show(step)
                start = time.process_time()
            batch = next(batches)
            for optimizer in optimizers:
                optimizer.zero_grad()
            try:
                task.loss(model, batch).backward()
                for optimizer in optimizers:
                    optimizer.step()
            except torch.linalg.LinAlgError:  # an inverse that does not exist any more
                return run
            for schedule in schedules:
                schedule.step()
        run.seconds += time.process_time() - start
    measured = task.measured(model)
    if all(math.isfinite(v) and v < LOST for v in measured.values()):
        note(run, run.steps, measured)
        run.final = measured
    return run


def note(run: Run, step: int, measured: dict[str, float]) -> None:
    run.step.append(step)
    run.at.append(run.seconds)
    for split, value in measured.items():
        run.curves[split].append(value)
