r"""
Whose curvature? Labels from the data, or from the model
========================================================

The Fisher matrix is an average over labels that the *model* predicts. Most
code, and SINGD as it comes, uses the labels of the *data*, because their
gradients are there anyway. That is another matrix. Here both stand beside the
exact one, and two calls let SINGD sample.

.. admonition:: What you will learn

   - **Sample** labels with :func:`singd.sample_labels`.
   - **Separate** the backward pass for the curvature from that for the step.
   - **Measure** how far each estimate is from the exact matrix.

   You should have read
   :ref:`sphx_glr_auto_gallery_1_start_plot_10_first_steps.py`, and know what
   a Jacobian is. Lesson 2,
   :ref:`sphx_glr_auto_gallery_0_course_plot_02_four_matrices.py`, derives the
   matrices.

Three matrices
--------------

Let :math:`g` be the gradient of the loss by the outputs of a layer. Then

.. math::

   G = \mathbb{E}_x\, \mathbb{E}_{y \sim p(y|x)} [g g^\top]
     = \mathbb{E}_x [J^\top (\operatorname{diag} p - p p^\top) J], \qquad
   \hat G = \mathbb{E}_{(x, y) \sim \text{data}} [g g^\top]

with the Jacobian :math:`J` of the logits. :math:`G` belongs to the Fisher
matrix and :math:`\hat G` to the *empirical* one. If the model has learned the
distribution of the labels, they agree. A label that surprises it makes
:math:`\hat G` larger, a label that it knows by heart smaller.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.func import jacrev, vmap

from singd import PUBLISHED, SINGD, sample_labels

WRONG, SEEN, STEPS, BATCH = 0.2, 900, 150, 256
_ = torch.set_num_threads(1)  # the same digits on every machine
torch.manual_seed(0)
cross_entropy = nn.functional.cross_entropy

# %%
# Digits of 8 x 8 pixels. A fifth of the labels is replaced by random ones, so
# that there are surprises.

data = load_digits()
x = torch.tensor(data.data, dtype=torch.float32) / 16
truth = torch.tensor(data.target)
other, wrong = torch.randint(0, 10, truth.shape), torch.rand(len(x)) < WRONG
y = torch.where(wrong, other, truth)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10))


# %%
# The two calls
# -------------
#
# First a backward pass on sampled labels. SINGD collects the statistics of
# every backward pass, so this one gives the curvature. Then ``zero_grad``, and
# the pass of the loss *inside* ``collecting(False)``: it gives the gradient,
# and the factors see nothing of it.


def step(model, optimizer, x, y, curvature):
    optimizer.zero_grad()
    if curvature == "sampled":
        outputs = model(x)
        cross_entropy(outputs, sample_labels(outputs)).backward()
        optimizer.zero_grad()
    with optimizer.collecting(curvature != "sampled"):
        cross_entropy(model(x), y).backward()
    optimizer.step()


# %%
# The exact matrix
# ----------------
#
# ``rule="kfac"`` keeps :math:`G` as it is, and its first statistics count in
# full. So one step with ``lr=0`` on all data reads it. For the exact one,
# ``torch.func`` writes :math:`J` of every input.

KFAC = {**PUBLISHED, "rule": "kfac", "T": 1, "momentum": 0.0}


def collected(model, x, y):
    optimizer = SINGD(model, lr=0.0, **KFAC)
    cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.detach()
    return optimizer.factors("0").G.dense()


@torch.no_grad()
def exact(model, x):
    J = vmap(jacrev(model[1:]))(model[0](x))
    p = model(x).softmax(1)
    H = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    return (J.mT @ H @ J).mean(0)


def ratio(model, part):
    """Traces: empirical over exact."""
    empirical = collected(model, x[part], y[part])
    return (empirical.trace() / exact(model, x[part]).trace()).item()


seen, unseen = slice(None, SEEN), slice(SEEN, None)
model = network()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
steps, ratios = range(0, 4 * STEPS + 1, 50), []
for t in range(4 * STEPS + 1):
    if t in steps:
        ratios.append((ratio(model, seen), ratio(model, unseen)))
    batch = torch.randint(0, SEEN, (BATCH,))
    optimizer.zero_grad()
    cross_entropy(model(x[batch]), y[batch]).backward()
    optimizer.step()

# %%
# **Before you run on:** the model learned the first 900 labels, the wrong
# ones with them. On which half is the empirical matrix too large?

fig, ax = plt.subplots(figsize=(5.4, 3.4))
for name, look, line in zip(
    ("labels seen", "labels not seen"), ("C1o-", "C1o--"), zip(*ratios)
):
    ax.plot(steps, line, look, label=name)
ax.axhline(1, color="0.6", linestyle=":")
ax.set(xlabel="step", ylabel="empirical / exact", title="Traces of G")
_ = ax.legend()

# sphinx_gallery_start_ignore
assert abs(ratios[0][0] - 1) < 0.05
assert ratios[-1][0] < 0.9 < 1.3 < ratios[-1][1]
# sphinx_gallery_end_ignore

# %%
# At the start there is hardly a difference. Later the empirical matrix is too
# small on the labels that were learned by heart, and too large on others. Now
# the matrices themselves, on the labels seen, with eight draws per input:


def sampled(model, x, draws):
    many = x.repeat(draws, 1)
    with torch.no_grad():
        drawn = sample_labels(model(many))
    return collected(model, many, drawn)


def error(G, of):
    return ((G - of).norm() / of.norm()).item()


matrices = {
    "exact": exact(model, x[seen]),
    "sampled": sampled(model, x[seen], 8),
    "empirical": collected(model, x[seen], y[seen]),
}
fig, axes = plt.subplots(1, 3, figsize=(5.4, 2.7), sharey=True)
for ax, (name, G) in zip(axes, matrices.items(), strict=True):
    image = ax.imshow(G, cmap="RdBu", vmin=-0.13, vmax=0.13)
    ax.set(title=name, xlabel="hidden unit")
axes[0].set_ylabel("hidden unit")
fig.colorbar(image, ax=axes, location="bottom", shrink=0.6)
errors = {n: error(G, matrices["exact"]) for n, G in matrices.items()}
print({name: f"{value:.0%}" for name, value in errors.items()})

# sphinx_gallery_start_ignore
assert errors["sampled"] < 0.1
assert errors["empirical"] > 3 * errors["sampled"]
# sphinx_gallery_end_ignore

# %%
# The sampled matrix can hardly be told from the exact one.
#
# More draws help, more data don't
# --------------------------------
#
# The error of sampling falls with the root of the number of draws. The
# empirical matrix has an error that no amount of data takes away.

draws, few = [1, 4, 16, 64], x[:400]
found = [error(sampled(model, few, n), exact(model, few)) for n in draws]
floor = error(collected(model, few, y[:400]), exact(model, few))
fig, ax = plt.subplots(figsize=(5.4, 3.4))
ax.loglog(draws, found, "C2o-", label="sampled")
law = [found[0] / n**0.5 for n in draws]
ax.loglog(draws, law, ":", color="0.6", label="root law")
ax.axhline(floor, color="C1", label="empirical")
ax.set(xlabel="draws per input", ylabel="relative error", title="Errors of G")
_ = ax.legend()

# sphinx_gallery_start_ignore
assert found[-1] < found[0] / 4
assert found[-1] < 0.2 * floor
# sphinx_gallery_end_ignore

# %%
# Does it matter for training?
# ----------------------------
#
# Two runs of SINGD, the same but for the labels of their curvature. A sampled
# step needs a second forward and backward pass; with ``T=5`` only every fifth
# step does.

OPTIONS = {**PUBLISHED, "T": 5, "lr_cov": 0.2, "match_rms": 0.2}
OPTIONS |= {"normalize_lr_cov": "spectral", "momentum_on": "gradient"}


def fit(curvature, lr=0.02, seed=0):
    model = network()
    optimizer = SINGD(model, lr=lr, **OPTIONS)
    torch.manual_seed(seed)
    batches = [torch.randint(0, len(x), (BATCH,)) for _ in range(STEPS)]
    right = []
    for t, batch in enumerate(batches):
        how = curvature if t % 5 == 0 else "none is due"
        step(model, optimizer, x[batch], y[batch], how)
        with torch.no_grad():
            right.append((model(x).argmax(1) == truth).float().mean().item())
    return right


fig, ax = plt.subplots(figsize=(5.4, 3.4))
colors = {"sampled": "C2", "empirical": "C1"}
runs = {name: [fit(name, seed=s) for s in (0, 1)] for name in colors}
for name, color in colors.items():
    for seed, right in enumerate(runs[name]):
        look = dict(lw=5, alpha=0.4) if name == "sampled" else dict(lw=1)
        look["label"] = f"{name}, seed {seed}"
        ax.plot(right, color + "-:"[seed], **look)
ax.set(xlabel="step", ylabel="share of true labels met")
ax.set_title("Two seeds of each")
_ = ax.legend()

# sphinx_gallery_start_ignore
last = {k: min(right[-1] for right in v) for k, v in runs.items()}
assert min(last.values()) > 0.9
assert abs(last["sampled"] - last["empirical"]) < 0.02
# sphinx_gallery_end_ignore

# %%
# Here it does not: the curves lie on each other, though the matrices differ.
# Where they differ by a factor only, ``match_rms`` takes it out. Do not expect
# a faster run from sampling; expect the right matrix.
#
# When not to use it
# ------------------
#
# If the curvature only preconditions, try without: it costs a pass. Use it
# where the matrix itself is read, as for Laplace approximations or pruning.
# For a regression say ``sample_labels(outputs, "gaussian")``.
#
# .. admonition:: Lessons learned
#
#    - The labels decide which matrix you have.
#    - Sampling is right on average, and its error falls with the draws.
#    - ``collecting(False)`` keeps a backward pass out of the factors.
#    - A better curvature is not always a faster run.
#
# .. admonition:: Exercise
#
#    Leave ``collecting(False)`` out. What does SINGD say?
#
# .. dropdown:: Solution
#
#    It warns, because the second pass would replace the sampled curvature.
#
#    .. code-block:: python
#
#        import warnings
#
#        model = network()
#        optimizer = SINGD(model, lr=0.0, **KFAC)
#        outputs = model(x)
#        cross_entropy(outputs, sample_labels(outputs)).backward()
#        optimizer.zero_grad()
#        cross_entropy(model(x), y).backward()
#        with warnings.catch_warnings(record=True) as caught:
#            warnings.simplefilter("always")
#            optimizer.step()
#        assert "collecting(False)" in str(caught[0].message)
#
# Where to go next:
# :ref:`sphx_glr_auto_gallery_3_advanced_plot_36_four_rules_one_task.py`
# compares rules,
# :ref:`sphx_glr_auto_gallery_3_advanced_plot_33_diagnostics.py` reads the
# factors of a run, and :doc:`/concepts` tells where :math:`G` comes from.
