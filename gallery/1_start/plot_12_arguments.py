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
   M &\leftarrow \alpha_2 M + \nabla_W \ell, \qquad
   N = C C^\top M \, K K^\top \\
   W &\leftarrow W - \beta_2 \, \rho \, N / \operatorname{rms}(N)
   \end{aligned}

In code, :math:`\beta_2` is ``lr``, :math:`\rho` ``match_rms``,
:math:`\alpha_2` ``momentum``, :math:`\lambda` ``damping``, :math:`\beta_1`
``lr_cov``, and ``structures`` chooses :math:`P`. (Nesterov's correction of
:math:`M` is left out here.) Lesson 5, on
:ref:`damping <sphx_glr_auto_gallery_0_course_plot_05_damping.py>`, and lesson
8, on :ref:`the step <sphx_glr_auto_gallery_0_course_plot_08_a_step_on_a_group.py>`,
derive the upper two lines.
"""

import inspect

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from singd import PUBLISHED, SINGD

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

RATES = {"SINGD": (3e-3, 0.01, 0.03, 0.1), "AdamW": (0.01, 0.03, 0.1, 0.3)}
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
# sphinx_gallery_end_ignore

# %%
# TEXT
#
# All others, one at a time
# -------------------------

CHANGES = (
    *(dict(damping=value) for value in (0.003, 0.3, 3.0)),
    *(dict(lr_cov=value) for value in (0.01, 0.5)),
    *(dict(T=value) for value in (10, 100)),
    dict(structures=("dense", "dense")),
    dict(structures=("block8diagonal", "diagonal")),
    dict(structures=("diagonal", "diagonal")),
    *(dict(momentum=value) for value in (0.0, 0.99)),
    dict(momentum_on="direction"),
    *(dict(match_rms=value) for value in (0.2, None)),
)


def label(change):
    ((name, value),) = change.items()
    if name == "structures":
        return ", ".join(value)
    return f"{name}={value}"


runs = {label(change): fit(lr=LR, **change) for change in CHANGES}
fig, ax = plt.subplots(figsize=(5.4, 5.2))
for name, run in runs.items():
    ends = last(run)
    ax.plot(ends, [name] * len(ends), "-", color="C0")
    ax.plot(ends.mean(), name, "o", color="C0")
for name, run in {"SINGD": base, "AdamW": adamw}.items():
    ax.axvspan(*last(run).aminmax(), color=COLORS[name], alpha=0.3, label=name)
ax.set(xscale="log", xlabel="loss of the last 20 steps")
ax.set_title("One argument changed")
ax.invert_yaxis()
_ = ax.legend()
for name, run in runs.items():
    print(f"{name:32} {last(run).mean():.2g}", last(run))
