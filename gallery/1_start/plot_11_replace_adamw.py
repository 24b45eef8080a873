r"""
How do I put SINGD in place of AdamW? One line at a time
========================================================

You have a loop that trains with AdamW. This page turns it into one that trains
with SINGD: the constructor changes, the learning rate and its schedule stay.

.. admonition:: What you will learn

   - **Replace** the constructor, and nothing else.
   - **Translate** AdamW's arguments to those of SINGD.
   - **Compare** both at the same learning rates.

   You need to know an ordinary PyTorch training loop.
   :ref:`sphx_glr_auto_gallery_1_start_plot_10_first_steps.py` is a good start.

Two update rules
----------------

AdamW scales each entry of the gradient by its own size. SINGD multiplies the
gradient of a weight matrix from both sides, and scales the result :math:`N`
as a whole, so that a step moves weights by about :math:`\beta_2`,

.. math::

   N = C C^\top \, \nabla_W \ell \; K K^\top , \qquad
   W \leftarrow W - \beta_2 \left(N / \mathrm{rms}(N) + \gamma W\right) .

AdamW's first steps move weights by :math:`\beta_2` too. So its learning rates
carry over. (The momentum is left out here.)
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from singd import PUBLISHED, SINGD

STEPS, BATCH, SEEDS = 150, 64, (0, 1, 2)
RATES = (1e-3, 1e-2, 3e-2, 1e-1)
COLORS = {"AdamW": "C1", "SINGD": "C0", "published": "C7"}
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
# The constructor
# ---------------
#
# ``AdamW(model.parameters(), ...)`` becomes ``SINGD(model, ...)``. It needs
# the model, because it listens to the inputs of the layers and to their output
# gradients. ``weight_decay`` acts on the weights at once, as AdamW's does. The
# third line is the method as published, for comparison.


def adamw(model, lr):
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)


def singd(model, lr):
    return SINGD(model, lr=lr, weight_decay=0.01)


def published(model, lr):
    return SINGD(model, **(PUBLISHED | dict(lr=lr, weight_decay=0.01)))


optimizer = singd(network(), 1e-2)
print(optimizer)

# %%
# The two linear layers train with factors. The LayerNorm trains with AdamW, in
# a group of its own: ``fallback`` holds its options. Its learning rate is that
# of SINGD, so one schedule drives both.

groups = optimizer.param_groups
assert [group["algorithm"] for group in groups] == ["singd", "adamw"]
assert len(groups[1]["params"]) == 2
assert groups[0]["lr"] == groups[1]["lr"] == 1e-2

# %%
# **Before you run on:** all three train at the same four learning rates, from
# three seeds. Which one depends least on the rate?

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
# We look at the last losses. Bands reach from the lowest to the highest seed.

last = {
    name: torch.stack([run[:, -30:].mean(1) for run in tried.values()])
    for name, tried in runs.items()
}
fig, ax = plt.subplots(figsize=(6, 3.4))
for name, ends in last.items():
    ax.fill_between(
        RATES, ends.amin(1), ends.amax(1), alpha=0.25, color=COLORS[name]
    )
    ax.plot(RATES, ends.mean(1), "o-", color=COLORS[name], label=name)
ax.set(xscale="log", yscale="log", xlabel="learning rate")
ax.set(ylabel="loss of the last 30 steps", title="AdamW's rates train SINGD")
ax.legend()

ratio = last["SINGD"].mean(1) / last["AdamW"].mean(1)
assert (ratio < 0.85).all()

# %%
# At each of these rates SINGD ends below AdamW. Now each at its best of the
# four. The published method is not tuned beyond its rate, and might want a
# higher one; its factors hardly move in so short a run.

best = {name: RATES[int(e.mean(1).argmin())] for name, e in last.items()}
fig, ax = plt.subplots(figsize=(6, 3.4))
for name, lr in best.items():
    smooth = runs[name][lr].unfold(1, 10, 1).mean(2)
    color, steps = COLORS[name], range(10, STEPS + 1)
    band = (smooth.amin(0), smooth.amax(0))
    ax.fill_between(steps, *band, alpha=0.25, color=color)
    ax.plot(steps, smooth.mean(0), color=color, label=f"{name}, lr {lr}")
ax.set(xlabel="step", ylabel="training loss (mean of 10)", yscale="log")
ax.set_title("At its best rate, SINGD ends lowest")
ax.legend()

ends = {name: tried.mean(1).min() for name, tried in last.items()}
assert ends["SINGD"] < 0.6 * ends["AdamW"] < 0.6 * ends["published"]
assert max(best["SINGD"], best["AdamW"]) < 0.1

# %%
# What the factors look like
# --------------------------
#
# :math:`K K^\top` approximates the inverse second moment of the inputs. Pixels
# at the border are almost always empty: there it can grow. The last row and
# column of :math:`K` belong to the bias; we leave them out.

model = network()
optimizer = singd(model, 1e-2)
fit(model, optimizer)
K = optimizer.factors("0").K.dense()
diagonal = (K @ K.T).diagonal()[:64].view(8, 8)
fig, ax = plt.subplots(figsize=(4.2, 3.4))
shown = ax.imshow(diagonal.log10())
ax.set(xlabel="pixel column", ylabel="pixel row")
ax.set_title("Diagonal of K Kᵀ, as an image")
_ = fig.colorbar(shown, label="log10")

assert diagonal[:, 0].min() > diagonal[:, 2:6].max()
assert diagonal.max() > 3 * diagonal.min()

# %%
# The empty column at the left is amplified more than the middle, several
# times.
#
# When not to use it
# ------------------
#
# This page counts steps. A step of SINGD takes longer than one of AdamW, so
# keep AdamW if its loss per *second* is what you pay for and your network is
# small. Keep it for networks made mostly of parameters that are not matrices.
#
# .. admonition:: Lessons learned
#
#    - ``SINGD(model)`` replaces ``AdamW(model.parameters())``.
#    - The learning rate, its schedule and the decay carry over.
#    - All other parameters train with AdamW: set it up with ``fallback``.
#    - ``PUBLISHED`` is another method: its rates do not carry over.
#
# .. admonition:: Exercise
#
#    What happens with ``fallback=None``?
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
