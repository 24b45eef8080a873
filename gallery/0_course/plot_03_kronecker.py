r"""
Lesson 3: Blocks and Kronecker products: what is thrown away?
=============================================================

The Fisher matrix of a million weights has :math:`10^{12}` entries. KFAC keeps
two small matrices for each layer. On a network so small that :math:`F` fits
into a picture, this lesson shows what is lost, and when nothing is.

.. admonition:: What you will learn

   - **Derive** KFAC's factors from the gradient of one example.
   - **Measure** what each of its two simplifications throws away.
   - **Prove** when the second one is exact.

   You need
   :ref:`sphx_glr_auto_gallery_0_course_plot_02_four_matrices.py`; the library
   part uses :class:`~singd.SINGD`.

One example's gradient is a product
-----------------------------------

A layer computes :math:`z = W a`. With a 1 appended to :math:`a`, the last
column of :math:`W` is the bias. Let :math:`g = \partial \ell / \partial z`.
The gradient of :math:`W` is :math:`g a^\top`. Read row by row, as torch stores
it, this is the **Kronecker product** :math:`g \otimes a`: every entry of the
first times the whole second. So the layer's block of :math:`F` is

.. math::

   \mathbb{E}\left[ (g \otimes a)(g \otimes a)^\top \right]
   = \mathbb{E}\left[ g g^\top \otimes a a^\top \right] .

**KFAC** simplifies twice. It drops the blocks between different layers. And it
takes the mean of the product for the product of the means,

.. math::

   \mathbb{E}\left[ g g^\top \otimes a a^\top \right] \approx G \otimes U ,
   \qquad G = \mathbb{E}[g g^\top] , \quad U = \mathbb{E}[a a^\top] .

With 1,000 inputs and outputs these are :math:`2 \cdot 10^6` numbers instead
of :math:`10^{12}`, and the inverse falls into two small ones:

.. math::

   (G \otimes U)^{-1} (g \otimes a) = (G^{-1} g) \otimes (U^{-1} a)
   \quad\text{so}\quad N = G^{-1} \, \nabla_W \ell \; U^{-1} .
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_iris
from torch import nn
from torch.func import jacrev, vmap

from singd import PUBLISHED, SINGD

STEPS = 20
KFAC = {**PUBLISHED, "rule": "kfac", "lr": 0.0, "loss_average": None}
_ = torch.set_num_threads(1)
_ = torch.manual_seed(0)
data, kinds = map(torch.tensor, load_iris(return_X_y=True))
flowers = (data - data.mean(0)) / data.std(0)

# %%
# From scratch
# ------------
#
# Instead of summing over labels, send vectors :math:`r_c` backward that
# satisfy :math:`\sum_c r_c r_c^\top = H`, the second moment of lesson 2:
# :math:`\sqrt{p_c} \, (p - e_c)` for softmax, unit vectors for a Gaussian.


def softmax(f):
    p = f.softmax(1)
    unit = torch.eye(f.shape[1]).double()
    return [p[:, c : c + 1].sqrt() * (p - e) for c, e in enumerate(unit)]


def gaussian(f):
    return [e.expand_as(f) for e in torch.eye(f.shape[1]).double()]


def rows(weights, act, likelihood, x):
    """The inputs a (n, d_i) and the gradients g (c, n, d_o) of all layers."""
    a, z = [], []
    for W in weights:
        a.append(torch.cat([x, torch.ones_like(x[:, :1])], 1))
        z.append(a[-1] @ W.T)
        x = act(z[-1])
    vectors = likelihood(z[-1].detach())
    g = [torch.autograd.grad(z[-1], z, r, retain_graph=True) for r in vectors]
    return [v.detach() for v in a], [torch.stack(v) for v in zip(*g)]


def exact(a, g):
    each = [torch.einsum("cno,ni->cnoi", *v).flatten(2) for v in zip(g, a)]
    R = torch.cat(each, 2).flatten(0, 1)  # one gradient per row
    return R.T @ R / len(a[0])


def kfac(a, g):
    n = len(a[0])
    U = [v.T @ v / n for v in a]
    G = [torch.einsum("cno,cnp->op", v, v) / n for v in g]
    return torch.block_diag(*[torch.kron(*v) for v in zip(G, U)])


# %%
# A network with 64 weights, trained for a few steps on Fisher's own irises.

tanh = nn.Tanh()
net = [nn.Linear(4, 5), tanh, nn.Linear(5, 4), tanh, nn.Linear(4, 3)]
net = nn.Sequential(*net).double()
sgd = torch.optim.SGD(net.parameters(), lr=0.3)
for _ in range(STEPS):
    sgd.zero_grad()
    nn.functional.cross_entropy(net(flowers), kinds).backward()
    sgd.step()

layers = {name: net.get_submodule(name) for name in ("0", "2", "4")}
weights = [torch.cat([v.weight, v.bias[:, None]], 1) for v in layers.values()]
a, g = rows(weights, torch.tanh, softmax, flowers)
F, K = exact(a, g), kfac(a, g)

# %%
# Is :math:`F` right? Check it against the Gauss-Newton matrix of lesson 2.


def network(weights, x):
    for W in weights[:-1]:
        x = torch.tanh(W[:, :-1] @ x + W[:, -1])
    return weights[-1][:, :-1] @ x + weights[-1][:, -1]


J = vmap(jacrev(network), (None, 0))(weights, flowers)
J = torch.cat([v.flatten(2) for v in J], 2)
p = net(flowers).softmax(1)
H = torch.diag_embed(p) - p[:, :, None] * p[:, None]
assert torch.allclose(F, torch.einsum("nci,ncd,ndj->ij", J, H, J) / len(p))

# %%
# The picture to keep
# -------------------
#
# A row and a column for each weight; red is positive, blue negative. (Colours
# show the root of an entry, so that small ones are seen.)

ends = torch.tensor([len(w.flatten()) for w in weights]).cumsum(0).tolist()
spans = [slice(*v) for v in zip([0, *ends], ends)]
blocks = torch.block_diag(*[F[s, s] for s in spans])


def draw(title, **matrices):
    fig, axes = plt.subplots(1, 2, figsize=(5.5, 3.4))
    for ax, (name, M) in zip(axes, matrices.items()):
        shown = (M.sign() * M.abs().sqrt()).detach()
        ax.imshow(shown, cmap="RdBu_r", vmin=-0.4, vmax=0.4)
        ax.set(xticks=[], yticks=[], title=name.replace("_", " "))
        for end in ends[:-1]:
            ax.axhline(end - 0.5, color="0.6", linewidth=0.8)
            ax.axvline(end - 0.5, color="0.6", linewidth=0.8)
    _ = fig.suptitle(title)


draw("First, what couples layers goes", exact=F, blocks=blocks)

# %%
# Then each block becomes one Kronecker product. Right is what that gets wrong.

draw("Then, what couples a and g goes", Kronecker=K, error=K - blocks)
between = ((blocks - F).norm() / F.norm()).item()
within = ((K - blocks).norm() / blocks.norm()).item()
print(f"error by dropping blocks between layers: {between:.0%}")
print(f"error by Kronecker products in the rest: {within:.0%}")
# sphinx_gallery_start_ignore
assert min(between, within) > 0.3
# sphinx_gallery_end_ignore

# %%
# Neither is small. Lesson 6 trains with it all the same.
#
# When is a Kronecker product exact?
# ----------------------------------
#
# When :math:`g g^\top` and :math:`a a^\top` are uncorrelated.
#
# *One example.* There is one :math:`a`, a constant, so that
# :math:`\mathbb{E}[g g^\top \otimes a a^\top]
# = \mathbb{E}[g g^\top] \otimes a a^\top`.
#
# *A deep linear network with square loss.* The layers behind :math:`z` form
# one matrix :math:`B`, so :math:`g = B^\top r`. The true Fisher has
# :math:`\mathbb{E}_y[r r^\top] = H = I`, hence
#
# .. math::
#
#    \mathbb{E}_y[g g^\top] = B^\top B \quad\text{for every } x ,
#
# a constant. With the labels of the data, :math:`r = f - y` is large for some
# :math:`x` and small for others.
#
# **Before you run on:** we measure the error inside the blocks for four cases.
# Which bars will be zero?


def empirical(f):
    return [f - nn.functional.one_hot(kinds)]


def linear(z):
    return z


cases = {
    "tanh, softmax": (torch.tanh, softmax, flowers),
    "the same, one flower": (torch.tanh, softmax, flowers[:1]),
    "linear, square": (linear, gaussian, flowers),
    "the same, empirical": (linear, empirical, flowers),
}
fig, ax = plt.subplots(figsize=(5.5, 3.8))
errors = torch.zeros(4, 3)
for i, case in enumerate(cases.values()):
    a, g = rows(weights, *case)
    M, approximation = exact(a, g), kfac(a, g)
    for j, s in enumerate(spans):
        gap = approximation[s, s] - M[s, s]
        errors[i, j] = (gap.norm() / M[s, s].norm()).item()
for j in range(3):
    at = torch.arange(4) + 0.27 * (j - 1)
    bars = ax.bar(at, errors[:, j], width=0.25, label=f"layer {j + 1}")
    ax.bar_label(bars, fmt="%.1f", fontsize=9)
ax.set_xticks(range(4), [name.replace(", ", ",\n") for name in cases])
ax.set(ylabel="relative error in the block", ylim=(0, 1.2 * errors.max()))
ax.set_title("Exact in two of four cases")
_ = ax.legend()

assert errors[1:3].max() < 1e-12
assert errors[[0, 3]].min() > 0.05

# %%
# The library's answer
# --------------------
#
# The rule ``kfac`` takes all backward passes before a step together. We send
# our :math:`r_c` into ``backward``. With ``loss_average=None``, :math:`G` is
# the sum over the 150 flowers, so we divide.

optimizer = SINGD(net, **KFAC)
f = net(flowers)
for r in softmax(f.detach()):
    f.backward(r, retain_graph=True)
optimizer.step()
kept = [optimizer.factors(name) for name in layers]
products = [torch.kron(v.G.dense() / 150, v.U.dense()) for v in kept]
assert torch.allclose(torch.block_diag(*products), K)

# %%
# When not to use this
# --------------------
#
# With few weights, take :math:`F` itself. Where a layer is applied at many
# positions, one example has many :math:`a` and :math:`g`: see lesson 4.
#
# .. admonition:: Lessons learned
#
#    - One example's gradient is a Kronecker product, :math:`g \otimes a`.
#    - KFAC drops blocks between layers, and what couples :math:`a` and
#      :math:`g`.
#    - It is exact in its blocks for one example, and for deep linear networks
#      with square loss: the true Fisher, not the empirical one.
#    - Two small inverses replace a large one.
#
# .. admonition:: Exercise
#
#    Apply :math:`(G \otimes U + 0.1 I)^{-1}` to some matrix :math:`V`, without
#    any matrix larger than :math:`G` and :math:`U`.
#
# .. dropdown:: Solution
#
#    In the eigenvectors of :math:`G` and :math:`U` all is diagonal: divide
#    entry :math:`(i, j)` by :math:`g_i u_j + 0.1`.
#
#    .. code-block:: python
#
#        G, U = kept[2].G.dense() / 150, kept[2].U.dense()
#        V = torch.randn(3, 5).double()
#        (g_i, Q), (u_j, R) = torch.linalg.eigh(G), torch.linalg.eigh(U)
#        ours = Q @ ((Q.T @ V @ R) / (g_i[:, None] * u_j + 0.1)) @ R.T
#        large = torch.kron(G, U) + 0.1 * torch.eye(15)
#        theirs = torch.linalg.solve(large, V.flatten()).view(3, 5)
#        assert torch.allclose(ours, theirs)
#
# .. admonition:: Exercise
#
#    Is :math:`G \otimes U` the Kronecker product nearest to the last block?
#    Order the entries so that Kronecker products become matrices of rank one.
#
# .. dropdown:: Solution
#
#    No. The best matrix of rank one leaves the other singular values as error.
#
#    .. code-block:: python
#
#        block = F[spans[2], spans[2]].detach()
#        moved = block.view(3, 5, 3, 5).permute(0, 2, 1, 3).reshape(9, 25)
#        best = torch.linalg.svdvals(moved)[1:].norm()
#        ours = (K[spans[2], spans[2]] - block).norm()
#        print(f"nearest {best:.2f}, KFAC {ours:.2f}")
#        assert best < 0.9 * ours
#
# Where to go next:
# :ref:`sphx_glr_auto_gallery_0_course_plot_04_shared_weights.py`, and for
# one page on how KFAC becomes SINGD, :doc:`/concepts`.
