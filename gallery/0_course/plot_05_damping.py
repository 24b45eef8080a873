r"""
Lesson 5: Damping: how far do I trust a curvature?
==================================================

The natural gradient jumps to the minimum of a quadratic model. With hardly
any curvature it jumps far, and far away the model is wrong. **Damping** says
how far to trust it. KFAC damps two factors, and needs a second number.

.. admonition:: What you will learn

   - **Derive** damping as a price on the length of the step.
   - **See** which directions it filters out, full and factored.
   - **Prove** that the right balance makes the step blind to scale.

   You need
   :ref:`sphx_glr_auto_gallery_0_course_plot_03_kronecker.py`.

A price on length
-----------------

For small steps, :math:`\ell` changes by about
:math:`\nabla \ell^\top \delta + \tfrac12 \delta^\top F \delta`. For long ones
this fails, so make length expensive:

.. math::

   \min_\delta \; \nabla \ell^\top \delta + \tfrac12 \delta^\top F \delta
   + \tfrac{\lambda}{2} \lVert \delta \rVert^2
   \quad\Longrightarrow\quad
   \delta = -(F + \lambda I)^{-1} \nabla \ell .

Along an eigenvector with eigenvalue :math:`s`, the gradient is divided by
:math:`s + \lambda` instead of :math:`s`. So damping keeps the share

.. math::

   \frac{s}{s + \lambda} = \begin{cases}
   \approx 1 & \text{where } s \gg \lambda \text{: a natural gradient,} \\
   \approx 0 & \text{where } s \ll \lambda \text{: small, slow steps.}
   \end{cases}

Damping two factors
-------------------

The eigenvalues of :math:`G \otimes U` are all products :math:`u g` of theirs.
Full damping divides by :math:`u g + \lambda`, which is no longer a product, so
the two inverses of lesson 3 are lost. **Factored damping** gives each factor
:math:`\sqrt\lambda`, with a balance :math:`\pi` (1, or **pi-damping**):

.. math::

   \left( u + \pi \sqrt\lambda \right)
   \left( g + \tfrac{1}{\pi} \sqrt\lambda \right)
   = u g + \lambda
   + \underbrace{\sqrt\lambda \left( \tfrac{u}{\pi} + \pi g \right)}
   _{\text{too much}} .

On average over all pairs, the excess is
:math:`\sqrt\lambda (\bar u / \pi + \pi \bar g)` with the average eigenvalues.
Its derivative :math:`-\bar u / \pi^2 + \bar g` is zero at

.. math::

   \pi = \sqrt{\bar u / \bar g} , \qquad
   \bar u = \frac{\operatorname{tr} U}{d_i} , \quad
   \bar g = \frac{\operatorname{tr} G}{d_o} .
"""

import copy

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from singd import PUBLISHED, SINGD, sample_labels
from singd.rules import Kfac

DIGITS, STEPS, DAMPING = 500, 20, 1e-3
KFAC = {**PUBLISHED, "lr": 1.0, "momentum": 0.0}
LOOK = {"full": "k-", "factored": "C2--", "with pi": "C2-", "promised": "C2:"}
_ = torch.set_num_threads(1)
_ = torch.manual_seed(0)

# %%
# A network for handwritten digits, trained a little.

data, target = load_digits(return_X_y=True)
x, y = torch.tensor(data[:DIGITS]) / 16, torch.tensor(target[:DIGITS])
net = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
loss_of = nn.functional.cross_entropy
sgd = torch.optim.SGD(net.parameters(), lr=0.3)
for _ in range(STEPS):
    sgd.zero_grad()
    loss_of(net(x), y).backward()
    sgd.step()

# %%
# The library collects :math:`U` and :math:`G` from labels that the model draws
# (lesson 2). The gradient needs the data's labels; ``collecting(False)`` keeps
# that backward pass out of the factors.


def kfac_step(net, pi, damping):
    chosen = {**KFAC, "rule": Kfac(pi=pi), "damping": damping}
    optimizer = SINGD(net, **chosen)
    f = net(x)
    torch.manual_seed(0)
    loss_of(f, sample_labels(f)).backward()
    optimizer.zero_grad()
    with optimizer.collecting(False):
        loss_of(net(x), y).backward()
    optimizer.step()
    return [optimizer.factors(name) for name in ("0", "2")]


def joined(layer, what):
    return torch.cat([what(layer.weight), what(layer.bias)[:, None]], 1)


stepped = copy.deepcopy(net)
kept = kfac_step(stepped, True, DAMPING)
U, G = zip(*[(v.U.dense(), v.G.dense()) for v in kept])
V = [joined(stepped[i], lambda p: p.grad) for i in (0, 2)]

# %%
# From scratch
# ------------
#
# Three ways to damp. The full one works in the factors' eigenvectors, as an
# exercise of lesson 3 did.


def full(U, G, V, damping):
    (u, R), (g, Q) = torch.linalg.eigh(U), torch.linalg.eigh(G)
    return Q @ (Q.T @ V @ R / (g[:, None] * u + damping)) @ R.T


def factored(U, G, V, damping, pi=1.0):
    U = U + pi * damping**0.5 * torch.eye(len(U))
    G = G + damping**0.5 / pi * torch.eye(len(G))
    return torch.linalg.solve(G, torch.linalg.solve(U, V, left=False))


def balance(U, G):
    return ((U.trace() / len(U)) / (G.trace() / len(G))).sqrt()


def with_pi(U, G, V, damping):
    return factored(U, G, V, damping, balance(U, G))


# %%
# How far?
# --------
#
# Take *one* step at rate 1, for many :math:`\lambda`, and compare the loss
# with what the quadratic model promised.
#
# **Before you run on:** what will happen to promise and loss for a very small
# :math:`\lambda`?


def after(N):
    twin = copy.deepcopy(net)
    for layer, n in zip((twin[0], twin[2]), N):
        layer.weight.data -= n[:, :-1]
        layer.bias.data -= n[:, -1]
    return loss_of(twin(x), y).item()


def promised(N):
    parts = zip(U, G, V, N)
    change = [((0.5 * g @ n @ u - v) * n).sum() for u, g, v, n in parts]
    return before + sum(change).item()


before = loss_of(net(x), y).item()
lambdas = torch.logspace(-7, 1, 33).tolist()
curves = {}
for method in (full, factored, with_pi):
    steps = [[method(*v, lam) for v in zip(U, G, V)] for lam in lambdas]
    curves[method.__name__.replace("_", " ")] = [after(N) for N in steps]
curves["promised"] = [promised(N) for N in steps]

fig, ax = plt.subplots(figsize=(5.4, 3.6))
for name, values in curves.items():
    ax.semilogx(lambdas, values, LOOK[name], label=name)
ax.axhline(before, color="C7", linewidth=1)
ax.set(xlabel="damping λ", ylabel="loss after one step", ylim=(-1, 4))
ax.set_title("Too little trust: no step. Too much: a leap")
_ = ax.legend(loc="upper right")

# sphinx_gallery_start_ignore
delivered = torch.tensor(list(curves.values()))
assert (delivered[:3].min(1).values < before / 3).all()
assert (delivered[:3, 0] > 5 * before).all()
assert delivered[2:, -8:].diff(dim=0).abs().max() < 0.1 < -delivered[3, 0]
assert delivered[0].argmin() > delivered[2].argmin() > delivered.shape[1] / 2
# sphinx_gallery_end_ignore

# %%
# On the right, promise (for the step with :math:`\pi`) and loss agree, but
# little happens. To the left the promise falls below zero, which no
# cross-entropy can reach, and the loss explodes. The best :math:`\lambda` lies
# between; it is larger for full damping, which has no excess.
#
# The picture to keep
# -------------------
#
# Colour is the share that is kept of the undamped step. Dots are pairs of
# eigenvalues of the first layer. On the dashed line, full damping keeps half.

# sphinx_gallery_thumbnail_number = 2
log_u, log_g = torch.linspace(-5, 4, 90), torch.linspace(-7, 0, 70)
u, g = 10 ** log_u[None], 10 ** log_g[:, None]


def draw(title, U, G, **balances):
    fig, axes = plt.subplots(1, 2, figsize=(5.5, 3.6), sharey=True)
    pairs = torch.cartesian_prod(*map(torch.linalg.eigvalsh, (U, G)))
    for ax, (name, pi) in zip(axes, balances.items()):
        divisor = u * g + DAMPING
        if pi is not None:
            divisor = (u + pi * DAMPING**0.5) * (g + DAMPING**0.5 / pi)
        colours = ax.pcolormesh(log_u, log_g, u * g / divisor, vmin=0, vmax=1)
        ax.plot(*pairs.clamp(min=1e-9).log10().T, "w.", markersize=2)
        ax.plot([-5, 4], [2, -7], "w--", linewidth=1)
        ax.set(xlim=(-5, 4), ylim=(-7, 0), xlabel="log₁₀ u")
        ax.set_title(name.replace("_", " "))
    axes[0].set_ylabel("log₁₀ g")
    fig.colorbar(colours, ax=axes, label="share kept")
    _ = fig.suptitle(title)


draw("Damping the factors filters more", U[0], G[0], full=None, factored=1.0)

# %%
# Factored damping also filters pairs in which only *one* eigenvalue is small.
# Now move a factor of 100 from :math:`G` to :math:`U`. Their product is the
# same, so the step should be.

A, B = 100 * U[0], G[0] / 100
pi = balance(A, B)
draw("After U → 100 U, G → G / 100", A, B, factored=1.0, with_pi=pi)

# %%
# Without :math:`\pi` the dots leave their colours behind. With it the colours
# move along: :math:`\pi` becomes :math:`c \pi`, and
#
# .. math::
#
#    c U + c \pi \sqrt\lambda I = c \left( U + \pi \sqrt\lambda I \right) ,
#    \qquad
#    \frac{G}{c} + \frac{\sqrt\lambda}{c \pi} I
#    = \frac1c \left( G + \frac{\sqrt\lambda}{\pi} I \right) .

scales = torch.logspace(-4, 4, 17).double()
fig, ax = plt.subplots(figsize=(5.4, 3.6))
target, gap = full(U[0], G[0], V[0], DAMPING), {}
for name, method in (("factored", factored), ("with pi", with_pi)):
    N = [method(c * U[0], G[0] / c, V[0], DAMPING) for c in scales]
    gap[name] = torch.stack([(n - target).norm() for n in N]) / target.norm()
    ax.semilogx(scales, gap[name], LOOK[name], marker="o", label=name)
ax.set(xlabel="scale c moved from G to U", ylabel="distance to the full step")
ax.set(ylim=(0, 1.1), title="With π the step is blind to scale")
_ = ax.legend()

assert torch.allclose(gap["with pi"], gap["with pi"][0])
# sphinx_gallery_start_ignore
assert gap["factored"].max() > gap["factored"].min() + 0.1
# sphinx_gallery_end_ignore

# %%
# Move :math:`\lambda` and :math:`c` yourself. Which map moves with :math:`c`?
#
# .. interactive:: damping
#
# The library's answer
# --------------------
#
# ``Kfac(pi=True)`` and ``Kfac(pi=False)`` must move the weights by our steps.

for pi, method in ((True, with_pi), (False, factored)):
    stepped = copy.deepcopy(net)
    kfac_step(stepped, pi, DAMPING)
    for i, *v in zip((0, 2), U, G, V):
        moved = joined(net[i], lambda p: p) - joined(stepped[i], lambda p: p)
        assert torch.allclose(moved, method(*v, DAMPING))

# %%
# When not to use this
# --------------------
#
# A fixed :math:`\lambda` suits one scale: multiply the loss by 100, and it
# damps 10,000 times less, since :math:`G` is made of squared gradients.
# ``relative_damping=True`` measures it in units of :math:`\bar u \bar g`.
#
# .. admonition:: Lessons learned
#
#    - Damping prices length; it keeps :math:`s / (s + \lambda)` of a step.
#    - Promises far below the loss are a sign of too little damping.
#    - Damping two factors adds :math:`\sqrt\lambda (u / \pi + \pi g)`.
#    - :math:`\pi = \sqrt{\bar u / \bar g}` makes KFAC invariant to scale.
#
# .. admonition:: Exercise
#
#    Levenberg and Marquardt choose :math:`\lambda` by trust: delivered divided
#    by promised decrease. Which :math:`\lambda` is the smallest with a trust
#    above one half? Compare it with the best.
#
# .. dropdown:: Solution
#
#    It lies near the best.
#
#    .. code-block:: python
#
#        got, wanted = curves["with pi"], curves["promised"]
#        trust = [(before - a) / (before - b) for a, b in zip(got, wanted)]
#        chosen = min(k for k, v in zip(lambdas, trust) if v > 0.5)
#        best = lambdas[got.index(min(got))]
#        assert 0.1 < chosen / best < 10
#
# .. admonition:: Exercise
#
#    Where does the step point for a very large :math:`\lambda`? And where
#    without any curvature, :math:`U = I` and :math:`G = I`?
#
# .. dropdown:: Solution
#
#    Along the gradient, both times: the inverses are multiples of :math:`I`.
#
#    .. code-block:: python
#
#        for method in (full, factored, with_pi):
#            N = 1e9 * method(U[0], G[0], V[0], 1e9)
#            assert torch.allclose(N, V[0], rtol=1e-2, atol=1e-6)
#            N = method(torch.eye(65), torch.eye(16), V[0].float(), 1.0)
#            cosine = (N * V[0]).sum() / (N.norm() * V[0].norm())
#            assert cosine > 0.9999
#
# Where to go next:
# :ref:`sphx_glr_auto_gallery_0_course_plot_06_kfac_from_scratch.py` trains.
# :ref:`sphx_glr_auto_gallery_2_features_plot_24_mixed_precision.py` needs
# damping for another reason, rounding. :doc:`/choosing` says which
# ``damping`` to give :class:`~singd.SINGD`.
