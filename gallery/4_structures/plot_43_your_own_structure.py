r"""
Can you invent a structure? One class, and its laws
===================================================

In an image, all rows look alike: the left neighbour of a pixel tells the same
about it, in whichever row. So let all rows share one small block,
:math:`K = I \otimes B`. No such structure is registered. This page writes it,
tests it by the laws of structures, and trains with it.

.. admonition:: What you will learn

   - **Write** a structure of seven short members.
   - **Run** the laws that every structure must obey.
   - **Register** it, and train with it by its name.

   You should have read
   :ref:`sphx_glr_auto_gallery_4_structures_plot_42_closure.py`.

The structure
-------------

Members are block diagonal with the *same* :math:`k \times k` block
:math:`B` everywhere. The set is closed, since
:math:`(I \otimes B)(I \otimes D) = I \otimes BD`. The projection comes from

.. math::

   \tfrac12 P(N) = \operatorname*{arg\,min}_{M}
   \left\lVert (M + M^\top) - N \right\rVert_F ,

which here is the *mean of the diagonal blocks* of :math:`N`.
"""

from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import singd
from singd import SINGD, StructuredMatrix, register_structure, structure
from singd.structures import static

STEPS, BATCH = 150, 64
COLORS = {"diagonal": "C9", "same8": "k", "block8diagonal": "C4"}
COLORS["dense"] = "C0"
_ = torch.set_num_threads(1)

# %%
# The fields of the dataclass are its tensors: here the block. How many copies
# of it there are is no tensor, hence ``static``: every operation keeps it.


@dataclass(eq=False, repr=False)
class SameBlocks(StructuredMatrix):
    """A block diagonal matrix whose blocks are all equal."""

    B: Tensor  # [8, 8]
    copies: int = static()  # n / 8

    @classmethod
    def eye(cls, n, **kw):
        if n % 8:
            raise ValueError(f"SameBlocks needs a multiple of 8, got {n}.")
        return cls(torch.eye(8, **kw), n // 8)

    @property
    def n(self):
        return 8 * self.copies

    def mm(self, X):
        return (self.B @ X.reshape(-1, 8, X.shape[1])).reshape(X.shape)

    def tmm(self, X):
        return (self.B.T @ X.reshape(-1, 8, X.shape[1])).reshape(X.shape)

    def compose(self, other):
        return type(self)(self.B @ other.B, self.copies)

    def project(self, Y):
        blocks = Y.reshape(-1, 8, Y.shape[1])
        return type(self)((blocks @ blocks.mT).mean(0), self.copies)

    def trace(self):
        return self.copies * self.B.diagonal().sum(dtype=torch.float32)


_ = register_structure("same8", SameBlocks, "one 8 x 8 block, repeated")

# %%
# It shows itself like any other structure.

K = structure("same8")(24, dtype=torch.float64)
K.map(torch.ones_like)

# %%
# The laws
# --------
#
# Five laws hold for every structure. The last one solves the least-squares
# problem above by brute force. Random members are not symmetric, so that a
# missing transpose shows.


def deviations(eye):
    """How far a structure is from each law, relative to the largest entry."""
    torch.manual_seed(0)
    A, B = eye.map(torch.randn_like), eye.map(torch.randn_like)
    Y = torch.randn(eye.n, 5, dtype=torch.float64)
    a, b, N = A.dense(), B.dense(), Y @ Y.T
    units = torch.eye(eye.numel, dtype=torch.float64)
    basis = torch.stack([eye.from_flat(u).dense() for u in units])
    both = (basis + basis.mT).flatten(1).T
    best = torch.tensordot(torch.linalg.pinv(both) @ N.flatten(), basis, 1)
    pairs = {
        "transpose": (A.tmm(Y), a.T @ Y),
        "closed": ((A @ B).dense(), a @ b),
        "identity": (eye.dense(), torch.eye(eye.n, dtype=torch.float64)),
        "trace": (A.trace().double(), a.trace()),
        "projection": (eye.project(Y).dense(), 2 * best),
    }
    return {
        law: ((x - y).abs().max() / y.abs().max()).item()
        for law, (x, y) in pairs.items()
    }


# %%
# **Before you run on:** a common mistake is to *sum* the blocks in ``project``
# instead of taking their mean. Which of the laws will notice?


class Wrong(SameBlocks):
    def project(self, Y):
        return super().project(Y) * self.copies


right, wrong = deviations(K), deviations(Wrong(K.B, K.copies))
fig, ax = plt.subplots(figsize=(5.4, 3))
laws = torch.arange(len(right))
ax.barh(laws, [*right.values()], 0.35, label="right")
ax.barh(laws + 0.35, [*wrong.values()], 0.35, label="summed")
ax.set_yticks(laws + 0.17, right)
ax.set(xscale="log", xlim=(1e-17, 10), xlabel="relative deviation")
ax.set(title="Only the law of projections finds the sum")
ax.legend()

assert max(right.values()) < 1e-6  # the trace is summed in float32
broken = [law for law, value in wrong.items() if value > 1e-6]
assert broken == ["projection"]

# %%
# Only the projection is off, by a factor of three: one for each block. The
# trace counts in single precision, hence its longer bar. The identity is
# exact, and has none.
#
# Train with it
# -------------
#
# The first layer reads 8 x 8 digits, one row of pixels per block. It has no
# bias, since 65 inputs are no multiple of 8.

images, labels = map(torch.tensor, load_digits(return_X_y=True))
images = images.float() / 16


def fit(name):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 10)
    )
    groups = [
        {"params": [model[0].weight], "structures": (name, "dense")},
        {"params": list(model[2].parameters())},
    ]
    options = dict(lr=3e-3, T=1, lr_cov=0.2, normalize_lr_cov=True)
    optimizer = SINGD(model, groups, **(singd.PUBLISHED | options))
    losses = []
    for _ in range(STEPS):
        batch = torch.randint(len(images), (BATCH,))
        optimizer.zero_grad()
        output = model(images[batch])
        loss = nn.functional.cross_entropy(output, labels[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses), optimizer.factors("0").K


runs = {name: fit(name) for name in COLORS}
fig, ax = plt.subplots(figsize=(5.4, 3.6))
for name, (losses, K) in runs.items():
    smooth = losses.unfold(0, 10, 1).mean(1)
    label = f"{name}: {K.numel:,} numbers"
    ax.plot(smooth, COLORS[name], label=label)
    print(f"{name:15} {K.numel:5} numbers, loss {losses[-30:].mean():.2f}")
ax.set(yscale="log", xlabel="step", ylabel="training loss (mean of 10)")
ax.set_title("One block for all rows beats the diagonal")
ax.legend()

loss = {name: run[0][-30:].mean().item() for name, run in runs.items()}
assert runs["same8"][1].numel == runs["diagonal"][1].numel == 64
assert loss["same8"] < 0.8 * loss["diagonal"]
assert min(loss, key=loss.get) == "dense"

# %%
# ``same8`` stores 64 numbers, as many as the diagonal, and ends with a lower
# loss. Dense ends lowest, with 64 times the storage.
#
# What has the block learned? Beside it stands a block of the dense factor:
# that of the fourth row of pixels.

fig, axes = plt.subplots(1, 2, figsize=(5.5, 2.8))
blocks = {"same8": runs["same8"][1].B}
rows = runs["dense"][1].dense()[24:32]
blocks["dense, fourth row"] = rows[:, 24:32]
for ax, (name, B) in zip(axes, blocks.items()):
    shown = ax.imshow(B, cmap="RdBu_r", vmin=-0.5, vmax=0.5)
    ax.set(title=name, xlabel="pixel of a row", ylabel="pixel of a row")
_ = fig.colorbar(shown, ax=axes, label="entry of K")

# sphinx_gallery_start_ignore
sizes = [(B - B.diagonal().diag()).norm() for B in blocks.values()]
assert blocks["same8"].diagonal(1).mean() < 0
assert sizes[0] > 2 * sizes[1]
assert rows.norm() ** 2 - rows[:, 24:32].norm() ** 2 > sizes[1] ** 2
# sphinx_gallery_end_ignore

# %%
# Neighbours get negative entries, so that differences of pixels are amplified.
# Off the diagonal, the shared block has more than twice the size (norm) of the
# dense factor's. The dense factor has more room: it also relates a pixel to
# those of other rows, and these entries weigh more than those of its block.
#
# When not to use this
# --------------------
#
# Tie blocks only where the inputs really repeat. In these digits the first and
# the last row are nearly empty, and a shared block has to treat them as the
# others. Before you write a structure, look whether one of
# :ref:`sphx_glr_auto_gallery_4_structures_plot_40_zoo.py` will do.
#
# .. admonition:: Lessons learned
#
#    - A structure is a dataclass of tensors (and sizes) with seven members.
#    - Derive the projection; then let brute force check it.
#    - A wrong projection passes every law but its own.
#
# .. admonition:: Exercise
#
#    Let all *columns* share a block instead, :math:`K = B \otimes I`. What
#    changes?
#
# .. dropdown:: Solution
#
#    Only the reshaping. The sum over blocks is in the product, so that the
#    mean divides by their number. The trace stays.
#
#    .. code-block:: python
#
#        class SameColumns(SameBlocks):
#            def mm(self, X):
#                return (self.B @ X.reshape(8, -1)).reshape(X.shape)
#
#            def tmm(self, X):
#                return (self.B.T @ X.reshape(8, -1)).reshape(X.shape)
#
#            def project(self, Y):
#                Y = Y.reshape(8, -1)
#                return type(self)(Y @ Y.T / self.copies, self.copies)
#
#
#        columns = SameColumns.eye(24, dtype=torch.float64)
#        assert max(deviations(columns).values()) < 1e-6
#
# Where to go next: why twice
# (:ref:`sphx_glr_auto_gallery_4_structures_plot_41_why_twice.py`), the
# interface (:class:`~singd.StructuredMatrix`), the list (:doc:`/structures`).
