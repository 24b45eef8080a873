r"""
Lesson 10. Which sets of matrices can one stay in?
==================================================

A dense :math:`K` has as many numbers as the square of the layer's inputs. We
want fewer. But :math:`K` is multiplied in every update. So which sets of small
matrices does that leave alone? This last lesson finds them, fits the update
into them, and sees what they cost in bfloat16.

.. admonition:: What you will learn

   - **Tell** which sets of matrices no update leaves.
   - **Derive** the projection :math:`P`, and its one freedom.
   - **Weigh** structures by loss, memory and time.

   You should have read
   :ref:`sphx_glr_auto_gallery_0_course_plot_09_two_factors_one_scale.py`.

Closed sets
-----------

The update is :math:`K (I - \beta_1 m_K)`, or :math:`K e^{-\beta_1 m_K}`. It
takes sums, multiples and products. A set that contains :math:`I` and is closed
under all three is a **subalgebra**; singd calls it a **structure**. What about
inverses, which the group of the last lessons had? They come for free. By
Cayley and Hamilton, every matrix satisfies

.. math::

   M^n + c_{n-1} M^{n-1} + \dots + c_1 M + c_0 I = 0 , \qquad
   c_0 = \pm \det M .

If :math:`\det M \neq 0`, multiply by :math:`M^{-1}` and divide by
:math:`c_0`:

.. math::

   M^{-1} = - \tfrac{1}{c_0}
   \left( M^{n-1} + c_{n-1} M^{n-2} + \dots + c_1 I \right) ,

a sum of products of members.
"""

import time

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from singd import PUBLISHED, SINGD, registered_structures, structure

_ = torch.set_num_threads(1)
_ = torch.manual_seed(0)
N = 12
i, j = torch.meshgrid(torch.arange(N), torch.arange(N), indexing="ij")

# %%
# **Before you run on:** here are four sets. In which of them is the product of
# two members a member? And the inverse of one?


def member(pattern):
    """A random, well-conditioned matrix that is zero off the pattern."""
    return torch.eye(N) + 0.5 * torch.randn(N, N) * pattern


def toeplitz():
    values = torch.cat([torch.ones(1), 0.4 * torch.randn(N - 1)])
    return values[(j - i).clamp(min=0)] * (j >= i)


SETS = {
    "tridiagonal": lambda: member((i - j).abs() <= 1),
    "blocks": lambda: member(i // 4 == j // 4),
    "half an arrow": lambda: member((i < 3) | (i == j)),
    "Toeplitz": toeplitz,
}
# sphinx_gallery_thumbnail_number = 1
fig, axes = plt.subplots(3, 4, figsize=(6.4, 5))
for (name, draw), column in zip(SETS.items(), axes.T):
    A, B = draw().double(), draw().double()
    rows = {"member": A, "product": A @ B, "inverse": torch.linalg.inv(A)}
    for ax, M in zip(column, rows.values()):
        ax.imshow(M.abs() > 1e-12, cmap="Blues", vmin=0, vmax=1.4)
        ax.set(xticks=[], yticks=[])
    column[0].set_title(name)
    off = [((M.abs() > 1e-12) & (A == 0)).any() for M in rows.values()]
    assert any(off) == (name == "tridiagonal")
for ax, row in zip(axes[:, 0], rows):
    ax.set_ylabel(row)

# %%
# The tridiagonal set is left by the first product, and its inverses are full.
# The other three are subalgebras. (Toeplitz ones also repeat one number along
# each diagonal; that is kept, too.)
#
# The projection
# --------------
#
# :math:`m_K = \tfrac12 N` is symmetric and dense. Which member :math:`M`
# should take its place? Only :math:`K K^\top` matters, and there
#
# .. math::
#
#    K (I - \beta_1 M)(I - \beta_1 M)^\top K^\top
#    = K \left[ I - \beta_1 (M + M^\top) \right] K^\top + O(\beta_1^2) .
#
# So :math:`M + M^\top` should come close to :math:`N`:
#
# .. math::
#
#    \tfrac12 P(N) = \operatorname*{arg\,min}_{M}
#    \left\lVert (M + M^\top) - N \right\rVert_F
#    \quad \text{over the members } M .
#
# One freedom is left. A **skew** member, :math:`S^\top = -S`, can be added to
# :math:`M` and nothing changes. :math:`P` takes the solution of least norm. We
# find it by brute force, for every registered structure.

Y = torch.randn(N, 5, dtype=torch.float64)
print("structure           numbers  skew members")
for name, build in registered_structures().items():
    eye = build(N, dtype=torch.float64)
    units = torch.eye(eye.numel, dtype=torch.float64)
    members = torch.stack([eye.from_flat(u).dense() for u in units])
    both = (members + members.mT).flatten(1).T
    least = torch.linalg.pinv(both) @ (Y @ Y.T).flatten()
    P = 2 * torch.tensordot(least, members, 1)
    torch.testing.assert_close(eye.project(Y).dense(), P)
    skew = eye.numel - torch.linalg.matrix_rank(both)
    print(f"{name:20} {eye.numel:6} {skew:13}")

# %%
# Triangular Toeplitz and diagonal members have no skew ones, so that their
# :math:`P` is the only choice. In a dense block, the freedom is a rotation of
# :math:`K`. Here is one such direction :math:`S`:

M = 0.5 * Y @ Y.T
S = torch.randn(N, N, dtype=torch.float64)
S = S - S.T
ts = torch.linspace(-1, 1, 41)
moved = [M + t * S for t in ts]
error = torch.stack([(m + m.T - Y @ Y.T).norm() for m in moved])
norm = torch.stack([m.norm() for m in moved])
fig, ax = plt.subplots(figsize=(6, 3.2))
ax.plot(ts, error, "C3", label="error of M + Mᵀ")
ax.plot(ts, norm, "C0", label="norm of M")
ax.plot(0, M.norm(), "C0o", label="what P takes")
ax.set(xlabel="t, in M + t S", ylim=(-2, None))
ax.set_title("Skew members change the norm, not the error")
ax.legend()
assert error.max() < 1e-12
assert norm.argmin() == 20

# %%
# From scratch
# ------------
#
# For a pattern of zeros the projection is one line: keep what is in the
# pattern, and double an entry whose mirror image is not. With it, SINGD in any
# pattern takes a dozen lines, and the library agrees.

digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)


def project(M, pattern):
    return torch.where(pattern & ~pattern.T, 2, 1) * pattern * M


def update(K, C, m, pattern, U, other, damping, beta):
    """One update of K; `other` is the second moment that belongs to C."""
    H_C, CC = C.T @ other @ C, C.T @ C
    bracket = H_C.diag().mean() * K.T @ U @ K
    bracket = bracket + damping * CC.diag().mean() * K.T @ K
    m = 0.5 * m + 0.5 * (project(bracket, pattern) - torch.eye(len(K)))
    return K - beta * K @ m, m


name = "hierarchical4_4"
layer = nn.Linear(64, 10).double()
options = {**PUBLISHED, "lr": 0.0, "alpha1": 0.5, "damping": 0.01}
options |= {"T": 1, "lr_cov": 0.1, "structures": (name, name)}
optimizer = SINGD(layer, rule="singd", **options)
eyes = [structure(name)(n, dtype=torch.float64) for n in (65, 10)]
masks = [e.map(torch.ones_like).dense() != 0 for e in eyes]
K, C = (e.dense() for e in eyes)
m_K, m_C = torch.zeros_like(K), torch.zeros_like(C)
for batch in torch.arange(640).split(64):
    output = layer(x[batch].double())
    output.register_hook(lambda grad: moments.append(64 * grad.T @ grad))
    a = nn.functional.pad(x[batch].double(), (0, 1), value=1)
    moments = [a.T @ a / 64]
    nn.functional.cross_entropy(output, labels[batch]).backward()
    optimizer.step()
    U, G = moments
    new_K, m_K = update(K, C, m_K, masks[0], U, G, 0.01, 0.1)
    C, m_C = update(C, K, m_C, masks[1], G, U, 0.01, 0.1)
    K = new_K
torch.testing.assert_close(optimizer.factors(layer).K.dense(), K)
torch.testing.assert_close(optimizer.factors(layer).C.dense(), C)
print("ours and the library's factors agree")

# %%
# Loss against damping, in bfloat16
# ---------------------------------
#
# A small network, 80 steps, factors in float32 and in bfloat16. KFAC stands
# beside; its :math:`\lambda` is not SINGD's, as a root is taken of it.

STYLE = {
    "dense": {"color": "C0", "marker": "o"},
    "block8diagonal": {"color": "C5", "marker": "s"},
    "diagonal": {"color": "C9", "marker": "v"},
    "KFAC": {"color": "C2", "marker": "x"},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DAMPINGS = (1e-6, 1e-4, 1e-2, 1e-1)


def train(name, damping, dtype, steps=80):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    rule, kind = ("kfac", "dense") if name == "KFAC" else ("singd", name)
    options = {**PUBLISHED, "lr": 2e-3, "damping": damping, "T": 1}
    options |= {"structures": (kind, kind), "preconditioner_dtype": dtype}
    options |= {"lr_cov": 0.2, "normalize_lr_cov": rule == "singd"}
    optimizer = SINGD(model, rule=rule, **options)
    losses, start = [], time.process_time()
    for _ in range(steps):
        batch = torch.randint(0, 1797, (64,))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    seconds = time.process_time() - start
    kept = [t for k in "02" for f in optimizer.factors(k) for t in f.tensors()]
    size = sum(t.nbytes for t in kept)
    return sum(losses[-20:]) / 20, size / 1e3, 1e3 * seconds / steps


fig, axes = plt.subplots(1, 2, figsize=(7.4, 3.8), sharey=True)
runs = {}
for ax, (title, dtype) in zip(axes, DTYPES.items()):
    for name, style in STYLE.items():
        runs[name, title] = [train(name, d, dtype) for d in DAMPINGS]
        loss = [run[0] for run in runs[name, title]]
        ax.loglog(DAMPINGS, loss, label=name, **style)
    ax.set(xlabel="damping", title=title, ylim=(0.02, 10))
axes[0].set_ylabel("training loss")
_ = axes[0].legend()

# sphinx_gallery_start_ignore
for name in STYLE:
    for wide, half in list(zip(runs[name, "float32"], runs[name, "bfloat16"]))[
        2:
    ]:
        assert abs(half[0] / wide[0] - 1) < 0.1
loss = {name: [run[0] for run in runs[name, "bfloat16"]] for name in STYLE}
assert loss["dense"][2] < loss["block8diagonal"][2] < loss["diagonal"][2]
assert min(values[3] for values in loss.values()) > 2 * loss["KFAC"][2]
# sphinx_gallery_end_ignore

# %%
# At the right, where damping is large, both panels agree: rounding changes
# nothing, and too much damping makes a slow method of all. At the left, less
# damping trusts curvature that one batch has not seen. There rounding moves
# the results, in either direction.
#
# With 0.01, the more a structure can hold, the lower the loss. What does it
# cost?

fig, axes = plt.subplots(1, 2, figsize=(7.4, 3.2))
for ax, column, label in zip(axes, (1, 2), ("kB kept", "CPU ms per step")):
    for shift, (title, color) in enumerate(zip(DTYPES, ("C7", "C0"))):
        values = [runs[name, title][2][column] for name in STYLE]
        places = torch.arange(4) + 0.4 * shift
        ax.barh(places, values, 0.4, color=color, label=title)
    ax.set_yticks(torch.arange(4) + 0.2, STYLE)
    ax.set(xlabel=label)
    ax.invert_yaxis()
axes[0].set_title("Half the bytes")
axes[1].set_title("No time saved on a CPU")
axes[0].legend()

# sphinx_gallery_start_ignore
for name in STYLE:
    if name != "KFAC":
        assert runs[name, "float32"][2][1] == 2 * runs[name, "bfloat16"][2][1]
kept = [runs[name, "bfloat16"][2][1] for name in STYLE][:3]
assert kept[2] < 0.02 * kept[0]
assert kept[1] < 0.15 * kept[0]
# sphinx_gallery_end_ignore

# %%
# Memory falls with the structure and with the dtype. Time does not, here: the
# layers are tiny, and this CPU has no fast bfloat16 products.
#
# When not to use this
# --------------------
#
# Where layers have a few hundred inputs, dense factors cost little. Take
# structures when memory or time is short.
#
# .. admonition:: Lessons learned
#
#    - A structure is a subalgebra; inverses come for free.
#    - :math:`P` fits :math:`M + M^\top`; skew members are left out.
#    - Structures trade loss for memory.
#    - Damping decides whether bfloat16 is felt.
#
# .. admonition:: Exercise
#
#    Symmetric matrices are closed under sums and inverses. Are they a
#    structure?
#
# .. dropdown:: Solution
#
#    No: a product of two is symmetric only if they commute.
#
#    .. code-block:: python
#
#        A, B = (torch.randn(4, 4, dtype=torch.float64) for _ in range(2))
#        A, B = A + A.T, B + B.T
#        torch.testing.assert_close(torch.linalg.inv(A).T, torch.linalg.inv(A))
#        assert ((A @ B).T - A @ B).norm() > 0.1
#
# .. admonition:: Exercise
#
#    A circulant matrix has the entry :math:`v_{(j - i) \bmod n}` at
#    :math:`(i, j)`. Are circulant matrices a structure?
#
# .. dropdown:: Solution
#
#    Yes. All are sums of powers of one matrix, the cyclic shift.
#
#    .. code-block:: python
#
#        def circulant(v):
#            return v[(j - i) % N]
#
#
#        v, w = torch.randn(2, N, dtype=torch.float64)
#        for M in (circulant(v) @ circulant(w), circulant(v).inverse()):
#            torch.testing.assert_close(M, circulant(M[0]))
#
# Where to go next: this was the last lesson.
# :ref:`sphx_glr_auto_gallery_4_structures_plot_42_closure.py` cuts products
# that leave a set, :ref:`sphx_glr_auto_gallery_4_structures_plot_44_choosing.py`
# compares structures on a larger task, :doc:`/structures` lists them, and
# :ref:`sphx_glr_auto_gallery_1_start_plot_10_first_steps.py` trains a CNN.
