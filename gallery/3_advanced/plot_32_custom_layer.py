r"""
A layer of your own: five lines make SINGD see it
=================================================

Many GPT-2 implementations store the weight of a linear layer transposed. Such
a layer is no ``nn.Linear``, so SINGD does not touch it by itself: AdamW trains
it. This page registers it, and checks the factors against ``nn.Linear``.

.. admonition:: What you will learn

   - **See** which parameters SINGD leaves to AdamW.
   - **Register** a layer with a small class.
   - **Check** it by the one law that every layer must obey.

   You should know what a forward hook is, and have read
   :ref:`sphx_glr_auto_gallery_1_start_plot_10_first_steps.py`.

What SINGD asks of a layer
--------------------------

Its parameters as one matrix :math:`W`, its inputs as rows :math:`a_r`, and
its output gradients as rows :math:`g_r`, such that

.. math::

   \nabla_W \ell = \sum_r g_r a_r^\top .

Everything else follows: the factors, the structures, the bias as the last
column of :math:`W`.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from singd import SINGD, register_layer
from singd.layers import LinearKind, find_kind

STEPS, BATCH = 100, 64
_ = torch.set_num_threads(1)  # the same digits on every machine


# %%
# The layer
# ---------
#
# It computes the same as ``nn.Linear``. Only the weight lies the other way.


class Transposed(nn.Module):
    """y = x W + b with W of shape [inputs, outputs]."""

    def __init__(self, inputs, outputs):
        super().__init__()
        linear = nn.Linear(inputs, outputs)
        self.weight = nn.Parameter(linear.weight.detach().T.contiguous())
        self.bias = nn.Parameter(linear.bias.detach())

    def forward(self, input):
        return input @ self.weight + self.bias


def network(layer):
    torch.manual_seed(0)
    return nn.Sequential(layer(64, 32), nn.ReLU(), layer(32, 10))


print(SINGD(network(Transposed)))

# %%
# Four lines with ``adamw``: SINGD adopts only classes that it knows. A class
# with another ``forward`` could compute anything.
#
# Register it
# -----------
#
# The inputs and output gradients are those of a linear layer, so we start from
# its kind. Only the way from the weight to the matrix differs.


class TransposedKind(LinearKind):
    def weight_to_matrix(self, layer, weight):
        return weight.T

    def matrix_to_weight(self, layer, matrix):
        return matrix.T


register_layer(Transposed, TransposedKind())
print(SINGD(network(Transposed)))

# %%
# Check the law
# -------------
#
# One forward and backward by hand: the rows that the kind gives must add up to
# the gradient that autograd gives.


def both_sides(layer):
    """The gradient by autograd, and the sum over the kind's rows."""
    x = torch.randn(7, 5, dtype=torch.float64)
    y = layer(x)
    y.retain_grad()
    y.square().sum().backward()
    kind = find_kind(layer)
    options = dict(approx="expand", dtype=torch.float64)
    a = kind.input_rows(layer, x, bias=True, **options).matrix()
    g = kind.grad_rows(layer, y.grad, x, **options).matrix()
    return kind.to_matrix(layer, layer.weight.grad, layer.bias.grad), g.T @ a


gradient, rows = both_sides(Transposed(5, 3).double())
torch.testing.assert_close(gradient, rows)

fig, axes = plt.subplots(1, 2, figsize=(6, 2.4))
for ax, matrix, title in (
    (axes[0], gradient, "gradient by autograd"),
    (axes[1], rows, "sum of the rows' products"),
):
    ax.imshow(matrix, cmap="RdBu")
    ax.set(title=title, xlabel="inputs and bias", ylabel="outputs")

# %%
# Both pictures are the same, to rounding.
#
# Train
# -----
#
# **Before you run on:** two networks with the same initial weights, one of
# ``nn.Linear`` and one of our layer. How far do their losses differ?

data = load_digits()
images = torch.tensor(data.data, dtype=torch.float32) / 16
labels = torch.tensor(data.target)


def fit(layer):
    model = network(layer)
    optimizer = SINGD(model, lr=3e-3, T=1, lr_cov=0.2, normalize_lr_cov=True)
    batches = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(STEPS):
        batch = torch.randint(0, 1797, (BATCH,), generator=batches)
        optimizer.zero_grad()
        output = model(images[batch])
        loss = nn.functional.cross_entropy(output, labels[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses), optimizer.factors("0").K.dense()


(linear, K_linear), (ours, K_ours) = fit(nn.Linear), fit(Transposed)

fig, ax = plt.subplots(figsize=(6, 3.2))
ax.plot(linear, label="nn.Linear", lw=4, alpha=0.4)
ax.plot(ours, "k--", label="our layer", lw=1)
ax.set(xlabel="step", ylabel="loss", yscale="log", title="The same run")
_ = ax.legend()

# %%
# They lie on each other: the mathematics is the same. So are the factors.

fig, axes = plt.subplots(1, 2, figsize=(7, 3), sharey=True)
for ax, K, name in zip(axes, (K_linear, K_ours), ("nn.Linear", "our layer")):
    shown = ax.imshow(K, cmap="RdBu_r", vmin=-1, vmax=1)
    ax.set(title=f"K of {name}", xlabel="inputs and bias")
axes[0].set_ylabel("inputs and bias")
fig.colorbar(shown, ax=axes, label="entry")

assert (linear - ours).abs().max() < 0.02
assert (K_linear - K_ours).abs().max() < 0.02 * K_linear.abs().max()
assert ours[-1] < 0.2

# %%
# When not to use it
# ------------------
#
# Register a layer only if its output is *linear* in its parameters, and the
# same matrix acts at every position. A normalisation layer is better left to
# AdamW: its parameters are few, and need no factors.
#
# .. admonition:: Lessons learned
#
#    - Print the optimizer. What says ``adamw`` has no factors.
#    - A kind is a small class without state, one object for all layers.
#    - The law of rows is a test of three lines. Write it first.
#
# .. admonition:: Exercise
#
#    Write a kind for a layer that scales its output by a constant:
#    ``y = 2 * (x @ W.T + b)``. What are its rows?
#
# .. dropdown:: Solution
#
#    The inputs stay, and each row of output gradients counts twice.
#
#    .. code-block:: python
#
#        class Doubled(nn.Linear):
#            def forward(self, input):
#                return 2 * super().forward(input)
#
#
#        class DoubledKind(LinearKind):
#            def grads(self, layer, g):
#                return 2 * super().grads(layer, g)
#
#
#        register_layer(Doubled, DoubledKind())
#        gradient, rows = both_sides(Doubled(5, 3).double())
#        torch.testing.assert_close(gradient, rows)
#        assert "adamw" not in repr(SINGD(network(Doubled)))
#
# Where to go next:
# :ref:`sphx_glr_auto_gallery_3_advanced_plot_33_diagnostics.py` shows how
# to see that the new layer trains well, and
# :ref:`sphx_glr_auto_gallery_4_structures_plot_43_your_own_structure.py` how
# to add a structure. The interface is :class:`~singd.LayerKind`.
