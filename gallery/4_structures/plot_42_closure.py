r"""
Why is there no tridiagonal structure?
======================================

Neighbours matter most, so a tridiagonal factor seems natural. It stores three
numbers per input. Yet no such structure is registered, since products of
tridiagonal matrices are not tridiagonal. This page shows what goes wrong, and
a rule to tell which patterns can work.

.. admonition:: What you will learn

   - **See** a pattern fill up, update by update.
   - **Compute** the smallest closed pattern around any pattern.
   - **Measure** what truncation does, at once and later.

   You should have read
   :ref:`sphx_glr_auto_gallery_4_structures_plot_40_zoo.py`. Lesson 10,
   :ref:`sphx_glr_auto_gallery_0_course_plot_10_structures.py`, lets you draw
   a pattern.

The update is a product
-----------------------

.. math::

   m_K = \tfrac12 \left[ P(K^\top (U + \lambda I) K) - I \right] , \qquad
   K \leftarrow K - \beta_1 K m_K .

:math:`K m_K` is a product of two members. A structure must be *closed*: sums,
multiples and products of members are members.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

N, LAMBDA, BETA_1, UPDATES = 64, 1e-2, 0.1, 2000
_ = torch.set_num_threads(1)

# %%
# A pattern that fills up
# -----------------------
#
# A pattern says which entries may differ from zero. **Before you run on:** a
# tridiagonal :math:`K` is updated without any truncation. What fills up, and
# how fast?

i, j = torch.meshgrid(torch.arange(N), torch.arange(N), indexing="ij")
tridiagonal = (i - j).abs() <= 1


def product(A, B):
    """The pattern of a product of matrices with the patterns A and B."""
    return (A.double() @ B.double()) > 0


pattern, shown = tridiagonal, {1: tridiagonal}
for update in range(2, 33):
    pattern = product(pattern, tridiagonal)
    shown[update] = pattern

fig, axes = plt.subplots(2, 2, figsize=(4.6, 5))
for ax, update in zip(axes.flat, (1, 4, 16, 32)):
    ax.imshow(shown[update], cmap="Blues", vmin=0, vmax=1.3)
    share = shown[update].double().mean()
    ax.set(xticks=[], yticks=[], xlabel=f"{share:.0%} filled")
    ax.set_title(f"update {update}")
_ = fig.suptitle("Every update widens the band by one diagonal")

# sphinx_gallery_start_ignore
assert all(torch.equal(p, (i - j).abs() <= u) for u, p in shown.items())
assert shown[32].double().mean() > 0.75
# sphinx_gallery_end_ignore

# %%
# After 32 updates, more than three quarters of the entries are filled. The
# promised memory is gone.

# %%
# Which patterns are closed?
# --------------------------
#
# Read entry :math:`(i, j)` as an arrow from :math:`i` to :math:`j`. A product
# adds the arrow :math:`(i, k)` wherever :math:`(i, j)` and :math:`(j, k)`
# exist. So a pattern with the diagonal is closed exactly if every path has a
# shortcut. Multiplying a pattern with itself until nothing changes gives the
# smallest closed pattern that contains it.


def closure(pattern):
    while not torch.equal(bigger := product(pattern, pattern), pattern):
        pattern = bigger
    return pattern


first, diagonal = 4, i == j
PATTERNS = {
    "tridiagonal": tridiagonal,
    "bidiagonal": tridiagonal & (j >= i),
    "arrow": diagonal | (i < first) | (j < first),
    "half an arrow": diagonal | (i < first),
    "blocks": i // 16 == j // 16,
}
fig, axes = plt.subplots(5, 2, figsize=(3.4, 8.2))
for (name, pattern), (left, right) in zip(PATTERNS.items(), axes):
    for ax, picture in ((left, pattern), (right, closure(pattern))):
        ax.imshow(picture, cmap="Blues", vmin=0, vmax=1.3)
        ax.set(xticks=[], yticks=[])
    left.set_ylabel(name)
axes[0, 0].set_title("pattern")
axes[0, 1].set_title("closure")
_ = fig.suptitle("Two patterns are closed")

closed = [k for k, p in PATTERNS.items() if torch.equal(closure(p), p)]
print("closed:", ", ".join(closed))
# sphinx_gallery_start_ignore
assert closed == ["half an arrow", "blocks"]
assert closure(tridiagonal).all()
assert closure(PATTERNS["arrow"]).all()
assert torch.equal(closure(PATTERNS["bidiagonal"]), j >= i)
# sphinx_gallery_end_ignore

# %%
# Half an arrow is ``triurank4first``, and blocks are ``block16diagonal``. A
# tridiagonal pattern, or a whole arrow, can only grow into dense.
#
# And if we cut?
# --------------
#
# One could drop what falls outside the pattern after each product. With a
# closed pattern, nothing is dropped, and the update goes downhill on
# :math:`f(K) = \operatorname{Tr}(K^\top S K) - \log\det K K^\top`, with
# :math:`S = U + \lambda I`. A cut step need not go downhill. We try it on the
# second moment of 8 x 8 digits. Beside each run we compute the best :math:`K`
# of the same pattern, by a general optimizer. (Gaps to it below 0.001 are
# drawn at 0.001.)

x = torch.tensor(load_digits().data) / 16
S = x.T @ x / len(x) + LAMBDA * torch.eye(N, dtype=x.dtype)
optimum = N + torch.logdet(S)


def gap(K):
    return torch.trace(K.T @ S @ K) - torch.logdet(K @ K.T) - optimum


def learn(pattern):
    twice = torch.where(pattern & ~pattern.T, 2, 1) * pattern  # P
    K, gaps = torch.eye(N, dtype=x.dtype), []
    for _ in range(UPDATES):
        m_K = 0.5 * (twice * (K.T @ S @ K) - torch.eye(N))
        K = K - BETA_1 * pattern * (K @ m_K)  # cut
        gaps.append(gap(K).item())
    return gaps


def best(pattern):
    K = torch.eye(N, dtype=x.dtype, requires_grad=True)
    options = dict(max_iter=2000, line_search_fn="strong_wolfe")
    lbfgs = torch.optim.LBFGS([K], history_size=50, **options)

    def closure():
        lbfgs.zero_grad()
        loss = gap(K * pattern)
        loss.backward()
        return loss

    lbfgs.step(closure)
    return gap(K * pattern).item()


RUNS = {
    "bidiagonal, cut": PATTERNS["bidiagonal"],
    "tridiagonal, cut": tridiagonal,
    "blocks of 3, closed": i // 3 == j // 3,
    "half an arrow, closed": PATTERNS["half an arrow"],
}
fig, axes = plt.subplots(2, 1, figsize=(5.4, 5.8), sharex=True)
gaps, excess = {}, {}
for (name, pattern), color in zip(RUNS.items(), ("C3", "C7", "C4", "C6")):
    gaps[name] = torch.tensor(learn(pattern))
    lowest = best(pattern)
    excess[name] = gaps[name] - lowest
    axes[0].plot(gaps[name], label=name, color=color)
    axes[1].plot(excess[name].clamp(min=1e-3), color=color)
    end = gaps[name][-1]
    print(f"{name:21} ends at {end:5.1f}, its best is {lowest:.1f}")
axes[0].set(xscale="log", ylim=(20, 120), ylabel="gap to the best dense K")
axes[0].set_title("Later, a cut pattern may walk uphill")
axes[0].legend()
axes[1].set(yscale="log", xlabel="update", ylabel="gap to its own best K")
_ = axes[1].set_title("Only closed patterns reach their own best")

# sphinx_gallery_start_ignore
for name in ("blocks of 3, closed", "half an arrow, closed"):
    assert abs(excess[name][-1]) < 0.01
assert excess["tridiagonal, cut"][-1] > 1
climb = gaps["bidiagonal, cut"].tolist()
turn = climb.index(min(climb))
late = [climb[k] for k in (turn, 500, 1000, -1)]
assert turn < 100
assert late == sorted(late)
assert late[-1] > 2.5 * late[0]
equal = RUNS["blocks of 3, closed"]
assert equal.sum() == tridiagonal.sum() == 190
assert gaps["tridiagonal, cut"][-1] < gaps["blocks of 3, closed"][-1]
# sphinx_gallery_end_ignore

# %%
# At first a cut factor may look better. The tridiagonal one ends below blocks
# that store the same 190 numbers: neighbours do matter, and it stands still
# near its best. What closure buys is what happens *later*. The bidiagonal
# factor comes down as fast as the tridiagonal one, turns within a hundred
# updates, and then climbs for as long as we watch, to more than twice its
# lowest gap. Nothing in the update tells the two apart beforehand. A closed
# pattern needs no such luck: it ends at its own best.

# %%
# When not to use this
# --------------------
#
# The rule of shortcuts is for patterns of zeros. A set may also be closed
# because its entries are tied, as in a Toeplitz matrix. And an algorithm that
# differentiates :math:`f` itself, as ``best`` does, needs no closure at all.
#
# .. admonition:: Lessons learned
#
#    - The update multiplies members, so a structure must be closed.
#    - A pattern is closed if every path of arrows has a shortcut.
#    - A cut factor may do well for long: no law says when it turns.
#
# .. admonition:: Exercise
#
#    Is the pattern of even and odd inputs, :math:`(i + j)` even, closed?
#    Which registered structure is it, after sorting the inputs?
#
# .. dropdown:: Solution
#
#    It is: even inputs reach even ones only. Sorted by parity, it is
#    ``block32diagonal``.
#
#    .. code-block:: python
#
#        even = (i + j) % 2 == 0
#        assert torch.equal(closure(even), even)
#        order = torch.cat([torch.arange(0, N, 2), torch.arange(1, N, 2)])
#        assert torch.equal(even[order][:, order], i // 32 == j // 32)
#
# Where to go next: :ref:`sphx_glr_auto_gallery_4_structures_plot_40_zoo.py`
# draws all closed structures,
# :ref:`sphx_glr_auto_gallery_4_structures_plot_43_your_own_structure.py` adds
# one; :doc:`/structures` lists their projections; :doc:`/concepts` derives the
# update.
