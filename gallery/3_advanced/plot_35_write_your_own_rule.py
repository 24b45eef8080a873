r"""
Write your own rule
===================

Thirty lines make a new optimizer. A *rule* says what is kept of each layer,
how it moves, and what becomes of the gradient. All else is there already:
layers, structures, checkpoints, several processes. This page writes one that
looks at the inputs of a layer alone, checks it by its law, and trains with it.

.. admonition:: What you will learn

   - **Write** a rule: a subclass of :class:`~singd.Rule`.
   - **Check** it by a law that a wrong rule would break.
   - **Register** it, save it, and compare it with the others.

   You should have read
   :ref:`sphx_glr_auto_gallery_1_start_plot_10_first_steps.py`, and know KFAC:
   :ref:`sphx_glr_auto_gallery_0_course_plot_06_kfac_from_scratch.py`.

The idea
--------

For inputs :math:`a` of a layer let :math:`U` be the average of
:math:`a a^\top`. We keep a running average of it, and its damped inverse:

.. math::

   U \leftarrow (1 - \beta) U + \beta \bar U, \qquad
   X = (U + \lambda I)^{-1}, \qquad
   N = \nabla_W \ell \; X .

For a linear layer with a squared loss this is Newton's method, because the
curvature does not depend on the output.
"""

import copy

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import CenteredNorm
from sklearn.datasets import load_digits
from torch import nn

from singd import PUBLISHED, SINGD, Rule, register_rule
from singd.rules import INPUT

STEPS, BATCH = 80, 128
_ = torch.set_num_threads(1)  # the same digits on every machine

# %%
# The rule
# --------
#
# ``keeps`` names the matrices and the side of the layer that they belong to.
# They are structured matrices, so that the rule works with blocks as well.
# ``curvature`` sums over the rows of one backward pass, ``update`` gets the
# mean. ``prepare`` takes from the factors what ``direction`` multiplies each
# gradient by. A rule never changes the factors that it is given.


class InputsOnly(Rule):
    """N = dW (U + damping I)^-1."""

    name = "inputs-only"
    keeps = {"U": INPUT, "X": INPUT}

    def refusal(self, structure):
        blocks = all(t.ndim > 1 for t in structure.tensors())
        return None if blocks else "dense and block-diagonal structures"

    def start(self, identity):
        return {"U": identity[INPUT] * 0.0, "X": identity[INPUT] * 1.0}

    def curvature(self, factors, a, g):
        pairs = (factors["input"], a), (factors["output"], g)
        return tuple(I.project_congruence(rows) for I, rows in pairs)

    def update(self, factors, curvature, options, updates):
        beta = 1.0 if updates == 0 else options["lr_cov"]
        U = factors["U"] * (1 - beta) + curvature.H_K * beta
        damped = (U * 1.0).add_identity_(options["damping"])
        return {"U": U, "X": damped.map(torch.linalg.inv)}

    def sides(self, factors):
        return factors["X"], factors["X"]

    def prepare(self, factors, keep):
        return factors["X"]

    def direction(self, prepared, dW, *, overwrite=False):
        return prepared.mm(dW.mT.to(prepared.dtype)).mT


register_rule("inputs-only", InputsOnly())

# %%
# Its law
# -------
#
# Take inputs whose scales differ by a thousand, and a linear layer. With
# almost no damping and ``lr=1`` **one** step must reach the least-squares
# solution.
#
# **Before you run on:** where will SGD and AdamW be after 80 steps?

torch.manual_seed(0)
scales = torch.logspace(-2, 1, 12, dtype=torch.float64)
x = torch.randn(500, 12, dtype=torch.float64) * scales
target = (x / scales) @ torch.randn(12, 3, dtype=torch.float64)
target += 0.1 * torch.randn_like(target)
solution = torch.linalg.lstsq(x, target).solution
best = 0.5 * (x @ solution - target).square().sum(1).mean().item()


def regress(make, steps=STEPS):
    torch.manual_seed(1)
    model = nn.Linear(12, 3, bias=False, dtype=torch.float64)
    optimizer, losses = make(model), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = 0.5 * (model(x) - target).square().sum(1).mean()
        losses.append(loss.item() - best)
        loss.backward()
        optimizer.step()
    return model, losses


published = {**PUBLISHED, "momentum": 0.0, "T": 1, "damping": 1e-12}
METHODS = {
    "inputs-only": lambda m: SINGD(
        m, lr=1.0, **{**published, "rule": "inputs-only"}
    ),
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.1),
}
model, _ = regress(METHODS["inputs-only"], steps=1)
error = (model.weight.detach() - solution.T).abs().max().item()
assert error < 1e-5

curves = {name: regress(make)[1] for name, make in METHODS.items()}
COLOR = {"inputs-only": "k", "SGD": "C7", "AdamW": "C1"}
COLOR |= {"kfac": "C2", "singd": "C0"}
fig, axes = plt.subplots(2, 1, figsize=(5.4, 5.6))
axes[0].semilogy(torch.linalg.eigvalsh(x.T @ x / len(x)).flip(0), "ko-")
axes[0].set(xlabel="index", ylabel="eigenvalue", title="Spectrum of U")
for name, losses in curves.items():
    axes[1].semilogy([max(v, 1e-12) for v in losses], COLOR[name], label=name)
axes[1].set(xlabel="step", ylabel="loss above the best", title="Regression")
_ = axes[1].legend()

# sphinx_gallery_start_ignore
assert curves["inputs-only"][1] < 1e-9
assert min(curves["SGD"][-1], curves["AdamW"][-1]) > 0.01
# sphinx_gallery_end_ignore

# %%
# Our rule is there after one step, the others are not after 80. A missing
# transpose, a forgotten mean or a wrong column would break the law at once.
#
# Real data
# ---------
#
# A network of two layers on 8 x 8 digits. Every run uses the *same* size of
# update (``match_rms``) and the same rate, so that only directions differ.

data = load_digits()
images = torch.tensor(data.data, dtype=torch.float32) / 16
labels = torch.tensor(data.target)
SAME = {
    **PUBLISHED, "T": 1, "lr_cov": 0.2, "match_rms": 0.2, "damping": 1e-2,
    "momentum_on": "gradient", "normalize_lr_cov": "spectral",
}  # fmt: skip


def fit(rule, model=None, optimizer=None, steps=STEPS, seed=0, **options):
    torch.manual_seed(seed)
    if model is None:
        layers = nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)
        model = nn.Sequential(*layers)
        optimizer = SINGD(model, lr=0.03, **{**SAME, "rule": rule, **options})
    losses = []
    for _ in range(steps):
        batch = torch.randint(0, len(images), (BATCH,))
        optimizer.zero_grad()
        output = model(images[batch])
        loss = nn.functional.cross_entropy(output, labels[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model, optimizer


runs = {rule: fit(rule) for rule in ("inputs-only", "kfac", "singd")}
fig, ax = plt.subplots(figsize=(5.4, 3.4))
for rule, (losses, *_) in runs.items():
    ax.semilogy(losses, COLOR[rule], label=rule)
ax.set(xlabel="step", ylabel="loss", title="Digits, one rate for all")
_ = ax.legend()

# sphinx_gallery_start_ignore
assert all(losses[-1] < 0.3 for losses, *_ in runs.values())
# sphinx_gallery_end_ignore

# %%
# It trains. One rate on one task says nothing about which of them is better.
# What it keeps is named as you named it, and may be looked at:

_, model, optimizer = runs["inputs-only"]
factors = optimizer.factors("0")
assert factors._fields == ("U", "X")
damped = factors.U.dense() + 1e-2 * torch.eye(65)
assert (factors.X.dense() @ damped - torch.eye(65)).abs().max() < 1e-3

fig, axes = plt.subplots(2, 1, figsize=(4.2, 6.6))
for ax, name in zip(axes, factors._fields, strict=True):
    shown = getattr(factors, name).dense()
    image = ax.imshow(shown, norm=CenteredNorm(), cmap="RdBu")
    ax.set(xlabel="input", ylabel="input", title=f"{name}, first layer")
    _ = fig.colorbar(image, ax=ax)

# %%
# Pixels of a row are alike, hence the squares in :math:`U`. :math:`X` is its
# damped inverse. Checkpoints work without a line of yours, to the last bit:

saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
going_on, *_ = fit(None, model, optimizer, steps=5)
_, twin, resumed = fit("inputs-only", steps=0)
twin.load_state_dict(saved[0])
resumed.load_state_dict(saved[1])
assert fit(None, twin, resumed, steps=5)[0] == going_on

# %%
# When not to use this
# --------------------
#
# If only the numbers differ, an option will do: see :doc:`/choosing`. A new
# *set of matrices* is a structure, a new *kind of layer* a layer: both have
# pages of their own. This rule inverts, so that half precision harms it.
#
# .. admonition:: Lessons learned
#
#    - A rule is what it keeps, how that moves, and a direction.
#    - It never sees a process, a checkpoint or a hook.
#    - A law finds what a falling loss hides.
#
# .. admonition:: Exercise
#
#    Give :math:`U` and :math:`X` blocks, of 4 in the regression and of 16 in
#    the network. Does the law still hold? Does it train?
#
# .. dropdown:: Solution
#
#    The regression has independent inputs, but a sample of them is not
#    exactly so: one step comes near only. It trains all the same.
#
#    .. code-block:: python
#
#        blocks = ("block4diagonal", "dense")
#        options = {**published, "rule": "inputs-only", "structures": blocks}
#        _, losses = regress(lambda m: SINGD(m, lr=1.0, **options), steps=3)
#        assert 1e-6 < losses[1] < 0.1 * losses[0]
#        blocks = ("block16diagonal", "dense")
#        losses, *_ = fit("inputs-only", structures=blocks)
#        assert losses[-1] < 0.3
#
# Where to go next:
# :ref:`sphx_glr_auto_gallery_3_advanced_plot_36_four_rules_one_task.py`
# compares the rules that are ready,
# :ref:`sphx_glr_auto_gallery_4_structures_plot_43_your_own_structure.py`
# makes a structure, and
# :ref:`sphx_glr_auto_gallery_3_advanced_plot_32_custom_layer.py` a layer.
