r"""
Lesson 9: What does the coupling buy? Two factors, one scale
============================================================

IKFAC learns :math:`K` and :math:`C` apart from each other. SINGD couples
them: the update of :math:`K` contains a trace of :math:`C`. This lesson shows
what that is good for, and that KFAC can have half of it.

.. admonition:: What you will learn

   - **Find** the scale that KFAC's two factors cannot know.
   - **Prove** which methods do not mind it.
   - **Compare** four methods with the exact inverse.

   You should have read
   :ref:`sphx_glr_auto_gallery_0_course_plot_07_without_an_inverse.py`, and
   :ref:`sphx_glr_auto_gallery_0_course_plot_05_damping.py` for :math:`\pi`.

A scale without meaning
-----------------------

Take any :math:`c > 0`. Then

.. math::

   G \otimes U = \tfrac{1}{c} G \otimes c \, U .

Only the product has a meaning; how its scale is shared is a convention.
Measure inputs in other units, or the loss, or count positions differently:
scale moves from :math:`G` to :math:`U`. A method should not care. It is
**invariant** if :math:`U \to c \, U`, :math:`G \to G / c` leaves its step as
it is.

**KFAC** without :math:`\pi` is not: :math:`(c \, U + \sqrt\lambda I)^{-1}`
damps less if :math:`c` is large. With :math:`\pi`, which is
:math:`\sqrt{\operatorname{tr} U / \operatorname{tr} G}`, it is:
:math:`\pi \to c \, \pi`, hence

.. math::

   \begin{aligned}
   (c \, U + c \, \pi \sqrt\lambda I)^{-1}
     &= \tfrac1c \, (U + \pi \sqrt\lambda I)^{-1} , \\
   \big(\tfrac1c G + \tfrac{1}{c \, \pi} \sqrt\lambda I\big)^{-1}
     &= c \, \big(G + \tfrac1\pi \sqrt\lambda I\big)^{-1} ,
   \end{aligned}

and :math:`c` cancels in the step. **IKFAC** is not, as :math:`K^\top U K`
grows and :math:`\lambda K^\top K` does not. **SINGD** is. In

.. math::

   m_K = \tfrac12 \left[ \operatorname{tr}(C^\top G C) \; K^\top U K
   + \lambda \operatorname{tr}(C^\top C) \; K^\top K - I \right]

the :math:`1 / c` of the first trace meets the :math:`c` of :math:`U`, and the
second term has neither. The same holds for :math:`m_C`.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from singd import PUBLISHED, SINGD
from singd.rules import Kfac

LAMBDA, BETA_1 = 1e-3, 0.25
STYLE = {
    "KFAC, no π": {"color": "C2", "linestyle": "--"},
    "KFAC": {"color": "C2"},
    "IKFAC": {"color": "C9"},
    "SINGD": {"color": "C0"},
}
_ = torch.set_num_threads(1)
_ = torch.set_default_dtype(torch.float64)
inverse, eye = torch.linalg.inv, torch.eye


def tr(M):
    return M.diag().mean()


# %%
# Four methods
# ------------
#
# Each takes :math:`U` and :math:`G` and returns :math:`P_K` and :math:`P_C`,
# its approximate inverses. SINGD runs until it stands still.


def kfac(U, G, pi=1.0):
    r = LAMBDA**0.5
    P_K = inverse(U + r * pi * eye(len(U)))
    return P_K, inverse(G + r / pi * eye(len(G)))


def kfac_pi(U, G):
    return kfac(U, G, pi=(tr(U) / tr(G)).sqrt())


def ikfac(U, G):
    return inverse(U + LAMBDA * eye(len(U))), inverse(G + LAMBDA * eye(len(G)))


def bracket(K, U, tr_H, tr_CC):
    H = tr_H * K.T @ U @ K + LAMBDA * tr_CC * K.T @ K
    return 0.5 * (H - eye(len(K)))


def singd_step(K, C, U, G):
    m_K = bracket(K, U, tr(C.T @ G @ C), tr(C.T @ C))
    m_C = bracket(C, G, tr(K.T @ U @ K), tr(K.T @ K))
    return K - BETA_1 * K @ m_K, C - BETA_1 * C @ m_C


def singd(U, G, updates=800):
    K, C = eye(len(U)), eye(len(G))
    for _ in range(updates):
        K, C = singd_step(K, C, U, G)
    return K @ K.T, C @ C.T


METHODS = dict(zip(STYLE, (kfac, kfac_pi, ikfac, singd)))

# %%
# The map of scales
# -----------------
#
# First a layer with a single weight: :math:`u = 1`, :math:`g = 0.01`. All
# that counts is the product :math:`P_K P_C`. The right one is
# :math:`1 / (u g + \lambda)`: a line in this map. **Before you run on:** where
# do the four methods go when :math:`c` runs from 1/1,000 to 1,000?

u, g = eye(1), 0.01 * eye(1)
cs = torch.logspace(-3, 3, 9)
line = torch.tensor([1e-4, 1e4])
fig, ax = plt.subplots(figsize=(5.5, 4.4))
ax.loglog(line, 1 / (0.01 + LAMBDA) / line, "k:", label="the right product")
for name, method in METHODS.items():
    points = torch.tensor([method(c * u, g / c) for c in cs]).T
    marker = "*" if name == "SINGD" else "."
    ax.plot(*points, marker=marker, ms=9, label=name, **STYLE[name])
ax.set(xlabel="P_K", ylabel="P_C", xlim=(1e-3, 1e3), ylim=(1e-2, 1e5))
ax.set_title("KFAC with π walks beside the line, SINGD stands on it")
_ = ax.legend()

# sphinx_gallery_start_ignore
for name, invariant in zip(METHODS, (False, True, False, True)):
    products = [torch.mul(*METHODS[name](c * u, g / c)) for c in cs]
    products = torch.cat(products).flatten()
    assert torch.allclose(products, products[0]) == invariant
right = 1 / (0.01 + LAMBDA)
assert products.sub(right).abs().max() < 1e-6 * right
assert METHODS["KFAC"](u, g)[0].square() < 0.7 * right
# sphinx_gallery_end_ignore

# %%
# SINGD is a single point on the line. KFAC with :math:`\pi` walks along the
# line, but beside it: :math:`(u + \pi \sqrt\lambda)(g + \sqrt\lambda / \pi)`
# has a mixed term too many. The other two wander.
#
# On a real layer
# ---------------
#
# Now the last layer of a small network. The measure is the function that
# SINGD minimises, over its minimum for any :math:`P`, Kronecker product or
# not. It is twice a Kullback-Leibler divergence:
#
# .. math::
#
#    \operatorname{Tr}\big[(P_C \otimes P_K) F\big]
#    - \log\det \big[(P_C \otimes P_K) F\big] - d_i d_o , \qquad
#    F = G \otimes U + \lambda I .

torch.manual_seed(0)
digits = load_digits()
x, labels = torch.tensor(digits.data) / 16, torch.tensor(digits.target)
net = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
adam = torch.optim.Adam(net.parameters(), 1e-2)
for batch in torch.arange(1700).split(20):
    adam.zero_grad()
    nn.functional.cross_entropy(net(x[batch]), labels[batch]).backward()
    adam.step()
with torch.no_grad():
    a = nn.functional.pad(net[:2](x), (0, 1), value=1)
    g = net(x).softmax(1) - nn.functional.one_hot(labels)
U, G = a.T @ a / len(a), g.T @ g / len(g)
F = torch.kron(G, U) + LAMBDA * eye(170)


def gap(P_K, P_C):
    product = torch.kron(P_C, P_K) @ F
    return (product.trace() - torch.logdet(product) - 170).item()


cs = torch.logspace(-3, 3, 7)
gaps = {n: [gap(*m(c * U, G / c)) for c in cs] for n, m in METHODS.items()}
# sphinx_gallery_thumbnail_number = 2
fig, ax = plt.subplots(figsize=(5.5, 4))
for name, values in gaps.items():
    ax.loglog(cs, values, marker="o", label=name, **STYLE[name])
ax.set(xlabel="c, the scale moved from G to U", ylabel="distance from F")
ax.set_title("Two do not move, and SINGD is lowest")
ax.legend()

for name in ("KFAC", "SINGD"):
    assert max(gaps[name]) < 1.000001 * min(gaps[name])
for name in ("KFAC, no π", "IKFAC"):
    assert max(gaps[name]) > 3 * min(gaps[name])
assert gaps["SINGD"][0] < 0.5 * gaps["KFAC"][0] < min(gaps["IKFAC"])

# %%
# SINGD is lowest, since this is what it minimises. Where it stands
# still, :math:`m_K = 0`. Solved for :math:`K K^\top`:
#
# .. math::
#
#    K K^\top = \left[ \operatorname{tr}(H_C) \, U
#    + \lambda \operatorname{tr}(C^\top C) \, I \right]^{-1} , \qquad
#    H_C = C^\top G C .

P_K, P_C = singd(U, G)
fixed = tr(P_C @ G) * U + LAMBDA * tr(P_C) * eye(17)
torch.testing.assert_close(P_K, inverse(fixed), rtol=1e-6, atol=1e-6)

# %%
# So each factor tells the other how much damping it needs: the ratio of two
# traces replaces :math:`\pi`.
#
# In the library
# --------------
#
# A classifier of digits, in two systems of units: inputs times 3, weights
# divided by 3, the loss divided by 3. So :math:`c = 9`. The network says
# the same, and :math:`\nabla_W \ell` is the same. Does the same run follow?


def train(rule, unit, steps=150):
    layer = nn.Linear(64, 10, bias=False)
    nn.init.zeros_(layer.weight)
    options = {**PUBLISHED, "rule": rule, "damping": LAMBDA, "T": 1}
    options |= {"lr": 0.005 / unit, "lr_cov": 0.02}
    optimizer = SINGD(layer, **options)
    losses = []
    for i in range(steps):
        batch = torch.arange(50 * i, 50 * i + 50) % 1797
        output = layer(unit * x[batch])
        loss = nn.functional.cross_entropy(output, labels[batch])
        optimizer.zero_grad()
        (loss / unit).backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


RULES = {"SINGD": "singd", "IKFAC": "ikfac"}
fig, axes = plt.subplots(1, 2, figsize=(5.5, 3.4), sharey=True)
for ax, (name, rule) in zip(axes, RULES.items()):
    here, there = train(rule, 1.0), train(rule, 3.0)
    same = torch.allclose(here, there, rtol=1e-6)
    assert same == (name == "SINGD")
    ax.semilogy(here, label="c = 1", **STYLE[name])
    ax.semilogy(there, "k:", label="c = 9")
    ax.set(xlabel="step", title=name)
    ax.legend()
_ = axes[0].set_ylabel("training loss")

for rule, invariant in (("kfac", True), (Kfac(pi=False), False)):
    here, there = train(rule, 1.0), train(rule, 3.0)
    assert torch.allclose(here, there, rtol=1e-6) == invariant

# %%
# KFAC passes as well, and ``Kfac(pi=False)`` does not.
#
# When not to use this
# --------------------
#
# Invariance to this one scale is not invariance to all. The loss times ten,
# with one :math:`\lambda`, still changes every method's step. And
# where :math:`\lambda` is tiny beside all eigenvalues, all four agree.
#
# .. admonition:: Lessons learned
#
#    - How :math:`G \otimes U` shares its scale has no meaning.
#    - KFAC with :math:`\pi` and SINGD do not mind it.
#    - KFAC without :math:`\pi` and IKFAC do.
#    - SINGD's damping fits :math:`G \otimes U + \lambda I`, without a mixed
#      term.
#
# .. admonition:: Exercise
#
#    A claim above: let :math:`\lambda` go to zero, for the single weight. What
#    do all products become?
#
# .. dropdown:: Solution
#
#    All become :math:`1 / (u g)`.
#
#    .. code-block:: python
#
#        LAMBDA = 1e-14
#        products = [a * b for a, b in (m(eye(1), 0.01 * eye(1))
#                                       for m in METHODS.values())]
#        assert max(abs(p / 100 - 1) for p in products) < 1e-4
#
# .. admonition:: Exercise
#
#    Start SINGD from :math:`K = 3 I` and :math:`C = \tfrac13 I`. Where does
#    the single weight end on the map, and what is :math:`k / c` there?
#
# .. dropdown:: Solution
#
#    On the line again, at another point: for scalars :math:`m_K = m_C`, so
#    that the ratio of :math:`k` and :math:`c` never changes.
#
#    .. code-block:: python
#
#        LAMBDA = 1e-3
#        K, C = 3 * eye(1), eye(1) / 3
#        for _ in range(3000):
#            K, C = singd_step(K, C, eye(1), 0.01 * eye(1))
#        torch.testing.assert_close(K / C, 9 * eye(1))
#        assert abs((K * C).square().item() * 0.011 - 1) < 1e-6
#
# Where to go next:
# :ref:`sphx_glr_auto_gallery_0_course_plot_10_structures.py` makes the factors
# small, :ref:`sphx_glr_auto_gallery_2_features_plot_26_micro_batches.py` shows
# where scales come from, and :doc:`/choosing` explains the damping.
