"""When is SINGD the right choice? `make evidence` compares it with other optimizers, tuned the same way.

python tests/evidence/evidence.py                    (hours; writes docs/_data/evidence.json)
python tests/evidence/evidence.py --quick            (tiny networks, under two minutes: does it all run?)
python tests/evidence/evidence.py --tasks CNN --methods AdamW,SGD --steps 2000
python tests/evidence/evidence.py --ablations --tasks CNN,autoencoder      (what of it pays?)
python tests/evidence/evidence.py --batch-sizes --methods AdamW,SINGD,Muon (one task, several batch sizes)
python tests/evidence/evidence.py --steps 5000 --lrs 1e-4,3e-4 --seeds 3   (long runs: no search, these rates)

Per task and method the learning rate is searched on half decades, from one that is known to be good, until the
best has worse neighbours on both sides, and then a quarter of a decade to both sides of it, because an optimum
between two rates costs as much as a worse method. The best is the one with the lowest *validation* measure at the
end.
At that rate more seeds follow, and at the method's default rate one run. Every run is a file below build,
and a run that is there is not made again; runs that the results hold already are kept.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from methods import ABLATIONS, METHODS, Method, half_decade, quarters
from record import machine, rounded
from tasks import BATCH_TASKS, TASKS, Task
from trial import Run, train

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "_data" / "evidence.json"
START = time.monotonic()
REFERENCE = "AdamW"  # whose tuned final value is the target
STEPS = 400
MOST_RATES = 7  # half decades


def show(text: str, end: str = "\n") -> None:
    """Progress, with the minutes since the start."""
    print(
        f"{(time.monotonic() - START) / 60:5.1f} min  {text}", end=end, file=sys.stderr, flush=True
    )


class Runs:
    """All runs that were made, each in a file of its own, beside those that the results held before."""

    def __init__(self, folder: pathlib.Path, before: Iterable[dict[str, Any]] = ()) -> None:
        self.folder = folder
        self.known = {run.key: run for run in (Run(**r) for r in before)}
        for path in sorted(folder.glob("*.json")):
            run = Run(**json.loads(path.read_text()))
            self.known[run.key] = run

    def made(self, run: Run, work: Callable[[Run], Run]) -> Run:
        """The run as it was made before, or now."""
        if run.key not in self.known:
            # rounded at once, so that the summary is the same when it is made again from the file
            run = Run(**rounded(work(run).as_dict()))
            self.folder.mkdir(parents=True, exist_ok=True)
            name = "-".join(str(part).replace(" ", "_").replace("/", "_") for part in run.key)
            (self.folder / f"{name}.json").write_text(json.dumps(run.as_dict()))
            self.known[run.key] = run
        return self.known[run.key]

    def best_rate(self, task: str, method: str, steps: int) -> float | None:
        """The best rate in runs of another length, if there are any: the search begins there.

        Of several lengths that is the one with the nearest ratio, because optima move with the length.
        """
        lengths = {
            run.steps for run in self.known.values() if (run.task, run.method) == (task, method)
        }
        others = lengths - {steps}
        if not others:
            return None
        return self.best(task, method, min(others, key=lambda n: abs(math.log(n / steps)))).lr

    def best(self, task: str, method: str, steps: int) -> Run:
        """Of all runs of this length with the first seed, that with the best rate."""
        mine = [run for run in self.known.values() if run.key[:3] == (task, method, steps)]
        return min((run for run in mine if run.seed == 0), key=lambda run: (compared(run), run.lr))


def compared(run: Run) -> float:
    """What rates are compared by: the validation measure at the end, infinite where there is none."""
    return run.final.get("validation", math.inf)


def tune(
    first: float, work: Callable[[float], Run], most: int = MOST_RATES, fine: bool = True
) -> Run:
    """The best run over half decades around ``first``, a walk down until both neighbours are worse, and then (if
    ``fine``) over the quarters of a decade beside that one."""
    runs: dict[float, Run] = {}

    def at(lr: float) -> float:
        if lr not in runs:
            runs[lr] = work(lr)
        return compared(runs[lr])

    best = half_decade(first)
    at(best)
    while len(runs) < most:
        sides = [half_decade(best, -1), half_decade(best, 1)]
        missing = [lr for lr in sides if lr not in runs]
        if not missing:
            break
        # one that diverged, or a lower one that is better already, says where not to look
        at(missing[0])
        best = min(runs, key=lambda lr: (at(lr), lr))
    for lr in quarters(best) if fine else ():
        at(lr)
    return runs[min(runs, key=lambda lr: (at(lr), lr))]


def compare(
    task: Task,
    name: str,
    method: Method,
    runs: Runs,
    *,
    steps: int,
    seeds: int,
    rates: int,
    default: bool,
    fine: bool,
    lrs: list[float] | None = None,
) -> None:
    """All runs of one method on one task: rates are searched, or are ``lrs`` and what was tried before."""

    def work(lr: float, seed: int = 0) -> Run:
        title = f"{task.name}, {name}, lr {lr:g}, seed {seed}"

        def made(run: Run) -> Run:
            train(
                task, method.make, run, show=lambda i: show(f"{title}: step {i} of {steps}", "\r")
            )
            ends = ", ".join(f"{k} {v:.4g}" for k, v in run.final.items()) or "diverged"
            show(f"{title}: {ends} after {run.seconds:.1f} s" + " " * 12)
            return run

        return runs.made(Run(task.name, name, steps, lr, seed), made)

    if lrs is None:
        near = method.at.get(task.name, method.near)
        if steps != STEPS:
            near = runs.best_rate(task.name, name, steps) or near
        best = tune(near, work, rates, fine)
    else:
        for lr in lrs:
            work(lr)
        best = runs.best(task.name, name, steps)
    for seed in range(1, seeds):
        work(best.lr, seed)
    if default and method.default is not None:
        work(method.default)


def reached(run: Run, split: str, target: float) -> tuple[float, float]:
    """Steps and CPU seconds until the measure is at the target for the first time; infinite if never."""
    for step, at, value in zip(run.step, run.at, run.curves[split], strict=True):
        if value <= target:
            return step, at
    return math.inf, math.inf


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def finite(value: float) -> float | None:
    """JSON knows no infinity."""
    return value if math.isfinite(value) else None


def summary(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """A row for each task, number of steps and method: its tuned rate, where it ended, how soon it was there."""
    found: dict[tuple[str, int], dict[str, list[Run]]] = {}
    for run in runs:
        found.setdefault((run.task, run.steps), {}).setdefault(run.method, []).append(run)
    rows = []
    for (task, steps), methods in found.items():
        best: dict[str, list[Run]] = {}
        for name, mine in methods.items():
            lr = min((r for r in mine if r.seed == 0), key=compared).lr
            best[name] = sorted((r for r in mine if r.lr == lr), key=lambda r: r.seed)
        targets = {}
        if REFERENCE in best:
            for split in ("train", "validation"):
                targets[split] = median(r.final.get(split, math.inf) for r in best[REFERENCE])
        for name, mine in best.items():
            row: dict[str, Any] = {
                "task": task,
                "steps": steps,
                "method": name,
                "lr": mine[0].lr,
                "rates": len({r.lr for r in methods[name]}),
                "seeds": len(mine),
                "diverged": sum(not r.final for r in mine),
                "seconds": median(r.seconds for r in mine),
            }
            for split in ("train", "validation", "test"):
                ends = [r.final.get(split, math.inf) for r in mine]
                low = [min(r.curves[split], default=math.inf) for r in mine]
                row[split] = [finite(v) for v in (min(ends), median(ends), max(ends))]
                row[f"lowest {split}"] = finite(median(low))
            for split, target in targets.items():
                both = [reached(r, split, target) for r in mine]
                row[f"steps to {split} target"] = finite(median(b[0] for b in both))
                row[f"seconds to {split} target"] = finite(median(b[1] for b in both))
            rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""

    def number(value: float | None, digits: str = ".3g") -> str:
        return "-" if value is None else format(value, digits)

    lines = [
        f"{'task':12} {'steps':>5} {'method':28} {'lr':>6} {'seeds':>5} {'train':>9} {'valid.':>9} {'test':>9} "
        f"{'seconds':>7} {'steps to':>8} {'s to':>6}"
    ]
    for row in sorted(rows, key=lambda r: (r["task"], r["steps"], r["train"][1] or math.inf)):
        lines.append(
            f"{row['task']:12} {row['steps']:5} {row['method']:28} {row['lr']:6g} {row['seeds']:5} "
            + " ".join(f"{number(row[s][1], '.4g'):>9}" for s in ("train", "validation", "test"))
            + f" {row['seconds']:7.1f} {number(row.get('steps to train target'), 'g'):>8}"
            + f" {number(row.get('seconds to train target'), '.1f'):>6}"
        )
    return "\n".join(lines)


def results(runs: Runs) -> dict[str, Any]:
    """All that goes into the file: of runs at a rate that did not win, no curves."""
    rows = summary(runs.known.values())
    won = {(r["task"], r["steps"], r["method"]): r["lr"] for r in rows}
    kept = []
    for _, run in sorted(runs.known.items()):
        entry = run.as_dict()
        if won[run.task, run.steps, run.method] != run.lr:
            entry |= {"step": [], "at": [], "curves": {s: [] for s in run.curves}}
        kept.append(entry)
    tasks = {
        name: {**TASKS, **BATCH_TASKS}[name](False)
        for name in sorted({run.task for run in runs.known.values()})
    }
    return {
        "machine": machine(),
        "tasks": {name: {"says": task.says, "unit": task.unit} for name, task in tasks.items()},
        "summary": rows,
        "runs": kept,
    }


def write(runs: Runs, path: pathlib.Path) -> list[dict[str, Any]]:
    """The file, with a run or a row on each line, so that a change of it can be read."""
    found = rounded(results(runs))
    parts = []
    for key, value in found.items():
        if isinstance(value, list):
            text = "[\n" + ",\n".join(f" {json.dumps(v)}" for v in value) + "\n]"
        else:
            text = json.dumps(value)
        parts.append(f"{json.dumps(key)}: {text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    return found["summary"]


def more_methods(path: pathlib.Path) -> dict[str, Method]:
    """``METHODS`` of a file of one's own."""
    spec = importlib.util.spec_from_file_location("more_methods", path)
    if spec is None or spec.loader is None or not path.exists():
        raise FileNotFoundError(f"There is no Python file {path} to take methods from.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.METHODS


def chosen(text: str, known: Iterable[str], what: str) -> list[str]:
    """The names in a comma-separated list, all for an empty one ("; " separates names with commas)."""
    if not text:
        return list(known)
    names = [name.strip() for name in text.split(";" if ";" in text else ",")]
    for name in names:
        if name not in known:
            raise SystemExit(f"Unknown {what} {name!r}; choose from {'; '.join(known)}.")
    return names


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "results",
        type=pathlib.Path,
        nargs="?",
        help="the JSON file to write (default: the one that the page reads; with --quick one in build)",
    )
    parser.add_argument("--quick", action="store_true", help="tiny networks, 10 steps, 2 rates")
    parser.add_argument("--tasks", default="", help="only these, with commas (or ; ) between")
    parser.add_argument("--methods", default="", help="only these, with commas (or ; ) between")
    parser.add_argument(
        "--ablations", action="store_true", help="SINGD with one thing changed in each method"
    )
    parser.add_argument("--batch-sizes", action="store_true", help="one task, several batch sizes")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each run (default: {STEPS})")
    parser.add_argument("--seeds", type=int, default=4, help="at the best rate (default: 4)")
    parser.add_argument(
        "--rates", type=int, default=MOST_RATES, help="at most so many (default: 7)"
    )
    parser.add_argument(
        "--lrs", help="no search: these rates, with commas between, and those that were tried"
    )
    parser.add_argument("--coarse", action="store_true", help="half decades only")
    parser.add_argument("--no-default", action="store_true", help="no run at the default rate")
    parser.add_argument("--also", type=pathlib.Path, help="a Python file with more METHODS")
    parser.add_argument(
        "--folder",
        type=pathlib.Path,
        help="of the runs (default: one in build for each file of results)",
    )
    args = parser.parse_args(arguments)

    torch.set_num_threads(1)
    methods = ABLATIONS if args.ablations else METHODS
    methods = {**methods, **(more_methods(args.also) if args.also else {})}
    tasks = BATCH_TASKS if args.batch_sizes else TASKS
    if args.quick:
        args.steps, args.seeds, args.rates, args.coarse = 10, 1, 2, True
    kind = "_ablations" * args.ablations or "_batch" * args.batch_sizes
    # a folder for each file of results, because all that lies in a folder goes into its file
    folder = args.folder or ROOT / "build" / f"evidence{kind}{'-quick' * args.quick}"
    committed = RESULTS.with_stem(RESULTS.stem + kind)
    args.results = args.results or (folder.with_suffix(".json") if args.quick else committed)
    before = json.loads(args.results.read_text())["runs"] if args.results.exists() else []
    runs = Runs(folder, before)
    names = chosen(args.methods, methods, "method")
    lrs = None if args.lrs is None else [float(lr) for lr in args.lrs.split(",") if lr]
    for title in chosen(args.tasks, tasks, "task"):
        task = tasks[title](args.quick)
        for name in names:
            compare(
                *(task, name, methods[name], runs),
                steps=args.steps,
                seeds=args.seeds,
                rates=args.rates,
                default=not args.no_default,
                fine=not args.coarse,
                lrs=lrs,
            )
            write(runs, args.results)
    print(table(write(runs, args.results)))


if __name__ == "__main__":
    main()
