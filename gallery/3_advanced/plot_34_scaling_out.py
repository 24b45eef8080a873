r"""
What does SINGD send, and what will it cost on many GPUs?
=========================================================

Count before you rent. What SINGD exchanges follows from the sizes of the
layers and the structure, number by number. This page counts it in a real run
on this machine, times a step on one, two and four processes, and then
*plans* for 8 to 512 GPUs. The plan is arithmetic, not a measurement.

.. admonition:: What you will learn

   - **Order** the wrappers around a model.
   - **Count** what a structure sends.
   - **Plan** a larger run from counts and link speeds.

   You should have read
   :ref:`sphx_glr_auto_gallery_2_features_plot_28_several_processes.py`.

The order
---------

1. Build the model and move it to its device.
2. Wrap it: ``DistributedDataParallel(model)``, or ``fully_shard`` on each
   block and then on the root.
3. Build SINGD on the result.
4. Only then make the first call of a compiled model.

The cost of a sum
-----------------

In a ring of :math:`N` processes, summing :math:`b` bytes over links of
:math:`\beta` bytes a second, with :math:`\alpha` seconds a hop, takes

.. math::

   t = 2\,\frac{N-1}{N}\,\frac{b}{\beta} + 2 (N - 1)\,\alpha .

Gathering :math:`b` bytes in all takes half of it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt

import singd

source = str(Path(singd.__file__).parent.parent)
RANKS, NAMES = (1, 2, 4), ("dense", "block30diagonal", "diagonal")
LOOK = {"dense": "C0o-", "block30diagonal": "C4o-", "diagonal": "C9o-"}
LOOK |= {"shared out": "C0o--", "gradient": "ko-"}

# %%
# Count and time it
# -----------------
#
# Each run trains the same network four times, and writes down the length of
# every ``all_reduce`` of SINGD, the time of a step, and the factors that each
# rank keeps.

SCRIPT = """
import json, os, time, torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from singd import PUBLISHED, SINGD

dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
sent, all_reduce = [], dist.all_reduce

def counted(tensor, *args, **options):
    sent.append(tensor.numel())
    return all_reduce(tensor, *args, **options)

dist.all_reduce = counted

def run(**options):
    torch.manual_seed(0)
    layers = [nn.Linear(128, 128) for _ in range(8)]
    model = DistributedDataParallel(nn.Sequential(*layers))
    optimizer = SINGD(model, **(PUBLISHED | dict(T=2) | options))
    times, numbers = [], []
    for step in range(6):
        x = torch.randn(512, 128)[rank::ranks]
        optimizer.zero_grad()
        sent.clear()
        dist.barrier()
        start = time.perf_counter()
        model(x).square().mean().backward()
        optimizer.step()
        dist.barrier()
        times.append(1e3 * (time.perf_counter() - start))
        numbers.append(sum(sent))
    states, keys = optimizer.state.values(), ("K", "C", "m_K", "m_C")
    kept = sum(s[k].numel() for s in states for k in keys if k in s)
    dist.all_gather_object(everybody := [None] * ranks, kept)
    pairs = zip(times[2::2], times[3::2])  # with an update, and without
    return min(sum(p) / 2 for p in pairs), numbers[-2:], everybody

names = "dense", "block30diagonal", "diagonal"
found = {n: run(structures=(n, n)) for n in names}
found["shared out"] = run(shard_factors=True)
if rank == 0:
    print(json.dumps(found), flush=True)
dist.barrier()
os._exit(0)  # gloo's threads may abort an interpreter that is torn down
"""


def torchrun(processes):
    """Run the script on this machine; return what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--local-addr=127.0.0.1", f"--nproc-per-node={processes}"]
    command += ["--no-python", sys.executable, "-c", SCRIPT]
    extra = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    env = {**os.environ, "PYTHONPATH": source, **extra}
    done = subprocess.run(command, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


found = {ranks: torchrun(ranks) for ranks in RANKS}

# %%
# An update sends all stored numbers of :math:`H_K` and :math:`H_C` and four
# more a layer (two traces, two counts), at once. Other steps send nothing but
# the gradient, which the wrapper does.


def stored(name, sizes):
    """How many numbers the factors of layers hold."""
    size = {n: singd.structure(name)(n).numel for n in {*sum(sizes, ())}}
    return sum(size[n] for pair in sizes for n in pair)


sizes = [(128, 129)] * 8  # d_o x d_i
for name in NAMES:
    update, between = found[2][name][1]
    assert update == stored(name, sizes) + 4 * len(sizes)
    assert between == 0
    print(f"{name:16}{update:8,} numbers an update")

# %%
# Shared out, the factors of a rank fall as one over the number of ranks.

fig, ax = plt.subplots(figsize=(5.4, 3.2))
for name, label in (("dense", "whole"), ("shared out", "shard_factors")):
    kept = [max(found[ranks][name][2]) / 1e3 for ranks in RANKS]
    ax.plot(RANKS, kept, LOOK[name], label=label)
ax.set(xticks=RANKS, xlabel="processes", ylim=(0, None))
ax.set(ylabel="thousands of numbers", title="Factors on the fullest rank")
_ = ax.legend()

# sphinx_gallery_start_ignore
whole = sum(found[1]["dense"][2])
for ranks in RANKS:
    kept = found[ranks]["shared out"][2]
    assert sum(kept) == whole == ranks * max(kept)
# sphinx_gallery_end_ignore

# %%
# These times were measured on one machine, where processes may have to share
# cores. They say nothing about the speed of a cluster.
#
# **Before you run on:** each process gets a smaller share of the batch. Will a
# step be faster?

fig, ax = plt.subplots(figsize=(5.4, 3.4))
for name in found[1]:
    times = [found[ranks][name][0] for ranks in RANKS]
    ax.plot(RANKS, times, LOOK[name], label=name)
ax.set(xticks=RANKS, xlabel="processes, one thread each", ylim=(0, None))
ax.set(ylabel="ms", title=f"A step with T=2, on {os.cpu_count()} core(s)")
_ = ax.legend()

# %%
# Not where processes have to wait for a core. And the batch is divided, but
# the work on the factors is not: each rank does all of it. Only
# ``shard_factors`` divides that, and pays by exchanging natural gradients.
#
# The plan
# --------
#
# Twelve transformer blocks of width 768, numbers of four bytes, ``T=10``.
# Links: within eight GPUs 450 GB/s one way (NVIDIA H100 datasheet: NVLink,
# 900 GB/s both ways), beyond that 50 GB/s (NVIDIA DGX H100 user guide:
# ConnectX-7, 400 Gb/s a port). The hop of 2 and 5 microseconds is a guess.

d, T = 768, 10
blocks = [(3 * d, d + 1), (d, d + 1), (4 * d, d + 1), (d, 4 * d + 1)] * 12
gradient = sum(o * i for o, i in blocks)


def ring(numbers, ranks, rounds=2):
    """Seconds of a sum (or, with one round, of a gather)."""
    speed, hop = (450e9, 2e-6) if ranks <= 8 else (50e9, 5e-6)
    return rounds * (ranks - 1) * (4 * numbers / ranks / speed + hop)


factors = {name: stored(name, blocks) for name in NAMES}
counts = range(3, 10)
plan = {"gradient": [1e3 * ring(gradient, 2**k) for k in counts]}
for name, n in factors.items():
    plan[name] = [1e3 * ring(n, 2**k) / T for k in counts]
halves = [1e3 * ring(gradient, 2**k, 1) for k in counts]  # gathered once
plan["shared out"] = [a + b for a, b in zip(plan["dense"], halves)]
print(f"{'ms a step, planned':19}", *(f"{2**k:6}" for k in counts))
for name, line in plan.items():
    print(f"{name:19}", *(f"{ms:6.1f}" for ms in line))

fig, ax = plt.subplots(figsize=(5.4, 4.2))
for name, line in plan.items():
    ax.plot([2**k for k in counts], line, LOOK[name], label=name)
ax.set_xscale("log", base=2)
ax.set_xticks([2**k for k in counts], [2**k for k in counts])
ax.set(yscale="log", xlabel="GPUs", ylabel="ms a step")
ax.set_title("A plan: the gradient's time, and what SINGD adds")
_ = fig.legend(loc="outside lower center", ncols=2)

# sphinx_gallery_start_ignore
assert 0.3 * gradient < factors["dense"] / T < 0.5 * gradient
assert factors["block30diagonal"] / T < gradient / 100
assert plan["dense"][-1] < plan["shared out"][-1] < plan["gradient"][-1]
# sphinx_gallery_end_ignore

# %%
# With ``T=10``, dense factors add less than half of the gradient's numbers,
# blocks of 30 less than a hundredth. Sharing out sends more, for memory's
# sake. Several ports a node make it faster, other traffic slower.
#
# When a rank dies
# ----------------
#
# The others end with an error. ``torchrun --max-restarts=1`` starts them
# again, and your script loads its last checkpoint: write it under another
# name, then rename it. Set ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1``, or the
# second life may find the first one's addresses, and hang. Mind that
# torchrun's store listens on all interfaces, whatever ``--local-addr`` says.
#
# When not to use this
# --------------------
#
# The plan knows no overlap with computing, no congestion, and no tree, which
# NCCL prefers for small messages on many GPUs. Measure before you decide.
#
# .. admonition:: Lessons learned
#
#    - Wrap, then build SINGD, then call.
#    - An update is one sum over all layers; its size follows from the counts.
#    - Structure and ``T`` save communication, ``shard_factors`` memory.
#    - Dense statistics are symmetric, yet sent whole: up to twice the least.
#
# .. admonition:: Exercise
#
#    From which ``T`` on do dense factors send less than a tenth of the
#    gradient?
#
# .. dropdown:: Solution
#
#    .. code-block:: python
#
#        enough = 10 * factors["dense"] / gradient
#        print(f"T = {enough:.0f}")
#        assert 30 < enough < 50
#
# Where to go next:
# :ref:`sphx_glr_auto_gallery_2_features_plot_29_fully_sharded.py` shards the
# weights, :ref:`sphx_glr_auto_gallery_4_structures_plot_44_choosing.py`
# chooses a structure, and
# :ref:`sphx_glr_auto_gallery_3_advanced_plot_30_vision_transformer.py` trains
# a transformer.
