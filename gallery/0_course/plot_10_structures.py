r"""
Lesson 10: Which sets of matrices can one stay in?
==================================================

A dense :math:`K` has as many numbers as the square of the layer's inputs. We
want fewer. But :math:`K` is multiplied in every update. Which sets does that
leave alone? This lesson finds out, and sees what they cost in bfloat16.

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
from singd.rules import Kfac

_ = torch.set_num_threads(1), torch.manual_seed(0)
N = 12
i, j = torch.meshgrid(torch.arange(N), torch.arange(N), indexing="ij")

# %%
# **Before you run on:** here are four sets. In which of them is the product of
# two members a member? And the inverse of one?


def member(pattern, tied=False):
    """A random matrix that is zero off the pattern."""
    noise = torch.randn(N)[(j - i).abs()] if tied else torch.randn(N, N)
    return torch.eye(N) + 0.5 * noise * pattern


SETS = {
    "tridiagonal": lambda: member((i - j).abs() <= 1),
    "blocks": lambda: member(i // 4 == j // 4),
    "half an arrow": lambda: member((i < 3) | (i == j)),
    "Toeplitz": lambda: member(j >= i, tied=True),
}
# sphinx_gallery_thumbnail_number = 1
fig, axes = plt.subplots(3, 4, figsize=(5.5, 4.6))
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
# The other three are subalgebras. (Toeplitz ones keep equal diagonals, too.)
# Draw one yourself:
#
# .. interactive:: closure
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
for name, build in registered_structures().items():
    eye = build(N, dtype=torch.float64)
    units = torch.eye(eye.numel, dtype=torch.float64)
    members = torch.stack([eye.from_flat(u).dense() for u in units])
    both = (members + members.mT).flatten(1).T
    least = torch.linalg.pinv(both) @ (Y @ Y.T).flatten()
    P = 2 * torch.tensordot(least, members, 1)
    torch.testing.assert_close(eye.project(Y).dense(), P)
    skew = eye.numel - torch.linalg.matrix_rank(both)
    print(f"{name:20} {eye.numel:4} numbers, {skew:3} skew members")

# %%
# Toeplitz and diagonal structures have no skew members, so their :math:`P` is
# the only choice. In a dense block, the freedom is a rotation of :math:`K`,
# which :math:`K K^\top` does not show to first order.
#
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


def updated(K, C, m, pattern, U, G):
    """K after an update, and its momentum m; U belongs to K, G to C."""
    H = (C.T @ G @ C).diag().mean() * K.T @ U @ K
    H += 0.01 * (C.T @ C).diag().mean() * K.T @ K
    m = 0.5 * m + 0.5 * (project(H, pattern) - torch.eye(len(K)))
    return K - 0.1 * K @ m, m


layer, name = nn.Linear(64, 10).double(), "hierarchical4_4"
options = {**PUBLISHED, "lr": 0.0, "damping": 0.01, "T": 1, "lr_cov": 0.1}
optimizer = SINGD(layer, **options | {"structures": (name, name)})
K, C = torch.eye(65).double(), torch.eye(10).double()
patterns = [structure(name)(len(M)).map(torch.ones_like) for M in (K, C)]
for_K, for_C = (p.dense() != 0 for p in patterns)
m_K = m_C = 0
for batch in torch.arange(640).split(64):
    a = nn.functional.pad(x[batch].double(), (0, 1), value=1)
    output = layer(a[:, :-1])
    output.retain_grad()
    nn.functional.cross_entropy(output, labels[batch]).backward()
    optimizer.step()
    U, G = a.T @ a / 64, 64 * output.grad.T @ output.grad
    new = updated(K, C, m_K, for_K, U, G)
    C, m_C = updated(C, K, m_C, for_C, G, U)
    K, m_K = new
torch.testing.assert_close(optimizer.factors(layer).K.dense(), K)
torch.testing.assert_close(optimizer.factors(layer).C.dense(), C)
print("ours and the library's factors agree")

# %%
# Loss against damping, in bfloat16
# ---------------------------------
#
# A small network, 80 steps, with factors in float32 and in bfloat16. KFAC
# stands beside; in bfloat16 it inverts there, too.

COLOR = {"dense": "C0", "block8diagonal": "C4", "diagonal": "C9", "KFAC": "C2"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DAMPINGS = (1e-8, 1e-6, 1e-4, 1e-2)


def train(name, damping, dtype, steps=80):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    options = {**PUBLISHED, "lr": 2e-3, "damping": damping, "T": 1}
    options |= {"lr_cov": 0.2, "preconditioner_dtype": dtype}
    if name == "KFAC":
        options["rule"] = Kfac(inverse_dtype=dtype)
    else:
        options |= {"structures": (name, name), "normalize_lr_cov": True}
    optimizer = SINGD(model, **options)
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
    kB = sum(t.nbytes for t in kept) / 1e3
    return sum(losses[-20:]) / 20, kB, 1e3 * seconds / steps


fig, axes = plt.subplots(1, 2, figsize=(5.5, 3.8), sharey=True)
runs = {}
for ax, (title, dtype) in zip(axes, DTYPES.items()):
    for name, color in COLOR.items():
        runs[name, title] = [train(name, d, dtype) for d in DAMPINGS]
        loss = [run[0] for run in runs[name, title]]
        ax.loglog(DAMPINGS, loss, "o-", label=name, color=color)
    ax.set(xlabel="damping", title=title, ylim=(0.005, 2e3))
axes[0].set_ylabel("training loss")
_ = axes[0].legend()

# sphinx_gallery_start_ignore
loss = {key: torch.tensor([r[0] for r in rows]) for key, rows in runs.items()}
ratio = {n: loss[n, "bfloat16"] / loss[n, "float32"] for n in COLOR}
assert ratio["KFAC"][0] > 10
assert all(loss[n, "bfloat16"].max() < 1 for n in list(COLOR)[1:3])
assert all((ratio[n][2:].log().abs() < 0.3).all() for n in COLOR)
assert min(loss[n, "bfloat16"].min() for n in COLOR) < 0.04
assert loss["KFAC", "bfloat16"].argmin() == 2
dense, blocks, diagonal = (loss[n, "bfloat16"][2] for n in list(COLOR)[:3])
assert loss["KFAC", "bfloat16"][2] < dense < min(blocks, diagonal)
# sphinx_gallery_end_ignore

# %%
# From :math:`10^{-4}` on, both panels agree. At :math:`10^{-4}` KFAC is
# lowest, and of the structures the dense one. With far less damping, KFAC in
# bfloat16 explodes. Dense SINGD suffers (with other seeds, it may explode as
# well). Blocks and the diagonal still train. One reason: the eigenvalues of a
# block lie inside the range of the whole matrix, so rounding has less to
# destroy.
#
# What does it cost?

fig, axes = plt.subplots(1, 2, figsize=(5.5, 2.8), sharey=True)
for ax, column, label in zip(axes, (1, 2), ("kB kept", "CPU ms per step")):
    values = [runs[name, "bfloat16"][2][column] for name in COLOR]
    bars = ax.barh(list(COLOR), values, color=list(COLOR.values()))
    ax.bar_label(bars, fmt=" %.2g")
    ax.set(xlabel=label, xlim=(0, 1.2 * max(values)))
axes[0].invert_yaxis()
_ = fig.suptitle("Structures save much memory, and less time")

# sphinx_gallery_start_ignore
for name in COLOR:
    assert runs[name, "float32"][2][1] == 2 * runs[name, "bfloat16"][2][1]
_, kept, times = zip(*(runs[name, "bfloat16"][2] for name in COLOR))
assert kept[2] < 0.02 * kept[0]
assert kept[1] < 0.15 * kept[0]
assert times[2] > 0.1 * times[0]
# sphinx_gallery_end_ignore

# %%
# These are bytes of bfloat16, half of float32's. Time falls far less, as
# the layers are tiny.
#
# When not to use this
# --------------------
#
# Where layers have a few hundred inputs, dense factors cost little.
#
# .. admonition:: Lessons learned
#
#    - A structure is a subalgebra; inverses come for free.
#    - :math:`P` fits :math:`M + M^\top`; skew members are left out.
#    - Structures trade loss for memory.
#    - In bfloat16, take enough damping, or a small structure.
#
# .. admonition:: Exercise
#
#    Symmetric matrices are closed under sums and inverses. Are they a
#    structure? If not, give two that show it.
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
#    :math:`(i, j)`. Are they a structure? What is the first row of a product?
#
# .. dropdown:: Solution
#
#    Yes: all are sums of powers of the cyclic shift. First rows are convolved.
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
#        row = torch.fft.ifft(torch.fft.fft(v) * torch.fft.fft(w)).real
#        torch.testing.assert_close((circulant(v) @ circulant(w))[0], row)
#
# Where to go next: this was the last lesson.
# :ref:`sphx_glr_auto_gallery_4_structures_plot_42_closure.py` cuts products
# that leave a set,
# :ref:`sphx_glr_auto_gallery_4_structures_plot_44_choosing.py` compares
# structures on a larger task, and :doc:`/structures` lists them.
