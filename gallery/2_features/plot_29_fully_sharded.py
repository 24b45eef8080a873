r"""
Which part of SINGD does FSDP2 shard?
=====================================

FSDP2 is PyTorch's ``fully_shard``: each process holds a part, a *shard*, of
every weight, of its gradient and of its momentum. SINGD's :term:`factors
<factor>` stay whole on every process, unless ``shard_factors=True`` deals them
out layer by layer. This page trains on two processes, in :term:`bfloat16`, and
resumes on one.

.. admonition:: What you will learn

   - **Wrap** a model with ``fully_shard`` and a mixed-precision policy.
   - **Save** a distributed checkpoint, and resume on other numbers of ranks.
   - **Distribute** the factors with ``shard_factors=True``.

   You should have read
   :ref:`sphx_glr_auto_gallery_2_features_plot_28_several_processes.py`.

What a rank holds
-----------------

A *rank* is one of :math:`N` processes. Let :math:`|\cdot|` count stored
numbers. For each layer :math:`l` there are a weight :math:`W_l`, its momentum
:math:`M_l`, and the factors :math:`K_l` and :math:`C_l` of
:doc:`SINGD </concepts>`. A rank holds

.. math::

   \underbrace{\tfrac1N \sum_l \left(|W_l| + |M_l|\right)}_{\text{FSDP2}}
   + \underbrace{\sum_{l \in \text{own}}
   \left(|K_l| + |C_l|\right)}_{\text{SINGD}} .

*Own* are all layers; with ``shard_factors=True``, only those that were dealt
to this rank. A factor multiplies a whole gradient. So in a step the shards of
each gradient are gathered first, and each rank keeps its part of the result.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import singd

STEPS, SAVED_AT = 30, 20
source = str(Path(singd.__file__).parent.parent)

# %%
# The script
# ----------
#
# Wrap each layer (in a transformer: each block), then the whole model, then
# build SINGD. The mixed-precision policy computes in ``bfloat16`` and sums
# gradients in ``float32``. Weights and factors are kept in ``float32``. A
# ``state_dict`` alone would hold the shards of one rank. So checkpoints go
# through torch's ``get_state_dict`` and ``torch.distributed.checkpoint``,
# which know where all shards are.

SCRIPT = """
import os, sys, torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint import state_dict as sd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from singd import SINGD

folder, start, SAVED_AT, STEPS = sys.argv[1], *map(int, sys.argv[2:])
dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
torch.set_num_threads(1)
images, labels = map(torch.tensor, load_digits(return_X_y=True))
images = images.float() / 16

def train(name, dtype, **options):
    torch.manual_seed(0)
    sizes = (64, 64, 48, 10)
    a, b, c = (nn.Linear(i, o) for i, o in zip(sizes, sizes[1:]))
    model = nn.Sequential(a, nn.Tanh(), b, nn.Tanh(), c)
    mesh = init_device_mesh("cpu", (ranks,))
    policy = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32)
    for part in (a, b, c, model):  # the root comes last
        fully_shard(part, mesh=mesh, mp_policy=policy)
    optimizer = SINGD(model, lr=0.01, **options)
    if start:
        state = sd.get_state_dict(model, optimizer)
        dcp.load(dict(zip("wo", state)), checkpoint_id=f"{folder}/{name}")
        sd.set_state_dict(model, optimizer, model_state_dict=state[0],
                          optim_state_dict=state[1])
    losses = []
    for step in range(start, STEPS):
        g = torch.Generator().manual_seed(step)
        batch = torch.randint(len(images), (64,), generator=g)[rank::ranks]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        dist.all_reduce(mean := loss.detach() / ranks)
        losses.append(mean.item())
        if step + 1 == SAVED_AT:
            state = dict(zip("wo", sd.get_state_dict(model, optimizer)))
            dcp.save(state, checkpoint_id=f"{folder}/{name}")
    W = sum(p.to_local().numel() for p in model.parameters())
    F = sum(s[k].numel() for s in optimizer.state.values()
            for k in ("K", "C") if k in s)
    # weights and momentum; factors
    dist.all_gather_object(held := [None] * ranks, (2 * W, F))
    return losses, held

cases = {"bfloat16": (torch.bfloat16, {}), "float32": (None, {}),
         "distributed": (None, {"shard_factors": True})}
found = {n: train(n, dtype, **opts) for n, (dtype, opts) in cases.items()}
if rank == 0:
    torch.save(found, folder + "/result.pt")
    print(f"{ranks} rank(s), steps {start} to {STEPS}", flush=True)
dist.barrier()
os._exit(0)  # gloo's threads may abort an interpreter that is torn down
"""

# %%
# Two ranks train for all thirty steps, and save after twenty. One process
# alone goes on from there. **Before you run on:** both see the same batches.
# Will their losses differ in ``bfloat16``, and in ``float32``?


def torchrun(processes, folder, start):
    """Run the script; return losses and what each rank holds."""
    script = Path(folder, "train.py")
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--local-addr=127.0.0.1", f"--nproc-per-node={processes}"]
    extra = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(script), folder, *map(str, (start, SAVED_AT, STEPS))],
        env={**os.environ, "PYTHONPATH": source, **extra},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout.strip())
    return torch.load(Path(folder, "result.pt"))


with tempfile.TemporaryDirectory() as folder:
    two = torchrun(2, folder, 0)
    one = torchrun(1, folder, SAVED_AT)

fig, ax = plt.subplots(figsize=(5, 3.4))
ax.plot(two["bfloat16"][0], color="silver", lw=6, label="two ranks, unbroken")
rest = range(SAVED_AT, STEPS)
ax.plot(rest, one["bfloat16"][0], "--", label="resumed on one process")
ax.set(xlabel="step", ylabel="loss of the batch")
ax.set_title("A checkpoint of two ranks goes on with one")
_ = ax.legend()

# %%
# The resumed run goes on where the other one was. The batch is now split
# differently, so sums are rounded differently. How much is that? (Equal losses
# are drawn at the lower edge.)

fig, ax = plt.subplots(figsize=(5, 3))
gap = {}
for name, style in {"bfloat16": "C3x", "float32": "C0o"}.items():
    pairs = zip(two[name][0][SAVED_AT:], one[name][0], strict=True)
    gap[name] = [abs(a - b) for a, b in pairs]
    ax.plot(rest, [max(g, 1e-9) for g in gap[name]], style, label=name)
ax.set(yscale="log", xlabel="step", ylabel="difference of the losses")
ax.set_title("One and two ranks differ by rounding")
ax.set_xticks(rest)
_ = ax.legend(loc="center left")

# sphinx_gallery_start_ignore
assert max(gap["float32"]) < 1e-5 < max(gap["bfloat16"]) < 0.1
# sphinx_gallery_end_ignore

# %%
# They differ in both precisions, in ``float32`` by less than 0.00001.
#
# Who holds what
# --------------
#
# ``shard_factors=True`` changes where the factors are, not what comes out.

held = one["float32"][1] + two["float32"][1] + two["distributed"][1]
weights, factors = zip(*held)
labels = ["one process"]
labels += [f"rank {r}{s}" for s in ("", ", distributed") for r in (0, 1)]
fig, ax = plt.subplots(figsize=(5, 3.2))
ax.barh(labels, weights, color="silver", label="weights, momentum")
ax.barh(labels, factors, left=weights, label="factors")
ax.set(xlabel="numbers held", title="FSDP2 halves weights, not factors")
ax.invert_yaxis()
_ = fig.legend(loc="outside lower center", ncols=2)

# sphinx_gallery_start_ignore
whole = factors[0]
assert factors[1] == factors[2] == factors[3] + factors[4] == whole
assert max(weights[1:]) < 0.52 * weights[0]
# sphinx_gallery_end_ignore
pairs = zip(two["distributed"][0], two["float32"][0], strict=True)
assert max(abs(a - b) for a, b in pairs) < 1e-5

# %%
# The factors of rank 0 and rank 1, distributed, add up to those of one
# process.
#
# When not to use this
# --------------------
#
# A model that fits on one device trains faster under
# ``DistributedDataParallel``: there nothing is gathered.
#
# .. admonition:: Lessons learned
#
#    - Wrap layers, then the whole model, then build SINGD.
#    - FSDP2 shards weights and momentum. Factors are whole, unless
#      ``shard_factors=True`` deals them out by layers.
#    - Checkpoints go through ``get_state_dict``; the number of ranks may
#      change between saving and loading.
#    - Every rank must call ``state_dict``, ``factors`` and ``stats``.
#
# .. admonition:: Exercise
#
#    The factors of one layer stay together. How many numbers does the fuller
#    of two ranks hold at least, whatever the other layers are?
#
# .. dropdown:: Solution
#
#    Those of the largest layer. Here it has 65 inputs, with the bias, and 64
#    outputs. :math:`K` is a block of 64 x 64 and one of 1 x 1, and :math:`C`
#    has 64 numbers.
#
#    .. code-block:: python
#
#        largest = 64**2 + 1 + 64
#        assert max(factors[3:]) >= largest
#        assert max(factors[3:]) <= whole / 2 + largest
#
# Where to go next:
# :ref:`sphx_glr_auto_gallery_2_features_plot_23_checkpoints.py` on plain
# checkpoints,
# :ref:`sphx_glr_auto_gallery_2_features_plot_24_mixed_precision.py` on
# precision, and
# :ref:`sphx_glr_auto_gallery_3_advanced_plot_34_scaling_out.py` on what
# scaling out costs.
