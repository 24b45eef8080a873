r"""
Convolutions share their weights: expand or reduce?
===================================================

A convolution applies one small matrix at every position of an image. SINGD
averages over what this matrix reads. It can count the positions as more
examples (*expand*), or put the positions of one image together first
(*reduce*). This page computes both by hand, compares them, and trains with
each.

.. admonition:: What you will learn

   - **See** a convolution as a matrix applied to patches.
   - **Tell** expand from reduce, and compute both.
   - **Choose** between them, and set ``kfac_approx``.

   You should have read
   :ref:`sphx_glr_auto_gallery_1_start_plot_10_first_steps.py`. Why both are
   right, :ref:`sphx_glr_auto_gallery_0_course_plot_04_shared_weights.py`
   derives.

Two ways to average
-------------------

For each layer, SINGD needs the second moment :math:`U` of what it reads. A
convolution is applied at :math:`S` positions of each of :math:`B` images. At
position :math:`s` of image :math:`b` it reads the pixels :math:`a_{bs}` of a
small square, a *patch*. With the mean
:math:`\bar a_b = \frac1S \sum_s a_{bs}`,

.. math::

   U_{\text{expand}} = \frac1{BS} \sum_{b,s} a_{bs} a_{bs}^\top, \qquad
   U_{\text{reduce}} = \frac1B \sum_b \bar a_b \bar a_b^\top .

For the gradients :math:`g_{bs}` at the outputs, expand adds up
:math:`g_{bs} g_{bs}^\top`, and reduce sums over the positions before it
squares.
"""

import time

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from singd import PUBLISHED, SINGD

STEPS, BATCH, LR_COV, DAMPING = 100, 64, 0.1, 1e-3
COLORS = {"expand": "C0", "reduce": "C5"}
_ = torch.set_num_threads(1)  # the same digits on every machine

data = load_digits()
images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(data.target)

# %%
# The patches
# -----------
#
# One image of 8 x 8 pixels has :math:`S = 36` patches of 3 x 3. Below it, each
# row is one patch :math:`a_{bs}^\top`, so the layer multiplies this matrix by
# its weights.

patches = nn.functional.unfold(images[:1], 3)[0].T  # [S, 9]
fig, (top, below) = plt.subplots(2, 1, figsize=(4, 5.6), height_ratios=(2, 3))
top.imshow(images[0, 0], cmap="gray_r")
top.set(title="An image", xlabel="column", ylabel="row")
below.imshow(patches, cmap="gray_r", aspect="auto")
below.set(title="Its patches", xlabel="pixel of the patch")
_ = below.set(ylabel="position of the patch")
assert patches.shape == (36, 9)

# %%
# By hand
# -------
#
# We want to see SINGD's :math:`U`. It does not keep it, but the published
# method with ``rule="ikfac"`` has a first update that is easy to undo. From
# :math:`K = I` it leads to
# :math:`K = I - \frac{\beta_1}{2}(U + \lambda I - I)`, with
# :math:`\beta_1` = ``lr_cov`` and :math:`\lambda` = ``damping``. So we can
# solve for :math:`U`, and compare it with the formulas.


def U_of_singd(kfac_approx):
    torch.manual_seed(0)
    layer = nn.Conv2d(1, 4, 3, bias=False)
    options = PUBLISHED | dict(T=1, lr_cov=LR_COV, damping=DAMPING)
    options |= dict(rule="ikfac", kfac_approx=kfac_approx)
    optimizer = SINGD(layer, **options)
    layer(images[:BATCH]).square().sum(1).mean().backward()
    optimizer.step()
    K, eye = optimizer.factors(layer).K.dense(), torch.eye(9)
    return (eye - K) * 2 / LR_COV + (1 - DAMPING) * eye


a = nn.functional.unfold(images[:BATCH], 3).transpose(1, 2)  # [B, S, 9]
by_hand = {
    "expand": torch.einsum("bsi,bsj->ij", a, a) / (BATCH * 36),
    "reduce": torch.einsum("bi,bj->ij", a.mean(1), a.mean(1)) / BATCH,
}
for name, U in by_hand.items():
    close = torch.allclose(U_of_singd(name), U, atol=1e-5)
    print(f"{name}: by hand and in SINGD the same: {close}")
    assert close

# %%
# Now look at both.

fig, axes = plt.subplots(2, 1, figsize=(4, 5.6), sharex=True)
for ax, (name, U) in zip(axes, by_hand.items()):
    shown = ax.imshow(U, vmin=0, vmax=0.3)
    ax.set(title=name, ylabel="pixel of the patch")
axes[1].set_xlabel("pixel of the patch")
_ = fig.colorbar(shown, ax=axes, label="entry of U")

# %%
# With *expand* a pixel resembles itself and its neighbours most. With *reduce*
# the matrix is nearly flat, because averaging over positions first removes
# what differs between them. What is left is almost a single product :math:`u
# u^\top`. The share of the largest eigenvalue in the sum of all tells how
# nearly:


def share(U):
    values = torch.linalg.eigvalsh(U)
    return (values[-1] / values.sum()).item()


print(f"share of the first eigenvalue, expand {share(by_hand['expand']):.2f}")
print(f"share of the first eigenvalue, reduce {share(by_hand['reduce']):.2f}")

# sphinx_gallery_start_ignore
assert by_hand["reduce"].trace() < by_hand["expand"].trace()
assert share(by_hand["reduce"]) > 0.95 > 0.8 > share(by_hand["expand"])
# sphinx_gallery_end_ignore

# %%
# In training
# -----------
#
# **Before you run on:** which one will be faster? For the factors, one
# multiplies :math:`BS` rows, the other :math:`B`.


def fit(kfac_approx):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    optimizer = SINGD(model, lr=1e-2, T=1, kfac_approx=kfac_approx)
    shuffle = torch.Generator().manual_seed(1)
    losses, start = [], time.process_time()
    for _ in range(STEPS):
        batch = torch.randint(0, 1797, (BATCH,), generator=shuffle)
        optimizer.zero_grad()
        output = model(images[batch])
        loss = nn.functional.cross_entropy(output, labels[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses), time.process_time() - start


runs = {name: fit(name) for name in by_hand}
fig, ax = plt.subplots(figsize=(5, 3.4))
for name, (losses, seconds) in runs.items():
    smooth = losses.unfold(0, 10, 1).mean(1)
    ax.plot(smooth, color=COLORS[name], label=f"{name}, {seconds:.1f} s")
ax.set(xlabel="step", ylabel="training loss (mean of 10)", yscale="log")
ax.set_title("Both train")
_ = ax.legend()

# sphinx_gallery_start_ignore
last = [losses[-30:].mean().item() for losses, _ in runs.values()]
assert max(last) < 1
# sphinx_gallery_end_ignore

# %%
# Both end far below the loss of a guess, :math:`\log 10 = 2.3`. One run with
# one seed does not rank them. The seconds in the legend are CPU time, of which
# the factors are a part only.
#
# Which one is right?
# -------------------
#
# For a deep linear network with the true :term:`Fisher matrix`, each is exact
# in its own setting. Expand fits a loss that has a term for each position,
# such as a language model's. Reduce fits a network that averages the positions
# before the loss, such as a classifier with average pooling. Elsewhere both
# are approximations.
#
# When not to use it
# ------------------
#
# A layer without shared weights has :math:`S = 1`: there both are the same,
# and the option does nothing.
#
# .. admonition:: Lessons learned
#
#    - A convolution is a matrix applied to patches.
#    - Expand counts positions as examples; reduce averages them first.
#    - A loss for each token: expand. One loss after pooling: try reduce.
#    - If the loss is averaged over tokens, too, say
#      ``loss_average="batch+sequence"``.
#
# .. admonition:: Exercise
#
#    Convince yourself that the option does nothing for an ``nn.Linear`` that
#    reads one vector per example.
#
# .. dropdown:: Solution
#
#    With :math:`S = 1` the mean over positions is the one value itself.
#
#    .. code-block:: python
#
#        def K_of_linear(kfac_approx):
#            torch.manual_seed(0)
#            layer = nn.Linear(64, 4)
#            options = PUBLISHED | dict(T=1, kfac_approx=kfac_approx)
#            optimizer = SINGD(layer, **options)
#            layer(images[:BATCH].flatten(1)).square().mean().backward()
#            optimizer.step()
#            return optimizer.factors(layer).K.dense()
#
#
#        assert torch.equal(K_of_linear("expand"), K_of_linear("reduce"))
#
# Where to go next:
# :ref:`sphx_glr_auto_gallery_3_advanced_plot_32_custom_layer.py` adds a layer
# of your own,
# :ref:`sphx_glr_auto_gallery_2_features_plot_26_micro_batches.py` shows what
# is summed over several backward passes, and
# :ref:`sphx_glr_auto_gallery_4_structures_plot_40_zoo.py` has smaller factors.
