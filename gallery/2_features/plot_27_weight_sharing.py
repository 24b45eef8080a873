r"""
Convolutions share their weights: expand or reduce?
===================================================

A convolution applies one small matrix at every position of an image. Its
statistics can treat the positions as more examples (*expand*), or put the
positions of one image together first (*reduce*). This page computes both by
hand, compares them, and trains with each.

.. admonition:: What you will learn

   - **See** a convolution as a matrix applied to patches.
   - **Tell** expand from reduce, and compute both.
   - **Choose** between them, and set ``kfac_approx``.

   You should have read
   :ref:`sphx_glr_auto_gallery_1_start_plot_10_first_steps.py`.

Two ways to average
-------------------

A layer is applied at :math:`S` positions of each of :math:`B` images. At
position :math:`s` of image :math:`b` it reads the patch :math:`a_{bs}`. With
:math:`\bar a_b = \frac1S \sum_s a_{bs}`,

.. math::

   U_{\text{expand}} = \frac1{BS} \sum_{b,s} a_{bs} a_{bs}^\top, \qquad
   U_{\text{reduce}} = \frac1B \sum_b \bar a_b \bar a_b^\top .

On the other side, expand sums :math:`g_{bs} g_{bs}^\top`, and reduce sums over
the positions before it squares.
"""

import time

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from singd import PUBLISHED, SINGD

STEPS, BATCH, LR_COV, DAMPING = 150, 64, 0.1, 1e-3
_ = torch.set_num_threads(1)  # the same digits on every machine

data = load_digits()
images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(data.target)

# %%
# The patches
# -----------
#
# One image, and its 36 patches of 3 x 3 pixels. Each is a row
# :math:`a_{bs}^\top`.

patches = nn.functional.unfold(images[:1], 3)[0].T  # [S, 9]
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 3))
left.imshow(images[0, 0], cmap="gray_r")
left.set(title="An image", xlabel="column", ylabel="row")
right.imshow(patches, cmap="gray_r", aspect="auto")
right.set(title="Its patches", xlabel="entry of the patch")
right.set(ylabel="position")
assert patches.shape == (36, 9)

# %%
# By hand
# -------
#
# After one step from :math:`K = C = I` without coupling (``rule="ikfac"``),
# the factor is :math:`K = I - \frac{\beta_1}{2}(U + \lambda I - I)`. So we can
# read :math:`U` off the optimizer, and compare it with the formulas.


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

fig, axes = plt.subplots(1, 2, figsize=(7, 3))
for ax, (name, U) in zip(axes, by_hand.items()):
    shown = ax.imshow(U, vmin=0, vmax=0.3)
    ax.set(title=name, xlabel="entry of the patch")
axes[0].set_ylabel("entry of the patch")
_ = fig.colorbar(shown, ax=axes, label="entry of U")

# %%
# Averaging over positions first removes what differs between them. So
# ``reduce`` has the smaller trace, and it is closer to a matrix of rank one:
# its first eigenvalue holds a larger share.


def share(U):
    values = torch.linalg.eigvalsh(U)
    return (values[-1] / values.sum()).item()


assert by_hand["reduce"].trace() < by_hand["expand"].trace()
assert share(by_hand["reduce"]) > share(by_hand["expand"])
print(f"share of the first eigenvalue, expand {share(by_hand['expand']):.1f}")
print(f"share of the first eigenvalue, reduce {share(by_hand['reduce']):.1f}")

# %%
# In training
# -----------
#
# **Before you run on:** which one will be faster? One multiplies :math:`BS`
# rows, the other :math:`B`.


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
    options = PUBLISHED | dict(lr=3e-3, T=1, lr_cov=0.2, damping=1e-2)
    options |= dict(normalize_lr_cov=True, kfac_approx=kfac_approx)
    optimizer = SINGD(model, **options)
    shuffle = torch.Generator().manual_seed(1)
    losses, start = [], time.perf_counter()
    for _ in range(STEPS):
        batch = torch.randint(0, 1797, (BATCH,), generator=shuffle)
        optimizer.zero_grad()
        output = model(images[batch])
        loss = nn.functional.cross_entropy(output, labels[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses), time.perf_counter() - start


runs = {name: fit(name) for name in by_hand}
fig, ax = plt.subplots(figsize=(7, 3.4))
for name, (losses, seconds) in runs.items():
    print(f"{name}: {seconds:.1f} s")
    ax.plot(losses.unfold(0, 10, 1).mean(1), label=name)
ax.set(xlabel="step", ylabel="training loss (mean of 10)", yscale="log")
ax.set_title("Both train")
ax.legend()

last = [losses[-30:].mean().item() for losses, _ in runs.values()]
assert max(last) < 0.3

# %%
# Both end far below the loss of chance, 2.3. One run with one seed does not
# rank them. The times depend on your machine; the figures above the plot are
# those of this one.
#
# Which one is right?
# -------------------
#
# Each is exact for a deep linear network in its own setting. Expand fits a
# loss that has a term for each position, such as a language model's. Reduce
# fits a network that averages the positions before the loss, such as a
# classifier with average pooling. Elsewhere both are approximations.
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
#    - Expand takes positions for examples; reduce averages them first.
#    - Tokens with a loss each: expand. One loss after pooling: try reduce.
#    - A loss averaged over tokens too needs
#      ``loss_average="batch+sequence"``.
#
# .. admonition:: Exercise
#
#    Convince yourself that the option does nothing for an ``nn.Linear`` that
#    reads one vector per example.
#
# .. dropdown:: Solution
#
#    With :math:`S = 1` the mean over positions does nothing.
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
# is summed over several backwards, and
# :ref:`sphx_glr_auto_gallery_4_structures_plot_40_zoo.py` has smaller factors.
