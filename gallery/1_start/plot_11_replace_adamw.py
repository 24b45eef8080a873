r"""
How do I put SINGD in place of AdamW? One line at a time
========================================================

You have a loop that trains with AdamW. This page turns it into one that trains
with SINGD: one line changes, the one that builds the optimizer. The learning
rate and its schedule stay.

.. admonition:: What you will learn

   - **Replace** AdamW in a loop, and change nothing else.
   - **Find** which parameters AdamW still trains, and in which group.
   - **Compare** both at the same learning rates.

   You need to know an ordinary PyTorch training loop.
   :ref:`sphx_glr_auto_gallery_1_start_plot_10_first_steps.py` is a good start.

Two update rules
----------------

AdamW divides each entry of the gradient by its usual size. So a step moves
each weight by about the learning rate :math:`\beta_2`. SINGD multiplies the
gradient of a weight matrix from both sides (:doc:`why </concepts>`), and then
scales the result :math:`N` as a whole. With a weight decay :math:`\gamma`, and
without momentum,

.. math::

   N = C C^\top \, \nabla_W \ell \; K K^\top , \qquad
   W \leftarrow W - \beta_2 \left(\frac{N}{\mathrm{rms}(N)} +
   \gamma W\right) .

The root mean square (rms) of the scaled part is 1. So weights move by about
:math:`\beta_2` here too, and AdamW's learning rates carry over.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from singd import PUBLISHED, SINGD

STEPS, BATCH, SEEDS = 150, 64, (0, 1, 2)
RATES = (1e-3, 1e-2, 3e-2, 1e-1)
COLORS = {"AdamW": "C1", "SINGD": "C0", "published": "C3"}
_ = torch.set_num_threads(1)  # the same digits on every machine

# %%
# The task: 1,797 digits of 8 x 8 pixels. The network has a LayerNorm, to see
# what becomes of parameters that are not matrices.

data = load_digits()
images = torch.tensor(data.data, dtype=torch.float32) / 16
labels = torch.tensor(data.target)


def network(seed=0):
    torch.manual_seed(seed)
    hidden = [nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(64, 10))


# %%
# The loop, which stays as it is
# ------------------------------


def fit(model, optimizer):
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, STEPS)
    losses = []
    for _ in range(STEPS):
        batch = torch.randint(0, 1797, (BATCH,))
        optimizer.zero_grad()
        output = model(images[batch])
        loss = nn.functional.cross_entropy(output, labels[batch])
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return torch.tensor(losses)


# %%
# The line that changes
# ---------------------
#
# ``AdamW(model.parameters(), ...)`` becomes ``SINGD(model, ...)``. It needs
# the model, because it reads the inputs of the layers and the gradients at
# their outputs. ``weight_decay`` means what it means for AdamW. The third
# function is SINGD as it was published, for comparison.


def adamw(model, lr):
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)


def singd(model, lr):
    return SINGD(model, lr=lr, weight_decay=0.01)


def published(model, lr):
    return SINGD(model, **(PUBLISHED | dict(lr=lr, weight_decay=0.01)))


optimizer = singd(network(), 1e-2)
print(optimizer)

# %%
# The two linear layers have factors :math:`K` and :math:`C`. The LayerNorm has
# no weight matrix, so AdamW trains it, inside SINGD, in parameter group 1.
# Options for it would go into the argument ``fallback``. Its learning rate is
# that of SINGD, so one schedule drives both:

groups = optimizer.param_groups
assert [group["algorithm"] for group in groups] == ["singd", "adamw"]
assert len(groups[1]["params"]) == 2
assert groups[0]["lr"] == groups[1]["lr"] == 1e-2

# %%
# **Before you run on:** all three train at the same four learning rates, from
# three seeds. Will AdamW's best rate be a good one for SINGD?

builders = {"AdamW": adamw, "SINGD": singd, "published": published}
runs = {name: {lr: [] for lr in RATES} for name in builders}
for name, build in builders.items():
    for lr in RATES:
        for seed in SEEDS:
            model = network(seed)
            optimizer = build(model, lr)
            runs[name][lr].append(fit(model, optimizer))
    runs[name] = {lr: torch.stack(losses) for lr, losses in runs[name].items()}

# %%
# The last 30 losses of each run, averaged. Lines are means over the seeds,
# bands reach from the lowest to the highest.

last = {
    name: torch.stack([run[:, -30:].mean(1) for run in tried.values()])
    for name, tried in runs.items()
}
fig, ax = plt.subplots(figsize=(5, 3.4))
for name, ends in last.items():
    ax.fill_between(
        RATES, ends.amin(1), ends.amax(1), alpha=0.25, color=COLORS[name]
    )
    ax.plot(RATES, ends.mean(1), "o-", color=COLORS[name], label=name)
ax.set(xscale="log", yscale="log", xlabel="learning rate")
ax.set(ylabel="loss of the last 30 steps", title="AdamW's rates train SINGD")
_ = ax.legend()

# sphinx_gallery_start_ignore
ratio = last["SINGD"].mean(1) / last["AdamW"].mean(1)
assert (ratio[1:] < 1).all()
# sphinx_gallery_end_ignore

# %%
# From a rate of 0.01 on SINGD ends below AdamW. For the published method the
# largest of the rates is best: those of AdamW do *not* carry over to it. Now
# the runs, each at its best rate:

best = {name: RATES[int(e.mean(1).argmin())] for name, e in last.items()}
fig, ax = plt.subplots(figsize=(5, 3.4))
for name, lr in best.items():
    smooth = runs[name][lr].unfold(1, 10, 1).mean(2)
    color, steps = COLORS[name], range(10, STEPS + 1)
    band = (smooth.amin(0), smooth.amax(0))
    ax.fill_between(steps, *band, alpha=0.25, color=color)
    ax.plot(steps, smooth.mean(0), color=color, label=f"{name}, lr {lr}")
ax.set(xlabel="step", ylabel="training loss (mean of 10)", yscale="log")
ax.set_title("At its best rate, SINGD ends lowest")
_ = ax.legend()

# sphinx_gallery_start_ignore
ends = {name: tried.mean(1).min() for name, tried in last.items()}
assert ends["SINGD"] < 0.8 * ends["AdamW"] < 0.8 * ends["published"]
assert max(best["SINGD"], best["AdamW"]) < 0.1 == best["published"]
assert (PUBLISHED["lr_cov"], PUBLISHED["T"]) == (0.01, 10)
# sphinx_gallery_end_ignore

# %%
# The published method updates its factors at every tenth step, by steps of
# 0.01. That is made for long runs; here it makes 15 small updates.
#
# What the factors look like
# --------------------------
#
# :math:`K K^\top` approximates the inverse of the inputs' second moment
# :math:`\mathbb{E}[a a^\top]`. It should be large for pixels that are small,
# as those at the left and right border are. We draw its diagonal, without the
# last entry, which belongs to the bias.

model = network()
optimizer = singd(model, 1e-2)
fit(model, optimizer)
K = optimizer.factors("0").K.dense()
diagonal = (K @ K.T).diagonal()[:64].view(8, 8)
fig, ax = plt.subplots(figsize=(4.2, 3.4))
shown = ax.imshow(diagonal.log10())
ax.set(xlabel="pixel column", ylabel="pixel row")
ax.set_title("The empty borders are amplified")
_ = fig.colorbar(shown, label="log10 of the diagonal of K Kᵀ")

# sphinx_gallery_start_ignore
border, middle = diagonal[:, [0, 7]], diagonal[:, 2:6]
assert border.mean() > 1.5 * middle.mean()
assert diagonal[:, 0].min() > middle.max()
# sphinx_gallery_end_ignore

# %%
# When not to use it
# ------------------
#
# A step of SINGD takes longer than one of AdamW. If the network is small and
# *time* is what you pay for, keep AdamW. Keep it also for networks made mostly
# of parameters that are not matrices.
#
# .. admonition:: Lessons learned
#
#    - ``SINGD(model)`` replaces ``AdamW(model.parameters())``.
#    - The learning rate, its schedule and the decay carry over.
#    - What is not a matrix trains with AdamW: ``fallback`` holds its options.
#    - ``PUBLISHED`` takes other steps: AdamW's rates do not carry over to it.
#
# .. admonition:: Exercise
#
#    With ``fallback=None`` nothing stands in for SINGD. What happens to the
#    LayerNorm?
#
# .. dropdown:: Solution
#
#    A warning names ``1.weight`` and ``1.bias``, the LayerNorm. They keep
#    their values.
#
#    .. code-block:: python
#
#        import warnings
#
#        model = network()
#        with warnings.catch_warnings(record=True) as caught:
#            warnings.simplefilter("always")
#            optimizer = SINGD(model, fallback=None)
#        assert "1.weight" in str(caught[0].message)
#        fit(model, optimizer)
#        assert torch.equal(model[1].weight, torch.ones(64))
#
# Where to go next:
# :ref:`sphx_glr_auto_gallery_1_start_plot_12_arguments.py` changes one
# argument at a time,
# :ref:`sphx_glr_auto_gallery_3_advanced_plot_33_diagnostics.py` reads the
# statistics of a run,
# :ref:`sphx_glr_auto_gallery_2_features_plot_20_outside_layers.py` shows who
# trains what, and :doc:`/choosing` what the defaults change.
