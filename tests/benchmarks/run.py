"""What everything costs, in one run: `make bench`.

python tests/benchmarks/run.py --peers FOLDER RESULTS.json      (about 16 minutes on two idle cores)
python tests/benchmarks/run.py --quick RESULTS.json             (small networks: does it all run?)
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import pathlib
import statistics
import sys
import time
import warnings
from typing import Any

import contenders as c
import defaults as d
import torch
import widths as w
from floors import operations
from marks import MARKS, PEAK_SHARE, STATE_SHARE
from memory import kept_bytes, layer_state, peak_bytes
from record import machine, rounded
from tables import tables
from timing import Contender, interleaved, over_period, product_rate, quantile_of
from torch import nn
from workloads import SMALL, WORKLOADS

import singd
from singd.structures import StructureSpec, registered_structures

# wall time of each workload's training: of all contenders, and of those that a mark compares
SECONDS = {"mlp": (95, 45), "cnn": (100, 50), "vit": (180, 160)}
DEFAULTS_SECONDS = {"mlp": 40, "cnn": 30, "vit": 60}
QUICK = ("dense", "diagonal", "block30diagonal", "hierarchical15_15", "triltoeplitz")
QUARTILES = {"lower": 0.25, "median": 0.5, "upper": 0.75}
START = time.monotonic()


def structures(small: bool) -> dict[str, StructureSpec]:
    """Which of ours to measure: all, or for a quick look those that have a mark."""
    everything = registered_structures()
    return {name: everything[name] for name in (QUICK if small else everything)}


def show(text: str) -> None:
    """Progress, on one line of its own, with the minutes since the start."""
    print(f"{(time.monotonic() - START) / 60:5.1f} min  {text}", file=sys.stderr, flush=True)


def focus(name: str) -> set[str]:
    """The contenders that a mark compares, which are measured more often."""
    cases = [f"{mark.structure}, T={mark.T}" for mark in MARKS if mark.workload == name]
    return {f"{prefix}{case}" for case in cases for prefix in ("", "published ")}


def training(name: str, published: Any, small: bool) -> dict[str, Any]:
    """All contenders on one workload."""
    workload, names = (SMALL if small else WORKLOADS)[name], structures(small)
    field = [*c.others(), *c.ours(1, names), *c.ours(c.PERIOD, names), c.without_cache()]
    if published is not None:
        field += [*c.published(published, name, 1), *c.published(published, name, c.PERIOD)]
    runs, sgd = interleaved(
        field,
        c.SGD_CONTENDER,
        workload,
        seconds=SECONDS[name][0],
        focus=() if small else focus(name),
        focus_seconds=SECONDS[name][1],
        rounds=1 if small else 99,
        show=lambda text: show(f"{name}: {text}"),
    )
    rows = [
        {
            "name": run.contender.name,
            "kind": run.contender.kind,
            "structure": run.contender.structure,
            "T": run.contender.period,
            "iterations": sum(map(len, run.seconds)),
            "ms": 1e3 * over_period(run.seconds),
            "overhead_ms": {
                key: 1e3 * over_period(run.overheads, q) for key, q in QUARTILES.items()
            },
            "update_step_ms": 1e3 * over_period(run.overheads[:1]),
            "other_step_ms": 1e3 * over_period(run.overheads[1:] or run.overheads[:1]),
        }
        for run in runs.values()
    ]
    return {
        "sgd_ms": {key: 1e3 * quantile_of(sgd, q) for key, q in QUARTILES.items()},
        "contenders": rows,
    }


def shares(trained: dict[str, Any], rate: float, small: bool) -> list[dict[str, Any]]:
    """Each mark beside what was measured, and beside the floor of multiplications."""
    rows = []
    for mark in MARKS:
        found = {
            row["kind"]: row["overhead_ms"]["median"]
            for row in trained[mark.workload]["contenders"]
            if (row["structure"], row["T"]) == (mark.structure, mark.T)
            and "without" not in row["name"]
        }
        count = operations((SMALL if small else WORKLOADS)[mark.workload], mark.structure, mark.T)
        row = {
            "workload": mark.workload,
            "structure": mark.structure,
            "T": mark.T,
            "ours_ms": found["ours"],
            "gflop": count / 1e9,
            "floor_ms": 1e3 * count / rate,
            "times_floor": found["ours"] / (1e3 * count / rate),
            "mark": mark.share,
        }
        if "published" in found:
            row["published_ms"] = found["published"]
            row["share"] = found["ours"] / found["published"]
        rows.append(row)
    return rows


def against_width(small: bool) -> dict[str, Any]:
    """Every structure's cost against the width of a layer."""
    sizes = (32, 64, 128) if small else w.WIDTHS
    large = sizes[-4:]  # where the exponent is fitted: small ones cost the calls
    costs: dict[str, Any] = {}
    for name, make in structures(small).items():
        if not make.cost:
            continue  # a user's, which promises nothing
        show(f"widths: {name}")
        both = [w.seconds(make, d) for d in sizes]
        update, gradient = ([pair[i] for pair in both] for i in (0, 1))
        theory = w.theoretical_exponents(make, large)
        costs[name] = {
            "update_ms": [1e3 * s for s in update],
            "gradient_ms": [1e3 * s for s in gradient],
            "update_exponent": w.fitted_exponent(large, update[-len(large) :]),
            "gradient_exponent": w.fitted_exponent(large, gradient[-len(large) :]),
            "update_exponent_in_theory": theory[0],
            "gradient_exponent_in_theory": theory[1],
        }
    for name, cost in costs.items():
        for part in ("update", "gradient"):
            mine, dense = cost[f"{part}_ms"], costs["dense"][f"{part}_ms"]
            below = None if name == "dense" else w.crossing(sizes, mine, dense)
            cost[f"{part}_below_dense_from"] = below
    return {"widths": sizes, "fitted_from": large[0], "rows": w.ROWS, "structures": costs}


def memory(published: Any, small: bool) -> dict[str, Any]:
    """Bytes that are kept on the ViT, and the peak of an update on the CNN."""
    vit, cnn = ((SMALL if small else WORKLOADS)[name] for name in ("vit", "cnn"))
    names = structures(small)
    field = [c.SGD_CONTENDER, *c.others(), *c.ours(c.PERIOD, names), c.without_cache()]
    peaks = [c.SGD_CONTENDER, *c.ours(1, names)]
    if published is not None:
        field += c.published(published, "vit", c.PERIOD)
        peaks += c.published(published, "cnn", 1)
    layers = {}
    for name in names:
        show(f"memory: state of {name}")
        (plain,) = c.ours(c.PERIOD, [name])
        half = Contender(
            name, c.singd_of(singd.SINGD, name, 1, preconditioner_dtype=torch.bfloat16)
        )
        factors, state, adamw = layer_state(plain, vit)
        layers[name] = {
            "factors": factors,
            "factors_bfloat16": layer_state(half, vit)[0],
            "state": state,
            "share_of_adamw": state / adamw,
        }
    kept, peak = [], []
    for contender in field:
        show(f"memory: kept by {contender.name}")
        row = {"name": contender.name, "kind": contender.kind, "structure": contender.structure}
        kept.append({**row, "bytes": kept_bytes(contender, vit)})
    for contender in peaks:
        show(f"memory: peak of {contender.name}")
        row = {"name": contender.name, "kind": contender.kind, "structure": contender.structure}
        peak.append({**row, "bytes": peak_bytes(contender, cnn)})
    return {
        "layers_on_vit": layers,
        "kept_on_vit": kept,
        "peak_on_cnn": peak,
        "state_mark": STATE_SHARE,
        "peak_mark": PEAK_SHARE,
    }


def hook(published: Any, calls: int = 1000, blocks: int = 15) -> dict[str, float]:
    """Microseconds that the forward hook adds to a call of a layer where no update is due."""
    optimizers = {"ours": singd.SINGD}
    if published is not None:
        optimizers["published"] = published
    x, layers = torch.randn(4, 8), {"plain": nn.Sequential(nn.Linear(8, 8))}
    keep = []
    for name, optimizer in optimizers.items():
        layers[name] = copy.deepcopy(layers["plain"])
        keep.append(optimizer(layers[name], T=10**6))
        layers[name](x).sum().backward()
        keep[-1].step()  # the next 999,999 steps update nothing
    times: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(blocks):
        for name, layer in layers.items():
            start = time.process_time()
            for _ in range(calls):
                layer(x)
            times[name].append(1e6 * (time.process_time() - start) / calls)
    plain = statistics.median(times.pop("plain"))
    return {"call_us": plain, **{name: statistics.median(t) - plain for name, t in times.items()}}


def defaults(published: Any, small: bool) -> dict[str, Any]:
    """What the defaults cost on each workload, and on tiny layers."""
    found: dict[str, Any] = {"steps": d.STEPS}
    for name, workload in (SMALL if small else WORKLOADS).items():
        found[name] = d.schedule(
            *(workload, published, 0.0 if small else DEFAULTS_SECONDS[name]),
            show=lambda text, name=name: show(f"defaults, {name}: {text}"),
            rounds=1 if small else 99,
        )
    show("defaults: tiny layers")
    return {**found, "tiny": d.tiny_layers(*((20, 10) if small else ()))}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("results", type=pathlib.Path, help="the JSON file to write")
    parser.add_argument("--peers", type=pathlib.Path, help="folder of the published package")
    parser.add_argument("--quick", action="store_true", help="small networks, one round")
    parser.add_argument(
        "--parts", default="training,defaults,widths,memory,hook", help="only some of the parts"
    )
    args = parser.parse_args()
    parts = args.parts.split(",")

    torch.set_num_threads(1)
    # the published package warns of its slow routes
    warnings.simplefilter("ignore")
    published = None if args.peers is None else c.published_singd(args.peers)
    here = {**machine(), "load": round(os.getloadavg()[0], 1)}
    results: dict[str, Any] = {"machine": here, "quick": args.quick}
    show("{cpu}, {cores} cores, torch {torch}, load {load}".format(**results["machine"]))
    size = 256 if args.quick else 2048
    rate = product_rate(size, least=0.1 if args.quick else 1.0)
    results |= {"product_size": size, "product_gflop_per_s": rate / 1e9}
    if "training" in parts:
        results["training"] = {n: training(n, published, args.quick) for n in WORKLOADS}
        results["marks"] = shares(results["training"], rate, args.quick)
    if "defaults" in parts:
        results["defaults"] = defaults(published, args.quick)
    if "widths" in parts:
        results["widths"] = against_width(args.quick)
    if "memory" in parts:
        results["memory"] = memory(published, args.quick)
    if "hook" in parts:
        results["hook"] = hook(published, *((20, 3) if args.quick else ()))
    results["minutes"] = (time.monotonic() - START) / 60
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(rounded(results), indent=1) + "\n")
    print(tables(results))
    show(f"wrote {args.results}")


if __name__ == "__main__":
    main()
