r"""
Who trains the parameters that are no matrices?
===============================================

SINGD :term:`preconditions <preconditioner>` the weight *matrices* of layers. A
real model has more: norms, learned positions, attention in one fused layer,
tied embeddings. They train with AdamW, inside the same optimizer: it is the
*fallback*. This page shows which parameters these are, and why.

.. admonition:: What you will learn

   - **Read** from the optimizer's table who trains what.
   - **Set** the learning rate of the fallback.
   - **Move** attention from the fallback to SINGD.

   You should have read
   :ref:`sphx_glr_auto_gallery_1_start_plot_11_replace_adamw.py`.

What makes a layer a matrix
---------------------------

A layer that computes :math:`W a` from its input :math:`a` has the gradient
:math:`\nabla_W \ell = \sum g a^\top`, where :math:`g` is the gradient at the
layer's output. :math:`C` acts on the side of :math:`g`, and :math:`K` on the
side of :math:`a` (:doc:`/concepts`):

.. math::

   N = C C^\top \, \Big( \sum g a^\top \Big) \; K K^\top .

A norm multiplies its input entry by entry, and a position is added to it. So
their gradients have no two such sides, and SINGD has nothing to act on.
"""

import warnings

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from singd import SINGD

STEPS, BATCH, LR = 120, 64, 1e-2
_ = torch.set_num_threads(1)  # the same digits on every machine

data = load_digits()
images = torch.tensor(data.images, dtype=torch.float32) / 16
labels = torch.tensor(data.target)

# %%
# A model with a bit of everything. It takes a digit as a sequence of eight
# rows of pixels. Attention cannot tell in which order the rows come, so a
# learned position is added to each.


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

print(SINGD(Attention(), lr=LR))

# %%
# Three linear layers train with SINGD, as group 0. Group 1
# trains with AdamW: the position, the norm, and all of the attention.
# ``nn.MultiheadAttention`` holds matrices, but multiplies by them inside one
# function, from which :math:`a` and :math:`g` cannot be read.
#
# The same attention, made of two linear layers:


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
    groups = SINGD(Model(), lr=LR).param_groups
    numbers[Model.__name__] = [
        sum(p.numel() for p in group["params"]) for group in groups
    ]

fig, ax = plt.subplots(figsize=(5, 2.2))
for name, (singd, adamw) in numbers.items():
    ax.barh(name, singd, color="C0", label="SINGD")
    ax.barh(name, adamw, left=singd, color="C1", label="AdamW (fallback)")
ax.set(xlabel="numbers in the parameters", ylim=(-0.5, 2.4))
ax.set_title("A fused layer trains with AdamW")
_ = ax.legend(*(p[:2] for p in ax.get_legend_handles_labels()), ncols=2)

# sphinx_gallery_start_ignore
before, after = (adamw / (s + adamw) for s, adamw in numbers.values())
assert before > 0.5
assert after < 0.1
# sphinx_gallery_end_ignore

# %%
# With linear layers, AdamW's share falls from over a half to under a tenth.

# %%
# Left out
# --------
#
# ``fallback=None`` leaves those parameters out: they keep their first values.
# SINGD warns and names them.

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model = LinearAttention()
    SINGD(model, lr=LR, fallback=None)
print(caught[0].message)
assert "position, norm.weight, norm.bias" in str(caught[0].message)

# %%
# **Before you run on:** a position that stays zero says nothing about the order
# of the rows. Can the model still learn to tell digits apart?


def fit(Model, **options):
    model = Model()
    optimizer = SINGD(model, lr=LR, warn_unsupported=False, **options)
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
    "fallback": fit(Attention),
    "linear layers": fit(LinearAttention),
}
STYLES = dict(color="C3"), dict(color="C1", ls="--"), dict(color="C1"), {}

fig, ax = plt.subplots(figsize=(5, 3.4))
for (name, (losses, _)), style in zip(runs.items(), STYLES):
    ax.plot(losses.unfold(0, 10, 1).mean(1), label=name, **style)
ax.set(xlabel="step", ylabel="training loss (mean of 10)")
ax.set_title("What is left out is missed")
_ = ax.legend()

# sphinx_gallery_start_ignore
last = {name: losses[-30:].mean().item() for name, (losses, _) in runs.items()}
assert last["left out"] > last["fallback, lr=1e-3"] > last["fallback"]
assert last["left out"] < 0.5 * torch.tensor(10.0).log()
assert last["linear layers"] < last["fallback, lr=1e-3"]
# sphinx_gallery_end_ignore

# %%
# Even without order the model learns a lot: a guess would have a loss of
# :math:`\log 10`. The runs that train everything learn more. Unless you say
# otherwise, the fallback has SINGD's ``lr``, here 0.01; a tenth of it is too
# slow for so short a run. This is the position after training:

fig, ax = plt.subplots(figsize=(5, 2.8))
position = runs["fallback"][1].position.detach()
image = ax.imshow(position, cmap="RdBu", vmin=-0.8, vmax=0.8)
ax.set(xlabel="number of the entry", ylabel="row of the digit")
ax.set_title("The position, trained by AdamW")
_ = fig.colorbar(image, label="value")

# sphinx_gallery_start_ignore
assert not runs["left out"][1].position.any()
assert position.abs().max() > 0.2
# sphinx_gallery_end_ignore

# %%
# What else the fallback gets
# ---------------------------
#
# Four more modules, each alone in a model. Some lines give a reason.


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)
        self.head.weight = self.tokens.weight


DENSE = ("dense", "dense")
CASES = (
    nn.Embedding(9, 4),
    nn.Embedding(9, 4, scale_grad_by_freq=True),
    Tied(),
    nn.utils.parametrizations.weight_norm(nn.Linear(4, 4, bias=False)),
)
tables = [str(SINGD(nn.Sequential(m), structures=DENSE)) for m in CASES]
for table in tables:
    print(*table.splitlines()[3:], sep="\n")

# sphinx_gallery_start_ignore
assert "diagonal" in tables[0]
assert all("Linear" not in table for table in tables)
assert all("adamw" in table for table in tables[1:])
# sphinx_gallery_end_ignore

# %%
# - An embedding trains with SINGD. Its inputs are one-hot, so its :math:`K` is
#   always diagonal, even if ``structures`` asks for dense factors.
# - Scaled by frequency, its gradient is not :math:`\sum g a^\top` any more.
# - Tied to the output layer, one weight is used in two ways: what is :math:`a`
#   in one is :math:`g` in the other. So no pair :math:`K`, :math:`C` fits.
# - With ``weight_norm`` the matrix is computed from two parameters.
#
# Only sparse gradients are refused, because neither algorithm can use them.

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
# If most of your parameters are outside, take plain AdamW. If a layer of your
# own multiplies by a matrix, teach SINGD to read it
# (:ref:`sphx_glr_auto_gallery_3_advanced_plot_32_custom_layer.py`).
#
# .. admonition:: Lessons learned
#
#    - Print the optimizer once, before a long run.
#    - The fallback has SINGD's ``lr``; ``fallback=dict(lr=...)`` changes it.
#    - Prefer linear layers to fused ones.
#    - ``fallback=None`` freezes what is outside, with a warning.
#
# .. admonition:: Exercise
#
#    Hand the parameters over yourself: ``SINGD(model, model.parameters(),
#    fallback=None)``. Is there a warning, too?
#
# .. dropdown:: Solution
#
#    It is an error. You named parameters to be trained, and for some of them
#    no algorithm is left:
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
# :ref:`sphx_glr_auto_gallery_2_features_plot_21_parameter_options.py` gives
# layers options of their own,
# :ref:`sphx_glr_auto_gallery_3_advanced_plot_30_vision_transformer.py` trains
# a larger model of this kind, and
# :ref:`sphx_glr_auto_gallery_1_start_plot_12_arguments.py` draws what each
# argument does.
