r"""
Gradient scaling and clipping: what does SINGD have to know?
============================================================

In float16 small gradients become zero. A gradient scaler multiplies the loss,
so that they survive. SINGD gathers *squares* of gradients during the backward,
before anything is unscaled. So it must be told of the scaler. Of clipping it
need not know.

.. admonition:: What you will learn

   - **Pass** a ``torch.amp.GradScaler`` to SINGD.
   - **Check** that the scale changes nothing.
   - **Clip** gradients, and know what is clipped.

   You should have read
   :ref:`sphx_glr_auto_gallery_2_features_plot_24_mixed_precision.py`.

Why it has to know
------------------

The scaler multiplies the loss by :math:`c`. Then every output gradient is
:math:`c\,g`, and

.. math::

   G \;\to\; c^2\, G .

With :math:`c = 2^{16}`, the usual start, that is a factor of four billion.
SINGD divides by it as it gathers.
"""

import copy

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from singd import PUBLISHED, SINGD

STEPS, BATCH = 60, 64
FACTORS = PUBLISHED | dict(lr=3e-3, T=1, lr_cov=0.2, normalize_lr_cov=True)
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
# The smallest positive number of float16 is about :math:`6 \cdot 10^{-8}`.

small = torch.logspace(-10, -4, 60)
kept = small.half().float() / small
scaled = (small * 2**16).half().float() / 2**16 / small

fig, ax = plt.subplots(figsize=(5.4, 3))
ax.semilogx(small, kept, label="as it is")
ax.semilogx(small, scaled, label="scaled by $2^{16}$")
ax.set(xlabel="gradient", ylabel="float16 over exact")
ax.set_title("Scaling saves small gradients")
ax.legend()
assert kept[0] == 0
assert (scaled - 1).abs().max() < 0.01

# %%
# A scaled loop
# -------------
#
# It is PyTorch's own recipe. Only the constructor knows of the scaler. We
# train in float32 here, where a power of two may change nothing at all.


def fit(scale=None, clip=None, bad_step=None, unscale=True):
    model = copy.deepcopy(start)
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=scale or 1.0, enabled=scale is not None
    )
    optimizer = SINGD(model, grad_scaler=scaler, **FACTORS)
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
optimizer = SINGD(model, **FACTORS)
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
# Where a gradient is not finite, the scaler skips the step and halves its
# scale. We spoil the batch of step 30.

weights, optimizer, losses, _, scales = fit(scale=2.0**16, bad_step=30)
fig, axes = plt.subplots(2, 1, figsize=(5.4, 5), sharex=True)
axes[0].plot(undisturbed, color="C7", lw=4, alpha=0.4, label="undisturbed")
axes[0].plot(losses, label="spoilt at step 30")
axes[0].set(ylabel="training loss", yscale="log")
axes[0].set_title("The run goes on as if nothing had happened")
axes[0].legend()
axes[1].step(range(STEPS), scales, where="post")
axes[1].set(xlabel="step", ylabel="scale", ylim=(0, 80000))
axes[1].set_title("The scale is halved once")

K = optimizer.factors("0").K.dense()
assert scales[29] == 2.0**16
assert scales[30] == 2.0**15
assert torch.isfinite(K).all()
assert torch.isfinite(weights).all()
assert losses[:30] == undisturbed[:30]
end, expected = (sum(run[-20:]) / 20 for run in (losses, undisturbed))
print(f"the last losses agree to 25 %: {abs(end / expected - 1) < 0.25}")
assert abs(end / expected - 1) < 0.25

# %%
# The loss of the bad step is no number, and leaves a gap. Up to there the two
# runs are the same. After it they differ by one missing step: the last 20
# losses agree to 25 %. Neither the weights nor the factors have seen the bad
# batch.
#
# What clipping clips
# -------------------
#
# ``clip_grad_norm_`` shortens the gradient before SINGD multiplies it. The
# statistics are gathered earlier, from the unclipped gradients. The length of
# the step on the weights is thus *not* bounded by the clipping.

LIMIT = 0.3
clipped_run = fit(scale=2.0**16, clip=LIMIT)
clipped, norms = clipped_run[0], clipped_run[3]
fig, ax = plt.subplots(figsize=(5.4, 3))
ax.plot(norms, label="before clipping")
ax.plot([min(n, LIMIT) for n in norms], label="after clipping")
ax.set(xlabel="step", ylabel="norm of the gradient")
ax.set_title("Clipping acts on the gradient")
ax.legend()

assert max(norms) > LIMIT
assert not torch.equal(clipped, plain)
without, *_ = fit(clip=LIMIT)
assert torch.equal(clipped, without)

# %%
# Some gradients were longer than the limit, and clipping changed the run. With
# or without the scaler, it changed it in the same way.
#
# When not to use it
# ------------------
#
# bfloat16 has the range of float32. There a scaler has nothing to save: leave
# it out.
#
# .. admonition:: Lessons learned
#
#    - Pass ``grad_scaler=scaler``; the loop stays PyTorch's.
#    - A scale that is a power of two changes nothing.
#    - Unscale before you clip, as with any optimizer.
#    - Clipping bounds the gradient, not the natural gradient. To bound the
#      step, lower ``lr`` or raise ``damping``.
#
# .. admonition:: Exercise
#
#    Train with a scale and ``clip=0.3``, but with ``unscale=False``. What is
#    clipped now?
#
# .. dropdown:: Solution
#
#    The scaled gradients: all are far longer than the limit, and after the
#    division next to nothing is left of them. The weights hardly move.
#
#    .. code-block:: python
#
#        first = nn.utils.parameters_to_vector(start.parameters()).detach()
#        stuck, *_ = fit(scale=2.0**16, clip=LIMIT, unscale=False)
#        moved, should = (stuck - first).norm(), (clipped - first).norm()
#        print(f"moved {moved / should:.1%} of the way")
#        assert moved < should / 100
#
# Where to go next:
# :ref:`sphx_glr_auto_gallery_2_features_plot_26_micro_batches.py` is the other
# place where a scale matters,
# :ref:`sphx_glr_auto_gallery_2_features_plot_23_checkpoints.py` saves the
# scaler too, and
# :ref:`sphx_glr_auto_gallery_3_advanced_plot_33_diagnostics.py` watches the
# length of the step.
