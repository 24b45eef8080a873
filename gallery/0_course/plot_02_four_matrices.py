r"""
Lesson 2: Fisher, Gauss-Newton, Monte Carlo, empirical: which is which?
=======================================================================

Of four matrices with similar names, two are equal, one is right on average,
and one is something else, though most code computes that one. The difference
is one question: *whose labels?*

.. admonition:: What you will learn

   - **Derive** that Fisher and Gauss-Newton matrices are equal.
   - **Tell** the Fisher matrix from the empirical one.
   - **Compute** all four, by hand and with :class:`~singd.SINGD`.

   You need
   :ref:`sphx_glr_auto_gallery_0_course_plot_01_rulers.py`.

One formula, four labels
------------------------

A network computes :math:`f = f_\theta(x)`, and the loss of one example is
:math:`\ell(f, y) = -\log p(y \mid f)`. With the Jacobian
:math:`J = \partial f / \partial \theta` and
:math:`r = \partial \ell / \partial f`, its gradient is :math:`J^\top r`. Every
Fisher matrix is the mean of

.. math::

   \nabla_\theta \ell \, \nabla_\theta \ell^\top = J^\top r \, r^\top J .

Only the labels differ, on which :math:`r` depends:

- **Fisher matrix**: every label, weighted as the *model* believes in it.
- **Monte-Carlo Fisher**: one label for each input, drawn from the model.
- **Empirical Fisher**: the label in the *data*.

The fourth comes from the **Hessian**. By the chain rule
:math:`\nabla^2_\theta \ell = J^\top H J + \sum_c r_c \nabla^2_\theta f_c` with
:math:`H = \nabla^2_f \ell`. The **Gauss-Newton matrix** is the mean of its
first part, :math:`J^\top H J`.

Why Fisher is Gauss-Newton
--------------------------

Lesson 1, with :math:`f` in place of :math:`\theta`, showed that
:math:`\mathbb{E}_y[r r^\top] = \mathbb{E}_y[H]` under the model's own labels.
The Jacobian knows no label, so

.. math::

   F = \mathbb{E}_x \, J^\top \, \mathbb{E}_y[r r^\top] \, J
     = \mathbb{E}_x \, J^\top \, \mathbb{E}_y[H] \, J .

Now take the two usual losses.

.. math::

   \begin{aligned}
   \text{softmax:} \quad
   & r = p - e_y , & H &= \mathrm{diag}(p) - p p^\top , \\
   \text{Gaussian, } \tfrac12 \lVert f - y \rVert^2 \text{:} \quad
   & r = f - y , & H &= I .
   \end{aligned}

Neither :math:`H` contains :math:`y`, so its mean is :math:`H` itself, and
:math:`F = \mathbb{E}_x[J^\top H J]` is the Gauss-Newton matrix.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_iris
from torch import nn
from torch.func import grad, hessian, jacrev, vmap

from singd import PUBLISHED, SINGD, sample_labels

STEPS, NOISE = 40, 0.2
KFAC = {**PUBLISHED, "rule": "kfac", "lr": 0.0, "loss_average": None}
_ = torch.set_num_threads(1)
generator = torch.manual_seed(0)

# %%
# From scratch
# ------------
#
# One function for three of them: it takes labels and their weights.


def fisher_like(loss, theta, x, labels):
    F = 0
    for weight, y in labels:
        g = vmap(grad(loss), (None, 0, 0))(theta, x, y)
        F = F + (weight[:, None] * g).T @ g / len(x)
    return F


def gauss_newton(loss, f, theta, x, y):
    J = vmap(jacrev(f), (None, 0))(theta, x)
    H = vmap(hessian(loss))(vmap(f, (None, 0))(theta, x), y)
    return torch.einsum("nci,ncd,ndj->ij", J, H, J) / len(x)


# %%
# A classifier with 27 weights, for three kinds of iris.

data, kinds = map(torch.tensor, load_iris(return_X_y=True))
flowers = (data - data.mean(0)) / data.std(0)
softmax_loss = nn.functional.cross_entropy


def classifier(theta, x):
    hidden = torch.tanh(theta[:12].view(3, 4) @ x + theta[12:15])
    return theta[15:24].view(3, 3) @ hidden + theta[24:]


def nll(theta, x, y):
    return softmax_loss(classifier(theta, x), y)


theta = torch.randn(27, generator=generator, dtype=torch.float64)
p = vmap(classifier, (None, 0))(theta, flowers).softmax(1)
all_labels = [(p[:, c], torch.full_like(kinds, c)) for c in range(3)]
F = fisher_like(nll, theta, flowers, all_labels)
GN = gauss_newton(softmax_loss, classifier, theta, flowers, kinds)
assert torch.allclose(F, GN)

# %%
# All 729 entries agree. Now draw a label for each flower, 400 times.
# **Before you run on:** which matrix do the draws average to? Is the empirical
# one near it?

ones = torch.ones(len(kinds)).double()
samples = []
for _ in range(400):
    drawn = sample_labels(p.log(), generator=generator)
    samples.append(fisher_like(nll, theta, flowers, [(ones, drawn)]))
count = torch.arange(1, 401)
means = torch.stack(samples).cumsum(0) / count[:, None, None]
errors = (means - F).norm(dim=(1, 2)) / F.norm()
gap = (fisher_like(nll, theta, flowers, [(ones, kinds)]) - F).norm()

fig, ax = plt.subplots(figsize=(5.4, 3.6))
ax.loglog(count, errors, "C2", label="mean of Monte-Carlo Fishers")
ax.loglog(count, errors[0] / count.sqrt(), "C7:", label="slope −1/2")
ax.axhline(gap / F.norm(), color="C1", label="empirical Fisher")
ax.set(xlabel="draws", ylabel="relative distance to F")
ax.set_title("Labels of the model lead to F, data's do not")
_ = ax.legend(loc="lower left")

# sphinx_gallery_start_ignore
spread = torch.stack(samples).std(0) / 400**0.5
assert ((means[-1] - F).abs() <= 5 * spread + 1e-12).all()
assert errors[-1] < 0.1 * gap / F.norm()
# sphinx_gallery_end_ignore

# %%
# The picture to keep
# -------------------
#
# A model with two weights, so that matrices can be drawn: the curve
# :math:`f = \theta_2 \tanh(\theta_1 x)` with Gaussian loss, fitted to 200
# points. An ellipse is the image of the unit circle under a matrix's square
# root: how wide the gradients scatter around 0.

# sphinx_gallery_thumbnail_number = 2
x = torch.linspace(-2, 2, 200).double()
y = 1.5 * torch.tanh(1.2 * x) + NOISE * torch.randn(200).double()
ones = torch.ones_like(x)


def curve(theta, x):
    return theta[1:] * torch.tanh(theta[0] * x)


def square(f, y):
    return 0.5 * (f - y).square().sum()


def error(theta, x, y):
    return square(curve(theta, x), y)


def four(theta):
    f = vmap(curve, (None, 0))(theta, x)[:, 0]
    # The gradient is linear in the label, so that two labels with a normal's
    # mean and variance stand for all.
    model = [(0.5 * ones, f - 1), (0.5 * ones, f + 1)]
    drawn = sample_labels(f, "gaussian", generator=generator)
    return {
        "Fisher": fisher_like(error, theta, x, model),
        "Gauss-Newton": gauss_newton(square, curve, theta, x, y),
        "Monte Carlo": fisher_like(error, theta, x, [(ones, drawn)]),
        "empirical": fisher_like(error, theta, x, [(ones, y)]),
    }


theta, run = torch.tensor([1.5, 3.5]).double(), []
for _ in range(STEPS):
    g = vmap(grad(error), (None, 0, 0))(theta, x, y)
    run.append(four(theta))
    theta = theta - 0.2 * torch.linalg.solve(run[-1]["Fisher"], g.mean(0))

angle = torch.linspace(0, 2 * torch.pi, 99).double()
circle = torch.stack([angle.cos(), angle.sin()])
looks = dict(zip(run[0], ("C0-", "k:", "C2--", "C1-")))
fig, axes = plt.subplots(1, 2, figsize=(5.5, 3.6), sharex=True, sharey=True)
for ax, step in zip(axes, (0, STEPS - 1)):
    for name, M in run[step].items():
        values, vectors = torch.linalg.eigh(M)
        ax.plot(*(vectors * values.sqrt()) @ circle, looks[name], label=name)
    ax.set(title=f"step {step}", xlabel="along θ₁", ylabel="along θ₂")
fig.legend(handles=axes[0].get_lines(), ncols=2, loc="outside lower center")
_ = fig.suptitle("The empirical Fisher shrinks with the residuals")

# %%
# Fisher and Gauss-Newton are one ellipse. The empirical matrix is the mean of
# :math:`(f - y)^2 J^\top J`. While the fit is bad it is too large. In the end
# it is nearly nothing, though the model is as sensitive as before.

fig, ax = plt.subplots(figsize=(5.4, 3.6))
for name, look in looks.items():
    ax.semilogy([M[name].trace() for M in run], look, label=name)
ax.set(xlabel="step", ylabel="trace")
ax.set_title("Along the run, the empirical one collapses")
_ = ax.legend(loc="center right")

sizes = [[M.trace() for M in matrices.values()] for matrices in run]
assert all(torch.allclose(F, GN) for F, GN, *_ in sizes)
assert sizes[0][3] > 2 * sizes[0][0]
assert sizes[-1][3] < 0.1 * sizes[-1][0]

# %%
# As a fit becomes perfect, the gradient vanishes like :math:`f - y`, but this
# matrix like its square. So a step by its inverse explodes.
#
# The library's answer
# --------------------
#
# The library squares the gradients that ``backward`` brings. In ordinary
# training that is the *empirical* Fisher. With labels from ``sample_labels``
# it is Monte Carlo; with a backward pass per class, weighted by
# :math:`\sqrt{p_c}`, it is :math:`F`. For a linear layer and *one* flower, the
# library's two factors are exact (lesson 3 says why): :math:`F = G \otimes U`.

a = flowers[75:76]
net = nn.Sequential(nn.Linear(4, 3, bias=False)).double()


def by_library(labels):
    optimizer = SINGD(net, **KFAC)
    for weight, label in labels:
        (weight.sqrt() * softmax_loss(net(a), label)).backward()
    optimizer.step()
    factors = optimizer.factors("0")
    return torch.kron(factors.G.dense(), factors.U.dense())


def linear(theta, x, y):
    return softmax_loss(theta.view(3, 4) @ x, y)


theta = net[0].weight.detach().flatten()
p = net(a).detach().softmax(1)
labels = {
    "Fisher": [(p[:, c], torch.tensor([c])) for c in range(3)],
    "Monte Carlo": [(ones[:1], sample_labels(net(a), generator=generator))],
    "empirical": [(ones[:1], kinds[75:76])],
}
for name, chosen in labels.items():
    ours = fisher_like(linear, theta, a, chosen)
    assert torch.allclose(by_library(chosen), ours)
    print(f"{name:12} trace {ours.trace():.2f}, the library agrees")

# %%
# When not to use this
# --------------------
#
# All labels cost a backward pass per class, Monte Carlo one. The empirical
# Fisher costs none: that is its whole merit.
#
# .. admonition:: Lessons learned
#
#    - Fisher: labels from the model. Empirical: labels from the data.
#    - For softmax and Gaussian losses, Fisher is Gauss-Newton.
#    - Monte Carlo is unbiased; four times the draws halve its error.
#    - The empirical Fisher shrinks with the residuals.
#
# .. admonition:: Exercise
#
#    When is the empirical Fisher right? Give the Gaussian the noise of the
#    data, :math:`\ell = (f - y)^2 / (2 \sigma^2)`, and compare at the end.
#
# .. dropdown:: Solution
#
#    When the model is right about its own errors. The mean of
#    :math:`(f - y)^2 / \sigma^4` is then the :math:`1 / \sigma^2` of
#    :math:`F`.
#
#    .. code-block:: python
#
#        exact, *_, empirical = sizes[-1]
#        ratio = (empirical / NOISE**4) / (exact / NOISE**2)
#        print(f"ratio of the traces: {ratio:.1f}")
#        assert 0.8 < ratio < 1.25
#
# .. admonition:: Exercise
#
#    Compare the Hessian of the curve's loss with the Gauss-Newton matrix at
#    :math:`\theta = (0.1, -0.1)`. Which one can have negative eigenvalues?
#
# .. dropdown:: Solution
#
#    The Hessian. Its second part, :math:`r \nabla^2 f`, has any sign. The
#    Gauss-Newton matrix is a mean of squares.
#
#    .. code-block:: python
#
#        start = torch.tensor([0.1, -0.1]).double()
#
#
#        def mean_loss(theta):
#            return vmap(error, (None, 0, 0))(theta, x, y).mean()
#
#
#        H = hessian(mean_loss)(start)
#        GN = gauss_newton(square, curve, start, x, y)
#        assert torch.linalg.eigvalsh(H)[0] < -0.1
#        assert torch.linalg.eigvalsh(GN)[0] > -1e-12
#
# Where to go next:
# :ref:`sphx_glr_auto_gallery_0_course_plot_03_kronecker.py` makes :math:`F`
# small enough for a network; :doc:`/concepts` shows where it enters.
