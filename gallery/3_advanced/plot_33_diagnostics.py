r"""
Is my run healthy? Reading ``optimizer.stats()``
================================================

A preconditioner that goes wrong does so some steps before the loss shows it.
``optimizer.stats()`` lets you watch: plain numbers for each layer, computed
only when you ask. This page reads them for a healthy run, a stale one and a
diverging one, and shows the remedies.

.. admonition:: What you will learn

   - **Log** the statistics of every layer.
   - **Recognise** a healthy, a stale and a diverging preconditioner.
   - **Choose** the remedy: ``lr_cov``, ``normalize_lr_cov``, ``damping`` or
     ``T``.

   You should have read
   :ref:`sphx_glr_auto_gallery_1_start_plot_10_first_steps.py`.

What to look at
---------------

The factors start as identities and follow

.. math::

   m_K \leftarrow \alpha_1 m_K + \tfrac12 \left[ \operatorname{tr}(H_C) H_K
   + \lambda \operatorname{tr}(C^\top C) P(K^\top K) - I \right], \qquad
   K \leftarrow K - \beta_1 K m_K .

If :math:`K` and :math:`C` fit the curvature, the bracket is zero. So the size
of :math:`m_K` says how far they are from fitting: it must shrink.
"""

import math

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from singd import SINGD

STEPS, BATCH = 120, 64
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
    optimizer = SINGD(model, lr=3e-3, **options)
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

losses, stats = fit(T=1, lr_cov=0.2, normalize_lr_cov=True)
for name, value in stats[-1].items():
    print(f"{name:13}{value:10.1f}")

# %%
# Three runs
# ----------
#
# The first follows the advice for short runs. The second uses the defaults,
# ``T=10`` and ``lr_cov=0.01``. The third takes large steps on the factors, and
# nothing bounds them.
#
# **Before you run on:** in which of them is :math:`m_K` large in the end?

SETTINGS = {
    "healthy": dict(T=1, lr_cov=0.2, normalize_lr_cov=True),
    "stale": dict(),
    "diverging": dict(T=1, lr_cov=0.5),
}
runs = {name: fit(**options) for name, options in SETTINGS.items()}
colors = {"healthy": "C0", "stale": "C7", "diverging": "C3"}


def draw(ax, runs, key, title):
    for name, (losses, stats) in runs.items():
        values = losses if key == "loss" else [abs(s[key]) for s in stats]
        shown = [v if math.isfinite(v) else math.nan for v in values]
        ax.plot(shown, label=name, color=colors.get(name))
    ax.set(xlabel="step", ylabel=key, yscale="log", title=title)


fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
draw(axes[0], runs, "loss", "The loss tells late")
draw(axes[1], runs, "norm_m_K", "The momentum of K tells early")
axes[0].set_ylim(1e-3, 1e2)
axes[1].set_ylim(0.1, 1e3)
_ = axes[0].legend()

# %%
# The diverging run's loss stops when it is no number any more. Its
# :math:`m_K` grew tenfold two steps before that. In the healthy run
# :math:`m_K` rises for the first steps, while the factors are far from
# fitting, and then shrinks. In the stale run it stays large: the factors are
# needed elsewhere, but they hardly
# move.

bad = next(i for i, loss in enumerate(runs["diverging"][0]) if loss != loss)
m_K = {name: [s["norm_m_K"] for s in run[1]] for name, run in runs.items()}
first = m_K["diverging"][0]
warned = next(i for i, m in enumerate(m_K["diverging"]) if m > 10 * first)
print(f"m_K has grown tenfold at step {warned}, the loss is nan at {bad}")
assert bad - warned == 2
assert m_K["healthy"][-1] < 0.5 * m_K["healthy"][0]
assert m_K["stale"][-1] > m_K["stale"][0]

# %%
# Two more signs
# --------------
#
# ``trace_K`` is 1 at the start. ``cosine`` is the one between the gradient and
# the natural gradient. If both stay at 1, the optimizer is SGD, whatever you
# paid for it. ``update_ratio`` is the length of the step on the weights over
# the length of the weights.

fig, axes = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained")
some = {name: runs[name] for name in ("healthy", "stale")}
draw(axes[0], some, "trace_K", "Scale of K")
draw(axes[1], some, "cosine", "Turn of the gradient")
draw(axes[2], some, "update_ratio", "Step over weights")
axes[1].set_yscale("linear")
axes[0].legend()

last = {name: run[1][-1] for name, run in runs.items()}
assert last["stale"]["trace_K"] < 1.2
assert last["stale"]["cosine"] > 0.99
assert last["healthy"]["trace_K"] > 3
assert last["healthy"]["cosine"] < 0.8
assert max(s["update_ratio"] for s in runs["healthy"][1]) < 0.3

# %%
# The stale run has a trace and a cosine near 1 after 120 steps. In the healthy
# run the scale of :math:`K` settles, and the gradient is turned. Its step on
# the weights stays below a third of their length.
#
# The remedies
# ------------
#
# Each of these, alone, cures the diverging run.

REMEDIES = {
    "smaller lr_cov": dict(T=1, lr_cov=0.1),
    "normalize_lr_cov": dict(T=1, lr_cov=0.5, normalize_lr_cov=True),
    "larger damping": dict(T=1, lr_cov=0.5, damping=1e-2),
}
cured = {name: fit(**options) for name, options in REMEDIES.items()}
fig, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
draw(ax, {**cured, "diverging": runs["diverging"]}, "loss", "Three remedies")
ax.set_ylim(1e-3, 1e2)
ax.legend()

assert all(run[0][-1] < 0.5 for run in cured.values())

# %%
# The stale run needs the opposite: ``T=1`` and a larger ``lr_cov``, as in the
# healthy run.
#
# When not to use it
# ------------------
#
# Each call computes norms and one natural gradient per layer, and waits for
# the device. Call it every hundred steps in a long run, not at each.
#
# .. admonition:: Lessons learned
#
#    - :math:`m_K` says how far the factors are from fitting. It must shrink.
#    - A growing :math:`m_K` warns some steps before the loss is ``nan``.
#    - A trace and a cosine that stay at 1 mean that you are running SGD.
#    - Diverging: lower ``lr_cov``, normalise it, or raise ``damping``.
#      Stale: lower ``T``, raise ``lr_cov``.
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
