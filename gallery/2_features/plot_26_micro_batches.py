r"""
Do micro-batches give the same step as one batch?
=================================================

A batch that does not fit into memory is taken in parts, the *micro-batches*:
several backward passes, then one step. Gradients simply add up. SINGD also
averages *squares* of gradients, and these need more care. This page shows what
SINGD takes care of, and what you have to.

.. admonition:: What you will learn

   - **Scale** the loss of each micro-batch.
   - **Check** that the step is that of the whole batch.
   - **See** what another scaling does, and to which options it does harm.

   You should have read
   :ref:`sphx_glr_auto_gallery_1_start_plot_11_replace_adamw.py`.

What is added up
----------------

SINGD needs the second moments of a layer's inputs :math:`a` and of the
gradients :math:`g` at its outputs (:doc:`/concepts`). With a loss that is a
mean over :math:`B` examples, each :math:`g` carries a factor :math:`1/B`. So

.. math::

   U = \frac1B \sum_b a_b a_b^\top, \qquad G = B \sum_b g_b g_b^\top .

Each backward pass adds to both *sums*. The step divides one and multiplies the
other by the :math:`B` of all micro-batches together. This is right if the
losses of the micro-batches add up to the loss of the whole batch.
"""

import copy

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from singd import PUBLISHED, SINGD

BATCH, STEPS = 96, 12
OPTIONS = {
    "SINGD": dict(lr=1e-2),
    "published": PUBLISHED | dict(lr=1e-2, T=1, lr_cov=0.1),
}
OPTIONS["IKFAC"] = OPTIONS["published"] | dict(rule="ikfac")
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
# its own examples, so we multiply it by its share of the batch. (The other
# values of ``weight`` come further down.)


def fit(parts, weight="share", name="SINGD", **more):
    """The first layer's K, C and W after each step."""
    model, history = copy.deepcopy(start), []
    optimizer = SINGD(model, **(OPTIONS[name] | more))
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
# In double precision no difference could hide in rounding.

whole = fit([96])
SPLITS = {
    "4 equal": [24] * 4,
    "unequal": [50, 30, 15, 1],
    "96 of one": [1] * 96,
}
rounding = {}
for split, parts in SPLITS.items():
    run = fit(parts)
    rounding[split] = differences(run, whole, 0)
    worst = max(difference(a, b) for a, b in zip(run[-1], whole[-1]))
    print(f"{split:10} the same: {worst < 1e-10}")
    assert worst < 1e-10

# %%
# After twelve steps, factors and weights differ by rounding only. This also
# holds for parts of unequal size, and for parts of a single example.
#
# The wrong scaling
# -----------------
#
# Some loops leave the losses as they are, and divide the gradients by the
# number of parts before the step (``weight="after"``). Then the gradients are
# right. But :math:`G` was made of gradients that were four times too large, so
# it is 16 times too large.

four = [24] * 4
wrong = fit(four, weight="after")
steps = range(1, STEPS + 1)
fig, ax = plt.subplots(figsize=(5, 3.4))
for (split, line), style in zip(rounding.items(), ("-", "--", ":")):
    floor = [max(d, 1e-17) for d in line]
    ax.plot(steps, floor, f"C0{style}", label=split)
ax.plot(steps, differences(wrong, whole, 0), "C3", label="divided afterwards")
ax.set(yscale="log", ylim=(1e-18, 10), xlabel="step")
ax.set(ylabel="relative difference of K", title="Rounding, and a real error")
_ = ax.legend(loc="center right")

# sphinx_gallery_start_ignore
assert max(max(line) for line in rounding.values()) < 1e-12
assert min(differences(wrong, whole, 0)) > 0.1
# sphinx_gallery_end_ignore

# %%
# A right split gives the :math:`K` of the whole batch up to rounding. The
# wrong scaling changes it by more than a tenth, from the first step on.
#
# **Before you run on:** are the *weights* wrong, too? Consider the defaults of
# SINGD, the published method, and :term:`IKFAC`.

off = {}
STYLES = {"SINGD": "C0o-", "published": "C3s--", "IKFAC": "C9^:"}
fig, ax = plt.subplots(figsize=(5, 3.4))
for name, style in STYLES.items():
    right = fit([96], name=name)
    wrong = fit(four, weight="after", name=name)
    off[name] = [100 * d for d in differences(wrong, right, 2)]
    ax.plot(steps, off[name], style, markersize=4, label=name)
ax.set(xlabel="step", ylabel="weights are off by (%)")
ax.set_title("The defaults forgive a wrong scale")
_ = ax.legend()

# sphinx_gallery_start_ignore
assert max(off["SINGD"]) < 1e-8
for name in ("published", "IKFAC"):
    assert off[name] == sorted(off[name]) and off[name][-1] > 0.1
# sphinx_gallery_end_ignore

# %%
# With the defaults, :term:`damping` is a share of the curvature, and a step is
# scaled to the size that ``lr`` sets. So a constant factor on :math:`G` drops
# out again. With the damping of the published method, or of IKFAC, it does
# not: the weights are off, by more in each step.
#
# The more parts, the worse
# -------------------------
#
# The wrong scaling makes :math:`G` too large by the square of the number of
# parts. So here the published method depends on how you cut the batch.

numbers = [1, 2, 3, 4, 6]
errors, right = [], fit([96], name="published")[-1][2]
for n in numbers:
    *_, W = fit([96 // n] * n, weight="after", name="published")[-1]
    errors.append(100 * difference(W, right))

fig, ax = plt.subplots(figsize=(5, 3))
ax.plot(numbers, errors, "C3s--")
ax.set(xlabel="number of micro-batches", ylabel="weights are off by (%)")
_ = ax.set_title("The error grows with the number of parts")

# sphinx_gallery_start_ignore
assert errors == sorted(errors)
assert errors[0] < 1e-8
# sphinx_gallery_end_ignore

# %%
# Clear both
# ----------
#
# ``optimizer.zero_grad()`` clears the gradients and SINGD's sums.
# ``model.zero_grad()`` deletes the gradients, and SINGD notices. With
# ``set_to_none=False`` it writes zeros into them, which SINGD cannot see: the
# sums stay. We throw a first backward pass away in each of these ways.


def thrown_away(clear):
    model = copy.deepcopy(start)
    optimizer = SINGD(model, **OPTIONS["SINGD"])
    for part in (torch.arange(96, 192), torch.arange(96)):
        clear(model, optimizer)
        output = model(images[part])
        nn.functional.cross_entropy(output, labels[part]).backward()
    optimizer.step()
    return optimizer.factors("0").K.dense()


right = thrown_away(lambda model, optimizer: optimizer.zero_grad())
seen = thrown_away(lambda model, optimizer: model.zero_grad())
unseen = thrown_away(lambda model, _: model.zero_grad(set_to_none=False))
assert torch.equal(seen, right)
print(f"zeros: K is off by {difference(unseen, right):.1%}")
assert difference(unseen, right) > 0.01

# %%
# When not to use it
# ------------------
#
# If the batch fits into memory, take it whole: there is nothing to gain. With
# a BatchNorm, which averages over each micro-batch, they are not equal to the
# whole batch in any optimizer.
#
# .. admonition:: Lessons learned
#
#    - Weight each loss by its share of the batch; then nothing else changes.
#    - Parts of unequal size are fine.
#    - Do not rescale gradients afterwards: SINGD has read them before.
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
