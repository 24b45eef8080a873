r"""
Do several processes train the same model as one?
=================================================

Yes, up to rounding. This page starts two processes with ``torchrun``, gives
each a part of every batch, and compares the weights with those of one process
that has the whole batch.

.. admonition:: What you will learn

   - **Start** SINGD on several processes with ``DistributedDataParallel``.
   - **Scale** the loss if the processes have parts of unequal size.
   - **Count** what is exchanged.

   You should have read
   :ref:`sphx_glr_auto_gallery_1_start_plot_10_first_steps.py`. Formulas in the
   symbols of :doc:`/concepts`; you can skip them.

What is exchanged
-----------------

A *rank* is the number of a process, and stands for the process itself. With
``DistributedDataParallel`` (DDP), each of :math:`N` ranks computes gradients
on its part of the batch, and all take the mean. SINGD also needs what it
averages over the batch, the curvature of a layer's inputs and of its output
gradients:

.. math::

   H_K = \frac{\sum_r P(K^\top A_r^\top A_r K)}{\sum_r m_r}, \qquad
   H_C = \frac{R}{N^2} \sum_r P(C^\top B_r^\top B_r C) .

Both are sums over ranks :math:`r`, so one reduction adds them up. :math:`A_r`
are the :math:`m_r` rows of inputs, :math:`B_r` the output gradients, and
:math:`R` undoes the averaging of the loss over *all* samples. The gradient of
a rank counts :math:`1/N` in the mean, and enters squared: so :math:`N^2`.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

import singd

PROCESSES = 2
source = str(Path(singd.__file__).parent.parent)
images, labels = map(torch.tensor, load_digits(return_X_y=True))

# %%
# The script
# ----------
#
# It is the usual script for DDP. Of each batch of 64, rank 0 gets 48 samples
# and rank 1 the other 16. Because these shares are unequal, each rank
# multiplies its loss by ``ranks * its samples / all``. With equal shares that
# is one, and can be left out.

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from singd import SINGD

dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
torch.set_num_threads(1)
torch.manual_seed(0)
images, labels = torch.load(sys.argv[2])

model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
model = DistributedDataParallel(model.double())
optimizer = SINGD(model, lr=0.01)

shares = [64] if ranks == 1 else [48, 16]
start = sum(shares[:rank])
losses = []
for step in range(30):
    batch = torch.randint(0, len(images), (64,))  # the same on all ranks
    mine = batch[start : start + shares[rank]]
    optimizer.zero_grad()
    output = model(images[mine])
    loss = nn.functional.cross_entropy(output, labels[mine])
    (loss * (ranks * len(mine) / 64)).backward()
    optimizer.step()
    with torch.no_grad():
        whole = nn.functional.cross_entropy(model(images), labels)
    losses.append(whole.item())
if rank == 0:
    print(f"{ranks} process(es), last loss {losses[-1]:.3f}")
    weights = [p.detach() for p in model.parameters()]
    torch.save((losses, weights), sys.argv[1])
dist.destroy_process_group()
"""

# %%
# ``torchrun`` is ``python -m torch.distributed.run``. The environment
# variables keep the messages inside this machine. **Before you run on:** how
# large will the difference of the weights be after 30 steps?


def torchrun(processes):
    """Run the script; return the losses and the weights of rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        script, result = Path(folder, "train.py"), Path(folder, "result.pt")
        digits = Path(folder, "digits.pt")
        script.write_text(SCRIPT)
        torch.save((images / 16, labels), digits)
        command = [sys.executable, "-m", "torch.distributed.run"]
        command += ["--standalone", "--local-addr=127.0.0.1"]
        command += [f"--nproc-per-node={processes}"]
        command += map(str, (script, result, digits))
        environment = {
            **os.environ,
            "PYTHONPATH": source,
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        print(done.stdout.strip())
        return torch.load(result)


losses, weights = torchrun(1)
losses_2, weights_2 = torchrun(PROCESSES)

# %%
# The losses of both runs lie on one line.

fig, ax = plt.subplots(figsize=(5, 3.4))
ax.plot(losses, color="silver", linewidth=6, label="one process")
ax.plot(losses_2, "--", label="two processes")
ax.set(xlabel="step", ylabel="loss on all digits")
ax.set_title("Two processes train as one")
_ = ax.legend()

# %%
# The script computes in double precision, so that nothing but rounding should
# differ. (Where losses are equal, the dot is drawn at the lower edge.)

gaps = [abs(a - b) for a, b in zip(losses, losses_2)]
fig, ax = plt.subplots(figsize=(5, 3))
ax.plot([max(gap, 1e-17) for gap in gaps], "o")
ax.axhline(2.2e-16, color="black", ls=":", label="rounding near 1")
ax.set(yscale="log", ylim=(1e-17, 1), xlabel="step")
ax.set(ylabel="difference of the losses")
ax.set_title("The difference stays at rounding")
_ = ax.legend()

pairs = zip(weights, weights_2, strict=True)
difference = max((a - b).abs().max().item() for a, b in pairs)
print("weights differ by less than 1e-10:", difference < 1e-10)
assert difference < 1e-10
assert max(gaps) < 1e-12

# %%
# What it costs
# -------------
#
# Each update of the factors sends one message: as many numbers as :math:`K`
# and :math:`C` have, and two counts for each layer. Updates are at every step
# at first, then rarer (``T``). The :doc:`structures </structures>` decide how
# long the message is.

sizes = [(32, 65), (10, 33)]  # d_o x d_i of both layers
sent = {"gradient, each step": sum(a * b for a, b in sizes)}
for name in ("dense", "block8diagonal", "diagonal"):
    make = singd.structure(name)
    numbers = sum(make(n).numel for pair in sizes for n in pair)
    sent[f"{name}, each update"] = numbers + 2 * len(sizes)

fig, ax = plt.subplots(figsize=(5, 2.4))
colors = ["silver", "C0", "C4", "C9"]
drawn = ax.barh(list(sent), list(sent.values()), color=colors)
ax.bar_label(drawn, fmt=" {:,.0f}")
ax.set(xlabel="numbers sent by a rank", xlim=(0, 9000))
ax.set_title("Dense factors exceed the gradient")
ax.invert_yaxis()

# sphinx_gallery_start_ignore
gradient, dense, blocks, diagonal = sent.values()
assert dense > gradient > blocks > diagonal
# sphinx_gallery_end_ignore

# %%
# When not to use this
# --------------------
#
# A model that trains in one process in the time you have needs none of this.
#
# .. admonition:: Lessons learned
#
#    - N processes equal one process on the whole batch: no option changes.
#    - Scale the loss if the shares are unequal. Multiply a loss that is a
#      *sum* over samples by the number of ranks.
#    - Wrap first, then build: ``SINGD(DistributedDataParallel(model))``.
#    - Without a wrapper, SINGD averages the gradients itself, in ``step``.
#    - Dense factors send more than the gradient does; structured ones less.
#
# .. admonition:: Exercise
#
#    Leave out the factor by which the loss is multiplied. What do the two
#    processes train then?
#
# .. dropdown:: Solution
#
#    Another model: a sample of rank 1 now weighs three times as much as one of
#    rank 0. One gradient shows it, and needs no second process:
#
#    .. code-block:: python
#
#        layer, loss = torch.nn.Linear(64, 10), torch.nn.CrossEntropyLoss()
#        x, y = images[:64].float() / 16, labels[:64]
#
#        def gradient(*factors):
#            parts = zip(factors, x.split([48, 16]), y.split([48, 16]))
#            total = sum(c * loss(layer(a), b) for c, a, b in parts) / 2
#            return torch.autograd.grad(total, layer.weight)[0]
#
#        whole = torch.autograd.grad(loss(layer(x), y), layer.weight)[0]
#        right = gradient(2 * 48 / 64, 2 * 16 / 64)
#        assert torch.allclose(right, whole, atol=1e-6)
#        assert (gradient(1, 1) - whole).norm() > 0.1 * whole.norm()
#
# Where to go next:
# :ref:`sphx_glr_auto_gallery_2_features_plot_26_micro_batches.py` on
# micro-batches, :ref:`sphx_glr_auto_gallery_2_features_plot_23_checkpoints.py`
# on checkpoints, and
# :ref:`sphx_glr_auto_gallery_3_advanced_plot_33_diagnostics.py` on watching a
# run.
