r"""
Why does KFAC fail in bfloat16? Damping against rounding
========================================================

:term:`KFAC` inverts matrices, and in :term:`bfloat16`, a number format of 16
bits, that can go badly wrong. SINGD only multiplies, and trains as in float32.
But enough :term:`damping` cures KFAC, too. This page predicts how much is
enough, and trains both in both precisions. Then it trains with autocast.

.. admonition:: What you will learn

   - **Watch** rounding make an eigenvalue negative.
   - **Predict** the damping that KFAC needs in bfloat16.
   - **Train** with autocast, and choose the dtype of the factors.

   You should have read
   :ref:`sphx_glr_auto_gallery_1_start_plot_11_replace_adamw.py`; what damping
   is, :ref:`sphx_glr_auto_gallery_0_course_plot_05_damping.py` explains.

Two ways to precondition
------------------------

For each layer, KFAC averages :math:`U = \mathbb{E}[a a^\top]` of its inputs
and :math:`G` of its output gradients, and inverts both. The damping
:math:`\lambda` is shared out by their average eigenvalues:

.. math::

   N = (G + \tfrac1\pi \sqrt\lambda I)^{-1} \, \nabla_W \ell \;
   (U + \pi \sqrt\lambda I)^{-1} , \qquad
   \pi^2 = \frac{\operatorname{tr} U}{\operatorname{tr} G} .

SINGD learns :math:`K` and :math:`C` such that :math:`K K^\top` and
:math:`C C^\top` take the places of the two inverses. bfloat16 keeps 8 bits.
Rounding moves each entry of :math:`U` by up to :math:`2^{-8}` of its size, so
the eigenvalues move by about :math:`2^{-8}` of the largest, at most.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from singd import PUBLISHED, SINGD
from singd.rules import Kfac

STEPS, BATCH, HALF = 80, 64, torch.bfloat16
_ = torch.set_num_threads(1)  # the same digits on every machine

data = load_digits()
images = torch.tensor(data.data, dtype=torch.float32) / 16
labels = torch.tensor(data.target)

# %%
# Round the second moment
# -----------------------
#
# We take :math:`U` of one batch of 64 digits, with a 1 appended for the bias,
# in double precision, and round it to bfloat16. These are its eigenvalues:

a = torch.cat([images[:BATCH], torch.ones(BATCH, 1)], dim=1).double()
U = a.T @ a / BATCH
exact = torch.linalg.eigvalsh(U)
moved = torch.linalg.eigvalsh(U.bfloat16().double())
limit = 2**-8 * exact[-1]

fig, ax = plt.subplots(figsize=(5, 3.4))
ax.plot(exact, "ko", markersize=4, label="exact")
ax.plot(moved, "C3x", markersize=6, label="rounded to bfloat16")
ax.axhline(0, color="black", linewidth=1)
ax.axhline(limit, color="black", ls=":", label="$2^{-8}$ of the largest")
ax.set(xlabel="eigenvalue, from the smallest on", ylabel="its value")
ax.set_yscale("symlog", linthresh=1e-4)
ax.set(ylim=(-0.1, 30), title="Rounding makes eigenvalues negative")
_ = ax.legend()

# sphinx_gallery_start_ignore
assert exact[0] > -1e-12
assert -limit < moved[0] < -1e-4
# sphinx_gallery_end_ignore

# %%
# The exact eigenvalues are not negative. Some rounded ones are, by less than
# the dotted line says. The inverse of a small negative number is a large
# negative one: a large step uphill.
#
# Train both in both precisions
# -----------------------------
#
# KFAC adds :math:`\pi \sqrt\lambda` to each eigenvalue of :math:`U`. So we
# predict that rounding does no harm where this is larger than :math:`2^{-8}`
# of the largest eigenvalue. One step of KFAC tells :math:`U` and :math:`\pi`.
# The KFAC is that of textbooks, with the options of ``PUBLISHED``. SINGD has
# its defaults, but dense factors and, like KFAC, a damping that is not
# relative to the curvature.

KFAC = PUBLISHED | dict(lr=1e-2, T=1, lr_cov=0.1, rule="kfac")
OURS = dict(lr=1e-2, structures=("dense", "dense"), relative_damping=False)


def fit(autocast=False, steps=STEPS, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = SINGD(model, **options)
    shuffle, losses = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        batch = torch.randint(0, 1797, (BATCH,), generator=shuffle)
        optimizer.zero_grad()
        with torch.autocast("cpu", HALF, enabled=autocast):
            output = model(images[batch])
            loss = nn.functional.cross_entropy(output, labels[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses), optimizer


_, optimizer = fit(steps=1, **KFAC)
enough = 0.0
for name in ("0", "2"):
    U, G, *_ = optimizer.factors(name)
    pi = (U.average_trace() / G.average_trace()).sqrt()
    largest = torch.linalg.eigvalsh(U.dense())[-1]
    enough = max(enough, (2**-8 * largest / pi).item() ** 2)
print(f"predicted: a damping above {enough:.0e} is enough")

# %%
# **Before you run on:** which of the four curves will rise on the left, and
# where?

ROUNDED = dict(preconditioner_dtype=HALF)
ROUNDED_KFAC = dict(rule=Kfac(inverse_dtype=HALF), **ROUNDED)
RUNS = {
    "KFAC, float32": ("C2o-", KFAC),
    "KFAC, bfloat16": ("C2x--", KFAC | ROUNDED_KFAC),
    "SINGD, float32": ("C0o-", OURS),
    "SINGD, bfloat16": ("C0x--", OURS | ROUNDED),
}
DAMPINGS, last = (1e-6, 1e-5, 1e-3, 1e-2), []
fig, ax = plt.subplots(figsize=(5, 3.8))
for name, (style, options) in RUNS.items():
    runs = [fit(**(options | dict(damping=lam)))[0] for lam in DAMPINGS]
    last.append([losses[-30:].mean().item() for losses in runs])
    ax.plot(DAMPINGS, last[-1], style, label=name)
ax.axvline(enough, color="black", linestyle=":", label="predicted")
ax.set(xscale="log", yscale="log", xlabel="damping λ")
ax.set(ylabel="loss of the last 30 steps")
ax.set_title("KFAC in bfloat16 needs damping")
_ = ax.legend()

# sphinx_gallery_start_ignore
for lam, kfac, kfac_half, ours, ours_half in zip(DAMPINGS, *last):
    assert 0.7 < ours_half / ours < 1.5
    if lam < enough:
        assert kfac_half > 3 * kfac
    else:
        assert 0.8 < kfac_half / kfac < 1.25
# sphinx_gallery_end_ignore

# %%
# To the left of the predicted line, KFAC in bfloat16 is far above KFAC in
# float32; to the right they agree. So KFAC is not broken in bfloat16: it needs
# a damping that the rounding sets. SINGD trains alike in both precisions, with
# any of these dampings.
#
# The reason is that :math:`K K^\top` has no negative eigenvalue, however
# :math:`K` is rounded. (If the product is rounded too, one may be slightly
# below zero. But nothing is inverted afterwards: :doc:`/concepts`.)

_, optimizer = fit(**OURS, **ROUNDED, damping=1e-5)
for factor in optimizer.factors("0")[:2]:  # K, C
    matrix = factor.dense().double()
    lowest = torch.linalg.eigvalsh(matrix @ matrix.T)[0]
    print("lowest eigenvalue is positive:", bool(lowest > 0))
    assert lowest > 0

# %%
# Autocast
# --------
#
# ``torch.autocast`` computes the layers in bfloat16 and keeps the weights in
# float32. The factors have the dtype of the weights, unless
# ``preconditioner_dtype`` says otherwise.

SETTINGS = {
    "float32": {},
    "autocast": dict(autocast=True),
    "autocast, bfloat16 factors": dict(autocast=True, **ROUNDED),
}
STYLES = dict(color="silver", lw=6), dict(color="C0"), dict(color="k", ls=":")
fig, ax = plt.subplots(figsize=(5, 3.4))
sizes, ends = [], []
for (name, options), style in zip(SETTINGS.items(), STYLES):
    losses, optimizer = fit(lr=1e-2, **options)
    sizes.append(sum(s["state_bytes"] for s in optimizer.stats().values()))
    ax.plot(losses.unfold(0, 10, 1).mean(1), label=name, **style)
    ends.append(losses[-30:].mean())
ax.set(xlabel="step", ylabel="training loss (mean of 10)", yscale="log")
ax.set_title("All three train alike")
ax.legend()
print(f"state with bfloat16 factors: {sizes[2] / sizes[0]:.0%}")

# sphinx_gallery_start_ignore
assert max(ends) < 1.2 * min(ends)
assert sizes[0] == sizes[1]
assert 0.5 < sizes[2] / sizes[0] < 0.75
# sphinx_gallery_end_ignore

# %%
# The three losses hardly differ. With bfloat16 factors the optimizer keeps
# about two thirds of the memory; the rest is the momentum of the weights.
#
# When not to use it
# ------------------
#
# If memory is not short, keep float32 factors. They learn by small steps, and
# in bfloat16 a step that is much smaller than the number it is added to is
# lost:

one = torch.ones((), dtype=HALF)
assert one + 1 / 300 == one

# %%
# .. admonition:: Lessons learned
#
#    - Rounding to bfloat16 moves eigenvalues by up to about :math:`2^{-8}` of
#      the largest.
#    - KFAC in bfloat16 needs damping above that; then it works.
#    - SINGD inverts nothing, so rounding asks for no more damping.
#    - With autocast, nothing changes. ``preconditioner_dtype`` halves factors.
#
# .. admonition:: Exercise
#
#    Subtract the mean image first, ``images - images.mean(0)``. Where does the
#    dotted line of the first figure lie then?
#
# .. dropdown:: Solution
#
#    The mean makes up most of the largest eigenvalue. Without it the dotted
#    line, a share of that eigenvalue, is less than half as high.
#
#    .. code-block:: python
#
#        centred = (images - images.mean(0))[:BATCH].double()
#        values = torch.linalg.eigvalsh(centred.T @ centred / BATCH)
#        print(f"limit {limit:.2f}, centred {2**-8 * values[-1]:.2f}")
#        assert values[-1] < exact[-1] / 2
#
# Where to go next:
# :ref:`sphx_glr_auto_gallery_2_features_plot_23_checkpoints.py` keeps the
# dtype of the factors in a file,
# :ref:`sphx_glr_auto_gallery_4_structures_plot_40_zoo.py` makes them smaller,
# and :ref:`sphx_glr_auto_gallery_3_advanced_plot_33_diagnostics.py` watches
# them.
