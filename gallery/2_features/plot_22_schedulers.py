r"""
Do learning-rate schedulers work? All of them, and the factors have their own
=============================================================================

A scheduler writes a new ``lr`` into the optimizer's groups after each step.
SINGD reads it there, as SGD does. It has a second step size, that of the
factors, and you can schedule that one, too.

.. admonition:: What you will learn

   - **Schedule** the step on the weights with any scheduler of PyTorch.
   - **Cycle** the momentum with OneCycleLR.
   - **Slow** the factors down with a function of the step.

   You should have read
   :ref:`sphx_glr_auto_gallery_1_start_plot_12_arguments.py`.

Two step sizes
--------------

At step :math:`t` the factors move by :math:`\beta_1(t)`, if it is their turn,
and the weights by :math:`\beta_2(t)`:

.. math::

   K \leftarrow K - \beta_1(t) \, K m_K , \qquad
   M \leftarrow \alpha_2(t) M + N , \qquad
   W \leftarrow W - \beta_2(t) \, M .

A scheduler moves :math:`\beta_2`, which is ``lr``; OneCycleLR also moves
:math:`\alpha_2`, which is ``momentum``. For :math:`\beta_1` you give a
function as ``lr_cov``.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim import lr_scheduler as schedules

from singd import PUBLISHED, SINGD

STEPS, BATCH, WARM = 160, 64, 20
OPTIONS = PUBLISHED | dict(lr=1e-2, T=1, lr_cov=0.2, normalize_lr_cov=True)
_ = torch.set_num_threads(1)  # the same digits on every machine

data = load_digits()
images = torch.tensor(data.data, dtype=torch.float32) / 16
labels = torch.tensor(data.target)


def build(**options):
    torch.manual_seed(0)
    layers = [nn.Linear(64, 32), nn.LayerNorm(32), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(32, 10))
    return model, SINGD(model, **(OPTIONS | options))


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
    highest = [1e-2, 1e-3]  # of SINGD's group, and of AdamW's
    return schedules.OneCycleLR(optimizer, highest, total_steps=STEPS)


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
    for name, run in runs.items():
        curve = run[:, column].unfold(0, smooth, 1).mean(1)
        ax.plot(range(smooth - 1, STEPS), curve, label=name)
    ax.set(xlabel="step", **labels)


fig, axes = plt.subplots(1, 2, figsize=(9, 3.2))
draw(axes[0], 1, ylabel="lr", title="What the scheduler writes")
draw(axes[1], 2, ylabel="momentum", title="One cycle moves this one, too")
_ = axes[0].legend(fontsize=8)

# %%
# SINGD used these values: the left panel is read from its groups, right before
# each step. The losses:

# sphinx_gallery_nbval = "nbval-ignore-output"
fig, ax = plt.subplots(figsize=(7, 3.4))
draw(ax, 0, 10, ylabel="loss (mean of 10)", yscale="log")
ax.legend()

last = {name: run[-20:, 0].mean().item() for name, run in runs.items()}
for name, loss in last.items():
    print(f"{name:16} {loss:.1g}")

assert all(last[name] < last["constant"] / 1.5 for name in list(last)[1:])
low, high = runs["one cycle"][:, 2].aminmax()
assert (low - 0.85).abs() + (high - 0.95).abs() < 1e-3
early = {name: run[10:20, 0].mean() for name, run in runs.items()}
assert early["constant"] < early["warm-up, cosine"] < early["one cycle"]

# %%
# The constant rate keeps the noise of the batches. The three others end at
# less than two thirds of its loss. A warm-up only costs steps here; it pays
# where the first steps are in danger. OneCycleLR moves the momentum between
# 0.95 and 0.85, against ``lr``. It sets the ``lr`` of each group: the
# LayerNorm's group trains with AdamW, and needs a number of its own.
#
# A schedule for the factors
# --------------------------
#
# ``lr_cov`` may be a function of the step :math:`t`, which starts at zero. A
# fast start lets the factors find their size; slow steps later average over
# more batches. We keep ``lr`` constant and look at the trace of :math:`K`.

FACTORS = {
    "0.2": 0.2,
    "0.01": 0.01,
    "0.2, then 0.01": lambda t: 0.2 if t < 40 else 0.01,
}
runs = {}
for name, lr_cov in FACTORS.items():
    model, optimizer = build(lr_cov=lr_cov, lr=3e-3)
    runs[name] = train(model, optimizer)

fig, axes = plt.subplots(1, 2, figsize=(9, 3.2))
draw(axes[0], 3, ylabel="average trace of K", title="The factors")
draw(axes[1], 0, 10, ylabel="loss (mean of 10)", yscale="log")
axes[1].set_title("The loss")
for ax in axes:
    ax.axvline(40, color="C7", linestyle=":")
axes[0].legend(title="lr_cov")

last = {name: run[-20:, 0].mean().item() for name, run in runs.items()}
for name, loss in last.items():
    print(f"lr_cov {name:15} loss {loss:.1g}")

jitter = {name: run[40:, 3].diff().abs().mean() for name, run in runs.items()}
assert jitter["0.2, then 0.01"] < jitter["0.2"] / 10
assert runs["0.01"][-1, 3] < runs["0.2, then 0.01"][-1, 3] / 2
assert last["0.2"] < last["0.2, then 0.01"] < last["0.01"]

# %%
# With 0.01 alone the factors are far from their size when the run ends. The
# schedule brings them there in 40 steps, and then they are calm: the trace
# moves less than a tenth as much per step. The loss gains nothing by it: this
# small network does not mind restless factors.
#
# Groups and checkpoints
# ----------------------
#
# A scheduler moves *all* groups, that of AdamW for the LayerNorm, too. With
# LambdaLR each group gets its own function: here SINGD's ``lr`` falls, and
# AdamW's stays. We stop half-way, save optimizer and scheduler, and resume
# with new ones.

rules = [lambda step: 1 - step / STEPS, lambda step: 1.0]

model, optimizer = build()
whole = train(model, optimizer, schedules.LambdaLR(optimizer, rules))
adamw = optimizer.param_groups[1]
assert adamw["algorithm"] == "adamw"
assert adamw["lr"] == adamw["initial_lr"]

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

fig, axes = plt.subplots(1, 2, figsize=(9, 3))
for ax, column, label in zip(axes, (1, 0), ("lr of SINGD", "loss")):
    ax.plot(whole[:, column], color="C7", linewidth=5, label="unbroken")
    ax.plot(first[:, column], color="C0", label="stopped")
    ax.plot(range(80, STEPS), second[:, column], color="C1", label="resumed")
    ax.set(xlabel="step", ylabel=label)
axes[0].legend()
axes[1].set_yscale("log")

# %%
# Resumed is unbroken, to the last bit. A function that you give as ``lr_cov``
# is not in the checkpoint: build SINGD with the same one, and it goes on at
# the right step.
#
# When not to use this
# --------------------
#
# While you search for ``lr``, ``lr_cov`` and ``damping``, keep them constant.
# A schedule that hides a bad ``lr`` for the first steps only makes the search
# longer.
#
# .. admonition:: Lessons learned
#
#    - Call ``scheduler.step()`` after ``optimizer.step()``, as always.
#    - Let ``lr`` fall to zero: it removes the noise of the batches.
#    - OneCycleLR moves SINGD's ``momentum`` as well.
#    - ``lr_cov`` takes a function of the step, from zero on.
#    - Save the scheduler's state beside the optimizer's.
#
# .. admonition:: Exercise
#
#    ``lr_cov`` sees the number of steps, not of updates. With ``T=10``, for
#    which steps is a function called?
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
#    For 0, 10 and 20: it is asked at updates only, once for each layer.
#
# Where to go next:
# :ref:`sphx_glr_auto_gallery_2_features_plot_21_parameter_options.py` on
# groups, :ref:`sphx_glr_auto_gallery_2_features_plot_23_checkpoints.py` on
# checkpoints, and :doc:`/choosing` on values to start from.
