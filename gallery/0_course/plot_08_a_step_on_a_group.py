r"""
Lesson 8: Why is the step on K a product?
=========================================

The last lesson found :math:`K \leftarrow K - \beta_1 K m_K` by a Taylor
series. Here the same rule comes from geometry. That explains three things:
why :math:`K` stands on the left, where momentum may be added, and what can
still go wrong.

.. admonition:: What you will learn

   - **Derive** :math:`m_K` as a gradient in the right coordinates.
   - **See** where plain gradient steps leave the allowed set.
   - **Measure** what is lost when the exponential is cut short.

   You should have read
   :ref:`sphx_glr_auto_gallery_0_course_plot_07_without_an_inverse.py`.

The set that must not be left
-----------------------------

Let :math:`A = U + \lambda I`. The best preconditioner
:math:`P = A^{-1}` is the minimum of a function without an inverse:

.. math::

   f(P) = \operatorname{Tr}(P A) - \log\det P , \qquad
   \nabla f = A - P^{-1} .

:math:`P` has to be positive definite. Such matrices form a **cone**: sums and
positive multiples stay inside, differences may not. So a gradient step
:math:`P - \eta \nabla f` can leave it. (And it needs :math:`P^{-1}` again.)

The invertible matrices :math:`K` form a **group**: products and inverses stay
inside. So step by *products*: :math:`K \leftarrow K e^{-M}`, with a small
matrix :math:`M`. The **exponential** :math:`e^{-M} = I - M + \tfrac12 M^2 -
\dots` is always invertible; its inverse is :math:`e^{M}`. Which :math:`M`
lowers :math:`f` most? Insert :math:`P = K e^{-M} e^{-M^\top} K^\top`:

.. math::

   \begin{aligned}
   f &= \operatorname{Tr}\big(e^{-M^\top} K^\top A K e^{-M}\big)
        + 2 \operatorname{Tr} M - \log\det K K^\top \\
     &= f_0 - 2 \operatorname{Tr}(K^\top A K \, M) + 2 \operatorname{Tr} M
        + O(M^2) \\
     &= f_0 - 4 \operatorname{Tr}(m_K M) + O(M^2) , \qquad
        m_K = \tfrac12 [K^\top A K - I] .
   \end{aligned}

Steepest descent takes :math:`M = \beta_1 m_K`. This is the **Riemannian**
step: go to coordinates in which the present :math:`P` is the identity, take
the gradient there, and come back.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from singd import PUBLISHED, SINGD

_ = torch.set_num_threads(1)
_ = torch.set_default_dtype(torch.float64)
COLOR = {"step on P": "C7", "exponential": "C0", "cut": "C9"}

# %%
# Two eigenvalues
# ---------------
#
# Two curvatures, :math:`A = \operatorname{diag}(0.4, 5)`, so that everything
# can be drawn. The cone is the quadrant where both eigenvalues of :math:`P`
# are positive. **Before you run on:** all three rules start at
# :math:`P = I` with the same step, 0.3. Which will leave the quadrant?


def momentum(K, A):
    return 0.5 * (K.T @ A @ K - torch.eye(len(K)))


def on_P(P, A, beta):
    return P - beta * (A - torch.linalg.inv(P))


def exponential(P, A, beta):
    K = torch.linalg.cholesky(P)
    K = K @ torch.matrix_exp(-beta * momentum(K, A))
    return K @ K.T


def cut(P, A, beta):
    K = torch.linalg.cholesky(P)
    K = K - beta * K @ momentum(K, A)
    return K @ K.T


STEPS = dict(zip(COLOR, (on_P, exponential, cut)))
A = torch.tensor([0.4, 5.0]).diag()
# sphinx_gallery_thumbnail_number = 1
fig, ax = plt.subplots(figsize=(5.5, 4))
ax.axhspan(-0.6, 0, color="C3", alpha=0.15)
ax.text(1.4, -0.35, "not positive definite", color="C3")
for name, step in STEPS.items():
    path = [torch.eye(2)]
    while len(path) < 30 and path[-1].diag().min() > 0:
        path.append(step(path[-1], A, 0.3))
    p = torch.stack(path).diagonal(dim1=1, dim2=2).T
    ax.plot(*p, "o-", color=COLOR[name], markersize=4, label=name)
    assert (p.min() > 0) == (name != "step on P")
ax.plot(1 / 0.4, 1 / 5, "k*", markersize=12, label="the best P")
ax.set(xlabel="first eigenvalue of P", ylabel="second eigenvalue of P")
ax.set_title("Products stay inside; a sum leaves at once")
_ = ax.legend()

# %%
# The plain step leaves with its first move. Both products walk to the best
# :math:`P`. The third rule cuts the exponential after two terms,
# :math:`e^{-M} \approx I - M`. It is the rule of the last lesson.
#
# How safe is the cut?
# --------------------
#
# Now a real :math:`A`, of all digits, one step from :math:`P = I`, with steps
# of any size.

digits = load_digits()
x = torch.tensor(digits.data) / 16
a = nn.functional.pad(x, (0, 1), value=1)
I = torch.eye(65)
A = a.T @ a / len(a) + 0.1 * I
betas = torch.linspace(0, 0.5, 101)
lowest = {
    name: torch.stack([torch.linalg.eigvalsh(step(I, A, b))[0] for b in betas])
    for name, step in STEPS.items()
}
top = torch.linalg.eigvalsh(momentum(I, A))[-1]
fig, ax = plt.subplots(figsize=(5.5, 3.8))
ax.axhspan(-1, 0, color="C3", alpha=0.15)
for name, values in lowest.items():
    ax.plot(betas, values, color=COLOR[name], label=name)
ax.axvline(1 / top, color="k", linestyle=":", label="1 / largest of m")
ax.set(xlabel="β₁", ylabel="lowest eigenvalue of P", ylim=(-0.5, 1))
ax.set_title("The exponential never touches zero; the cut does")
ax.legend()

assert lowest["step on P"].min() < 0 < lowest["exponential"].min()
singular = torch.linalg.eigvalsh(cut(I, A, 1 / top))[0]
assert singular.abs() < 1e-12

# %%
# The cut cannot make an eigenvalue negative, as :math:`K K^\top` is a square.
# But at :math:`\beta_1 = 1 / \mu`, with :math:`\mu` the largest eigenvalue of
# :math:`m_K`, the factor is singular, and stays so. Beyond, it overshoots. So
# keep :math:`\beta_1 \mu` below 1; a half is a good bound. The exponential is
# no free lunch either: it shrinks that direction to nearly nothing.
#
# What does the cut cost when steps are small?

errors = {1: [], 2: []}
m, sizes = momentum(I, A), torch.logspace(-3, -1, 7) / top
for M in (b * m for b in sizes):
    exact = torch.matrix_exp(-M)
    errors[1].append((I - M - exact).norm())
    errors[2].append((I - M + M @ M / 2 - exact).norm())

fig, ax = plt.subplots(figsize=(5.5, 3.6))
for order, color in ((1, "C9"), (2, "k")):
    y = torch.stack(errors[order])
    slope = (y[-1] / y[0]).log() / (sizes[-1] / sizes[0]).log()
    label = f"{order + 1} terms: slope {slope:.1f}"
    ax.loglog(sizes, y, "o-", color=color, label=label)
    assert abs(slope - (order + 1)) < 0.05
ax.set(xlabel="β₁", ylabel="distance from the exponential")
ax.set_title("A cut after two terms is off by the square of β₁")
_ = ax.legend()

# %%
# Why from the right?
# -------------------
#
# Measure the inputs in other units, :math:`a \to T a`. Then
# :math:`A \to T A T^\top`, and the same preconditioner is
# :math:`K \to T^{-\top} K`. Look: :math:`K^\top A K` does not change. So
# :math:`m_K`, to the right of :math:`K`, has no units. A gradient step
# :math:`K - \eta \, \partial f / \partial K` has no such luck.


def gaps(T, product, updates=60):
    B = T @ A @ T.T
    K, values = torch.linalg.inv(T).T, []
    for _ in range(updates):
        P = K @ K.T
        values.append((P * B).sum() - torch.logdet(P @ B) - len(B))
        slope = 2 * (B @ K - torch.linalg.inv(K).T)  # df/dK
        torch.testing.assert_close(K.T @ slope, 4 * momentum(K, B))
        K = K @ (I - 0.1 * momentum(K, B)) if product else K - 0.02 * slope
    return torch.stack(values)


other = torch.linspace(0.5, 1.2, 65).diag()
first, second = gaps(I, product=True), gaps(other, product=True)
torch.testing.assert_close(first, second)

fig, ax = plt.subplots(figsize=(5.5, 3.8))
ax.semilogy(first, "C0", label="product")
ax.semilogy(second, "k:", label="product, other units")
ax.semilogy(gaps(I, product=False), "C7", label="gradient")
ax.semilogy(gaps(other, product=False), "C7:", label="gradient, other units")
ax.set(xlabel="update", ylabel="f above its minimum")
ax.set_title("The product does not see the units")
_ = ax.legend()

# %%
# Compare solid with dotted, not blue with grey: the two step sizes are ours.
#
# Two factors
# -----------
#
# With both factors, :math:`f` is taken of :math:`P_C \otimes P_K` and
# :math:`G \otimes U + \lambda I`. The same derivation gives
# :math:`K^\top \partial f / \partial K = 4 d_o m_K`, with the :math:`m_K` of
# SINGD. We ask autograd, and the library.

layer, d_o = nn.Linear(64, 10), 10
options = {**PUBLISHED, "rule": "singd", "lr": 0.0, "damping": 0.1}
optimizer = SINGD(layer, **options)
output = layer(x)
loss = nn.functional.cross_entropy(output, torch.tensor(digits.target))
g = len(x) * torch.autograd.grad(loss, output, retain_graph=True)[0]
loss.backward()
optimizer.step()

U, G = a.T @ a / len(a), g.T @ g / len(g)
K = I.clone().requires_grad_()
curvature = torch.kron(G, U) + 0.1 * torch.eye(650)
P = torch.kron(torch.eye(d_o), K @ K.T)
f = (P * curvature).sum() - torch.logdet(P)
(df,) = torch.autograd.grad(f, K)
m_K = optimizer.factors(layer).m_K.dense()
torch.testing.assert_close(K.T @ df, 4 * d_o * m_K)
print("the library's m_K is the gradient")

# %%
# When not to use this
# --------------------
#
# If an inverse is cheap and safe, :math:`P = A^{-1}` needs no steps at all.
#
# .. admonition:: Lessons learned
#
#    - Positive definite matrices form a cone, invertible ones a group.
#    - :math:`m_K` is the gradient in coordinates where :math:`P = I`.
#    - :math:`m_K` may be summed, hence momentum; :math:`K` is multiplied.
#    - The exponential never leaves; its cut is safe for
#      :math:`\beta_1 \mu < 1`.
#
# .. admonition:: Exercise
#
#    Cut after three terms. Can :math:`I - M + \tfrac12 M^2` be singular, for a
#    symmetric :math:`M`? What is the least that an eigenvalue can be?
#
# .. dropdown:: Solution
#
#    Never. Its eigenvalues are :math:`1 - x + \tfrac12 x^2 = \tfrac12 [1 +
#    (x - 1)^2]`, at least a half.
#
#    .. code-block:: python
#
#        for beta in (0.1, 1.0, 10.0):
#            M = beta * momentum(I, A)
#            values = torch.linalg.eigvalsh(I - M + M @ M / 2)
#            assert values.min() >= 0.5
#
# .. admonition:: Exercise
#
#    The determinant of :math:`e^{-M}` is :math:`e^{-\operatorname{Tr} M}`.
#    Check it. What does it say about the sign of :math:`\det K`?
#
# .. dropdown:: Solution
#
#    It is positive, so that :math:`\det K` keeps its sign.
#
#    .. code-block:: python
#
#        M = 0.1 * momentum(I, A)
#        det = torch.linalg.det(torch.matrix_exp(-M))
#        torch.testing.assert_close(det, torch.exp(-M.trace()))
#
# Where to go next:
# :ref:`sphx_glr_auto_gallery_0_course_plot_09_two_factors_one_scale.py` looks
# at the coupling of both factors,
# :ref:`sphx_glr_auto_gallery_3_advanced_plot_33_diagnostics.py` watches
# :math:`m_K` in training, and :doc:`/concepts` has all symbols.
