r"""
What does each argument do, and which do I tune first?
======================================================

``SINGD(model)`` trains with its defaults, and one argument is left to tune:
the learning rate. This page tunes it, beside AdamW's. Then it changes the
other arguments, one at a time, and draws what happens.

.. admonition:: What you will learn

   - **Name** the part of the update that each argument changes.
   - **Rank** the arguments by how much they matter.
   - **Tell** settings to search from facts to state.

   You should have read
   :ref:`sphx_glr_auto_gallery_1_start_plot_11_replace_adamw.py`.

Where the arguments stand
-------------------------

Every :math:`T` steps the factors move; :math:`C` alike, with the roles
exchanged. Every step the weights move, by their momentum :math:`M` between the
factors, scaled to the size :math:`\rho`.

.. math::

   \begin{aligned}
   m_K &= \tfrac12 [\operatorname{tr}(H_C) H_K
     + \lambda \operatorname{tr}(U) \operatorname{tr}(G)
       \operatorname{tr}(C^\top C) P(K^\top K) - I] \\
   K &\leftarrow K - \beta_1 K m_K \\
   M &\leftarrow \alpha_2 M + (1 - \alpha_2) \nabla_W \ell \\
   N &= C C^\top M \, K K^\top \\
   W &\leftarrow W - \beta_2 \, \rho \, N / \operatorname{rms}(N)
   \end{aligned}

In code, :math:`\beta_2` is ``lr``, :math:`\rho` ``match_rms``,
:math:`\alpha_2` ``momentum``, :math:`\lambda` ``damping``, :math:`\beta_1`
``lr_cov``, and ``structures`` chooses :math:`P`. (Nesterov's correction of
:math:`M` is left out here.) Lesson 5, on
:ref:`damping <sphx_glr_auto_gallery_0_course_plot_05_damping.py>`, and
:ref:`lesson 8 <sphx_glr_auto_gallery_0_course_plot_08_a_step_on_a_group.py>`,
on the step, derive the upper two lines.
"""

import inspect

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from singd import SINGD

STEPS, BATCH, SEEDS, LR = 100, 64, (0, 1), 0.03
_ = torch.set_num_threads(1)  # the same digits on every machine

data = load_digits()
images = torch.tensor(data.data, dtype=torch.float32) / 16
labels = torch.tensor(data.target)

# %%
# One short run per seed, with a rate that falls to zero. The options replace
# those of ``SINGD(model, lr=LR)``.


def fit(make=SINGD, seeds=SEEDS, **options):
    curves = []
    for seed in seeds:
        torch.manual_seed(seed)
        layers = nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
        model = nn.Sequential(*layers)
        adamw = make is torch.optim.AdamW
        optimizer = make(model.parameters() if adamw else model, **options)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, STEPS)
        losses = []
        for _ in range(STEPS):
            batch = torch.randint(0, len(images), (BATCH,))
            optimizer.zero_grad()
            output = model(images[batch])
            loss = nn.functional.cross_entropy(output, labels[batch])
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        curves.append(losses)
    return torch.tensor(curves), optimizer


def last(run):
    return run[0][:, -20:].mean(1)  # the loss of the last 20 steps, per seed


# %%
# The learning rate
# -----------------
#
# Half decades, for SINGD and for AdamW, and the same batches for all. Bands
# are seeds.
#
# **Before you run on:** at which rates will the two be at their best?

RATES = {"SINGD": (0.01, 0.03, 0.1), "AdamW": (0.03, 0.1, 0.3)}
MAKE = {"SINGD": SINGD, "AdamW": torch.optim.AdamW}
COLORS = {"SINGD": "C0", "AdamW": "C1"}
tuned = {
    name: {lr: fit(MAKE[name], lr=lr) for lr in rates}
    for name, rates in RATES.items()
}

fig, ax = plt.subplots(figsize=(5.2, 3.4))
for name, runs in tuned.items():
    ends = torch.stack([last(run) for run in runs.values()])
    color = COLORS[name]
    ax.plot(list(runs), ends.mean(1), "o-", color=color, label=name)
    ax.fill_between(list(runs), *ends.aminmax(dim=1), color=color, alpha=0.25)
ax.set(xscale="log", yscale="log", xlabel="learning rate")
ax.set(ylabel="loss of the last 20 steps", title="Tuned the same way")
_ = ax.legend()

base = tuned["SINGD"][LR]
best = {n: min(r, key=lambda lr: last(r[lr]).mean()) for n, r in tuned.items()}
adamw = tuned["AdamW"][best["AdamW"]]

# sphinx_gallery_start_ignore
assert best["SINGD"] == LR
assert all(best[name] in RATES[name][1:-1] for name in RATES)
assert last(base).max() < last(adamw).min()
assert last(tuned["SINGD"][0.01]).max() < last(adamw).min()
assert last(tuned["SINGD"][0.1]).min() > last(adamw).mean()
# sphinx_gallery_end_ignore

# %%
# SINGD ends lower than AdamW's best, at its own best rate and at a third of
# it. At 0.1, three times the best, it ends higher. So ``lr`` is the argument
# to search.
#
# All others, one at a time
# -------------------------

CHANGES = (
    *(dict(damping=value) for value in (0.003, 0.3, 3.0)),
    dict(lr_cov=0.5),
    *(dict(T=value) for value in (10, 100)),
    dict(structures=("dense", "dense")),
    dict(structures=("block8diagonal", "diagonal")),
    dict(structures=("diagonal", "diagonal")),
    *(dict(momentum=value) for value in (0.0, 0.99)),
    dict(momentum_on="direction"),
    dict(match_rms=0.2),
)


def label(change):
    ((name, value),) = change.items()
    if name == "structures":
        return ",\n".join(value)
    return f"{name}={value}"


runs = {label(change): fit(lr=LR, **change) for change in CHANGES}
TICKS = 0.02, 0.05, 0.1, 0.2
fig, ax = plt.subplots(figsize=(5.4, 6))
for name, run in runs.items():
    ends = last(run)
    ax.plot(ends, [name] * len(ends), "-", color="C0")
    ax.plot(ends.mean(), name, "o", color="C0")
for name, run in {"SINGD": base, "AdamW": adamw}.items():
    ax.axvspan(*last(run).aminmax(), color=COLORS[name], alpha=0.3, label=name)
ax.set(xscale="log", xlabel="loss of the last 20 steps")
ax.set_xticks(TICKS, TICKS)
ax.minorticks_off()
ax.set_title("One argument changed")
ax.invert_yaxis()
_ = ax.legend(loc="upper right", framealpha=1)

# sphinx_gallery_start_ignore
ratio = {
    n: (last(r).mean() / last(base).mean()).item() for n, r in runs.items()
}
forgiven = "damping=0.003 damping=0.3 lr_cov=0.5 momentum=0.0"
decisive = "damping=3.0 momentum=0.99 momentum_on=direction match_rms=0.2"
assert all(ratio[name] < 1.6 for name in forgiven.split())
assert all(ratio[name] > 3 for name in decisive.split())
assert 1.2 < ratio["T=10"] < 2 < ratio["T=100"]
assert 1.2 < ratio["block8diagonal,\ndiagonal"] < 2
assert ratio["diagonal,\ndiagonal"] > 3
assert last(runs["dense,\ndense"]).min() < last(base).max()
assert last(runs["diagonal,\ndiagonal"]).min() < last(adamw).max()
assert last(runs["diagonal,\ndiagonal"]).max() > last(adamw).min()
assert last(runs["momentum_on=direction"]).max() > last(adamw).min()
# sphinx_gallery_end_ignore
# sphinx_gallery_start_ignore
SWITCHES = """model params structures loss_average kfac_approx batch_first
repeated_calls preconditioner_dtype grad_scaler average_gradients shard_factors
fallback warn_unsupported lr lr_cov T rule kfac_like relative_damping
scaled_start fast_start normalize_lr_cov alpha1 nesterov weight_decay
cache_products"""
changed = {name for change in CHANGES for name in change}
assert {*inspect.signature(SINGD).parameters} == {*SWITCHES.split(), *changed}
# sphinx_gallery_end_ignore

# %%
# Blue is the range of the defaults, orange that of AdamW at its best rate.
#
# - *Forgiving:* ``damping`` ten times smaller or larger, ``lr_cov`` five times
#   larger, and even no ``momentum``, stay within 1.6 times the default's loss.
# - *Decisive:* a ``damping`` of 3, ``momentum`` of 0.99, and the momentum
#   after the preconditioner (``momentum_on="direction"``, as published) cost
#   more than three times the loss. The last is no better than AdamW.
# - ``match_rms`` is the unit of ``lr``: with 0.2 the steps are a fifth, as
#   with a fifth of the rate.
#
# structures: which entries there are
# -----------------------------------
#
# The pictures show :math:`K` of the first layer, divided by the mean of its
# diagonal, minus :math:`I`. Blue is positive, red negative.

SHOWN = {
    "dense": runs["dense,\ndense"],
    "block8diagonal": runs["block8diagonal,\ndiagonal"],
    "diagonal": runs["diagonal,\ndiagonal"],
}
fig, axes = plt.subplots(1, 3, figsize=(5.4, 2.4))
for ax, (name, run) in zip(axes, SHOWN.items()):
    K = run[1].factors("0").K.dense()
    K = K / K.diagonal().mean() - torch.eye(len(K))
    ax.imshow(K, cmap="RdBu", vmin=-0.3, vmax=0.3)
    ax.set_title(f"{name}\nloss {last(run).mean():.2f}", fontsize=9)
    ax.set(xticks=[], yticks=[], xlabel="column")
_ = axes[0].set_ylabel("row")

# sphinx_gallery_start_ignore
assert SHOWN["dense"][1].factors("0").K.dense().diagonal(1).mean() < 0
# sphinx_gallery_end_ignore

# %%
# Neighbouring pixels are alike. The entries between them are negative, so that
# :math:`K` amplifies differences of pixels. Blocks of 8 hold those within a
# row of the image, and lose little. Diagonal holds none, and ends where AdamW
# does. Dense is no better than the default, since one block of 64 holds all
# pixels here.
#
# T: the pace of the factors
# --------------------------
#
# ``T=100`` updates the factors once. ``T=10`` costs less than twice the loss.

fig, ax = plt.subplots(figsize=(5.2, 3.2))
CURVES = {"SINGD": base, "SINGD, T=100": runs["T=100"], "AdamW": adamw}
for (name, run), line in zip(CURVES.items(), ("-", ":", "-")):
    smooth = run[0].unfold(1, 10, 1).mean(2)
    color = COLORS[name[:5]]
    ax.plot(smooth.mean(0), line, color=color, label=name)
    ax.fill_between(
        range(smooth.shape[1]), *smooth.aminmax(dim=0), color=color, alpha=0.2
    )
ax.set(yscale="log", xlabel="step", ylabel="training loss (mean of 10)")
ax.set_title("Factors from the start do not last")
_ = ax.legend()

# %%
# Facts and switches
# ------------------
#
# The others are not searched. They state a fact about your loss or your loop,
# or they save time or memory:
#
# .. list-table::
#    :header-rows: 1
#
#    * - argument
#      - what it says
#      - page
#    * - ``structures``
#      - which entries :math:`K` and :math:`C` have
#      - :ref:`Structures
#        <sphx_glr_auto_gallery_4_structures_plot_44_choosing.py>`
#    * - ``loss_average``
#      - what your loss is divided by
#      - :ref:`Micro-batches
#        <sphx_glr_auto_gallery_2_features_plot_26_micro_batches.py>`
#    * - ``kfac_approx``, ``batch_first``, ``repeated_calls``
#      - how to count positions that share a weight
#      - :ref:`Weight sharing
#        <sphx_glr_auto_gallery_2_features_plot_27_weight_sharing.py>`
#    * - ``preconditioner_dtype``
#      - the precision of the factors
#      - :ref:`Mixed precision
#        <sphx_glr_auto_gallery_2_features_plot_24_mixed_precision.py>`
#    * - ``grad_scaler``
#      - the scaler of your loss
#      - :ref:`Scaling, clipping
#        <sphx_glr_auto_gallery_2_features_plot_25_scaler_and_clipping.py>`
#    * - ``average_gradients``
#      - whether ``step`` averages over processes
#      - :ref:`Processes
#        <sphx_glr_auto_gallery_2_features_plot_28_several_processes.py>`
#    * - ``shard_factors``
#      - each process keeps a share of the factors
#      - :ref:`Sharding
#        <sphx_glr_auto_gallery_2_features_plot_29_fully_sharded.py>`
#    * - ``params``
#      - groups with options of their own
#      - :ref:`Groups
#        <sphx_glr_auto_gallery_2_features_plot_21_parameter_options.py>`
#    * - ``fallback``, ``warn_unsupported``
#      - AdamW's options for other parameters, or none
#      - :ref:`Other parameters
#        <sphx_glr_auto_gallery_2_features_plot_20_outside_layers.py>`
#    * - ``lr``, ``lr_cov``, ``T``
#      - may change over the steps
#      - :ref:`Schedulers
#        <sphx_glr_auto_gallery_2_features_plot_22_schedulers.py>`
#    * - ``rule``, ``kfac_like``
#      - another method on the same layers
#      - :ref:`Four rules
#        <sphx_glr_auto_gallery_3_advanced_plot_36_four_rules_one_task.py>`
#    * - ``relative_damping``, ``scaled_start``, ``fast_start``,
#        ``normalize_lr_cov``, ``alpha1``, ``nesterov``, ``weight_decay``
#      - how the defaults differ from the published method
#      - :doc:`Hyper-parameters </choosing>`
#    * - ``cache_products``
#      - keep :math:`K K^\top` between updates
#      - :doc:`/api`
#
# When not to use this
# --------------------
#
# One small network, two seeds, 100 steps, and each argument alone: the order
# of the dots is that of this task. The steps of SINGD also cost more than
# AdamW's, which
# :ref:`sphx_glr_auto_gallery_1_start_plot_13_when_is_singd_right.py` counts.
#
# .. admonition:: Lessons learned
#
#    - Tune ``lr``, as you would for AdamW, and leave the rest at first.
#    - ``lr`` and ``match_rms`` are one number: search one.
#    - ``T`` is for speed; keep updates in the first steps.
#    - ``loss_average`` and ``grad_scaler`` are facts: state them.
#
# .. admonition:: Exercise
#
#    With ``match_rms=0.2`` the loss was high. Which ``lr`` gives the loss of
#    the defaults back?
#
# .. dropdown:: Solution
#
#    Five times as much: it is the same run but for rounding.
#
#    .. code-block:: python
#
#        same = fit(seeds=(0,), lr=5 * LR, match_rms=0.2)
#        assert abs(last(same)[0] / last(base)[0] - 1) < 0.1
#
# Where to go next: :doc:`/choosing` has values to start from, and
# :ref:`sphx_glr_auto_gallery_3_advanced_plot_33_diagnostics.py` shows how to
# read a run that does not work.
