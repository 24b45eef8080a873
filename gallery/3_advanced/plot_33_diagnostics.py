r"""
What is wrong with my run? Reading ``optimizer.stats()``
========================================================

The loss tells you *that* something is wrong. It does not tell you what: a
preconditioner that stands still and a learning rate that is too small look
the same. ``optimizer.stats()`` tells them apart by plain numbers for each
layer, computed only when you ask. This page reads them for four runs, a
healthy one and three sick ones, and shows the remedies.

.. admonition:: What you will learn

   - **Log** the statistics of every layer.
   - **Recognise** a healthy, a stale and a diverging preconditioner.
   - **Choose** the remedy: ``lr``, ``lr_cov``, ``normalize_lr_cov``,
     ``damping`` or ``T``.

   You should have read
   :ref:`sphx_glr_auto_gallery_1_start_plot_10_first_steps.py`. Lesson 7,
   :ref:`sphx_glr_auto_gallery_0_course_plot_07_without_an_inverse.py`, derives
   the update.

What to look at
---------------

With ``PUBLISHED`` options the factors start as identities and follow

.. math::

   m_K \leftarrow \alpha_1 m_K + \tfrac12 \left[ \operatorname{tr}(H_C) H_K
   + \lambda \operatorname{tr}(C^\top C) P(K^\top K) - I \right], \qquad
   K \leftarrow K - \beta_1 K m_K .

If :math:`K` and :math:`C` fit the curvature, the bracket is zero. So the size
of :math:`m_K` says how far they are from fitting: it must shrink. And since
:math:`K` becomes :math:`K (I - \beta_1 m_K)`, a step with
:math:`\beta_1 \lVert m_K \rVert` far above 1 can turn directions of :math:`K`
around, and make them longer instead of shorter.
"""

import math
import warnings

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from singd import PUBLISHED, SINGD

STEPS, BATCH = 120, 64
BASE = PUBLISHED | dict(lr=3e-3)
FAST = dict(T=1, lr_cov=0.2, normalize_lr_cov=True)  # for a short run
_ = torch.set_num_threads(1)  # the same digits on every machine

# %%
# The task is small: 1,797 digits of 8 x 8 pixels, and a network of two layers.

data = load_digits()
images = torch.tensor(data.data, dtype=torch.float32) / 16
labels = torch.tensor(data.target)


def fit(**options):
    """Train; return the losses and the first layer's stats of each step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = SINGD(model, **(BASE | options))
    losses, stats = [], []
    for _ in range(STEPS):
        batch = torch.randint(0, len(images), (BATCH,))
        optimizer.zero_grad()
        output = model(images[batch])
        loss = nn.functional.cross_entropy(output, labels[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        stats.append(optimizer.stats()["0"])
    return losses, stats


# %%
# One call gives one dictionary for each layer. Log it as it is.

# sphinx_gallery_nbval = "nbval-ignore-output"
losses, stats = fit(**FAST)
for name, value in stats[-1].items():
    print(f"{name:13}{value:10.2g}")

# %%
# Four runs
# ---------
#
# The first follows the advice for short runs. The second takes the published
# pace, ``T=10`` and ``lr_cov=0.01``. The third has healthy factors, but a
# hundredth of the learning rate. The fourth takes large steps on the factors,
# and nothing bounds them.
#
# **Before you run on:** which two losses will look alike?

SETTINGS = {
    "healthy": FAST,
    "stale": dict(),
    "slow": dict(FAST, lr=3e-5),
    "diverging": dict(T=1, lr_cov=0.5),
}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    runs = {name: fit(**options) for name, options in SETTINGS.items()}
LOOK = {"healthy": "C0", "stale": "C7", "slow": "C0--", "diverging": "C3"}
LOOK |= {"smaller lr_cov": "C0", "bounded step": "C0--"}
LOOK |= {"larger damping": "C0:"}


def draw(ax, runs, key, title):
    for name, (losses, stats) in runs.items():
        values = losses if key == "loss" else [abs(s[key]) for s in stats]
        shown = [v if math.isfinite(v) else math.nan for v in values]
        ax.plot(shown, LOOK[name], label=name)
    ax.set(ylabel=key, yscale="log", title=title)


fig, ax = plt.subplots(figsize=(5.4, 3.2))
draw(ax, runs, "loss", "Stale and slow look alike")
ax.set(xlabel="step", ylim=(1e-3, 1e2))
_ = ax.legend()

# sphinx_gallery_start_ignore
final = {name: run[0][-1] for name, run in runs.items()}
assert min(final["stale"], final["slow"]) > 100 * final["healthy"]
# sphinx_gallery_end_ignore

# %%
# The stale and the slow run have hardly learnt anything, and the loss does not
# say why. Three numbers do. ``trace_K`` is 1 at the start. ``cosine`` is the
# one between the gradient and the natural gradient. If both stay at 1, the
# optimizer is SGD, whatever you paid for it. ``update_ratio`` is the length of
# the step on the weights over the length of the weights.

fig, axes = plt.subplots(3, 1, figsize=(5.4, 6), sharex=True)
some = {name: runs[name] for name in ("healthy", "stale", "slow")}
draw(axes[0], some, "trace_K", "The scale of K: the stale one stays at 1")
draw(axes[1], some, "cosine", "Turn of the gradient: none in the stale run")
draw(axes[2], some, "update_ratio", "Step over weights: too small in both")
axes[0].set(yscale="linear", ylim=(0, None))
axes[1].set(yscale="linear", ylim=(0, 1.05))
axes[0].legend(ncols=3, loc="center right")
_ = axes[2].set_xlabel("step")

ratio = {k: max(s["update_ratio"] for s in runs[k][1]) for k in some}
print({name: f"{value:.1g}" for name, value in ratio.items()})

# sphinx_gallery_start_ignore
last = {name: run[1][-1] for name, run in runs.items()}
assert last["stale"]["trace_K"] < 1.2
assert last["stale"]["cosine"] > 0.99
for name in ("healthy", "slow"):
    assert last[name]["trace_K"] > 3
    assert last[name]["cosine"] < 0.8
assert max(ratio["slow"], ratio["stale"]) < ratio["healthy"] / 10 < 0.03
# sphinx_gallery_end_ignore

# %%
# The slow run's factors have learnt: their scale is the healthy run's, and the
# gradient is turned. It needs a larger ``lr``. The stale run's factors stand
# still, and a larger ``lr`` would only tune SGD: it needs ``T=1`` and a larger
# ``lr_cov``.
#
# A run that explodes
# -------------------
#
# Now the first steps of the diverging run. What is drawn beside the loss
# is :math:`\beta_1 \lVert m_K \rVert`.

losses, stats = runs["diverging"]
size = [0.5 * s["norm_m_K"] for s in stats]
jumped = next(i for i, m in enumerate(size) if m > 10 * size[0])
fig, axes = plt.subplots(2, 1, figsize=(5.4, 4.4), sharex=True)
axes[0].plot(losses[: jumped + 1], "o-", color="C3")
axes[0].set(ylabel="loss", ylim=(0, None), title="Both leave in one step")
axes[1].plot(size[: jumped + 1], "o-", color="C3")
axes[1].axhline(1, color="C7", linestyle=":")
axes[1].set(ylabel="lr_cov x norm_m_K", yscale="log", xlabel="step")
print(caught[0].message)

# sphinx_gallery_start_ignore
risen = next(i for i, loss in enumerate(losses) if loss > 1.5 * losses[0])
bad = next(i for i, loss in enumerate(losses) if loss != loss)
assert risen == jumped == bad - 2
assert size[jumped] > 50
assert "grew more than tenfold" in str(caught[0].message)
# sphinx_gallery_end_ignore

# %%
# :math:`m_K` does not warn before the loss: both jump in one step, and two
# steps later the loss is ``nan``. But it names the culprit, as SINGD's own
# warning does. The step on :math:`K` had a size above 50, so the remedy is on
# the factors' side, not a smaller ``lr``. Each of these, alone, cures it.
# (``"spectral"`` bounds the step so that :math:`K` cannot lose its inverse.
# The published ``True`` bounds entries only, which may be too little here.)

REMEDIES = {
    "smaller lr_cov": dict(T=1, lr_cov=0.1),
    "bounded step": dict(T=1, lr_cov=0.5, normalize_lr_cov="spectral"),
    "larger damping": dict(T=1, lr_cov=0.5, damping=1e-2),
}
cured = {name: fit(**options) for name, options in REMEDIES.items()}
fig, ax = plt.subplots(figsize=(5.4, 3.2))
draw(ax, {**cured, "diverging": runs["diverging"]}, "loss", "Three remedies")
ax.set(xlabel="step", ylim=(1e-3, 1e2))
_ = ax.legend()

# sphinx_gallery_start_ignore
assert all(run[0][-1] < 0.5 for run in cured.values())
# sphinx_gallery_end_ignore

# %%
# When not to use it
# ------------------
#
# Each call computes norms and a natural gradient per layer, and waits for the
# device. In a long run, call it every hundred steps.
#
# .. admonition:: Lessons learned
#
#    - A trace and a cosine that stay at 1 mean that you are running SGD: lower
#      ``T``, raise ``lr_cov``.
#    - Factors that have learnt, but a tiny ``update_ratio``: raise ``lr``.
#    - A run that explodes, ``lr_cov`` times ``norm_m_K`` far above 1: lower
#      ``lr_cov``, bound the step, or raise ``damping``.
#
# .. admonition:: Exercise
#
#    Warm ``lr_cov`` up instead: a function of the step that grows from 0 to
#    0.2 over 50 steps. Is the run healthy?
#
# .. dropdown:: Solution
#
#    It is; it only starts later.
#
#    .. code-block:: python
#
#        losses, stats = fit(T=1, lr_cov=lambda step: 0.2 * min(1, step / 50))
#        momentum = [s["norm_m_K"] for s in stats]
#        assert losses[-1] < 0.5
#        assert momentum[-1] < 0.5 * momentum[0]
#        assert stats[10]["trace_K"] < runs["healthy"][1][10]["trace_K"]
#
# Where to go next:
# :ref:`sphx_glr_auto_gallery_4_structures_plot_44_choosing.py` compares
# structures,
# :ref:`sphx_glr_auto_gallery_3_advanced_plot_30_vision_transformer.py` trains
# a larger model, and :doc:`/choosing` has a table to start from.
