r"""
Gradient scaling and clipping: what does SINGD have to know?
============================================================

In float16, a number format of 16 bits, small gradients become zero. A gradient
scaler multiplies the loss by a large number, so that they survive, and divides
the gradients by it before the step. SINGD also gathers *squares* of gradients
during the backward pass, before that division. So it must be told of the
scaler. Of gradient clipping it need not know.

.. admonition:: What you will learn

   - **Pass** a ``torch.amp.GradScaler`` to SINGD.
   - **Check** that the scale changes nothing.
   - **Clip** gradients, and know what is clipped.

   You should have read
   :ref:`sphx_glr_auto_gallery_2_features_plot_24_mixed_precision.py`.

Why it has to know
------------------

SINGD needs :math:`G`, the second moment of the gradients :math:`g` at a
layer's output (:doc:`/concepts`). The scaler multiplies the loss by
:math:`c`. Then every :math:`g` becomes :math:`c\,g`, and

.. math::

   G = \mathbb{E}[g g^\top] \;\to\; c^2\, G .

With :math:`c = 2^{16}`, the usual start, that is a factor of four billion. If
SINGD knows the scaler, it divides by :math:`c^2`.
"""

import copy

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from singd import SINGD

STEPS, BATCH, LR = 60, 64, 1e-2
_ = torch.set_num_threads(1)  # the same digits on every machine

data = load_digits()
images = torch.tensor(data.data, dtype=torch.float32) / 16
labels = torch.tensor(data.target)
torch.manual_seed(0)
start = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

# %%
# Why scale at all?
# -----------------
#
# We round gradients of many sizes to float16, once as they are, and once
# multiplied by :math:`2^{16}`, then divided by it again in float32.

small = torch.logspace(-10, -4, 60)
kept = small.half().float() / small
scaled = (small * 2**16).half().float() / 2**16 / small

fig, ax = plt.subplots(figsize=(5, 3))
ax.semilogx(small, kept, "C3", label="as it is")
ax.semilogx(small, scaled, "C0", label="scaled by $2^{16}$")
ax.set(xlabel="gradient", ylabel="after rounding / before")
ax.set_title("Scaling saves small gradients")
_ = ax.legend()

# sphinx_gallery_start_ignore
assert kept[0] == 0 == kept[small < 2e-8].max()
assert (scaled - 1).abs().max() < 0.01
# sphinx_gallery_end_ignore

# %%
# Below about :math:`3 \cdot 10^{-8}` nothing is left without the scale. With
# it, the error is under one percent.
#
# A scaled loop
# -------------
#
# It is PyTorch's own recipe, but for one argument: SINGD is built with
# ``grad_scaler=scaler``. We train in float32 here. There, multiplying by a
# power of two rounds nothing, so the scale should change nothing at all.


def fit(scale=None, clip=None, bad_step=None, unscale=True):
    model = copy.deepcopy(start)
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=scale or 1.0, enabled=scale is not None
    )
    optimizer = SINGD(model, lr=LR, grad_scaler=scaler)
    shuffle = torch.Generator().manual_seed(1)
    losses, norms, scales = [], [], []
    for step in range(STEPS):
        batch = torch.randint(0, 1797, (BATCH,), generator=shuffle)
        x = images[batch] * (float("inf") if step == bad_step else 1)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels[batch])
        scaler.scale(loss).backward()
        if unscale:
            scaler.unscale_(optimizer)  # needed only to clip
        parameters = list(model.parameters())
        limit = clip or float("inf")
        norms.append(nn.utils.clip_grad_norm_(parameters, limit).item())
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
    weights = nn.utils.parameters_to_vector(model.parameters()).detach()
    return weights, optimizer, losses, norms, scales


# %%
# **Before you run on:** how far apart are a run without a scaler and one with
# a scale of :math:`2^{16}`?

plain, _, undisturbed, *_ = fit()
known, *_ = fit(scale=2.0**16)
print("the same weights, to the last bit:", torch.equal(plain, known))
assert torch.equal(plain, known)

# %%
# They are the same. A scaler that SINGD was not told of is an error, not a
# wrong result.

model = copy.deepcopy(start)
scaler = torch.amp.GradScaler("cpu")
optimizer = SINGD(model, lr=LR)
loss = nn.functional.cross_entropy(model(images[:64]), labels[:64])
scaler.scale(loss).backward()
try:
    scaler.step(optimizer)
except RuntimeError as error:
    message = str(error)
print(message)
assert "grad_scaler=scaler" in message

# %%
# A skipped step
# --------------
#
# Where a gradient is infinite or not a number, the scaler skips the step and
# halves its scale. We put infinity into the images of step 30.

weights, optimizer, losses, _, scales = fit(scale=2.0**16, bad_step=30)
fig, axes = plt.subplots(2, 1, figsize=(5, 5), sharex=True)
axes[0].plot(undisturbed, color="silver", lw=5, label="undisturbed")
axes[0].plot(losses, label="spoilt at step 30")
axes[0].set(ylabel="training loss", yscale="log")
axes[0].set_title("After a bad batch the run goes on")
axes[0].legend()
axes[1].step(range(STEPS), scales, where="post")
axes[1].set(xlabel="step", ylabel="scale", ylim=(0, 80000))
axes[1].set_title("The scale is halved once")

K = optimizer.factors("0").K.dense()
assert torch.isfinite(K).all()
assert torch.isfinite(weights).all()
# sphinx_gallery_start_ignore
assert scales[29] == 2.0**16
assert scales[30] == scales[-1] == 2.0**15
assert losses[:30] == undisturbed[:30]
end, expected = (sum(run[-20:]) / 20 for run in (losses, undisturbed))
assert 0.5 < end / expected < 2
# sphinx_gallery_end_ignore

# %%
# The loss of the bad step is not a number, and leaves a gap. Up to there the
# two runs are the same; after it they differ by one missing step. Neither the
# weights nor the factors have seen the bad batch.
#
# What clipping clips
# -------------------
#
# ``clip_grad_norm_`` shortens the gradient, after the backward pass and before
# SINGD multiplies it. By default SINGD scales each of its steps to a size that
# ``lr`` sets (``match_rms=1``), so the length of the gradient hardly counts.
# What clipping does bound is the share of one bad batch in the momentum.

LIMIT = 0.3
clipped, _, _, norms, _ = fit(scale=2.0**16, clip=LIMIT)
fig, ax = plt.subplots(figsize=(5, 3))
ax.plot(norms, "C3", label="before clipping")
ax.plot([min(n, LIMIT) for n in norms], "C0", label="after clipping")
ax.set(xlabel="step", ylabel="norm of the gradient")
ax.set_title("Clipping acts on the gradient")
_ = ax.legend()

without, *_ = fit(clip=LIMIT)
assert torch.equal(clipped, without)
# sphinx_gallery_start_ignore
assert max(norms) > LIMIT
assert not torch.equal(clipped, plain)
# sphinx_gallery_end_ignore

# %%
# Some gradients were longer than the limit, so clipping changed the run. With
# and without the scaler it did so in the same way, because ``unscale_`` had
# divided the gradients before.
#
# When not to use it
# ------------------
#
# :term:`bfloat16` has the range of float32. There a scaler has nothing to
# save: leave it out.
#
# .. admonition:: Lessons learned
#
#    - Pass ``grad_scaler=scaler``; the loop stays PyTorch's.
#    - A scale that is a power of two changes nothing.
#    - Unscale before you clip, as with any optimizer.
#    - Clipping bounds the gradient, not the step. To bound the step, lower
#      ``lr``.
#
# .. admonition:: Exercise
#
#    Train with a scale and ``clip=0.3``, but with ``unscale=False``. What is
#    clipped now?
#
# .. dropdown:: Solution
#
#    The scaled gradients: all are far longer than the limit, even those that
#    should not be clipped, so after clipping all have the same length.
#
#    .. code-block:: python
#
#        wrong, _, _, norms, _ = fit(2.0**16, LIMIT, unscale=False)
#        assert min(norms) > 100 * LIMIT
#        assert not torch.equal(wrong, clipped)
#
# Where to go next:
# :ref:`sphx_glr_auto_gallery_2_features_plot_26_micro_batches.py` is the other
# place where a scale matters,
# :ref:`sphx_glr_auto_gallery_2_features_plot_23_checkpoints.py` saves the
# scaler too, and
# :ref:`sphx_glr_auto_gallery_3_advanced_plot_33_diagnostics.py` watches the
# length of the step.
