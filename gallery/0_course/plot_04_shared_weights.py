r"""
Lesson 4: Shared weights: expand or reduce?
===========================================

A convolution applies one matrix at every pixel, a transformer at every token.
Then one example has many inputs :math:`a_s` and many gradients :math:`g_s`,
and there are two ways to make Kronecker factors of them. Which one is right
depends on where the positions meet.

.. admonition:: What you will learn

   - **Derive** KFAC-expand and KFAC-reduce, each from its own network.
   - **Measure** what the wrong one costs.
   - **Choose** ``kfac_approx`` of :class:`~singd.SINGD` for your model.

   You need
   :ref:`sphx_glr_auto_gallery_0_course_plot_03_kronecker.py`.

Two networks, two answers
-------------------------

A layer computes :math:`z_s = W a_s` at positions :math:`s = 1 \dots S`. The
gradient of one example is a *sum* of products,

.. math::

   \nabla_W \ell = \sum_s g_s a_s^\top .

The sum over :math:`s` may stand outside or inside the square. As in lesson 3,
let the rest of the network be one matrix :math:`B`, and the loss a sum of
squares.

**Per token.** Every position has an output :math:`f_s = B z_s` and a label of
its own. Then each position is an example in its own right, and lesson 3 holds
for :math:`N S` of them: :math:`g = B^\top r`, and

.. math::

   F = \sum_{n, s} B^\top B \otimes a_{ns} a_{ns}^\top
     = \underbrace{\sum_{n, s} B^\top B}_{G}
       \otimes
       \underbrace{\tfrac{1}{NS} \sum_{n, s} a_{ns} a_{ns}^\top}_{U} .

This is **KFAC-expand**: every position is a row.

**Pooled.** The positions are averaged before the loss,
:math:`f = \frac1S \sum_s B z_s = B W \bar a`, with the mean
:math:`\bar a = \frac1S \sum_s a_s`. Now there is one label for all positions,
and all have the same :math:`g_s = \frac1S B^\top r`. The sum stays inside:
:math:`\sum_s g_s a_s^\top = \left( \sum_s g_s \right) \bar a^\top`, and

.. math::

   F = \sum_n B^\top B \otimes \bar a_n \bar a_n^\top
     = \underbrace{\sum_n B^\top B}_{G}
       \otimes
       \underbrace{\tfrac1N \sum_n \bar a_n \bar a_n^\top}_{U} .

This is **KFAC-reduce**: one row for each example, the *mean* of its
:math:`a_s` and the *sum* of its :math:`g_s`.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.func import jacrev

from singd import PUBLISHED, SINGD

DIGITS = 60
KFAC = {**PUBLISHED, "rule": "kfac", "lr": 0.0, "loss_average": None}
_ = torch.set_num_threads(1)
_ = torch.manual_seed(0)

# %%
# The data: a digit of 8 x 8 pixels is a sequence of eight tokens, its rows.

data = load_digits(n_class=3)
digits = torch.tensor(data.images[:DIGITS]) / 16
labels = nn.functional.one_hot(torch.tensor(data.target[:DIGITS])).double()
net = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3)).double()

# %%
# From scratch
# ------------


def per_token(f):
    return f


def pooled(f):
    return f.mean(1)


def linear(z):
    return z


def rows(x, act, setting):
    """a (n, s, d_i), and g (c, n, s, d_o) for each unit vector backward."""
    a = torch.cat([x, torch.ones_like(x[..., :1])], 2)
    z = net[0](x)
    f = setting(net[1](act(z)))
    units = [e.expand_as(f) for e in torch.eye(3).double()]
    g = [torch.autograd.grad(f, z, e, retain_graph=True)[0] for e in units]
    return a, torch.stack(g)


def expand(a, g):
    a, g = a.flatten(0, 1), g.flatten(0, 2)
    return torch.kron(g.T @ g, a.T @ a / len(a))


def reduce(a, g):
    a, g = a.mean(1), g.sum(2).flatten(0, 1)
    return torch.kron(g.T @ g, a.T @ a / len(a))


def exact(x, act, setting):
    def outputs(W):
        z = nn.functional.linear(x, W[:, :-1], W[:, -1])
        return setting(net[1](act(z))).flatten()

    W = torch.cat([net[0].weight, net[0].bias[:, None]], 1).detach()
    J = jacrev(outputs)(W).flatten(1)
    return J.T @ J


# %%
# ``exact`` is the Gauss-Newton matrix of the square loss, and by lesson 2 the
# true Fisher matrix.
#
# **Before you run on:** which two of the four bars on the left will be zero?
# And on the right, where a tanh stands between the layers?


def matrices(approximation, *case):
    return exact(*case), approximation(*rows(*case))


def draw(ax, act):
    for i, approximation in enumerate((expand, reduce)):
        errors = []
        for setting in (per_token, pooled):
            F, M = matrices(approximation, digits, act, setting)
            errors.append(((M - F).norm() / F.norm()).item())
        at = torch.arange(2) + 0.4 * i - 0.2
        bars = ax.bar(at, errors, width=0.36, label=approximation.__name__)
        ax.bar_label(bars, fmt="%.2f", fontsize=9)
        table.append(errors)
    ax.set_xticks(range(2), ["per token", "pooled"])


table = []
fig, axes = plt.subplots(1, 2, figsize=(5.5, 3.5), sharey=True)
for ax, act in zip(axes, (linear, torch.tanh)):
    draw(ax, act)
axes[0].set(title="linear network", ylabel="relative error of G ⊗ U")
axes[0].set_ylim(0, 8)
axes[1].set_title("with a tanh")
axes[1].legend()
_ = fig.suptitle("Each is best in its own setting")

assert max(table[0][0], table[1][1]) < 1e-12

# sphinx_gallery_start_ignore
assert max(table[2][0], table[3][1]) < 0.2
assert min(table[0][1], table[2][1]) > 0.8
assert min(table[1][0], table[3][0]) > 6
# sphinx_gallery_end_ignore

# %%
# In the linear network each is exact at home. The tanh takes that away, but
# leaves the right one far ahead. The wrong one is off by about :math:`S = 8`:
# *expand* is 8 times too small, *reduce* 8 times too large.
#
# More than a factor
# ------------------
#
# A learning rate could make up for a factor. So compare eigenvalues of
# :math:`U`. The mean of the tokens forgets how they differ.

a = torch.cat([digits, torch.ones_like(digits[..., :1])], 2)
fig, ax = plt.subplots(figsize=(5.4, 3.6))
spectra = {}
for name, v in {"expand": a.flatten(0, 1), "reduce": a.mean(1)}.items():
    spectra[name] = torch.linalg.eigvalsh(v.T @ v / len(v)).flip(0)[:7]
    ax.semilogy(range(1, 8), spectra[name], "o-", label=name)
ax.set(xlabel="direction", ylabel="eigenvalue of U")
ax.set_title("Averaging shrinks the small directions")
_ = ax.legend()

# sphinx_gallery_start_ignore
ratio = spectra["expand"] / spectra["reduce"]
assert ratio[0] < 1.1
assert ratio[4] > 3
# sphinx_gallery_end_ignore

# %%
# An inverse magnifies exactly these. Does the natural gradient still point the
# right way? We compare the step by the wrong product with the exact one. And
# we move each token towards the mean of its digit, until all are alike.


def step(M, gradient):
    damping = 1e-2 * M.trace() / len(M) * torch.eye(len(M))
    return torch.linalg.solve(M + damping, gradient)


def cosine(approximation, setting, x):
    f = setting(net(x))
    target = labels.view(DIGITS, *[1] * (f.ndim - 2), 3)
    loss = 0.5 * (f - target).square().sum()
    W, b = torch.autograd.grad(loss, [net[0].weight, net[0].bias])
    gradient = torch.cat([W, b[:, None]], 1).flatten()
    steps = [
        step(M, gradient) for M in matrices(approximation, x, linear, setting)
    ]
    return torch.cosine_similarity(*steps, dim=0).item()


alike = torch.linspace(0, 1, 11).double()
means = digits.mean(1, keepdim=True)
fig, ax = plt.subplots(figsize=(5.4, 3.6))
for case in ((expand, pooled), (reduce, per_token)):
    cosines = [cosine(*case, (1 - t) * digits + t * means) for t in alike]
    name = ", ".join(part.__name__ for part in case).replace("_", " ")
    ax.plot(alike, cosines, "o-", label=name)
    assert cosines[0] < 0.8
    assert cosines[-1] > 0.999
ax.set(xlabel="how alike the tokens are", ylabel="cosine to the exact step")
ax.set(title="The wrong choice also turns the step", ylim=(0, 1.05))
_ = ax.legend(loc="lower right")

# %%
# Only for equal tokens is the difference a mere factor.
#
# The library's answer
# --------------------
#
# ``kfac_approx`` chooses. All four combinations must be our matrices.


def by_library(approximation, setting):
    chosen = {**KFAC, "kfac_approx": approximation.__name__}
    optimizer = SINGD(net, **chosen)
    f = setting(net(digits))
    for e in torch.eye(3).double():
        f.backward(e.expand_as(f), retain_graph=True)
    optimizer.step()
    kept = optimizer.factors("0")
    return torch.kron(kept.G.dense(), kept.U.dense())


for approximation in (expand, reduce):
    for setting in (per_token, pooled):
        ours = approximation(*rows(digits, linear, setting))
        assert torch.allclose(by_library(approximation, setting), ours)

# %%
# When not to use this
# --------------------
#
# Without shared weights the two are the same. And beyond linear networks
# neither is exact: where positions meet halfway, as in attention, try both.
#
# .. admonition:: Lessons learned
#
#    - A shared layer's gradient is a sum over positions.
#    - *Expand*: a label per position, every position a row.
#    - *Reduce*: positions averaged before the loss, one row per example.
#    - The wrong one is off by about :math:`S`, and turns the step.
#
# .. admonition:: Exercise
#
#    Is *reduce* still exact if positions are summed instead of averaged?
#
# .. dropdown:: Solution
#
#    Yes. Every :math:`g_s` grows by :math:`S`, and so does their sum, in
#    :math:`F` as in :math:`G`.
#
#    .. code-block:: python
#
#        def summed(f):
#            return f.sum(1)
#
#
#        F, M = matrices(reduce, digits, linear, summed)
#        assert torch.allclose(F, M)
#
# .. admonition:: Exercise
#
#    A vision transformer reads its class off one token. In a linear network
#    without attention, take the output of token 3. Is one of the two exact?
#
# .. dropdown:: Solution
#
#    No. Only the :math:`a` of that token matters, and both average over all.
#
#    .. code-block:: python
#
#        def one_token(f):
#            return f[:, 3]
#
#
#        for approximation in (expand, reduce):
#            F, M = matrices(approximation, digits, linear, one_token)
#            assert (M - F).norm() > 0.1 * F.norm()
#
# Where to go next:
# :ref:`sphx_glr_auto_gallery_2_features_plot_27_weight_sharing.py` shows which
# layers share weights in the library;
# :ref:`sphx_glr_auto_gallery_0_course_plot_05_damping.py` asks how far to
# trust any of these matrices.
