"""How long a step takes on 1, 2 and 4 processes, with one thread each, and what it exchanges.

python tests/benchmarks/scaling.py [FILE]    writes FILE, or scaling.json beside this script

The batch of the whole stays the same, so each process has less to do. All processes run on this machine: more
of them than it has cores share the cores, and what is read there is no speed of a cluster. ``load`` says what
else the machine had to do. The least of several times is the one that this disturbed least.
"""

import json
import os
import pathlib
import statistics
import sys
import time

HERE = pathlib.Path(__file__).parent
sys.path += [str(HERE.parent / "distributed")]
PROCESSES, T, CYCLES = (1, 2, 4), 3, 5
CASES = {
    "adamw": None,
    "dense": {},
    "dense, shard_factors": {"shard_factors": True},
    "block30diagonal": {"structures": ("block30diagonal", "block30diagonal")},
    "diagonal": {"structures": ("diagonal", "diagonal")},
}


def measured(options):
    """Train the ViT of the benchmarks in this process and its siblings."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from traffic import Traffic
    from workloads import WORKLOADS

    from singd import SINGD

    FACTORS = ("K", "C", "m_K", "m_C")

    torch.manual_seed(0)
    workload = WORKLOADS["vit"]
    model = DistributedDataParallel(workload.model())
    x, y = (t.chunk(dist.get_world_size())[dist.get_rank()] for t in workload.batch())
    adamw = options is None
    optimizer = torch.optim.AdamW(model.parameters()) if adamw else SINGD(model, T=T, **options)
    times = {"update": [], "plain": []}
    exchanged = {}
    for step in range(T * CYCLES):
        kind = "plain" if step % T else "update"
        dist.barrier()
        start = time.perf_counter()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        with Traffic() as traffic:
            optimizer.step()
        dist.barrier()
        if step >= T:
            times[kind].append(1e3 * (time.perf_counter() - start))
        exchanged[kind] = exchanged.get(kind, []) + [(len(traffic.messages), traffic.numel)]
    states = optimizer.state.values()
    mine = sum(s[key].nbytes for s in states for key in FACTORS if key in s)
    factors = [None] * dist.get_world_size()
    dist.all_gather_object(factors, mine)
    return {
        "milliseconds": {
            kind: {"least": round(min(v), 1), "median": round(statistics.median(v), 1)}
            for kind, v in times.items()
        },
        # the last one: with shard_factors the first update knows all factors, as they are identities
        "messages and numbers in step()": {kind: v[-1] for kind, v in exchanged.items()},
        "bytes of factors on each rank": factors,
    }


def worker(path):
    import torch
    import torch.distributed as dist
    from leaving import leave

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    found = {name: measured(options) for name, options in CASES.items()}
    if dist.get_rank() == 0:
        pathlib.Path(path).write_text(json.dumps(found))
    leave("measured")


def main(path):
    import torch
    from launch import torchrun

    part = path.with_suffix(".part")
    runs = {}
    for processes in PROCESSES:
        before = os.getloadavg()[0]
        done = torchrun(HERE / "scaling.py", processes, "--worker", part, timeout=600)
        if done.returncode:
            sys.exit(done.stderr)
        runs[processes] = {"load": round(before, 1), **json.loads(part.read_text())}
        part.unlink()
    about = {"cores": os.cpu_count(), "threads per process": 1, "torch": torch.__version__}
    path.write_text(json.dumps({"machine": about, "processes": runs}, indent=1) + "\n")
    print(f"{'':22}" + "".join(f"{n} processes".rjust(22) for n in PROCESSES))
    for name in CASES:
        cells = []
        for processes in PROCESSES:
            ms = runs[processes][name]["milliseconds"]
            cells.append(f"{ms['update']['least']:.0f} / {ms['plain']['least']:.0f} ms".rjust(22))
        print(f"{name:22}" + "".join(cells))
    print("a step with an update of the factors / one without; the least of several")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2])
    else:
        main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "scaling.json")
