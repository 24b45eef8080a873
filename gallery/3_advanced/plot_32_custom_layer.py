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
:ref:`Lesson 3 <sphx_glr_auto_gallery_0_course_plot_03_kronecker.py>` shows
how factors come from such rows.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from singd import PUBLISHED, SINGD, register_layer
from singd.layers import LinearKind, find_kind

STEPS, BATCH = 100, 64
OPTIONS = PUBLISHED | dict(lr=3e-3, T=1, lr_cov=0.2, normalize_lr_cov=True)
OPTIONS |= dict(fallback=dict(lr=1e-2))
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


print(SINGD(network(Transposed), **OPTIONS))

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
print(SINGD(network(Transposed), **OPTIONS))

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


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


register_layer(Doubled, LinearKind())  # wrong: see the figure

torch.manual_seed(0)
fig, ax = plt.subplots(figsize=(5, 3.8))
for layer, label, marker in (
    (Transposed, "our layer, our kind", "o"),
    (Doubled, "a layer with a wrong kind", "x"),
):
    gradient, rows = both_sides(layer(5, 3).double())
    ax.plot(gradient.flatten(), rows.flatten(), marker, label=label)
    obeys = torch.allclose(gradient, rows)
    print(f"{label} obeys the law: {obeys}")
    assert obeys is (layer is Transposed)
ax.axline((0, 0), slope=1, color="C7", ls=":")
ax.set(xlabel="gradient by autograd", ylabel="sum of the rows' products")
ax.set_title("A wrong kind leaves the diagonal")
_ = ax.legend()

# %%
# Each entry of the gradient is a dot. Ours lie on the diagonal. The second
# layer doubles its output, and is registered as if it did not: its rows give
# half of the gradient. SINGD would train it without a complaint.
#
# Train
# -----
#
# **Before you run on:** three networks with the same initial weights: one of
# ``nn.Linear``, one of our layer, and one of a subclass of it that is not
# registered. Whose losses will agree?


class Unregistered(Transposed):
    pass


data = load_digits()
images = torch.tensor(data.data, dtype=torch.float32) / 16
labels = torch.tensor(data.target)


def fit(layer):
    model = network(layer)
    optimizer = SINGD(model, **OPTIONS)
    batches = torch.Generator().manual_seed(0)
    losses, factors = [], []
    for _ in range(STEPS):
        batch = torch.randint(0, 1797, (BATCH,), generator=batches)
        optimizer.zero_grad()
        output = model(images[batch])
        loss = nn.functional.cross_entropy(output, labels[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if layer is not Unregistered:
            factors.append(optimizer.factors("0").K.dense())
    return torch.tensor(losses), factors


linear, K_linear = fit(nn.Linear)
ours, K_ours = fit(Transposed)
unknown, _ = fit(Unregistered)

fig, ax = plt.subplots(figsize=(5.4, 3.4))
ax.plot(linear, label="nn.Linear", lw=4, alpha=0.4)
ax.plot(ours, "k--", label="registered", lw=1)
ax.plot(unknown, color="C1", label="not registered: AdamW", lw=1)
ax.set(xlabel="step", ylabel="loss", yscale="log")
ax.set_title("Registered, it trains as nn.Linear does")
_ = ax.legend()

# sphinx_gallery_start_ignore
assert (linear - ours).abs().max() < 0.02
assert (linear - unknown).abs().max() > 0.2
assert ours[-1] < 0.2
# sphinx_gallery_end_ignore

# %%
# The registered layer's run lies on that of ``nn.Linear``. The unregistered
# one trains, too, but as another run: with AdamW, and without factors. How
# close are the factors of the first two? (Where they are equal, the line runs
# at the lower edge.)

apart = [
    ((a - b).abs().max() / a.abs().max()).item()
    for a, b in zip(K_linear, K_ours)
]
fig, ax = plt.subplots(figsize=(5.4, 3))
ax.plot([max(a, 1e-8) for a in apart])
ax.axhline(2**-24, color="C7", ls=":", label="one rounding, float32")
ax.set(xlabel="step", ylabel="relative difference of K", yscale="log")
ax.set_title("The factors differ by rounding, which grows")
_ = ax.legend()

# sphinx_gallery_start_ignore
assert apart[5] < 1e-5
assert max(apart) < 0.002
# sphinx_gallery_end_ignore

# %%
# A product of transposed matrices is rounded in another order, and training
# lets such differences grow. Here they stay far below one per cent.
#
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
#    Write the right kind for ``Doubled``. What are its rows?
#
# .. dropdown:: Solution
#
#    The inputs stay, and each row of output gradients counts twice.
#
#    .. code-block:: python
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
