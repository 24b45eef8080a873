r"""
Why does KFAC fail in bfloat16? Damping against rounding
========================================================

KFAC inverts a matrix. In bfloat16 that can go badly wrong, and SINGD, which
multiplies only, does not mind. But KFAC is cured by more damping, and this
page shows exactly how much. Then it trains with autocast.

.. admonition:: What you will learn

   - **Watch** rounding make an eigenvalue negative.
   - **Predict** the damping that KFAC needs in bfloat16.
   - **Train** with autocast, and choose the dtype of the factors.

   You should have read
   :ref:`sphx_glr_auto_gallery_1_start_plot_11_replace_adamw.py`.

Two ways to the same inverse
----------------------------

KFAC computes :math:`(U + \lambda I)^{-1}`. SINGD learns :math:`K` with

.. math::

   K K^\top \approx (U + \lambda I)^{-1} .

bfloat16 keeps 8 bits. Rounding moves each entry of :math:`U` by up to
:math:`2^{-9}` of its size, and the eigenvalues by about
:math:`2^{-8} \lambda_{\max}` at most. A small eigenvalue can thus become
negative. But :math:`K K^\top` is never indefinite, however :math:`K` is
rounded.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from singd import SINGD

STEPS, BATCH = 120, 64
_ = torch.set_num_threads(1)  # the same digits on every machine

data = load_digits()
images = torch.tensor(data.data, dtype=torch.float32) / 16
labels = torch.tensor(data.target)

# %%
# Round the second moment
# -----------------------
#
# :math:`U` of one batch of 64 digits, with the bias's one, in double precision
# and after rounding to bfloat16.

ones = torch.ones(BATCH, 1)
a = torch.cat([images[:BATCH], ones], dim=1).double()
U = a.T @ a / BATCH
rounded = U.bfloat16().double()
exact = torch.linalg.eigvalsh(U)
moved = torch.linalg.eigvalsh(rounded)
largest, lowest = exact[-1].item(), moved[0].item()
limit = 2**-8 * largest
print(f"lowest eigenvalue after rounding is negative: {lowest < 0}")

fig, ax = plt.subplots(figsize=(7, 3.4))
ax.plot(exact, "o", markersize=4, label="exact")
ax.plot(moved, "x", markersize=5, label="rounded to bfloat16")
ax.axhline(0, color="C7", linewidth=1)
ax.axhline(limit, color="C7", linestyle=":", label="$2^{-8}$ of the largest")
ax.set(xlabel="index", ylabel="eigenvalue", ylim=(-0.004, 0.05))
ax.set_title("Rounding makes small eigenvalues negative")
ax.legend()

assert exact[0] > -1e-12
assert lowest < 0
assert -lowest < limit

everything = torch.cat([images, torch.ones(1797, 1)], dim=1).double()
rounded_all = (everything.T @ everything / 1797).bfloat16().double()
assert torch.linalg.eigvalsh(rounded_all)[0] > -1e-12

# %%
# The exact eigenvalues are not negative. Some rounded ones are, by less than
# the dotted line. (With all 1,797 digits none is: it depends on the matrix.)
#
# **Before you run on:** add :math:`\lambda I` and invert. For which
# :math:`\lambda` is the result good, and where is it worst?

eye = torch.eye(65, dtype=torch.float64)
damping = torch.logspace(-5, 0, 60, dtype=torch.float64)
errors = []
for lam in damping:
    right = torch.linalg.inv(U + lam * eye)
    wrong = torch.linalg.inv(rounded + lam * eye)
    errors.append(((wrong - right).norm() / right.norm()).item())
errors = torch.tensor(errors)

fig, ax = plt.subplots(figsize=(7, 3.4))
ax.loglog(damping, errors, label="error of the inverse")
ax.axvline(-lowest, color="C3", linestyle="--", label="−(lowest eigenvalue)")
ax.axvline(limit, color="C7", linestyle=":", label="$2^{-8}$ of the largest")
ax.set(xlabel="damping λ", ylabel="relative error")
ax.set_title("Damping beats rounding above a threshold")
ax.legend()

worst = damping[errors.argmax()].item()
assert 0.3 < worst / -lowest < 3
left = torch.linalg.inv(rounded + worst / 10 * eye)
assert torch.linalg.eigvalsh(left)[0] < 0
assert errors.max() > 1
assert errors[damping > limit].max() < 0.05

# %%
# The error is largest near the dashed line. Left of it, the inverse has
# negative eigenvalues, so that a step can go uphill. Right of the dotted line
# the inverse is good. So KFAC is not broken in bfloat16: it needs
# :math:`\lambda \gtrsim 2^{-8} \lambda_{\max}`, and more damping means less of
# a second-order method.
#
# What rounding does to :math:`K K^\top`
# --------------------------------------
#
# We round the factor itself, and look for negative eigenvalues.

lam = 1e-3
values, vectors = torch.linalg.eigh(U + lam * eye)
K = vectors * values.rsqrt()
product = K.bfloat16().double() @ K.bfloat16().double().T
ours = torch.linalg.eigvalsh(product)[0].item()
theirs = torch.linalg.eigvalsh(rounded + lam * eye)[0].item()
print(f"negative eigenvalues of K Kᵀ: {ours < 0}, of U + λ I: {theirs < 0}")
assert ours > 0
assert theirs < 0

# %%
# In training
# -----------
#
# Autocast runs the layers in bfloat16 and keeps the weights in float32. The
# factors have the weight's dtype unless ``preconditioner_dtype`` says
# otherwise. We train in three ways.


def fit(autocast, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    factors = dict(T=1, lr_cov=0.2, normalize_lr_cov=True)
    optimizer = SINGD(model, lr=3e-3, preconditioner_dtype=dtype, **factors)
    shuffle = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        batch = torch.randint(0, 1797, (BATCH,), generator=shuffle)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(images[batch])
            loss = nn.functional.cross_entropy(output, labels[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    size = sum(s["state_bytes"] for s in optimizer.stats().values())
    return torch.tensor(losses), size


SETTINGS = {
    "float32": (False, None),
    "autocast": (True, None),
    "autocast, bfloat16 factors": (True, torch.bfloat16),
}
runs = {name: fit(*setting) for name, setting in SETTINGS.items()}

fig, axes = plt.subplots(1, 2, figsize=(9, 3.2))
for name, (losses, _) in runs.items():
    axes[0].plot(losses.unfold(0, 10, 1).mean(1), label=name)
axes[0].set(xlabel="step", ylabel="training loss (mean of 10)", yscale="log")
axes[0].set_title("All three train")
axes[0].legend(fontsize=8)
sizes = [size / 1e3 for _, size in runs.values()]
drawn = axes[1].barh(range(3), sizes, color=["C0", "C1", "C2"])
axes[1].bar_label(drawn, fmt=" %.0f")
axes[1].set(xlabel="state (kB)", yticks=[], xlim=(0, 1.2 * max(sizes)))
axes[1].set_title("Half-size factors halve most of it")
axes[1].invert_yaxis()

# %%
# All three reach a low loss. With bfloat16 factors the state is little more
# than half.

last = [losses[-30:].mean().item() for losses, _ in runs.values()]
assert max(last) < 0.3
assert sizes[0] == sizes[1]
assert 0.5 < sizes[2] / sizes[0] < 0.65

# %%
# When not to use it
# ------------------
#
# If memory is not short, keep float32 factors: their steps are small, and
# bfloat16 loses steps that are below about 1/256 of an entry.

one = torch.ones((), dtype=torch.bfloat16)
assert one + 1 / 300 == one

# %%
# .. admonition:: Lessons learned
#
#    - Rounding moves eigenvalues by up to about
#      :math:`2^{-8} \lambda_{\max}`.
#    - KFAC in bfloat16 needs damping above that; then it works.
#    - :math:`K K^\top` has no negative eigenvalues in any precision.
#    - Autocast needs nothing; ``preconditioner_dtype`` halves the factors.
#
# .. admonition:: Exercise
#
#    Where does the threshold lie if you first centre the images,
#    ``images - images.mean(0)``?
#
# .. dropdown:: Solution
#
#    Centring takes most of the largest eigenvalue away, and the threshold,
#    a share of it, falls with it.
#
#    .. code-block:: python
#
#        centred = (images - images.mean(0))[:BATCH].double()
#        values = torch.linalg.eigvalsh(centred.T @ centred / BATCH)
#        print(f"limit {limit:.2f}, centred {2**-8 * values[-1]:.2f}")
#        assert values[-1] < largest / 2
#
# Where to go next:
# :ref:`sphx_glr_auto_gallery_2_features_plot_23_checkpoints.py` keeps the
# dtype of the factors in a file,
# :ref:`sphx_glr_auto_gallery_4_structures_plot_40_zoo.py` makes them smaller,
# and :ref:`sphx_glr_auto_gallery_3_advanced_plot_33_diagnostics.py` watches
# them.
