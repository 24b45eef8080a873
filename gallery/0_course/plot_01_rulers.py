r"""
Lesson 1: Why does the gradient depend on the units?
====================================================

Measure a flower in millimetres instead of centimetres, and gradient descent
takes another path. The flower has not changed. The ruler has, by which the
steps are measured. This lesson finds a ruler that knows no units.

.. admonition:: What you will learn

   - **Show** that a change of units changes the gradient step.
   - **Derive** the Fisher matrix from the Kullback-Leibler divergence.
   - **Compute** a natural gradient, by hand and with :class:`~singd.SINGD`.

   You need to know gradients, matrices and likelihoods. The symbols are those
   of :doc:`/concepts`.

Two units, two steps
--------------------

Let :math:`\theta` be the weights in one unit and :math:`\phi` the same
weights in another, :math:`\theta = A \phi`. The chain rule gives
:math:`\nabla_\phi \ell = A^\top \nabla_\theta \ell`. So the step
:math:`-\nabla_\phi \ell` on :math:`\phi` moves :math:`\theta` by

.. math::

   A \, (-\nabla_\phi \ell) = -A A^\top \, \nabla_\theta \ell .

This is the step :math:`-\nabla_\theta \ell` only if :math:`A A^\top = I`. A
weight per centimetre is ten times the weight per millimetre. So a step in
millimetres moves it 100 times as far.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_iris
from torch import nn
from torch.func import grad, hessian, vmap

from singd import PUBLISHED, SINGD

GRADIENT, NATURAL = dict(rate=0.03, steps=2500), dict(rate=0.05, steps=150)
_ = torch.set_num_threads(1)

# %%
# The model: is an iris a *virginica*, given the length :math:`x` of its sepal?
# **Logistic regression** says yes with probability
# :math:`1 / (1 + e^{-(wx + b)})`, so :math:`\theta = (w, b)`. The loss is the
# mean of :math:`-\log p_\theta(y)`.

iris = load_iris()
cm = torch.tensor(iris.data[:, 0] - iris.data[:, 0].mean())
mm = 10 * cm
y = torch.tensor(iris.target == 2).double()


def log_p(theta, x, y):
    logit = theta[0] * x + theta[1]
    return y * logit - nn.functional.softplus(logit)


def loss(theta, x):
    return -log_p(theta, x, y).mean()


# %%
# A ruler without units
# ---------------------
#
# Measure a step :math:`\delta` by how much it changes the *prediction*, with
# the **Kullback-Leibler divergence** from the old one to the new one:
#
# .. math::
#
#    \mathrm{KL}(\delta) = \mathbb{E}_x \, \mathbb{E}_{y \sim p_\theta}
#    \left[ \log p_\theta(y) - \log p_{\theta + \delta}(y) \right] .
#
# Predictions do not depend on units. Expand
# :math:`\log p_{\theta + \delta}` to second order:
#
# .. math::
#
#    \mathrm{KL}(\delta) = - \delta^\top \, \mathbb{E}[\nabla \log p]
#    - \tfrac12 \, \delta^\top \, \mathbb{E}[\nabla^2 \log p] \, \delta
#    + O(\delta^3) .
#
# Probabilities sum to 1 for every :math:`\theta`. So their derivatives sum to
# 0, and
#
# .. math::
#
#    \begin{aligned}
#    \mathbb{E}_y[\nabla \log p]
#    &= \sum_y p \, \frac{\nabla p}{p} = \nabla \sum_y p = 0 , \\
#    \mathbb{E}_y[\nabla^2 \log p]
#    &= \sum_y p \left[ \frac{\nabla^2 p}{p}
#    - \nabla \log p \, \nabla \log p^\top \right]
#    = 0 - \mathbb{E}_y[\nabla \log p \, \nabla \log p^\top] .
#    \end{aligned}
#
# The linear term is gone, and the **Fisher matrix** :math:`F` is left:
#
# .. math::
#
#    \mathrm{KL}(\delta) = \tfrac12 \, \delta^\top F \, \delta + O(\delta^3) ,
#    \qquad F = \mathbb{E}_x \, \mathbb{E}_{y \sim p_\theta}
#    \left[ \nabla \log p \, \nabla \log p^\top \right] .
#
# In code, with both labels weighted as the *model* believes in them:


def fisher(theta, x):
    F = 0
    for label in (torch.zeros_like(x), torch.ones_like(x)):
        p = log_p(theta, x, label).exp()
        g = vmap(grad(log_p), (None, 0, 0))(theta, x, label)
        F = F + (p[:, None] * g).T @ g / len(x)
    return F


def kl(delta, theta, x):
    total = 0
    for label in (torch.zeros_like(x), torch.ones_like(x)):
        old, new = log_p(theta, x, label), log_p(theta + delta, x, label)
        total = total + (old.exp() * (old - new)).mean()
    return total


theta = torch.tensor([1.0, -0.5], dtype=torch.float64)
zero = torch.zeros_like(theta)
F = fisher(theta, cm)
assert torch.allclose(hessian(kl)(zero, theta, cm), F)

# %%
# The Hessian of the divergence is :math:`F`. Draw both rulers: all steps of
# the same divergence, and all of the same :math:`\delta^\top F \delta`.

side = torch.linspace(-2.2, 2.2, 81, dtype=torch.float64)
steps = torch.cartesian_prod(side, side)
exact = vmap(kl, (0, None, None))(steps, theta, cm)
approximate = 0.5 * ((steps @ F) * steps).sum(1)
fig, ax = plt.subplots(figsize=(5.4, 4.4))
for values, look in ((exact, ("C0", "-")), (approximate, ("k", "--"))):
    levels = dict(levels=[0.01, 0.15], colors=look[0], linestyles=look[1])
    ax.contour(side, side, values.view(81, 81).T, **levels)
ax.plot([], [], "C0", label="equal KL")
ax.plot([], [], "k--", label=r"equal $\frac{1}{2} \delta^T F \delta$")
ax.plot(0, 0, "k+")
ax.set(xlabel="change of w (per cm)", ylabel="change of b", aspect="equal")
ax.set_title("Small steps: one ruler. Large ones: two")
_ = ax.legend(loc="upper right")

# %%
# The remainder is of third order: halve the step, and it shrinks to an eighth.

direction = torch.tensor([0.8, 0.6], dtype=torch.float64)
sizes = torch.logspace(-2, 0, 9, dtype=torch.float64)
deltas = sizes[:, None] * direction
exact = vmap(kl, (0, None, None))(deltas, theta, cm)
rest = (exact - 0.5 * ((deltas @ F) * deltas).sum(1)).abs()
fig, ax = plt.subplots(figsize=(5.4, 3.6))
ax.loglog(sizes, exact, "o-", label="KL: slope 2")
ax.loglog(sizes, rest, "s-", label="what F leaves out: slope 3")
ax.set(xlabel="length of the step", ylabel="nats")
ax.set_title("The Fisher matrix is exact to second order")
ax.legend()

slope = (rest[1] / rest[0]).log() / (sizes[1] / sizes[0]).log()
assert abs(slope - 3) < 0.1

# %%
# Descent by the new ruler
# ------------------------
#
# The best step under a ruler minimises
# :math:`\nabla \ell^\top \delta + \frac{1}{2\beta} \delta^\top F \delta`. Its
# derivative :math:`\nabla \ell + \frac1\beta F \delta` is zero at the
# **natural gradient** step :math:`\delta = -\beta F^{-1} \nabla \ell`. In
# other units :math:`F_\phi = A^\top F A`, and every :math:`A` cancels:
#
# .. math::
#
#    A \, F_\phi^{-1} \nabla_\phi \ell
#    = A \, A^{-1} F^{-1} A^{-\top} \, A^\top \nabla_\theta \ell
#    = F^{-1} \nabla_\theta \ell .
#
# **Before you run on:** we draw four paths from :math:`\theta = 0`: gradient
# and natural gradient, in cm and in mm. How many will you see?


def path(x, rate, steps, natural=False):
    theta = torch.zeros(2, dtype=torch.float64)
    visited = [theta]
    for _ in range(steps):
        step = grad(loss)(theta, x)
        if natural:
            step = torch.linalg.solve(fisher(theta, x), step)
        theta = theta - rate * step
        visited.append(theta)
    return torch.stack(visited)


to_cm = torch.tensor([10.0, 1.0]).double()  # the diagonal of A
paths = {
    "gradient, cm": path(cm, **GRADIENT),
    "gradient, mm": path(mm, **GRADIENT) * to_cm,
    "natural, cm": path(cm, **NATURAL, natural=True),
    "natural, mm": path(mm, **NATURAL, natural=True) * to_cm,
}

# %%
# The picture to keep
# -------------------

# sphinx_gallery_thumbnail_number = 3
w = torch.linspace(-0.3, 3.6, 60).double()
b = torch.linspace(-1.8, 0.3, 60).double()
heights = vmap(loss, (0, None))(torch.cartesian_prod(w, b), cm)
fig, ax = plt.subplots(figsize=(5.4, 4.4))
ax.contour(w, b, heights.view(60, 60).T, 14, colors="0.8", linewidths=1)
styles = ("C7-", "C7--", "C0-", "kx")
for (name, visited), style in zip(paths.items(), styles):
    every = 10 if style == "kx" else 1
    ax.plot(*visited[::every].T, style, label=name, markersize=6)
ax.plot(*paths["natural, cm"][-1], "k*", markersize=12)
ax.set(xlabel="w (per cm)", ylabel="b")
ax.set_title("Two units, two gradient paths, one natural path")
_ = ax.legend(loc="lower left")

# %%
# Three. In millimetres the gradient rushes along :math:`w` first and corrects
# :math:`b` later. The two natural paths are one, step by step.

one, other = paths["natural, cm"], paths["natural, mm"]
assert torch.allclose(one, other, atol=1e-9)
apart = paths["gradient, cm"][:, None] - paths["gradient, mm"]
assert apart.norm(dim=2).min(1).values.max() > 0.2

# %%
# The library's answer
# --------------------
#
# At :math:`\theta = 0` every prediction is :math:`\frac12`. With
# :math:`a = (x, 1)` the gradient of one flower is :math:`(\frac12 - y) \, a`,
# so :math:`F = \frac14 \, \mathbb{E}[a a^\top]`. The rule ``kfac`` keeps
# :math:`U = \mathbb{E}[a a^\top]` and :math:`G = \frac14`. So its first step
# must be ours. (``PUBLISHED`` holds the options that we do not name.)

layer = nn.Linear(1, 1).double()
nn.init.zeros_(layer.weight)
nn.init.zeros_(layer.bias)
choice = dict(rule="kfac", lr=NATURAL["rate"], momentum=0.0, damping=0.0)
optimizer = SINGD(layer, **{**PUBLISHED, **choice})
logits = layer(cm[:, None])[:, 0]
nn.functional.binary_cross_entropy_with_logits(logits, y).backward()
optimizer.step()
moved = torch.cat([layer.weight[0], layer.bias]).detach()
print("ours:   ", [round(v, 3) for v in one[1].tolist()])
print("library:", [round(v, 3) for v in moved.tolist()])
assert torch.allclose(moved, one[1], rtol=1e-4)

# %%
# When not to use this
# --------------------
#
# :math:`F` has a row for every weight. With millions it can be neither stored
# nor inverted. And the ruler holds for small steps only. The next lessons deal
# with both.
#
# .. admonition:: Lessons learned
#
#    - Gradient descent measures steps in the units of the weights.
#    - The divergence measures them in predictions; to second order it is
#      :math:`\frac12 \delta^\top F \delta`.
#    - The linear term vanishes because probabilities sum to 1.
#    - In :math:`F^{-1} \nabla \ell` all units cancel.
#
# .. admonition:: Exercise
#
#    Newton's method uses the Hessian of the loss in place of :math:`F`.
#    Compare the two at ``theta``. Why?
#
# .. dropdown:: Solution
#
#    They are equal: the Hessian of :math:`\log p_\theta(y)` does not depend on
#    :math:`y`, because the logit is linear in the weights.
#
#    .. code-block:: python
#
#        H = hessian(loss)(theta, cm)
#        assert torch.allclose(H, F)
#
# .. admonition:: Exercise
#
#    Take natural gradient steps on :math:`s` instead of :math:`w = e^s - 1`.
#    Is the path the same?
#
# .. dropdown:: Solution
#
#    Only for tiny steps: a straight step in :math:`s` is a bent one in
#    :math:`w`. Halving the rate halves the gap.
#
#    .. code-block:: python
#
#        def bent(rate, steps):
#            s = torch.zeros(2, dtype=torch.float64)
#            for _ in range(steps):
#                w = torch.stack([s[0].exp() - 1, s[1]])
#                scale = torch.stack([s[0].exp(), torch.ones_like(s[0])])
#                F_s = scale[:, None] * fisher(w, cm) * scale
#                step = torch.linalg.solve(F_s, scale * grad(loss)(w, cm))
#                s = s - rate * step
#            return torch.stack([s[0].exp() - 1, s[1]])
#
#
#        gaps = []
#        for rate, steps in ((0.1, 10), (0.05, 20)):
#            straight = path(cm, rate, steps, natural=True)[-1]
#            gaps.append((bent(rate, steps) - straight).norm())
#        assert 1.8 < gaps[0] / gaps[1] < 2.2
#
# Where to go next:
# :ref:`sphx_glr_auto_gallery_0_course_plot_02_four_matrices.py` tells
# :math:`F` from its look-alikes,
# :ref:`sphx_glr_auto_gallery_1_start_plot_10_first_steps.py` trains a network.
