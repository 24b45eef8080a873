r"""
Do learning-rate schedulers work? All of them, and the factors have their own
=============================================================================

A scheduler writes a new ``lr`` into the optimizer's parameter groups after
each step, and SINGD reads it there, as SGD does. SINGD has a second step size,
that of its :term:`factors <factor>`, and you can schedule that one, too.

.. admonition:: What you will learn

   - **Schedule** the step on the weights with any scheduler of PyTorch.
   - **Cycle** the momentum with OneCycleLR.
   - **Slow** the factors down with a function of the step.

   You should have read
   :ref:`sphx_glr_auto_gallery_1_start_plot_12_arguments.py`.

Two step sizes
--------------

SINGD learns a factor :math:`K` for the inputs of each layer, and one for its
outputs (:doc:`/concepts`). At step :math:`t` the factors move by
:math:`\beta_1(t)`, if it is their turn, and the weights by :math:`\beta_2(t)`
along a direction :math:`M`, which includes momentum:

.. math::

   K \leftarrow K - \beta_1(t) \, K m_K , \qquad
   W \leftarrow W - \beta_2(t) \, M .

A scheduler moves :math:`\beta_2`, which is ``lr``; OneCycleLR also moves
``momentum``. To schedule :math:`\beta_1`, give a function as ``lr_cov``.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim import lr_scheduler as schedules

from singd import SINGD

STEPS, BATCH, WARM, LR = 160, 64, 20, 5e-2
SHADES = plt.cm.viridis([0.0, 0.3, 0.6, 0.85])
PLACE = dict(loc="outside upper center", ncols=2)
_ = torch.set_num_threads(1)  # the same digits on every machine

data = load_digits()
images = torch.tensor(data.data, dtype=torch.float32) / 16
labels = torch.tensor(data.target)


def build(lr=LR, **options):
    torch.manual_seed(0)
    layers = [nn.Linear(64, 32), nn.LayerNorm(32), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(32, 10))
    return model, SINGD(model, lr=lr, **options)


def train(model, optimizer, scheduler=None, start=0, stop=STEPS):
    """Returns the losses, and lr, momentum and trace of K at each step."""
    batches = torch.Generator().manual_seed(1)
    batches = torch.randint(0, 1797, (STEPS, BATCH), generator=batches)
    group, seen = optimizer.param_groups[0], []
    for batch in batches[start:stop]:
        optimizer.zero_grad()
        output = model(images[batch])
        loss = nn.functional.cross_entropy(output, labels[batch])
        loss.backward()
        used = group["lr"], group["momentum"]
        optimizer.step()
        if scheduler is not None:
            scheduler.step()  # after the optimizer's
        trace = optimizer.factors("0").K.average_trace().item()
        seen.append((loss.item(), *used, trace))
    return torch.tensor(seen)


# %%
# Four schedules of lr
# --------------------
#
# The network is small, on 8 x 8 digits. All four runs have the same largest
# ``lr``. One keeps it; the others bring it to zero, with or without a warm-up.


def cosine(optimizer, steps=STEPS):
    return schedules.CosineAnnealingLR(optimizer, steps)


def warm_up(optimizer):
    rise = schedules.LinearLR(optimizer, 0.05, total_iters=WARM)
    fall = cosine(optimizer, STEPS - WARM)
    return schedules.SequentialLR(optimizer, [rise, fall], [WARM])


def one_cycle(optimizer):
    return schedules.OneCycleLR(optimizer, LR, total_steps=STEPS)


SCHEDULES = {
    "constant": lambda optimizer: None,
    "cosine": cosine,
    "warm-up, cosine": warm_up,
    "one cycle": one_cycle,
}

# %%
# **Before you run on:** which run will end lowest, and which will still be
# noisy at the end?

runs = {}
for name, schedule in SCHEDULES.items():
    model, optimizer = build()
    runs[name] = train(model, optimizer, schedule(optimizer))


def draw(ax, column, smooth=1, **labels):
    for (name, run), color in zip(runs.items(), SHADES):
        curve = run[:, column].unfold(0, smooth, 1).mean(1)
        ax.plot(range(smooth - 1, STEPS), curve, label=name, color=color)
    ax.set(xlabel="step", **labels)


fig, axes = plt.subplots(2, 1, figsize=(5, 5.4))
draw(axes[0], 1, ylabel="lr", title="What the scheduler writes")
draw(axes[1], 2, ylabel="momentum", title="One cycle moves this one, too")
_ = fig.legend(*axes[0].get_legend_handles_labels(), **PLACE)

# %%
# SINGD used these values: they are read from its groups, right before each
# step. The losses:

# sphinx_gallery_nbval = "nbval-ignore-output"
fig, ax = plt.subplots(figsize=(5, 3.4))
draw(ax, 0, 10, ylabel="loss (mean of 10)", yscale="log")
ax.set_title("With a falling lr, the loss ends lower")
ax.legend()

last = {name: run[-20:, 0].mean().item() for name, run in runs.items()}
for name, loss in last.items():
    print(f"{name:16} {loss:.1g}")

# sphinx_gallery_start_ignore
assert last["cosine"] < last["constant"] / 1.3
assert last["warm-up, cosine"] < last["constant"] / 1.3
low, high = runs["one cycle"][:, 2].aminmax()
assert (low - 0.85).abs() + (high - 0.95).abs() < 1e-3
early = {name: run[10:20, 0].mean() for name, run in runs.items()}
assert early["constant"] < early["warm-up, cosine"] < early["one cycle"]
# sphinx_gallery_end_ignore

# %%
# With a constant rate the noise of the batches keeps the weights in motion to
# the end, while both cosines let them settle. A warm-up only costs steps here;
# it pays where large first steps would do damage. OneCycleLR starts slowest.
# It lets the momentum fall from 0.95 to 0.85 while ``lr`` rises, and back.
#
# A schedule for the factors
# --------------------------
#
# ``lr_cov`` may be a function of the step :math:`t`, which starts at zero:
# large first, so that the factors find their size, and small later, so that
# they average over more batches. We keep ``lr`` constant, and look at the
# average of the diagonal of :math:`K`, its average trace.

FACTORS = {
    "0.3": 0.3,
    "0.01": 0.01,
    "0.3, then 0.01": lambda t: 0.3 if t < 40 else 0.01,
}
runs = {}
for name, lr_cov in FACTORS.items():
    model, optimizer = build(lr=3e-3, lr_cov=lr_cov, T=1)
    runs[name] = train(model, optimizer)

fig, ax = plt.subplots(figsize=(5, 3.4))
draw(ax, 3, ylabel="average trace of K", title="Small steps, calm factors")
ax.axvline(40, color="black", linestyle=":")
_ = ax.legend(title="lr_cov")

# sphinx_gallery_start_ignore
jitter = {name: run[40:, 3].diff().abs().mean() for name, run in runs.items()}
assert jitter["0.3, then 0.01"] < jitter["0.3"] / 8
last = [run[-20:, 0].mean().item() for run in runs.values()]
assert max(last) < 2.5 * min(last)
# sphinx_gallery_end_ignore

# %%
# After the dotted line the schedule has calm factors: from step to step, their
# trace moves less than an eighth as much as with 0.3. This small network does
# not mind restless ones, for the three last losses differ little. So begin
# with a constant ``lr_cov``.
#
# Groups and checkpoints
# ----------------------
#
# A scheduler moves *all* groups, also that of the LayerNorm, which trains with
# AdamW. With LambdaLR each group gets its own function: here SINGD's ``lr``
# falls, and AdamW's stays. We stop half-way, save model, optimizer and
# scheduler, and resume with new ones.

rules = [lambda step: 1 - step / STEPS, lambda step: 1.0]

model, optimizer = build()
whole = train(model, optimizer, schedules.LambdaLR(optimizer, rules))
adamw = optimizer.param_groups[1]
assert adamw["algorithm"] == "adamw"
assert adamw["lr"] == adamw["initial_lr"] == LR

model, optimizer = build()
scheduler = schedules.LambdaLR(optimizer, rules)
first = train(model, optimizer, scheduler, stop=80)
saved = [x.state_dict() for x in (model, optimizer, scheduler)]

model, optimizer = build()
scheduler = schedules.LambdaLR(optimizer, rules)
for new, state in zip((model, optimizer, scheduler), saved):
    new.load_state_dict(state)
second = train(model, optimizer, scheduler, start=80)
assert torch.equal(torch.cat([first, second]), whole)

fig, axes = plt.subplots(2, 1, figsize=(5, 5))
for ax, column, label in zip(axes, (1, 0), ("lr of SINGD", "loss")):
    ax.plot(whole[:, column], color="silver", linewidth=6, label="unbroken")
    ax.plot(first[:, column], label="stopped at 80")
    ax.plot(range(80, STEPS), second[:, column], "k:", label="resumed")
    ax.set(xlabel="step", ylabel=label)
axes[0].set_title("Resumed, the schedule goes on")
axes[0].legend()
axes[1].set_yscale("log")

# %%
# The resumed run equals the unbroken one to the last bit. But a function that
# you give as ``lr_cov`` is not in the checkpoint: build the new SINGD with the
# same one.
#
# When not to use this
# --------------------
#
# While you search for a largest ``lr``, take one schedule for all, and leave
# ``lr_cov`` alone.
#
# .. admonition:: Lessons learned
#
#    - Call ``scheduler.step()`` after ``optimizer.step()``, as always.
#    - Let ``lr`` fall to zero, so that the noise of the batches averages out.
#    - OneCycleLR moves SINGD's ``momentum`` as well.
#    - ``lr_cov`` takes a function of the step, from zero on.
#    - Save the scheduler's state beside the optimizer's.
#
# .. admonition:: Exercise
#
#    With ``T=10`` the factors are updated at every tenth step only. With which
#    :math:`t` is a function ``lr_cov`` called?
#
# .. dropdown:: Solution
#
#    .. code-block:: python
#
#        asked = []
#
#        def noted(step):
#            asked.append(step)
#            return 0.2
#
#        model, optimizer = build(T=10, lr_cov=noted)
#        _ = train(model, optimizer, stop=25)
#        assert set(asked) == {0, 10, 20}
#
#    With 0, 10 and 20: it is called at updates only, and is given the number
#    of the step.
#
# Where to go next:
# :ref:`sphx_glr_auto_gallery_2_features_plot_21_parameter_options.py` on
# groups, :ref:`sphx_glr_auto_gallery_2_features_plot_23_checkpoints.py` on
# checkpoints, and :doc:`/choosing` on values to start from.
