r"""
Four rules, one task
====================

``rule=`` says how the preconditioner moves: ``"singd"``, ``"ikfac"``,
``"kfac"`` or ``"shampoo"``. All else stays. So they can be compared: one
autoencoder, the same options, the same grid of learning rates for each and
for AdamW, several seeds.

.. admonition:: What you will learn

   - **Choose** a rule, and say what each of them keeps.
   - **Compare** optimizers fairly: one grid of rates, and bands over seeds.
   - **Read** the result beside its cost in time and memory.

   You should have read
   :ref:`sphx_glr_auto_gallery_1_start_plot_10_first_steps.py`. The rules come
   from lessons :ref:`6
   <sphx_glr_auto_gallery_0_course_plot_06_kfac_from_scratch.py>`, :ref:`7
   <sphx_glr_auto_gallery_0_course_plot_07_without_an_inverse.py>` and :ref:`9
   <sphx_glr_auto_gallery_0_course_plot_09_two_factors_one_scale.py>`.

What differs
------------

With :math:`U = \mathbb{E}[a a^\top]` of the inputs and
:math:`G = \mathbb{E}[g g^\top]` of the output gradients of a layer, the
direction is :math:`N = C C^\top \nabla_W \ell\, K K^\top`, and

.. math::

   \begin{aligned}
   \text{kfac:}\quad & K K^\top = (U + \pi \sqrt\lambda I)^{-1},\;
     C C^\top = (G + \tfrac{\sqrt\lambda}{\pi} I)^{-1} \\
   \text{ikfac:}\quad & m_K = \tfrac12 [K^\top U K + \lambda K^\top K - I],
     \; K \leftarrow K - \beta K m_K \\
   \text{singd:}\quad & m_K = \tfrac12 [\operatorname{tr}(C^\top G C)
     K^\top U K + \lambda \operatorname{tr}(C^\top C) K^\top K - I] \\
   \text{shampoo:}\quad & \text{as singd, with }
     \tfrac1{d_o} \nabla_W \ell^\top C C^\top \nabla_W \ell
     \text{ for } \operatorname{tr}(C^\top G C)\, U .
   \end{aligned}

Only ``"kfac"`` inverts. ``"shampoo"`` looks at the gradient alone: it needs no
hooks on the layers, and so also serves attention and recurrent weights.
"""

import itertools
import time

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from singd import PUBLISHED, SINGD

STEPS, BATCH, SEEDS = 80, 128, (0, 1, 2)
RATES = (1e-2, 3e-2, 1e-1)
_ = torch.set_num_threads(1)  # the same digits on every machine

# %%
# One task
# --------
#
# An autoencoder of 8 x 8 digits through eight numbers. Every rule gets the
# same options: damping relative to the curvature, a spectral bound on the
# factors' step, momentum before the preconditioner, and updates of a matched
# size, so that AdamW's rates carry over. The rate falls to zero for all.

data = load_digits()
x = torch.tensor(data.data, dtype=torch.float32) / 16
train, test = x[:1500], x[1500:]

OPTIONS = {
    **PUBLISHED, "structures": ("dense", "dense"), "T": 5, "lr_cov": 0.2,
    "damping": 0.3, "relative_damping": True, "scaled_start": True,
    "fast_start": True, "normalize_lr_cov": "spectral", "nesterov": True,
    "momentum": 0.95, "momentum_on": "gradient", "match_rms": 0.2,
}  # fmt: skip


def autoencoder():
    widths = (64, 32, 8, 32, 64)
    layers = []
    for n, m in itertools.pairwise(widths):
        layers += [nn.Linear(n, m), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def build(model, name, lr):
    if name == "AdamW":
        return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    return SINGD(model, lr=lr, **{**OPTIONS, "rule": name})


def loss_of(model, x):
    return 0.5 * (model(x) - x).square().sum(1).mean()


def fit(name, lr, seed=0, task=autoencoder, loss_of=loss_of):
    torch.manual_seed(seed)
    model = task()
    optimizer = build(model, name, lr)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    losses, start = [], time.perf_counter()
    for _ in range(STEPS):
        batch = train[torch.randint(0, len(train), (BATCH,))]
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        decay.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - start
    with torch.no_grad():
        held_out = loss_of(model, test).item()
    return losses, held_out, seconds, optimizer


# %%
# Tuned the same way
# ------------------
#
# Every method gets three rates, and keeps the one with the lowest loss at the
# end, on training batches of the first seed.
#
# **Before you run on:** which rule will be best, and will it be far ahead?

METHODS = ("AdamW", "kfac", "ikfac", "singd", "shampoo")
colors = dict(zip(METHODS, ("C1", "C2", "C9", "C0", "C4"), strict=True))


def end(losses):
    return sum(losses[-10:]) / 10


tried = {m: [fit(m, lr) for lr in RATES] for m in METHODS}
grid = {m: [end(losses) for losses, *_ in tried[m]] for m in METHODS}
where = {m: v.index(min(v)) for m, v in grid.items()}
best = {m: RATES[i] for m, i in where.items()}
fig, ax = plt.subplots(figsize=(5.4, 3.4))
for m in METHODS:
    ax.plot(RATES, grid[m], "o-", label=m, color=colors[m])
ax.set(xscale="log", yscale="log", xlabel="learning rate")
ax.set(ylabel="loss at the end", title="The grid, for each")
_ = ax.legend()

# %%
# A best rate at the edge says that a grid is too small. It is not extended
# here, to keep the page quick; so read a margin with care.
#
# The result
# ----------

runs = {m: [tried[m][i]] for m, i in where.items()}
for m in METHODS:
    runs[m] += [fit(m, best[m], seed) for seed in SEEDS[1:]]
fig, ax = plt.subplots(figsize=(5.4, 4))
for m in METHODS:
    curves = torch.tensor([losses for losses, *_ in runs[m]])
    curves = curves.unfold(1, 5, 1).mean(2)  # five batches
    low, high = curves.amin(0), curves.amax(0)
    ax.plot(curves.mean(0), label=f"{m}, lr {best[m]:g}", color=colors[m])
    ax.fill_between(range(len(low)), low, high, color=colors[m], alpha=0.2)
ax.set(yscale="log", xlabel="step", ylabel="loss", title="Mean of three seeds")
ax.legend()

final = {m: [end(losses) for losses, *_ in runs[m]] for m in METHODS}
held_out = {m: [r[1] for r in runs[m]] for m in METHODS}
mean = {m: sum(v) / len(v) for m, v in final.items()}
for m in METHODS:
    print(f"{m:8} {min(r[2] for r in runs[m]):.2f} s")

# sphinx_gallery_start_ignore
assert max(mean.values()) < 1.4 * min(mean.values())
assert max(mean["singd"], mean["shampoo"]) < mean["AdamW"]
assert where["kfac"] == len(RATES) - 1
# sphinx_gallery_end_ignore

# %%
# They end close together: no mean is 1.4 times another. ``"singd"`` and
# ``"shampoo"`` are ahead of AdamW per step. The best rate of ``"kfac"`` lies
# at the edge of its grid, so that more might be in it, and ``"ikfac"`` is no
# better than AdamW here. Each step of a rule takes longer than one of AdamW,
# in a network as small as this several times as long.
#
# What it costs, and the loss on new data
# ---------------------------------------


def kilobytes(optimizer):
    states = optimizer.state_dict()["state"].values()
    tensors = [v for s in states for v in s.values() if torch.is_tensor(v)]
    return sum(v.nbytes for v in tensors) / 1e3


state = {m: kilobytes(runs[m][0][3]) for m in METHODS}
fig, axes = plt.subplots(2, 1, figsize=(5.4, 5.4))
for i, m in enumerate(METHODS):
    axes[0].plot([i] * 3, held_out[m], "o", color=colors[m])
    axes[1].bar(i, state[m], color=colors[m])
for ax, label in zip(axes, ("loss", "kB"), strict=True):
    ax.set_xticks(range(len(METHODS)), METHODS)
    ax.set_ylabel(label)
axes[0].set_title("Digits that were held out, each seed")
axes[1].set_title("State of the optimizer")
print("KFAC keeps", *runs["kfac"][0][3].factors("0")._fields)

# sphinx_gallery_start_ignore
assert state["kfac"] == state["singd"] == state["shampoo"]
assert state["singd"] > 2 * state["AdamW"]
kept = runs["kfac"][0][3].factors("0")._fields
assert kept == ("U", "G", "U_inv", "G_inv")
# sphinx_gallery_end_ignore

# %%
# All rules with dense factors store four matrices a layer. Diagonal and block
# structures shrink them: for three of the rules any structure does, for
# ``"kfac"`` only those whose inverse is of the same kind.
#
# When not to use this
# --------------------
#
# This is one small task, one damping, and eighty steps. It shows how to
# compare, and does not rank the rules. For your own task begin with
# ``"singd"``; take ``"shampoo"`` where most weights are in attention or
# recurrent layers; take ``"kfac"`` to compare with the literature.
#
# .. admonition:: Lessons learned
#
#    - One word changes the rule; all other options stay.
#    - A grid must be the same for all, and its edge must be looked at.
#    - Three seeds show which differences are none.
#    - All four keep equally many numbers; only ``"kfac"`` inverts.
#
# .. admonition:: Exercise
#
#    Which rules can precondition the input projection of
#    :class:`torch.nn.MultiheadAttention`?
#
# .. dropdown:: Solution
#
#    Only the one that needs no rows; the others leave it to AdamW.
#
#    .. code-block:: python
#
#        able = []
#        for rule in METHODS[1:]:
#            model = nn.MultiheadAttention(8, 2)
#            optimizer = SINGD(model, **{**OPTIONS, "rule": rule})
#            group = next(
#                g for g in optimizer.param_groups
#                if any(p is model.in_proj_weight for p in g["params"])
#            )
#            able += [rule] * (group["algorithm"] == "singd")
#        assert able == ["shampoo"]
#
# Where to go next:
# :ref:`sphx_glr_auto_gallery_3_advanced_plot_37_monte_carlo_fisher.py` asks
# whose curvature it is,
# :ref:`sphx_glr_auto_gallery_3_advanced_plot_35_write_your_own_rule.py` adds
# a fifth rule, and :doc:`/choosing` has a table to start from.
