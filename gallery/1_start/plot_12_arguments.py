r"""
What does each argument do, and which do I tune first?
======================================================

SINGD has many arguments. Four of them decide whether a run works. Others you
set once, because your loop or your loss demands it. Most can stay as they are.
This page changes one argument at a time and draws what happens.

.. admonition:: What you will learn

   - **Name** the part of the update that each argument changes.
   - **Rank** the arguments by how much they matter.
   - **Tell** settings to search from facts to state.

   You should have read
   :ref:`sphx_glr_auto_gallery_1_start_plot_11_replace_adamw.py`.

Where the arguments stand
-------------------------

Every :math:`T` steps the factors move; :math:`C` alike, with the roles
exchanged. Every step the weights move.

.. math::

   \begin{aligned}
   m_K &\leftarrow \alpha_1 m_K + \tfrac12 [\operatorname{tr}(H_C) H_K
     + \lambda \operatorname{tr}(C^\top C) P(K^\top K) - I] \\
   K &\leftarrow K - \beta_1 K m_K \\
   M &\leftarrow \alpha_2 M + C C^\top \, \nabla_W \ell \; K K^\top
     + \gamma W \\
   W &\leftarrow W - \beta_2 M
   \end{aligned}

In code, :math:`\beta_2` is ``lr``, :math:`\alpha_2` ``momentum``,
:math:`\gamma` ``weight_decay``, :math:`\beta_1` ``lr_cov``, :math:`\alpha_1`
``alpha1``, :math:`\lambda` ``damping``, and ``structures`` chooses :math:`P`.
"""

import inspect

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from singd import PUBLISHED, SINGD

STEPS, BATCH = 150, 64
BASE = PUBLISHED | dict(lr=3e-3, lr_cov=0.2, T=1, normalize_lr_cov=True)
_ = torch.set_num_threads(1)  # the same digits on every machine

data = load_digits()
images = torch.tensor(data.data, dtype=torch.float32) / 16
labels = torch.tensor(data.target)

# %%
# One short run. The options replace those of ``BASE``.


def fit(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = SINGD(model, **{**BASE, **options})
    losses, traces = [], []
    for _ in range(STEPS):
        batch = torch.randint(0, 1797, (BATCH,))
        optimizer.zero_grad()
        output = model(images[batch])
        loss = nn.functional.cross_entropy(output, labels[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        traces.append(optimizer.factors("0").K.average_trace().item())
    return torch.tensor(losses), traces, optimizer.factors("0")


def last(run):
    return run[0][-30:].mean().item()  # the loss of the last 30 steps


# %%
# Seven numbers
# -------------
#
# We try three values for each: that of ``BASE``, and two others.
#
# **Before you run on:** in which panels will the curves lie furthest apart?

SWEEPS = {
    "lr": (3e-4, 3e-3, 3e-2),
    "lr_cov": (2e-3, 2e-2, 0.2),
    "T": (1, 5, 30),
    "damping": (1e-5, 1e-3, 1e-1),
    **dict.fromkeys(("momentum", "alpha1"), (0.0, 0.5, 0.9)),
    "weight_decay": (0.0, 1e-2, 1e-1),
}
base = fit()
runs = {
    (name, value): base if value == BASE[name] else fit(**{name: value})
    for name, values in SWEEPS.items()
    for value in values
}


def draw(ax, name, column, smooth=1):
    for i, value in enumerate(SWEEPS[name]):
        curve = torch.as_tensor(runs[name, value][column])
        color = plt.get_cmap("viridis")(i / 2.4)
        ax.plot(curve.unfold(0, smooth, 1).mean(1), color=color, label=value)
    ax.set(title=name, yscale="log")
    ax.legend(fontsize=8, labelspacing=0.2)


fig, axes = plt.subplots(2, 4, figsize=(9, 5), sharex=True, sharey=True)
for ax, name in zip(axes.flat, SWEEPS):
    draw(ax, name, column=0, smooth=10)
    ax.set_ylim(0.01, 20)
axes[1, 3].axis("off")
fig.supxlabel("step")
_ = fig.supylabel("training loss (mean of 10)")

# %%
# The upper row fans out more than the lower one. The bars divide the last loss
# with the worst of the three values by that with the best.

spread = {}
for name, values in SWEEPS.items():
    losses = [last(runs[name, value]) for value in values]
    spread[name] = max(losses) / min(losses)

fig, ax = plt.subplots(figsize=(6, 2.8))
drawn = ax.barh(list(spread), list(spread.values()))
ax.bar_label(drawn, fmt=" %.1f x")
ax.set(xscale="log", xlabel="worst loss / best loss", xlim=(1, 200))
ax.set_title("Four arguments decide")
ax.invert_yaxis()

factors = list(spread.values())
assert min(factors[:4]) > 10 > 8 > max(factors[4:])

# %%
# lr_cov and T: the pace of the factors
# -------------------------------------
#
# :math:`K` starts as the identity, so its average trace starts at 1. The
# figure follows it.

fig, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True)
for ax, name in zip(axes, ("lr_cov", "T")):
    draw(ax, name, column=1)
    ax.set(xlabel="step", yticks=(1, 2, 5), yticklabels=(1, 2, 5))
    ax.minorticks_off()
_ = axes[0].set_ylabel("average trace of K")

assert runs["lr_cov", 2e-3][1][-1] < 1.3
assert runs["T", 30][1][-1] < 1.6
assert min(last(runs["lr_cov", 2e-3]), last(runs["T", 30])) > 1.5
assert runs["lr_cov", 0.2][1][-1] > 4

# %%
# A small ``lr_cov`` and a large ``T`` do the same: the factors and the loss
# hardly move. Set the pace *first*. While the factors stand still, a search
# over ``lr`` tunes SGD.
#
# ``lr`` is next. In the first figure, the low one is slow, the high one noisy.
#
# damping: a ceiling
# ------------------
#
# Where the curvature :math:`H_K` vanishes, the bracket is zero at
# :math:`\lambda \operatorname{tr}(C^\top C) P(K^\top K) = I`. So the
# eigenvalues of :math:`\operatorname{tr}(C^\top C) \, K K^\top` grow up to
# :math:`1 / \lambda`, which is dashed.

fig, ax = plt.subplots(figsize=(7, 3.2))
for damping, color in zip(SWEEPS["damping"], ("C7", "C0", "C1")):
    K, C, *_ = runs["damping", damping][2]
    trace = C.gram().average_trace()
    values = damping * trace * torch.linalg.svdvals(K.dense()) ** 2
    assert values.max() < 1.05
    assert (values.median() > 0.9) == (damping > 1e-5)
    ax.plot(values / damping, color=color, label=f"damping {damping:g}")
    ax.axhline(1 / damping, color=color, linestyle="--", linewidth=1)
ax.set(yscale="log", xlabel="index of the eigenvalue", ylabel="eigenvalue")
ax.set_title("Damping bounds what the factors can amplify")
_ = ax.legend(loc="lower left")

# %%
# With 0.001 or more, most directions sit at the ceiling: ``damping`` sets the
# scale of the natural gradient. So search it together with ``lr``. With 1e-5
# the ceiling is so high that rare directions are amplified a lot, and the loss
# ends far above the one with 0.001.

assert last(runs["damping", 1e-5]) > 3 * last(runs["damping", 1e-3])

# %%
# structures: which entries there are
# -----------------------------------
#
# The pictures show :math:`K` less its average diagonal, in four structures,
# and the loss that each ends with. Blue is positive, red negative.

STRUCTURES = ("dense", "block8diagonal", "triurank4first", "diagonal")
fig, axes = plt.subplots(1, 4, figsize=(9, 2.7))
for ax, name in zip(axes, STRUCTURES):
    runs[name] = fit(structures=(name, "dense"))
    K = runs[name][2].K.dense()
    mean = K.diagonal().mean() * torch.eye(65)
    ax.imshow(K - mean, cmap="RdBu", vmin=-1, vmax=1)
    ax.set_title(f"{name}\nloss {last(runs[name]):.2f}", fontsize=9)
    ax.set(xticks=[], yticks=[], xlabel="column")
_ = axes[0].set_ylabel("row")

assert min(STRUCTURES, key=lambda name: last(runs[name])) == "dense"
assert base[2].K.dense().diagonal(1).mean() < 0

# %%
# Neighbouring pixels are alike. Their negative entries let :math:`K` amplify
# differences of pixels. Dense has all of these entries. It ends lowest here,
# and costs most.
#
# Facts and switches
# ------------------
#
# The others are not searched. They state a fact about your loss or your loop,
# or they save time or memory. We change one at a time.

# sphinx_gallery_nbval = "nbval-ignore-output"
SWITCHES = dict(normalize_lr_cov=False, preconditioner_dtype=torch.bfloat16)
SWITCHES |= dict(kfac_approx="reduce", cache_products=False)
SWITCHES |= dict(kfac_like=True, loss_average=None)
print(f"{'nothing changed':21} loss {last(base):.1g}")
for name, value in SWITCHES.items():
    T = 5 if name == "cache_products" else 1
    runs[name] = fit(T=T, **{name: value})
    print(f"{name:21} loss {last(runs[name]):.1g}")

# %%
# ``loss_average`` must tell the truth: our loss is a mean over the batch.
# ``kfac_approx`` changes nothing without shared weights, and
# ``cache_products`` nothing but time and memory (here with ``T=5``).
# ``kfac_like`` is another method, IKFAC, and needs a search of its own.

assert last(runs["loss_average"]) > 10 * last(base)
assert last(runs["kfac_like"]) > 3 * last(base)
assert torch.equal(runs["kfac_approx"][0], base[0])
assert abs(last(runs["cache_products"]) / last(runs["T", 5]) - 1) < 0.01

# %%
# All of them, with their pages:
#
# .. list-table::
#    :header-rows: 1
#
#    * - argument
#      - what it says
#      - page
#    * - ``structures``
#      - which entries :math:`K` and :math:`C` have
#      - :ref:`sphx_glr_auto_gallery_4_structures_plot_44_choosing.py`
#    * - ``loss_average``
#      - what your loss is divided by
#      - :ref:`sphx_glr_auto_gallery_2_features_plot_26_micro_batches.py`
#    * - ``kfac_approx``
#      - how to count positions that share a weight
#      - :ref:`sphx_glr_auto_gallery_2_features_plot_27_weight_sharing.py`
#    * - ``preconditioner_dtype``
#      - the precision of the factors
#      - :ref:`sphx_glr_auto_gallery_2_features_plot_24_mixed_precision.py`
#    * - ``grad_scaler``
#      - the scaler of your loss
#      - :ref:`sphx_glr_auto_gallery_2_features_plot_25_scaler_and_clipping.py`
#    * - ``average_gradients``
#      - whether ``step`` averages over processes
#      - :ref:`sphx_glr_auto_gallery_2_features_plot_28_several_processes.py`
#    * - ``shard_factors``
#      - each process keeps the factors of its share of the layers
#      - :ref:`sphx_glr_auto_gallery_2_features_plot_29_fully_sharded.py`
#    * - ``params``
#      - groups with options of their own
#      - :ref:`sphx_glr_auto_gallery_2_features_plot_21_parameter_options.py`
#    * - ``fallback``, ``warn_unsupported``
#      - AdamW's options for all other parameters, or leave them out
#      - :ref:`sphx_glr_auto_gallery_2_features_plot_20_outside_layers.py`
#    * - ``lr_cov``
#      - may be a function of the step count
#      - :ref:`sphx_glr_auto_gallery_2_features_plot_22_schedulers.py`
#    * - ``normalize_lr_cov``
#      - bound each step of the factors
#      - :doc:`/choosing`
#    * - ``kfac_like``
#      - IKFAC: no coupling, no ``alpha1``
#      - :doc:`/concepts`
#    * - ``cache_products``
#      - keep :math:`K K^\top` between updates (where that saves time)
#      - :doc:`/api`
#
# Is any argument missing?

others = ["model", "params", "structures", "fallback", "warn_unsupported"]
others += ["grad_scaler", "average_gradients", "shard_factors"]
others += [name for name in PUBLISHED if name not in (*SWEEPS, *SWITCHES)]
assert {*inspect.signature(SINGD).parameters} == {*SWEEPS, *SWITCHES, *others}

# %%
# When not to use this
# --------------------
#
# One small network, one seed, 150 steps. The order of the bars depends on our
# values, and ``weight_decay`` is there for the test loss, which we ignored. In
# many thousand steps the factors have time, and ``T=10`` saves cost.
#
# .. admonition:: Lessons learned
#
#    - First give the factors a pace: ``T``, ``lr_cov``, ``normalize_lr_cov``.
#    - Then search ``lr``, then ``damping`` with it.
#    - Leave ``momentum`` and ``alpha1`` alone.
#    - ``loss_average`` and ``grad_scaler`` are facts: state them.
#
# .. admonition:: Exercise
#
#    With ``T=30`` the factors stood still. Does a larger ``lr`` make up for
#    them?
#
# .. dropdown:: Solution
#
#    Only in part. The loss falls, but stays several times that of ``T=1``.
#
#    .. code-block:: python
#
#        ends = [last(fit(T=30, lr=lr)) for lr in (3e-3, 3e-2, 1e-1)]
#        print([f"{end:.1g}" for end in ends])
#        assert ends[0] > 1.5
#        assert 2 * last(base) < min(ends) < 0.3
#
# Where to go next: :doc:`/choosing` has values to start from, and
# :ref:`sphx_glr_auto_gallery_3_advanced_plot_33_diagnostics.py` shows how to
# read a run that does not work.
