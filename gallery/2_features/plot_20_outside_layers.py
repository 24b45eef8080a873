r"""
Who trains the parameters that are no matrices?
===============================================

SINGD preconditions the weight *matrices* of layers. A real model has more:
norms, positions, attention in one fused layer, tied embeddings. They train
with AdamW, inside the same optimizer. This page shows which they are, why, and
what happens if you leave them out.

.. admonition:: What you will learn

   - **Read** from the optimizer's table who trains what, and why.
   - **Set** the learning rate of the fallback.
   - **Move** a parameter from the fallback to SINGD.

   You should have read
   :ref:`sphx_glr_auto_gallery_1_start_plot_11_replace_adamw.py`.

What makes a layer a matrix
---------------------------

A layer that computes :math:`W a` has the gradient
:math:`\nabla_W \ell = \sum g a^\top`: inputs on one side, output gradients on
the other. Only then is there something for both factors to act on,

.. math::

   N = C C^\top \, \Big( \sum g a^\top \Big) \; K K^\top .

The scale of a norm multiplies entry by entry, and a position is added. Their
gradients are no such products.
"""

import warnings

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from singd import PUBLISHED, SINGD

STEPS, BATCH = 120, 64
OPTIONS = PUBLISHED | dict(lr=3e-3, damping=1e-2, T=1, lr_cov=0.3)
# "reduce", since the model averages over rows
OPTIONS |= dict(normalize_lr_cov=True, kfac_approx="reduce")
_ = torch.set_num_threads(1)  # the same digits on every machine

data = load_digits()
images = torch.tensor(data.images, dtype=torch.float32) / 16
labels = torch.tensor(data.target)

# %%
# A model with a bit of everything. It reads a digit as eight rows of pixels.
# Attention does not see the order of rows, so a learned position is added.


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.rows = nn.Linear(8, 16)
        self.position = nn.Parameter(torch.zeros(8, 16))
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.hidden = nn.Linear(16, 32)
        self.head = nn.Linear(32, 10)

    def attend(self, x):
        return self.attention(x, x, x, need_weights=False)[0]

    def forward(self, images):
        x = self.rows(images) + self.position
        x = x + self.attend(self.norm(x))
        return self.head(self.hidden(x).relu().mean(1))


# %%
# The table
# ---------
#
# Printed, the optimizer has one line for each layer that it preconditions, and
# one for each parameter that it does not.

print(SINGD(Attention(), **OPTIONS))

# %%
# Three linear layers train with SINGD. In the last column, group 1 is the
# fallback: the position, the norm, and all of the attention. The last may
# surprise you. ``nn.MultiheadAttention`` holds matrices, but multiplies them
# inside one fused function, where nobody can listen to :math:`a` and
# :math:`g`.
#
# The same attention from two linear layers needs a few lines, and SINGD
# takes it.


class LinearAttention(Attention):
    def __init__(self):
        super().__init__()
        self.attention = None
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def attend(self, x):
        heads = self.qkv(x).view(len(x), 8, 3, 2, 8).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(*heads)
        return self.out(y.transpose(1, 2).flatten(2))


# %%
# How many of the numbers does each algorithm train?

numbers = {}
for Model in (Attention, LinearAttention):
    groups = SINGD(Model(), **OPTIONS).param_groups
    numbers[Model.__name__] = [
        sum(p.numel() for p in group["params"]) for group in groups
    ]

fig, ax = plt.subplots(figsize=(7, 1.9))
for name, (singd, adamw) in numbers.items():
    ax.barh(name, singd, color="C0", label="SINGD")
    ax.barh(name, adamw, left=singd, color="C1", label="AdamW (fallback)")
ax.set(xlabel="numbers in the parameters", ylim=(-0.5, 2.4))
ax.set_title("A fused layer keeps its matrices from SINGD")
ax.legend(*(pair[:2] for pair in ax.get_legend_handles_labels()), ncols=2)

before, after = (adamw / (s + adamw) for s, adamw in numbers.values())
assert before > 0.5
assert after < 0.1

# %%
# Left out
# --------
#
# ``fallback=None`` leaves those parameters out. SINGD warns and names them.

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model = LinearAttention()
    SINGD(model, **(OPTIONS | dict(fallback=None)))
print(caught[0].message)
assert "position, norm.weight, norm.bias" in str(caught[0].message)

# %%
# **Before you run on:** without its position, the model sees a bag of rows.
# Can it still learn to read digits?


def fit(Model, **options):
    model = Model()
    optimizer = SINGD(model, warn_unsupported=False, **(OPTIONS | options))
    losses, shuffle = [], torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        batch = torch.randint(0, 1797, (BATCH,), generator=shuffle)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses), model


runs = {
    "left out": fit(Attention, fallback=None),
    "fallback, lr=1e-3": fit(Attention, fallback=dict(lr=1e-3)),
    "fallback, lr=1e-2": fit(Attention, fallback=dict(lr=1e-2)),
    "linear layers": fit(LinearAttention, fallback=dict(lr=1e-2)),
}

fig, ax = plt.subplots(figsize=(7, 3.6))
for (name, (losses, _)), color in zip(runs.items(), ("C7", "C9", "C1", "C0")):
    ax.plot(losses.unfold(0, 10, 1).mean(1), label=name, color=color)
ax.set(xlabel="step", ylabel="training loss (mean of 10)")
ax.set_title("The fallback's learning rate is worth a search")
ax.legend()

last = {name: losses[-30:].mean().item() for name, (losses, _) in runs.items()}
assert last["left out"] > last["fallback, lr=1e-3"]
assert last["fallback, lr=1e-3"] > 1.5 * last["fallback, lr=1e-2"]
assert last["linear layers"] < last["fallback, lr=1e-2"]

# %%
# A bag of rows is worth something, but the three runs that train everything
# are better. The fallback's usual rate, AdamW's ``lr=1e-3``, is slow for so
# short a run. With linear layers the loss is lowest. (They start from other
# weights, so this is no proof.)
#
# We look at the position. Left out, it stays zero.

fig, axes = plt.subplots(1, 2, figsize=(8, 2.6))
for ax, name in zip(axes, ("left out", "fallback, lr=1e-2")):
    position = runs[name][1].position.detach()
    image = ax.imshow(position, cmap="RdBu", vmin=-0.5, vmax=0.5)
    ax.set(xlabel="channel", ylabel="row of the digit", title=name)
    ax.set(xticks=range(0, 16, 3), yticks=range(0, 8, 2))
_ = fig.colorbar(image, ax=axes, label="position")

assert not runs["left out"][1].position.any()
assert position.abs().max() > 0.2

# %%
# What else the fallback gets
# ---------------------------
#
# The table gives a reason, where there is one to give.


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)
        self.head.weight = self.tokens.weight


CASES = (
    nn.Embedding(9, 4),
    nn.Embedding(9, 4, scale_grad_by_freq=True),
    Tied(),
    nn.utils.parametrizations.weight_norm(nn.Linear(4, 4, bias=False)),
)
tables = [str(SINGD(nn.Sequential(m), **OPTIONS)) for m in CASES]
for table in tables:
    print(*table.splitlines()[3:], sep="\n")

assert "diagonal" in tables[0]
assert all("Linear" not in table for table in tables)

# %%
# - An embedding trains with SINGD. Its inputs are one-hot, so its :math:`K` is
#   always diagonal, whatever ``structures`` says.
# - Scaled by frequency, its gradient is not :math:`\sum g a^\top` any more.
# - Tied to the output layer, its weight plays both roles: what is :math:`a` in
#   one is :math:`g` in the other. No single product is right.
# - With ``weight_norm`` the parameters are a length and a direction, and the
#   matrix is computed from them.
#
# Only a sparse gradient is refused: neither algorithm can use it.

try:
    SINGD(nn.Embedding(9, 4, sparse=True))
except ValueError as error:
    message = str(error)
print(message)
assert "choose sparse=False" in message

# %%
# When not to use it
# ------------------
#
# If most of your parameters are outside, plain AdamW does the same with less
# code. If a large layer of your own is a matrix in disguise, register it
# instead (:ref:`sphx_glr_auto_gallery_3_advanced_plot_32_custom_layer.py`).
#
# .. admonition:: Lessons learned
#
#    - Print the optimizer once, before a long run.
#    - ``fallback=dict(lr=...)``: start from the rate that AdamW had.
#    - Prefer linear layers to fused ones.
#    - ``fallback=None`` freezes what is outside, with a warning.
#
# .. admonition:: Exercise
#
#    Hand the parameters over yourself: ``SINGD(model, model.parameters(),
#    fallback=None)``. Is that a warning, too?
#
# .. dropdown:: Solution
#
#    No, an error. You named parameters to be trained, and no algorithm is left
#    for some:
#
#    .. code-block:: python
#
#        model, refusal = Attention(), ""
#        try:
#            SINGD(model, model.parameters(), fallback=None)
#        except ValueError as error:
#            refusal = str(error)
#        print(refusal)
#        assert "position" in refusal
#
# Where to go next:
# :ref:`sphx_glr_auto_gallery_2_features_plot_27_weight_sharing.py` explains
# ``kfac_approx``,
# :ref:`sphx_glr_auto_gallery_3_advanced_plot_30_vision_transformer.py` trains
# a larger model of this kind, and
# :ref:`sphx_glr_auto_gallery_1_start_plot_12_arguments.py` draws what each
# argument does.
