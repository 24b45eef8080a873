r"""
Do micro-batches give the same step as one batch?
=================================================

A batch that does not fit into memory is taken in parts: several backwards,
then one step. Gradients simply add up. The statistics of SINGD are averages of
*squares*, and these need more care. This page shows that the care is taken.

.. admonition:: What you will learn

   - **Scale** the loss of each micro-batch.
   - **Check** that the step is that of the whole batch.
   - **See** what goes wrong with another scaling, and for whom.

   You should have read
   :ref:`sphx_glr_auto_gallery_1_start_plot_11_replace_adamw.py`.

What is added up
----------------

With a loss that is a mean over the batch of :math:`B` examples, the output
gradient of one example carries a factor :math:`1/B`. The statistics are

.. math::

   U = \frac1B \sum_b a_b a_b^\top, \qquad G = B \sum_b g_b g_b^\top .

Each backward adds to both *sums*. The step divides and multiplies once, by the
:math:`B` of all micro-batches together. This is right if the losses of the
micro-batches add up to the loss of the whole batch.
"""

import copy

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from singd import PUBLISHED, SINGD

BATCH, STEPS = 96, 12
OPTIONS = PUBLISHED | dict(lr=1e-2, T=1, lr_cov=0.1, damping=1e-2)
_ = torch.set_num_threads(1)  # the same digits on every machine

data = load_digits()
images = torch.tensor(data.data, dtype=torch.float64) / 16
labels = torch.tensor(data.target)
torch.manual_seed(0)
start = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
start = start.double()

# %%
# The loop
# --------
#
# ``parts`` are the sizes of the micro-batches. The loss of each is a mean over
# its own examples, so it is weighted by its share of the batch.


def fit(parts, weight="share", **options):
    """The first layer's K, C and W after each step."""
    model, history = copy.deepcopy(start), []
    optimizer = SINGD(model, **(OPTIONS | options))
    for step in range(STEPS):
        batch = torch.arange(step * BATCH, (step + 1) * BATCH)
        optimizer.zero_grad()
        for part in batch.split(parts):
            output = model(images[part])
            loss = nn.functional.cross_entropy(output, labels[part])
            weights = {"share": len(part) / BATCH, "sum": len(part)}
            (weights.get(weight, 1) * loss).backward()
        if weight == "after":
            for p in model.parameters():
                p.grad /= len(parts)
        optimizer.step()
        K, C, *_ = optimizer.factors("0")
        W = model[0].weight.detach().clone()
        history.append((K.dense(), C.dense(), W))
    return history


def difference(a, b):
    """Relative distance."""
    return ((a - b).norm() / b.norm()).item()


def differences(run, right, which):
    """Of K, C or W (0, 1, 2), after each step."""
    return [difference(a[which], b[which]) for a, b in zip(run, right)]


# %%
# Equal or unequal, it is the same step
# -------------------------------------
#
# We train in double precision, so that a difference would not hide in
# rounding.

whole = fit([96])
SPLITS = {
    "4 equal": [24] * 4,
    "unequal": [50, 30, 15, 1],
    "96 of one": [1] * 96,
}
rounding = {}
for name, parts in SPLITS.items():
    run = fit(parts)
    rounding[name] = differences(run, whole, 0)
    worst = max(difference(a, b) for a, b in zip(run[-1], whole[-1]))
    print(f"{name:10} the same: {worst < 1e-10}")
    assert worst < 1e-10

# %%
# After twelve steps, factors and weights differ by rounding only. This also
# holds for parts of unequal size, and for parts of a single example.
#
# The wrong scaling
# -----------------
#
# Some loops leave the losses as they are and divide the gradients before the
# step. The gradients are then right. But :math:`G` has been gathered from
# gradients that were four times too large, :math:`G \to 16\,G`.

four = [24] * 4
wrong = fit(four, weight="after")
steps = range(1, STEPS + 1)
fig, ax = plt.subplots(figsize=(5.4, 3.4))
for name, line in rounding.items():
    ax.plot(steps, [max(d, 1e-17) for d in line], label=name)
ax.plot(steps, differences(wrong, whole, 0), "C3", label="divided afterwards")
ax.set(yscale="log", ylim=(1e-18, 10), xlabel="step")
ax.set(ylabel="relative difference of K", title="Rounding, and a real error")
ax.legend(loc="center right")

assert min(differences(wrong, whole, 0)) > 1e10 * max(rounding["unequal"])

# %%
# A right split differs from the whole batch in the sixteenth digit. The wrong
# scaling differs in the second or third one, from the first step on.
#
# **Before you run on:** SINGD is invariant to :math:`U \to cU, G \to G/c`, but
# here only :math:`G` changes. IKFAC (``kfac_like=True``) has no such
# invariance at all. What do you expect of each?

off = {}
fig, axes = plt.subplots(2, 1, figsize=(5.4, 5), sharex=True, sharey=True)
for ax, (name, like) in zip(axes, {"SINGD": False, "IKFAC": True}.items()):
    right = fit([96], kfac_like=like)
    shared = fit(four, kfac_like=like)
    wrong = fit(four, weight="after", kfac_like=like)
    assert max(differences(shared, right, 2)) < 1e-10
    for which, label in enumerate("KCW"):
        line = [100 * d for d in differences(wrong, right, which)]
        ax.plot(steps, line, "o-", markersize=4, label=label)
        off[name, label] = line[-1]
    ax.set(ylabel="off by (%)", title=f"{name}, divided afterwards")
axes[0].legend()
_ = axes[1].set_xlabel("step")
for name in ("SINGD", "IKFAC"):
    print(name, *(f"{label} {off[name, label]:.1f} %" for label in "KCW"))

# %%
# In SINGD the trace of :math:`H_C` scales the update of :math:`K`, so a wrong
# :math:`G` reaches :math:`K`. IKFAC's first :math:`K` does not see :math:`G`;
# there the error sits in :math:`C`, and spoils the weights all the same.

assert off["SINGD", "K"] > 3
assert off["IKFAC", "K"] < 1e-8
assert off["IKFAC", "C"] > 1
assert min(off["SINGD", "W"], off["IKFAC", "W"]) > 0.1

# %%
# The more parts, the worse
# -------------------------
#
# The wrong scaling makes :math:`G` too large by the square of the number of
# parts. So the error depends on how you cut the batch, and that should not
# matter.

numbers = [1, 2, 3, 4, 6]
errors = []
for n in numbers:
    K, *_ = fit([96 // n] * n, weight="after")[-1]
    errors.append(100 * difference(K, whole[-1][0]))

fig, ax = plt.subplots(figsize=(5.4, 3))
ax.plot(numbers, errors, "o-")
ax.set(xlabel="number of micro-batches", ylabel="K is off by (%)")
ax.set_title("The error grows with the number of parts")

assert errors == sorted(errors)
assert errors[0] < 1e-8

# %%
# Clear both
# ----------
#
# ``optimizer.zero_grad()`` clears the gradients and the sums of statistics.
# ``model.zero_grad()`` deletes the gradients, and SINGD notices. With
# ``set_to_none=False`` it writes zeros into them, which SINGD cannot see: the
# sums stay. We throw a first backward away in each of these ways.


def thrown_away(clear):
    model = copy.deepcopy(start)
    optimizer = SINGD(model, **OPTIONS)
    for part in (torch.arange(96, 192), torch.arange(96)):
        clear(model, optimizer)
        output = model(images[part])
        nn.functional.cross_entropy(output, labels[part]).backward()
    optimizer.step()
    return optimizer.factors("0").K.dense() - torch.eye(65)  # the update


right = thrown_away(lambda model, optimizer: optimizer.zero_grad())
seen = thrown_away(lambda model, optimizer: model.zero_grad())
unseen = thrown_away(lambda model, _: model.zero_grad(set_to_none=False))
assert torch.equal(seen, right)
print(f"zeros: the update of K is off by {difference(unseen, right):.1%}")
assert difference(unseen, right) > 0.01

# %%
# When not to use it
# ------------------
#
# If the batch fits, take it whole: there is nothing to gain. With a BatchNorm,
# micro-batches are not equal to the whole batch in any optimizer.
#
# .. admonition:: Lessons learned
#
#    - Weight each loss by its share of the batch; then nothing else changes.
#    - Parts of unequal size are fine.
#    - Do not rescale gradients afterwards: the statistics are gathered before.
#    - Call ``optimizer.zero_grad()``: it clears statistics and gradients.
#
# .. admonition:: Exercise
#
#    Your loss is a *sum* over the examples. Which weight, and which
#    ``loss_average``?
#
# .. dropdown:: Solution
#
#    Sums add up as they are: no weight, and ``loss_average=None``.
#
#    .. code-block:: python
#
#        options = dict(weight="sum", loss_average=None)
#        one, parts = fit([96], **options), fit(four, **options)
#        assert max(differences(parts, one, 2)) < 1e-10
#
# Where to go next:
# :ref:`sphx_glr_auto_gallery_3_advanced_plot_33_diagnostics.py` shows how to
# watch the factors,
# :ref:`sphx_glr_auto_gallery_4_structures_plot_40_zoo.py` how small they can
# be, and :ref:`sphx_glr_auto_gallery_1_start_plot_10_first_steps.py` compares
# optimizers.
