r"""
Lesson 6: Does it train? KFAC in thirty lines
=============================================

So far we had matrices on paper. Now they train a network: a deep autoencoder,
the task on which KFAC became known. We write KFAC in thirty lines of PyTorch,
set it beside AdamW, and store its matrices in bfloat16.

.. admonition:: What you will learn

   - **Derive** KFAC's step without a single Kronecker product.
   - **Write** it in thirty lines, and check them against ``rule="kfac"``.
   - **Judge** it per step, per second and in bfloat16.

   You need :ref:`sphx_glr_auto_gallery_0_course_plot_03_kronecker.py` and
   :ref:`sphx_glr_auto_gallery_0_course_plot_05_damping.py`.

The derivation
--------------

Take one linear layer. Its input is :math:`a`, with a 1 appended for the bias.
The gradient at its output is :math:`g`. So one example's gradient of
:math:`W` has the entries :math:`g_i a_j`. The **Fisher matrix** :math:`F`
has one row for each pair :math:`(i, j)`:

.. math::

   F_{(ij)(kl)} = \mathbb{E}[g_i a_j \, g_k a_l]
   \approx \mathbb{E}[g_i g_k] \; \mathbb{E}[a_j a_l] = G_{ik} \, U_{jl} .

The :math:`\approx` is KFAC's one assumption: :math:`a` and :math:`g` are
independent. Now apply :math:`F` to a matrix :math:`N` of the size of
:math:`W`:

.. math::

   (F N)_{ij} = \sum_{kl} G_{ik} \, N_{kl} \, U_{jl} = (G \, N \, U)_{ij} .

The natural gradient solves :math:`F N = \nabla_W \ell`. Multiply by
:math:`G^{-1}` from the left and :math:`U^{-1}` from the right. With damping
on both factors, balanced by :math:`\pi`, the step is

.. math::

   N = \Big(G + \tfrac{\sqrt\lambda}{\pi} I\Big)^{-1} \nabla_W \ell \;
   \big(U + \pi \sqrt\lambda I\big)^{-1} , \qquad
   \pi^2 = \frac{\operatorname{tr} U}{\operatorname{tr} G} ,

where :math:`\operatorname{tr}` is the average of the diagonal. Last,
:math:`U` and :math:`G` are **running averages** over batches.
"""

import time
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from singd import PUBLISHED, SINGD

COLOR = {"AdamW": "C1", "KFAC": "C2", "SGD": "C7"}
STEPS, BATCH, DAMPING = 400, 200, 0.1
LR = {"AdamW": 7e-3, "KFAC": 0.015, "SGD": 0.03}
_ = torch.set_num_threads(1)

# %%
# Thirty lines
# ------------
#
# Hooks catch :math:`a` and :math:`g` on their way. ``T=5``: a fresh inverse
# every five steps is enough.


def damped_inverse(M, damping):
    return torch.linalg.inv(M + damping * torch.eye(len(M)).to(M))


class KFAC:
    def __init__(self, model, lr, damping, lr_cov=0.05, T=5, store=None):
        self.lr, self.damping, self.lr_cov = lr, damping, lr_cov
        self.T, self.store, self.t, self.layers = T, store, 0, {}
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                self.layers[layer] = {"buffer": 0}
                layer.register_forward_hook(self.watch)

    def watch(self, layer, inputs, output):
        if self.t % self.T == 0 and output.requires_grad:
            a = nn.functional.pad(inputs[0].detach(), (0, 1), value=1)
            output.register_hook(lambda g: self.update(layer, a, g))

    def update(self, layer, a, g):
        s, r = self.layers[layer], self.damping**0.5
        now = a.T @ a / len(a), len(g) * g.T @ g  # the loss is a mean
        old = s.get("factors", now)
        UG = [o.to(n).lerp(n, self.lr_cov) for o, n in zip(old, now)]
        s["factors"] = U, G = [M.to(self.store or M.dtype) for M in UG]
        s["pi"] = (U.diag().mean() / G.diag().mean()).sqrt().to(g)
        s["U_inv"] = damped_inverse(U.to(g), r * s["pi"])
        s["G_inv"] = damped_inverse(G.to(g), r / s["pi"])

    @torch.no_grad()
    def step(self):
        for layer, s in self.layers.items():
            dW = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
            N = s["G_inv"] @ dW @ s["U_inv"]
            s["buffer"] = 0.9 * s["buffer"] + N  # momentum, as in SGD
            layer.weight -= self.lr * s["buffer"][:, :-1]
            layer.bias -= self.lr * s["buffer"][:, -1]
        self.t += 1


# %%
# The deep autoencoder
# --------------------
#
# The classic one reads MNIST. Ours is a small sister, so that this page runs
# in seconds: 8 x 8 digits, squeezed through six numbers and unfolded again.
# Layers are narrow and tanh saturates, so gradients are badly scaled.

digits = torch.tensor(load_digits().data, dtype=torch.float32) / 16


def autoencoder():
    torch.manual_seed(0)
    layers = []
    for d_i, d_o in pairwise([64, 100, 50, 25, 6, 25, 50, 100, 64]):
        layers += [nn.Linear(d_i, d_o), nn.Tanh()]
        nn.init.xavier_uniform_(layers[-2].weight)
        nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers[:-1])


def fit(model, optimizer, steps=STEPS):
    batches, errors = torch.Generator().manual_seed(1), []
    clock = [time.process_time()]
    for _ in range(steps):
        x = digits[torch.randint(1797, (BATCH,), generator=batches)]
        x = x.to(model[0].weight.dtype)
        model.zero_grad()
        output = model(x)
        loss = nn.BCEWithLogitsLoss(reduction="sum")(output, x) / BATCH
        loss.backward()
        optimizer.step()
        clock.append(time.process_time())
        errors.append((output.detach().sigmoid() - x).norm() ** 2 / BATCH)
    tens = torch.tensor(clock).diff().unfold(0, 10, 10).mean(1)
    return torch.stack(errors), tens.median().item()  # seconds per step


# %%
# Does the library do the same?
# -----------------------------
#
# Twenty steps in double precision, with ours and with the library's rule.

ours, theirs = autoencoder().double(), autoencoder().double()
options = dict(lr=LR["KFAC"], damping=DAMPING, lr_cov=0.05, T=5)
fit(ours, KFAC(ours, **options), steps=20)
rule = {**PUBLISHED, "rule": "kfac"}
fit(theirs, SINGD(theirs, **rule | options), steps=20)
for p, q in zip(ours.parameters(), theirs.parameters()):
    torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)
print("thirty lines and the library agree")

# %%
# Train
# -----
#
# The learning rates, and KFAC's damping, come from a small search for each.
# **Before you run on:** after how many of 400 steps will KFAC be where
# AdamW ends? And is it faster per second, too?

OPTIMIZER = {
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), LR["AdamW"]),
    "KFAC": lambda m: KFAC(m, LR["KFAC"], DAMPING),
    "SGD": lambda m: torch.optim.SGD(m.parameters(), LR["SGD"], 0.9),
}
models = {name: autoencoder() for name in COLOR}
runs = {n: fit(m, OPTIMIZER[n](m)) for n, m in models.items()}


def smooth(errors):
    return errors.unfold(0, 20, 1).mean(1)


def draw(title, xlabel, timed):
    _, ax = plt.subplots(figsize=(5.5, 3.8))
    for name, (errors, seconds) in runs.items():
        x = torch.arange(10, STEPS - 9) * (seconds if timed else 1)
        ax.plot(x, smooth(errors), COLOR[name], label=name)
    ax.set(yscale="log", xlabel=xlabel, ylabel="squared error per image")
    ax.set_yticks([1, 2, 4, 8], [1, 2, 4, 8])
    ax.minorticks_off()
    ax.set_title(title)
    ax.legend()


# sphinx_gallery_thumbnail_number = 1
draw("It trains: per step, KFAC is ahead", "step", timed=False)

# sphinx_gallery_start_ignore
end = {name: smooth(errors)[-1].item() for name, (errors, _) in runs.items()}
first = int((smooth(runs["KFAC"][0]) < end["AdamW"]).nonzero()[0]) + 20
assert end["KFAC"] < 0.95 * end["AdamW"]
assert end["AdamW"] < end["SGD"]
assert first < 0.8 * STEPS
# sphinx_gallery_end_ignore

# %%
# KFAC reaches AdamW's last error in less than four fifths of the steps. The
# same runs, over seconds:

draw("Per second, the lead is gone or small", "CPU seconds", timed=True)

# sphinx_gallery_start_ignore
assert runs["KFAC"][1] > runs["AdamW"][1]
# sphinx_gallery_end_ignore

# %%
# A step of KFAC costs more: products in every layer, inverses in every fifth
# step. What do the errors look like?

chosen = digits[[10, 21, 42, 53, 64, 75]]
rows = {name: m(chosen).detach().sigmoid() for name, m in models.items()}
fig, axes = plt.subplots(4, 6, figsize=(5.4, 3.8))
for (name, images), line in zip([("digit", chosen), *rows.items()], axes):
    line[0].set_ylabel(name)
    for image, ax in zip(images, line):
        ax.imshow(image.view(8, 8), cmap="gray_r", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])
_ = fig.suptitle("What six numbers keep of a digit")

# %%
# In bfloat16
# -----------
#
# Store :math:`U` and :math:`G` with 8 bits. One hears that KFAC then breaks.
# It does not, here. Rounding moves eigenvalues of :math:`U` by about
# :math:`2^{-8} \lambda_{\max}` at most. The damping that training needs
# anyway is larger, in every layer.

model = autoencoder()
half = KFAC(model, LR["KFAC"], DAMPING, store=torch.bfloat16)
error = smooth(fit(model, half)[0])[-1].item()

U = [s["factors"][0].double() for s in half.layers.values()]
limits = torch.stack([torch.linalg.eigvalsh(M)[-1] for M in U]) / 2**8
pi = torch.stack([s["pi"] for s in half.layers.values()])
added, small = pi * 0.1**0.5, pi * 1e-5**0.5
fig, ax = plt.subplots(figsize=(5.5, 3.4))
ax.semilogy(added, "C2o", label=r"damping, $\lambda = 0.1$")
ax.semilogy(small, "C2o", mfc="w", label=r"$\lambda = 10^{-5}$")
ax.semilogy(limits, "C3x", label="what rounding can move")
ax.set_xticks(range(8), range(1, 9))
ax.set(xlabel="layer", ylabel="added to the eigenvalues of U")
ax.set_title("Damping beats rounding, if it is not too small")
_ = fig.legend(loc="outside lower center", ncols=3)

# sphinx_gallery_start_ignore
assert abs(error / end["KFAC"] - 1) < 0.15
assert (added > limits).all()
assert (small < limits).sum() >= 6
# sphinx_gallery_end_ignore

# %%
# With :math:`\lambda = 10^{-5}`, most circles lie below the crosses. There a
# rounded :math:`U` may have negative eigenvalues, and its inverse points
# uphill. But with so little damping, this network fails in float32 as well.
# The next lesson gets rid of the inverse.
#
# When not to use this
# --------------------
#
# Our class knows linear layers without shared weights, nothing else. And its
# :math:`g` come from the batch's own labels: this is the *empirical* Fisher.
#
# .. admonition:: Lessons learned
#
#    - KFAC is two running averages, two inverses, two products.
#    - :math:`(F N)_{ij} = (G N U)_{ij}`: no Kronecker product is formed.
#    - Per step it leads; per second it depends on the price of a step.
#    - In bfloat16, compare :math:`\pi \sqrt\lambda` with
#      :math:`2^{-8} \lambda_{\max}`.
#
# .. admonition:: Exercise
#
#    Check :math:`(F N)_{ij} = (G N U)_{ij}` with ``torch.kron``. In which
#    order do :math:`U` and :math:`G` stand, if :math:`N` is flattened by rows?
#
# .. dropdown:: Solution
#
#    Row :math:`(i, j)` counts :math:`j` faster. So :math:`G` comes first.
#
#    .. code-block:: python
#
#        torch.manual_seed(0)
#        G, U, N = torch.randn(3, 3), torch.randn(4, 4), torch.randn(3, 4)
#        U = U + U.T  # as U is symmetric in KFAC
#        FN = torch.kron(G, U) @ N.flatten()
#        torch.testing.assert_close(FN.reshape(3, 4), G @ N @ U)
#
# .. admonition:: Exercise
#
#    Train KFAC with :math:`\lambda = 10^{-4}`, in float32. Does its error end
#    above or below that of the mean image?
#
# .. dropdown:: Solution
#
#    Above: the steps are far too long.
#
#    .. code-block:: python
#
#        model = autoencoder()
#        bold = fit(model, KFAC(model, LR["KFAC"], 1e-4), steps=100)[0]
#        mean = (digits - digits.mean(0)).square().sum(1).mean()
#        assert bold[-20:].mean() > mean
#
# Where to go next:
# :ref:`sphx_glr_auto_gallery_0_course_plot_07_without_an_inverse.py` replaces
# the inverse by products,
# :ref:`sphx_glr_auto_gallery_2_features_plot_24_mixed_precision.py` studies
# rounding, :ref:`sphx_glr_auto_gallery_1_start_plot_10_first_steps.py` trains
# a CNN, and :doc:`/concepts` has all symbols.
