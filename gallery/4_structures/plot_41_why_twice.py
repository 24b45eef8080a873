r"""
Why is the lower triangle doubled?
==================================

The projection of a triangular structure keeps the diagonal of a symmetric
matrix, and *doubles* what lies beside it. It looks like a mistake. It is the
solution of a least-squares problem, and without it the factors learn the
wrong direction. This page draws both.

.. admonition:: What you will learn

   - **Derive** the factor 2 from one line.
   - **Draw** the projection of every structure as a picture of factors.
   - **Test** a projection, with and without the 2.

   You should have read
   :ref:`sphx_glr_auto_gallery_4_structures_plot_40_zoo.py`; the same problem
   is solved in lesson 10,
   :ref:`sphx_glr_auto_gallery_0_course_plot_10_structures.py`.

One line
--------

:math:`K` is updated by :math:`K \leftarrow K (I - \beta_1 m)`. What counts is
:math:`K K^\top`, the approximate inverse, and it becomes

.. math::

   K (I - \beta_1 m)(I - \beta_1 m)^\top K^\top
   = K \left[ I - \beta_1 (m + m^\top) \right] K^\top + O(\beta_1^2) .

So only :math:`m + m^\top` matters. A dense factor takes
:math:`m = \tfrac12 N` with a symmetric :math:`N`. A structure should choose
the member whose :math:`m + m^\top` comes closest to :math:`N`, and call it
:math:`\tfrac12 P(N)`:

.. math::

   \tfrac12 P(N) = \operatorname*{arg\,min}_{M}
   \left\lVert (M + M^\top) - N \right\rVert_F
   \quad\text{over the members } M .

Where several members are equally close, it takes the smallest; more below.
"""

import matplotlib.pyplot as plt
import torch

from singd import registered_structures

SIZE = 10
COLOR = {"full triangle": "C6", "trilrank4first": "C6--"}
_ = torch.set_num_threads(1)
torch.manual_seed(0)
Y = torch.randn(SIZE, 4, dtype=torch.float64)
N = Y @ Y.T

# %%
# In pictures
# -----------
#
# A lower triangular :math:`M` and its transpose overlap only on the diagonal.
# Below it, one entry of :math:`M` has to do the work of two in the dense case.
# So :math:`M` needs all of :math:`N` there and half of it on the diagonal;
# :math:`P = 2 M` has twice :math:`N` there, and :math:`N` on the diagonal.

M = torch.tril(N, -1) + 0.5 * torch.diag(N.diag())
panels = (
    (N, "N, symmetric"),
    (M, "M = P(N) / 2"),
    (M.T, "its transpose"),
    (M + M.T, "their sum"),
)
fig, axes = plt.subplots(2, 2, figsize=(4.6, 5))
for ax, (matrix, title) in zip(axes.flat, panels):
    ax.imshow(matrix, cmap="RdBu_r", vmin=-6, vmax=6)
    ax.set(xticks=[], yticks=[], title=title)
_ = fig.suptitle("A triangle and its transpose rebuild N")
assert torch.allclose(M + M.T, N)

# %%
# The error as a curve
# --------------------
#
# Forget the derivation and try: multiply the entries beside the diagonal by
# some :math:`c`. **Before you run on:** where is the error smallest for the
# full triangle? And for the sparse ``trilrank4first``, which cannot rebuild
# :math:`N`?

zoo = registered_structures()
eye = zoo["trilrank4first"](SIZE, dtype=torch.float64)
sparse = eye.map(torch.ones_like).dense().tril(-1)  # the border, 1 or 0
corner = torch.zeros(SIZE, SIZE)
corner[:4, :4] = 1  # dense, so never doubled
factors = torch.linspace(0, 4, 81)


def error(c, beside, rest):
    P = N * (rest + c * beside)
    return (0.5 * (P + P.T) - N).norm().item()


full = torch.ones(SIZE, SIZE).tril(-1), torch.eye(SIZE)
border = sparse * (1 - corner)
rank4 = border, torch.maximum(torch.eye(SIZE), corner)
curves = {
    "full triangle": [error(c, *full) for c in factors],
    "trilrank4first": [error(c, *rank4) for c in factors],
}
fig, ax = plt.subplots(figsize=(5.4, 3.4))
for name, values in curves.items():
    ax.plot(factors, values, COLOR[name], label=name)
ax.axvline(2, color="C7", ls=":")
ax.set(xlabel="factor c beside the diagonal", ylabel="error of m + mᵀ")
ax.set_title("Both curves are lowest at c = 2")
_ = ax.legend()

# sphinx_gallery_start_ignore
for values in curves.values():
    c = factors[values.index(min(values))]
    assert abs(c - 2) < 1e-6
assert min(curves["full triangle"]) < 1e-12 < min(curves["trilrank4first"])
# sphinx_gallery_end_ignore

# %%
# Both are lowest at 2. The full triangle has no error left; the sparse one
# keeps the error of the entries that it has no room for.
#
# Every structure obeys the rule
# ------------------------------
#
# Solve the least-squares problem by brute force: the columns of a matrix are
# :math:`M + M^\top` for each stored number alone. Its pseudo-inverse gives the
# solution of *least norm*. Compare with ``project(Y)``, which returns
# :math:`P(Y Y^\top)` without forming it.


def solve(eye):
    """P(N), and a basis of the skew members."""
    units = torch.eye(eye.numel, dtype=torch.float64)
    basis = torch.stack([eye.from_flat(unit).dense() for unit in units])
    A = (basis + basis.mT).flatten(1).T
    least = torch.linalg.pinv(A) @ N.flatten()
    null = torch.linalg.svd(A).Vh[torch.linalg.matrix_rank(A) :]
    combine = (torch.tensordot(v, basis, 1) for v in null)
    return 2 * torch.tensordot(least, basis, 1), list(combine)


freedom = {}
for name, structure in zoo.items():
    eye = structure(SIZE, dtype=torch.float64)
    P, freedom[name] = solve(eye)
    assert torch.allclose(eye.project(Y).dense(), P)
    print(f"{name:18} as project(), {len(freedom[name]):2} skew members")

# %%
# Why least norm? The minimum is not unique: a **skew** member,
# :math:`S^\top = -S`, adds nothing to :math:`M + M^\top`. It would turn
# :math:`K` without changing :math:`K K^\top`, to first order. Diagonal and
# Toeplitz structures have no skew members, a dense one of size :math:`n` has
# :math:`n (n - 1) / 2`. :math:`P` takes the minimum without any :math:`S`:

M = zoo["dense"](SIZE, dtype=torch.float64).project(Y).dense() / 2
for S in freedom["dense"]:
    other = M + S
    assert torch.allclose(other + other.T, M + M.T)
    assert other.norm() > M.norm()

# sphinx_gallery_start_ignore
assert len(freedom["dense"]) == SIZE * (SIZE - 1) // 2
assert not any(freedom[n] for n in zoo if "toepl" in n or n == "diagonal")
for name, skew in freedom.items():
    half = zoo[name](SIZE, dtype=torch.float64).project(Y).dense() / 2
    assert all((S + S.T).abs().max() < 1e-9 for S in skew)
    assert all((half + S).norm() > half.norm() for S in skew)
# sphinx_gallery_end_ignore

# %%
# For a matrix of ones, the projection shows its factors: 1 where an entry has
# its mirror image in the structure (or is on the diagonal), 2 where it has to
# stand for both.

fig, axes = plt.subplots(-(-len(zoo) // 3), 3, figsize=(5.2, 7))
ones = torch.ones(SIZE, 1, dtype=torch.float64)
for ax, (name, structure) in zip(axes.flat, zoo.items()):
    P = structure(SIZE, dtype=torch.float64).project(ones).dense()
    ax.imshow(P, cmap="Blues", vmin=0, vmax=2.4)
    ax.set_title(name, fontsize=10, fontweight="normal")
    assert set(P.round(decimals=9).unique().tolist()) <= {0, 1, 2}
for ax in axes.flat:
    ax.set(xticks=[], yticks=[], frame_on=bool(ax.images))
_ = fig.suptitle("Pale: once. Dark: twice.")

# %%
# What it changes
# ---------------
#
# One update of a full triangle, from :math:`K = I`, against one of a dense
# factor. The smaller the step, the closer :math:`K K^\top` should be.

betas = torch.logspace(-3, -1, 7, dtype=torch.float64)
I = torch.eye(SIZE, dtype=torch.float64)


def distance(beta, c):
    dense = I - beta * 0.5 * (N - I)
    m = 0.5 * (torch.diag(N.diag()) + c * N.tril(-1) - I)
    triangle = I - beta * m
    return (triangle @ triangle.T - dense @ dense.T).norm().item()


fig, ax = plt.subplots(figsize=(5.4, 3.4))
slopes = {}
for c, label, look in ((2, "doubled", "C6o-"), (1, "not doubled", "C3o-")):
    values = [distance(beta, c) for beta in betas]
    ax.loglog(betas, values, look, label=label)
    logs = torch.tensor([values[0], values[2]]).log()
    slopes[c] = ((logs[1] - logs[0]) / (betas[2] / betas[0]).log()).item()
    print(f"{label}: slope {slopes[c]:.1f}")
ax.set(xlabel="step on the factor", ylabel="distance of K Kᵀ from dense")
ax.set_title("Doubled, the error is of second order")
_ = ax.legend()

# sphinx_gallery_start_ignore
assert abs(slopes[2] - 2) < 0.05
assert abs(slopes[1] - 1) < 0.05
# sphinx_gallery_end_ignore

# %%
# The slopes are 2 and 1. Without the factor the triangle moves in a different
# direction, and a smaller step does not cure it.
#
# When not to use this
# --------------------
#
# The rule is for *symmetric* :math:`N`. Never project a product such as
# :math:`K m_K`: it is a member already, and needs no projection.
#
# .. admonition:: Lessons learned
#
#    - Only :math:`m + m^\top` reaches :math:`K K^\top`.
#    - The projection is a least-squares problem over the members; of several
#      solutions it is the one of least norm, without a skew part.
#    - An entry without its mirror image has to count twice.
#
# .. admonition:: Exercise
#
#    Show that :math:`P` keeps the trace, for every structure that contains
#    the diagonal matrices.
#
# .. dropdown:: Solution
#
#    The diagonal entries are free, and each appears in :math:`M + M^\top` as
#    :math:`2 M_{ii}`. Least squares sets it to :math:`N_{ii}`. So
#    :math:`P(N)_{ii} = N_{ii}`. (Toeplitz members do not contain them, and
#    keep the trace as well.)
#
#    .. code-block:: python
#
#        for name, structure in zoo.items():
#            P = structure(SIZE, dtype=torch.float64).project(Y).dense()
#            torch.testing.assert_close(P.trace(), N.trace())
#            same = torch.allclose(P.diagonal(), N.diagonal())
#            assert same == ("toeplitz" not in name)
#
# Where to go next: which patterns are allowed at all
# (:ref:`sphx_glr_auto_gallery_4_structures_plot_42_closure.py`), the list of
# all projections (:doc:`/structures`), the derivation (:doc:`/concepts`).
