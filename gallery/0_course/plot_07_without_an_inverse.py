r"""
Lesson 7: How can products invert a matrix?
===========================================

KFAC inverts. Inverting is slow on accelerators and delicate in half
precision. This lesson replaces the inverse by a recursion of products, called
IKFAC, and finds out how exact it is, and when it explodes.

.. admonition:: What you will learn

   - **Derive** IKFAC from KFAC by two Taylor series.
   - **Measure** how closely it follows KFAC.
   - **Predict** the curvature beyond which it diverges.

   You should have read
   :ref:`sphx_glr_auto_gallery_0_course_plot_06_kfac_from_scratch.py`.

The derivation
--------------

KFAC keeps the running average
:math:`S_{\text{new}} = (1 - \beta_1) S + \beta_1 U` and inverts
:math:`A = S + \lambda I`. **IKFAC** keeps a factor :math:`K` of the inverse
instead, :math:`K K^\top = A^{-1}`, which is the same as
:math:`K^\top A K = I`. What does the new :math:`U` do to it?

.. math::

   A_{\text{new}} = A + \beta_1 \, [(U + \lambda I) - A] .

Multiply by :math:`K^\top` and :math:`K`, and write :math:`2 m_K` for what
appears in the bracket:

.. math::

   K^\top A_{\text{new}} K = I + 2 \beta_1 m_K , \qquad
   m_K = \tfrac12 \left[ K^\top U K + \lambda K^\top K - I \right] .

So :math:`A_{\text{new}}^{-1} = K (I + 2 \beta_1 m_K)^{-1} K^\top`. Still an
inverse! But of a matrix near :math:`I`, and two series differ only from their
third term on:

.. math::

   \begin{aligned}
   (I + 2 \beta_1 m_K)^{-1} &= I - 2 \beta_1 m_K + 4 \beta_1^2 m_K^2 - \dots \\
   (I - \beta_1 m_K)^2 &= I - 2 \beta_1 m_K + \beta_1^2 m_K^2 .
   \end{aligned}

The second one is a square, so its root is at hand. It gives the rule, and its
error:

.. math::

   K_{\text{new}} = K - \beta_1 K m_K , \qquad
   K_{\text{new}} K_{\text{new}}^\top - A_{\text{new}}^{-1}
   = -3 \beta_1^2 \, K m_K^2 K^\top + O(\beta_1^3) .
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from singd import PUBLISHED, SINGD

DAMPING = 0.1
_ = torch.set_num_threads(1)
_ = torch.set_default_dtype(torch.float64)
pixels = torch.tensor(load_digits().data) / 16
labels = torch.tensor(load_digits().target)
I = torch.eye(65)


def second_moment(x):
    a = nn.functional.pad(x, (0, 1), value=1)  # the bias's one
    return a.T @ a / len(a)


# %%
# From scratch: two lines.


def momentum(K, U, damping=DAMPING):
    return 0.5 * (K.T @ U @ K + damping * K.T @ K - torch.eye(len(K)))


def ikfac(K, U, beta, damping=DAMPING):
    return K - beta * K @ momentum(K, U, damping)


# %%
# The library does the same. A layer sees 20 batches, with ``lr=0`` so that
# only the factors move.

layer = nn.Linear(64, 10)
options = {**PUBLISHED, "rule": "ikfac", "damping": DAMPING}
options |= {"lr": 0.0, "T": 1, "lr_cov": 0.1}
optimizer = SINGD(layer, **options)
K = I
for batch in torch.arange(20 * 64).split(64):
    nn.functional.cross_entropy(layer(pixels[batch]), labels[batch]).backward()
    optimizer.step()
    K = ikfac(K, second_moment(pixels[batch]), beta=0.1)
torch.testing.assert_close(optimizer.factors(layer).K.dense(), K)
print("ours and the library's K agree")

# %%
# How close to KFAC?
# ------------------
#
# **Before you run on:** both start at the same :math:`S`. A step with half
# the :math:`\beta_1`: how much smaller is the error of :math:`K K^\top` after
# one update? And after as many updates as it takes to go equally far?

S, U = second_moment(pixels[:900]), second_moment(pixels[900:])
start = torch.linalg.cholesky(torch.linalg.inv(S + DAMPING * I))


def error(beta, updates):
    K, average = start, S
    for _ in range(updates):
        K = ikfac(K, U, beta)
        average = (1 - beta) * average + beta * U
    kfac = torch.linalg.inv(average + DAMPING * I)
    return (K @ K.T - kfac).norm().item()


betas = torch.logspace(-3, -1, 7)
one = torch.tensor([error(b, 1) for b in betas])
many = torch.tensor([error(b, round(1 / b.item())) for b in betas])
m = momentum(start, U)
theory = 3 * (start @ m @ m @ start.T).norm() * betas**2

# sphinx_gallery_thumbnail_number = 1
fig, ax = plt.subplots(figsize=(5.5, 4))
ax.loglog(betas, many, "C9s--", mfc="w", label=r"after $1 / \beta_1$ updates")
ax.loglog(betas, one, "C9o", label="after one update")
ax.loglog(betas, theory, "k:", label="theory, to second order")
ax.set(xlabel=r"$\beta_1$", ylabel="distance of K Kᵀ from KFAC")
ax.set_title("Products follow the inverse, with slope 2")
ax.legend()


def slope(errors):
    fall = (errors[1:] / errors[:-1]).log() / (betas[1:] / betas[:-1]).log()
    return fall.mean().item()


assert abs(slope(one) - 2) < 0.05
assert abs(slope(many) - 1) < 0.05
assert abs(one[0] / theory[0] - 1) < 0.01

# %%
# One update is off by :math:`O(\beta_1^2)`: a quarter. Twice as many updates
# then add up to half. So IKFAC is not KFAC in disguise, but close to it.
#
# All the way: Newton-Schulz
# --------------------------
#
# Set :math:`\beta_1 = 1` and keep :math:`U` fixed; :math:`A = U + \lambda I`.
# The rule becomes :math:`K \leftarrow \tfrac12 K (3 I - K^\top A K)`, known
# as the **Newton-Schulz iteration** for the inverse square root. From
# :math:`K = c I` everything commutes. Each eigenvalue :math:`q` of
# :math:`K^\top A K` goes its own way, and its distance :math:`e = 1 - q` from
# the goal does too:
#
# .. math::
#
#    q \leftarrow q \left( \tfrac{3 - q}{2} \right)^2 , \qquad
#    e \leftarrow \tfrac34 e^2 + \tfrac14 e^3 .
#
# The number of right digits doubles in each update.

A = U + DAMPING * I
K, paths = I / A.trace().sqrt(), []
for _ in range(14):
    paths.append(torch.linalg.eigvalsh(K.T @ A @ K))
    schulz = 0.5 * K @ (3 * I - K.T @ A @ K)
    K = ikfac(K, U, beta=1.0)
    torch.testing.assert_close(K, schulz)
torch.testing.assert_close(K @ K.T, torch.linalg.inv(A))

fig, ax = plt.subplots(figsize=(5.5, 3.6))
ax.semilogy(torch.stack(paths), "C9", alpha=0.4, linewidth=1)
ax.axhline(1, color="k", linestyle=":")
ax.set(xlabel="update", ylabel="eigenvalues of KᵀAK")
_ = ax.set_title("A dozen updates invert a 65 x 65 matrix")

# sphinx_gallery_start_ignore
q = torch.stack(paths)
torch.testing.assert_close(q[1:], q[:-1] * ((3 - q[:-1]) / 2) ** 2)
assert (1 - q[12]).abs().max() < 1e-9
# sphinx_gallery_end_ignore

# %%
# When it explodes
# ----------------
#
# The same in one dimension, with any :math:`\beta_1`:
# :math:`q \leftarrow q \, [1 - \tfrac{\beta_1}{2} (q - 1)]^2`. If the
# bracket is below :math:`-1`, :math:`q` grows, which makes the bracket worse.
# That is the case if :math:`q > 1 + 4 / \beta_1`. From :math:`k = 1`, the
# first :math:`q` is the curvature :math:`s = u + \lambda` itself.


def path(s, beta, updates):
    q = [torch.as_tensor(s)]
    for _ in range(updates):
        q.append(q[-1] * (1 - beta / 2 * (q[-1] - 1)) ** 2)
    return torch.stack(q)


beta = 0.5
limit = 1 + 4 / beta
fig, ax = plt.subplots(figsize=(5.5, 3.6))
for s, look in ((3.0, "C9--"), (8.99, "C9"), (9.01, "C3")):
    ax.semilogy(path(s, beta, 20), look, label=f"s = {s}")
ax.axhline(limit, color="k", linestyle=":", label="1 + 4 / β₁ = 9")
ax.set(xlabel="update", ylabel="q = s k²", ylim=(0.1, 1e3), xlim=(0, 12))
ax.set_title("Just below the limit it recovers, just above it explodes")
ax.legend(loc="upper right", bbox_to_anchor=(1, 0.95))

for beta in (0.01, 0.1, 0.5, 1.0):
    limit = 1 + 4 / beta
    assert abs(path(0.99 * limit, beta, 3000)[-1] - 1) < 1e-6
    assert not path(1.01 * limit, beta, 3000)[-1] < 1e6

# %%
# Where does a network stand? The largest eigenvalue of :math:`U + \lambda I`
# decides. Pixels from 0 to 1 give 11; the raw ones, from 0 to 16, give 2,700.

beta = torch.logspace(-3, 0, 50)
fig, ax = plt.subplots(figsize=(5.5, 4))
ax.loglog(beta, 1 + 4 / beta, "k:")
ax.fill_between(beta, 1 + 4 / beta, 1e4, color="C3", alpha=0.3, linewidth=0)
ax.text(0.08, 250, "explodes", color="C3", fontsize=14)
ax.text(0.002, 0.5, "converges", color="C9", fontsize=14)
for scale, x in ((1, 0.002), (16, 0.08)):
    s = torch.linalg.eigvalsh(second_moment(scale * pixels))[-1].item()
    ax.axhline(s, color="C7", linewidth=1)
    ax.text(x, 1.2 * s, f"digits, pixels up to {scale}")
ax.set(xlabel=r"$\beta_1$", ylabel="curvature s")
ax.set(xlim=(1e-3, 1), ylim=(0.1, 1e4))
_ = ax.set_title("Scale the inputs, or start with small steps")

# sphinx_gallery_start_ignore
assert 11 < torch.linalg.eigvalsh(second_moment(pixels))[-1] < 12
assert 2600 < s < 2800
# sphinx_gallery_end_ignore

# %%
# Raw pixels need :math:`\beta_1 < 0.0015`, or a small start
# :math:`K = c I`, or a warm-up of :math:`\beta_1`. ``normalize_lr_cov``
# bounds the step. Try it: move the circle across the line.
#
# .. interactive:: divergence
#
# When not to use this
# --------------------
#
# In float32, with small layers on a CPU, an inverse every few steps is cheap,
# and exact. Products win where inverses are slow, or too delicate for the
# precision.
#
# .. admonition:: Lessons learned
#
#    - IKFAC replaces KFAC's inverse by a square, equal to first order.
#    - Per update it is off by :math:`O(\beta_1^2)`, over a run by
#      :math:`O(\beta_1)`.
#    - At :math:`\beta_1 = 1` it is the Newton-Schulz iteration.
#    - From :math:`K = I` it explodes beyond :math:`s = 1 + 4 / \beta_1`.
#
# .. admonition:: Exercise
#
#    Start at :math:`s = 1 + 2 / \beta_1` and :math:`k = 1`. What is :math:`k`
#    after the first step, and what would you do?
#
# .. dropdown:: Solution
#
#    The bracket is zero. So :math:`k` becomes zero and stays there: the factor
#    is no longer invertible. Any smaller step avoids it.
#
#    .. code-block:: python
#
#        stuck = path(1 + 2 / 0.5, 0.5, 10)
#        assert stuck[1:].abs().max() == 0
#        assert abs(path(1 + 2 / 0.5, 0.25, 100)[-1] - 1) < 1e-6
#
# .. admonition:: Exercise
#
#    Which term :math:`c \, \beta_1^2 m_K^2` has to be added to
#    :math:`I - \beta_1 m_K`, so that slope 2 becomes slope 3?
#
# .. dropdown:: Solution
#
#    The square has to be :math:`I - 2 x + 4 x^2` with
#    :math:`x = \beta_1 m_K`. With a term :math:`c x^2` it is
#    :math:`I - 2 x + (1 + 2 c) x^2`, so that :math:`c = \tfrac32`.
#
#    .. code-block:: python
#
#        def better(beta):
#            x = beta * momentum(start, U)
#            K = start @ (I - x + 1.5 * x @ x)
#            A_new = (1 - beta) * S + beta * U + DAMPING * I
#            return (K @ K.T - torch.linalg.inv(A_new)).norm().item()
#
#
#        cubic = torch.tensor([better(b) for b in betas])
#        assert abs(slope(cubic) - 3) < 0.1
#
# Where to go next:
# :ref:`sphx_glr_auto_gallery_0_course_plot_08_a_step_on_a_group.py` asks why
# :math:`K` is multiplied from the right,
# :ref:`sphx_glr_auto_gallery_2_features_plot_24_mixed_precision.py` looks at
# bfloat16, :ref:`sphx_glr_auto_gallery_3_advanced_plot_33_diagnostics.py` at
# runs that go wrong, and :doc:`/concepts` has all symbols.
